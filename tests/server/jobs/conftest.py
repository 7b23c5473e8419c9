"""Plans, results and a laboratory of real worker processes with ranks that measure nothing."""

import datetime as dt
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from probe.line_search import SearchOutcome
from probe.result import (
    CheckpointRef,
    Measurement,
    Plan,
    Provenance,
    Summary,
    Unit,
    UnitResult,
)
from server.store import SqlStore
from server.wire import JobView
from tests.server.jobs.locks import is_held

FAKE_RANK = Path(__file__).with_name("fake_rank.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1")
VOCAB = 50
DEADLINE_S = 120.0  # far above what anything here needs; only a broken run waits so long
NO_PROGRESS_S = 4.0  # a test of silence waits so long; a busy machine makes no sound rank so late


def make_unit(index: int) -> Unit:
    checkpoint = CheckpointRef(source="local", location=f"/checkpoints/step-{index}", step=index)
    return Unit(index=index, unit_id=f"{index:04d}-step-{index}", checkpoint=checkpoint)


def _plan(
    num_units: int = 3,
    *,
    labels: dict[str, str] | None = None,
    device: str = "auto",
    ranks: int = 1,
    **spec: Any,
) -> Plan:
    return Plan(
        kind="checkpoint_series",
        spec={
            "kind": "checkpoint_series",
            "name": "a series",
            "labels": labels or {},
            "model": {"device": device},
            "parallel": {"ranks": ranks},
            **spec,
        },
        spec_sha256="0" * 64,
        units=[make_unit(index) for index in range(num_units)],
        num_forward_passes=4 * num_units,
        max_forward_passes=40 * num_units,
        num_backward_passes=num_units,
        num_tokens_per_pass=1024,
    )


def make_result(
    unit: Unit, *, eta_c: float | None = 0.5, num_forward_passes: int = 4
) -> UnitResult:
    outcome = SearchOutcome.CONVERGED if eta_c else SearchOutcome.NO_CROSSING
    now = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    measurement = Measurement(
        repeat=0,
        loss_batch="held_out",
        outcome=outcome,
        eta_c=eta_c,
        eta_lower=0.4,
        eta_upper=0.6,
        eta_interpolated=eta_c,
        lambda_c=2 / eta_c if eta_c else None,
        loss_at_zero=3.0,
        slope=-1.0,
        num_forward_passes=num_forward_passes,
        num_extra_sign_changes=0,
        trials=[(0.4, 2.9), (0.6, None)],
        loss_resolution=1e-7,
        update_batch_sha256="1" * 64,
        loss_batch_sha256="2" * 64,
        duration_s=0.1,
    )
    summary = Summary(
        loss_batch="held_out",
        num_repeats=1,
        num_converged=1 if eta_c else 0,
        lambda_c_mean=measurement.lambda_c,
        lambda_c_standard_error=None,
        lambda_c_values=[measurement.lambda_c],
        lambda_c_lower=None,
        lambda_c_upper=None,
        loss_mean=3.0,
        outcomes={outcome.value: 1},
        num_forward_passes=num_forward_passes,
    )
    provenance = Provenance(
        spec_sha256="0" * 64,
        versions={},
        git_commit=None,
        device="cpu",
        dtype="float32",
        attention="sdpa",
        moments="none",
        moments_detail="none",
        num_parameters=1,
        hostname="here",
        started_at=now,
        finished_at=now,
    )
    return UnitResult(
        unit=unit,
        spec={},
        measurements=[measurement],
        summaries=[summary],
        num_forward_passes=num_forward_passes,
        num_backward_passes=1,
        duration_s=0.1,
        memory_bytes=1,
        provenance=provenance,
    )


@pytest.fixture(name="make_plan")
def make_plan_fixture() -> Callable[..., Plan]:
    return _plan


@pytest.fixture(name="make_result")
def make_result_fixture() -> Callable[..., UnitResult]:
    return make_result


@pytest.fixture
def store(database_url: str) -> Iterator[SqlStore]:
    store = SqlStore(database_url, worker_stale_s=60)
    yield store
    store.close()


class Lab:
    """A database, workers as real processes, and ranks that do as their job's spec says."""

    def __init__(self, directory: Path, database_url: str) -> None:
        self.directory = directory
        self.data_dir = directory / "data"
        self.database_url = database_url
        self.mark = uuid.uuid4().hex
        self.store = SqlStore(database_url)
        self.workers: list[subprocess.Popen[bytes]] = []

    def submit(
        self,
        acts: dict[int, list[str]] | None = None,
        num_units: int = 3,
        device: str = "auto",
        **spec: Any,
    ) -> str:
        """Queue a job; `acts` says by unit index what each try does (see fake_rank)."""
        name = uuid.uuid4().hex[:8]
        template = make_result(make_unit(0)).model_dump(mode="json")
        plan = _plan(
            num_units,
            device=device,
            journal=str(self.directory / f"{name}.journal"),
            release=str(self.directory / f"{name}.release"),
            acts={make_unit(index).unit_id: value for index, value in (acts or {}).items()},
            result=template,
            **spec,
        )
        return self.store.create_job(plan=plan, idempotency_key=None, body_sha256="0")[0].id

    def release(self, job_id: str) -> None:
        """Let every unit that holds go on."""
        Path(self.job(job_id).spec["release"]).touch()

    def job(self, job_id: str) -> JobView:
        view = self.store.get_job(job_id)
        assert view is not None
        return view

    def journal(self, job_id: str, what: str) -> list[int]:
        """Indices of the units that were `start`ed or `done`, in order."""
        return [int(unit_id[:4]) for word, unit_id, _ in self._notes(job_id) if word == what]

    def rank_pid(self, job_id: str) -> int:
        """Process that started the last unit."""
        return int(self._notes(job_id)[-1][2])

    def _notes(self, job_id: str) -> list[list[str]]:
        path = Path(self.job(job_id).spec["journal"])
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def start_worker(
        self,
        name: str = "w",
        *,
        torchrun: bool = False,
        machine: str = "",
        environment: dict[str, str] | None = None,
        **settings: Any,
    ) -> subprocess.Popen[bytes]:
        """Start a worker; one of another `machine` shares the database and nothing else."""
        rank = [*(TORCHRUN if torchrun else ()), str(FAKE_RANK), "--socket", "{socket}"]
        env = {
            "PROBE_DATA_DIR": str(self.directory / f"data{machine}"),
            "PROBE_DATABASE_URL": self.database_url,
            "PROBE_WORKER_NAME": name,
            "PROBE_RANK_COMMAND": json.dumps([sys.executable, *rank]),
            "PROBE_UNIT_RETRY_INTERVAL_S": "0.05",
            "PROBE_QUEUE_POLL_S": "0.1",
            "PROBE_HEARTBEAT_S": "0.2",
            "PROBE_TEST_RUN": self.mark,
            "PYTHONFAULTHANDLER": "1",
        } | {f"PROBE_{key.upper()}": str(value) for key, value in settings.items()}
        with (self.directory / "worker.out").open("ab") as out:
            worker = subprocess.Popen(
                [sys.executable, "-m", "server.worker"],
                env=os.environ | env | (environment or {}),
                stdout=out,
                stderr=out,
                start_new_session=True,  # so that a test can send Ctrl-C as a terminal does
            )
        self.workers.append(worker)
        return worker

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Poll until the condition holds."""
        deadline = time.monotonic() + DEADLINE_S
        while not (value := condition()):
            if time.monotonic() > deadline:
                pytest.fail(f"waited {DEADLINE_S:g} s for {what}\n{self.output()}")
            time.sleep(0.02)
        return value

    def until_started(self, job_id: str, index: int, times: int = 1) -> None:
        self.until(
            lambda: self.journal(job_id, "start").count(index) >= times, f"unit {index} to start"
        )

    def until_deaf(self, job_id: str, index: int) -> None:
        self.until(lambda: index in self.journal(job_id, "deaf"), f"unit {index} to fall silent")

    def until_status(self, job_id: str, *statuses: str) -> JobView:
        return self.until(
            lambda: (view := self.job(job_id)).status in statuses and view, f"{statuses}"
        )

    def assert_whole(self, job_id: str, starts: list[int]) -> None:
        """Succeeded, each of 3 units recorded and told once, the same numbers whatever happened."""
        view = self.until_status(job_id, "succeeded", "failed")
        assert view.status == "succeeded", view.error
        results = self.store.unit_results(job_id)
        assert [result.unit.index for result in results] == [0, 1, 2]
        # Unit k of the fake rank has eta_c = 2 * (hint from unit k - 1), the first one 2 * 1.0.
        assert [result.measurements[0].eta_c for result in results] == [2.0, 4.0, 8.0]
        assert self.journal(job_id, "start") == starts
        events = self.store.events_after(job_id, 0)
        assert [event.id for event in events] == list(range(1, len(events) + 1))
        finished = [event.data["index"] for event in events if event.type == "unit.finished"]
        assert finished == [0, 1, 2]
        assert [event.type for event in events].count("job.succeeded") == 1
        self.until(lambda: not self.ranks_of(job_id), "the gang to be gone")

    def ranks_of(self, job_id: str) -> set[int]:
        """Living processes that have measured for the job."""
        return {int(pid) for _, _, pid in self._notes(job_id)} & set(self.processes())

    def event_types(self, job_id: str) -> list[str]:
        return [event.type for event in self.store.events_after(job_id, 0)]

    def processes(self) -> dict[int, str]:
        """Every living process that descends from a worker of this laboratory."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if f"PROBE_TEST_RUN={self.mark}".encode() in (entry / "environ").read_bytes():
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found[int(entry.name)] = command
            except OSError:
                continue
        return found

    def children(self) -> dict[int, str]:
        """As `processes`, the workers themselves left out."""
        workers = {worker.pid for worker in self.workers}
        return {pid: line for pid, line in self.processes().items() if pid not in workers}

    def freeze(self, pid: int) -> None:
        """SIGSTOP, and wait until it is so; not in the middle of a transaction."""
        state = Path(f"/proc/{pid}/stat")

        def is_stopped() -> bool:
            return state.read_text().rpartition(")")[2].split()[0] == "T"

        os.kill(pid, signal.SIGSTOP)
        self.until(is_stopped, "the stop")
        while is_held(self.store.engine):
            self.thaw(pid)
            time.sleep(random.uniform(0.01, 0.1))
            os.kill(pid, signal.SIGSTOP)
            self.until(is_stopped, "the stop")

    def thaw(self, pid: int) -> None:
        os.kill(pid, signal.SIGCONT)

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        for worker in self.workers:
            if worker.pid == pid:
                worker.wait(DEADLINE_S)

    def output(self) -> str:
        return (self.directory / "worker.out").read_text()

    def close(self) -> None:
        for worker in self.workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait(DEADLINE_S)
        self.until(lambda: not self.processes(), f"no process to be left: {self.processes()}")
        self.store.close()


@pytest.fixture
def lab(tmp_path: Path, database_url: str) -> Iterator[Lab]:
    lab = Lab(tmp_path, database_url)
    yield lab
    lab.close()


@pytest.fixture
def series_spec(tmp_path: Path) -> dict[str, Any]:
    """Three random models with one tokenizer, and text."""
    # Only real ranks need them; most tests here import no torch.
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerFast

    from probe.checkpoints import save_checkpoint

    vocab = {"<pad>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    tokens = Tokenizer(WordLevel(vocab, unk_token="<pad>"))
    tokens.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )
    config = Olmo2Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    for step in (1, 2, 3):
        torch.manual_seed(step)
        save_checkpoint(Olmo2ForCausalLM(config), tmp_path / f"step-{step}", tokenizer=tokenizer)
    generator = random.Random(0)
    documents = [
        " ".join(f"w{generator.randrange(2, VOCAB)}" for _ in range(40)) for _ in range(99)
    ]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return {
        "kind": "checkpoint_series",
        "name": "tiny",
        "checkpoints": {"source": "local", "path": str(tmp_path / "step-*")},
        "optimizer": {"name": "adamw", "warmup_steps": 2},
        "batches": {
            "sources": [{"type": "files", "name": "words", "paths": [str(text)]}],
            "sequence_length": 16,
            "batch_sequences": 4,
            "held_out_sequences": 4,
        },
        "measurement": {"loss_batch": "both"},
    }
