"""The rank process from outside: its messages, its answers to broken input, and its end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from probe.engine import Session
from probe.errors import CheckpointUnavailableError
from probe.plan import expand_units
from probe.rank import Measurer, _of_this_rank, _run_units, error_event
from probe.result import CheckpointRef, Unit, UnitResult, eta_init_hint
from probe.spec_load import parse_spec

ROOT = Path(__file__).resolve().parents[3]
DEADLINE_S = 120
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


class Worker:
    """The other end of the socket."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "rank.sock"
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(self.path))
        self.listener.listen(1)
        self.listener.settimeout(DEADLINE_S)

    def start(self, **environment: str) -> subprocess.Popen[bytes]:
        rank = subprocess.Popen(
            [sys.executable, "-m", "probe.rank", "--socket", str(self.path)],
            cwd=ROOT, env=ENVIRONMENT | environment, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.accept()
        return rank

    def accept(self) -> None:
        self.connection, _ = self.listener.accept()
        self.connection.settimeout(DEADLINE_S)
        self.lines = self.connection.makefile("r", encoding="utf-8")

    def send(self, **message) -> None:
        self.connection.sendall((json.dumps(message) + "\n").encode())

    def next(self) -> dict:
        return json.loads(self.lines.readline())

    def answer(self) -> tuple[dict, list[dict]]:
        """The next message that is not progress, and the progress before it."""
        progress = []
        while (message := self.next())["type"] == "progress":
            progress.append(message)
        return message, progress

    def close(self) -> None:
        self.lines.close()
        self.connection.close()


@pytest.fixture
def worker(tmp_path):
    worker = Worker(tmp_path)
    yield worker
    if hasattr(worker, "connection"):
        worker.close()
    worker.listener.close()


def numbers(result: dict) -> list:
    kept = []
    for measurement in result["measurements"]:
        kept.append({k: v for k, v in measurement.items() if k != "duration_s"})
    return kept


def wait_gone(pid: int) -> bool:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.slow
def test_a_rank_measures_what_it_is_sent_and_survives_bad_units(worker, series):
    raw = series.spec(measurement__repeats=1)
    spec = parse_spec(raw)
    units = [unit.model_dump(mode="json") for unit in expand_units(spec)]
    rank = worker.start()
    ready = worker.next()
    assert ready == {"type": "ready", "pid": rank.pid, "device": "cpu (1 threads)", "rank": 0}

    worker.send(type="unit", unit=units[0], eta_init=None)
    early, _ = worker.answer()
    assert (early["code"], early["unit_id"]) == ("config_error", units[0]["unit_id"])

    worker.send(type="job", spec={**raw, "kind": "nonsense"})
    refused, _ = worker.answer()
    assert (refused["type"], refused["code"], refused["unit_id"]) == ("error", "config_error", None)

    worker.send(type="job", spec=raw)
    missing = {**units[1], "checkpoint": {**units[1]["checkpoint"], "location": "/nowhere"}}
    worker.send(type="unit", unit=missing, eta_init=None)
    failed, _ = worker.answer()
    assert failed["code"] == "checkpoint_error"
    assert failed["retryable"] is False
    assert "/nowhere" in failed["message"]
    assert "CheckpointError" in failed["traceback"]

    worker.send(type="unit", unit=units[0], eta_init=None)
    first, progress = worker.answer()
    assert first["type"] == "result"
    assert {m["unit_id"] for m in progress} == {units[0]["unit_id"]}
    assert set(progress[0]["data"]) == {"phase", "done", "total", "num_forward_passes"}
    hint = eta_init_hint(UnitResult.model_validate(first["result"]))
    worker.send(type="unit", unit=units[1], eta_init=hint)
    second, _ = worker.answer()

    # A fresh process gives the same numbers as this one, bit for bit.
    session = Session(spec)
    ours = session.measure(expand_units(spec)[0])
    theirs = session.measure(expand_units(spec)[1], eta_init=hint)
    assert numbers(first["result"]) == numbers(ours.model_dump(mode="json"))
    assert numbers(second["result"]) == numbers(theirs.model_dump(mode="json"))

    worker.send(type="stop")
    assert rank.wait(DEADLINE_S) == 0


@pytest.mark.slow
def test_a_rank_ends_when_its_socket_closes(worker):
    rank = worker.start()
    assert worker.next()["type"] == "ready"
    worker.close()
    assert rank.wait(DEADLINE_S) == 0


PARENT = """
import subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-m", "probe.rank", "--socket", sys.argv[1]])
time.sleep(1000)
"""


@pytest.mark.slow
def test_a_rank_does_not_outlive_a_killed_parent(worker):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(worker.path)],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    worker.accept()
    rank = worker.next()["pid"]
    assert rank != parent.pid
    parent.send_signal(signal.SIGKILL)
    parent.wait(DEADLINE_S)
    # The socket stays open on our side: only the parent's death can end the rank.
    assert wait_gone(rank)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "parallel", "says"),
    [
        ("2", {"ranks": 1}, "ranks is 1, but 2 were started"),
        ("2", {"backend": "single"}, "backend is single, but 2 were started"),
        ("1", {"ranks": 2}, "ranks is 2, but 1 was started"),
    ],
)
def test_another_number_of_ranks_than_the_job_s_is_refused(
    worker, series, world_size, parallel, says
):
    rank = worker.start(WORLD_SIZE=world_size, RANK="0")
    assert worker.next()["type"] == "ready"
    worker.send(type="job", spec=series.spec(parallel=parallel))
    message = worker.next()
    assert (message["type"], message["code"]) == ("error", "config_error")
    assert says in message["message"]
    worker.send(type="stop")
    assert rank.wait(DEADLINE_S) == 0


@pytest.mark.slow
def test_every_rank_reports_and_tells_its_own_errors(worker):
    rank = worker.start(WORLD_SIZE="2", RANK="1")
    ready = worker.next()
    assert (ready["type"], ready["rank"]) == ("ready", 1)
    worker.send(type="job", spec={"kind": "nonsense"})
    message = worker.next()
    assert (message["type"], message["rank"]) == ("error", 1)
    worker.send(type="stop")
    assert rank.wait(DEADLINE_S) == 0


@pytest.mark.parametrize(("rank", "heard"), [("0", ["result", "error"]), ("1", ["error"])])
def test_the_first_rank_speaks_for_all_but_for_errors(monkeypatch, rank, heard):
    monkeypatch.setenv("RANK", rank)
    sent = []
    send = _of_this_rank(lambda message: sent.append(message["type"]))
    for kind in ("result", "error"):
        send({"type": kind})
    assert sent == heard


def test_errors_carry_code_and_whether_to_try_again():
    ours = error_event(CheckpointUnavailableError("hub down"), "0001-x")
    assert (ours["code"], ours["retryable"], ours["message"]) == (
        "checkpoint_unavailable", True, "hub down",
    )  # fmt: skip
    theirs = error_event(ZeroDivisionError("oops"), None)
    assert (theirs["code"], theirs["retryable"]) == ("internal_error", False)
    assert theirs["message"] == "ZeroDivisionError: oops"


@pytest.mark.slow
def test_a_whole_spec_without_a_server(series, tmp_path):
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps(series.spec(measurement__repeats=1)))  # JSON is YAML
    out = tmp_path / "results.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "probe.rank", "--spec", str(job), "--out", str(out)],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]  # and nothing else
    kinds = [event["type"] for event in events if event["type"] != "progress"]
    assert kinds == ["units", "ready", "result", "result", "result", "done"]
    results = [UnitResult.model_validate(e["result"]) for e in events if e["type"] == "result"]
    assert [r.unit.checkpoint.step for r in results] == [4, 12, 20]
    assert [UnitResult.model_validate_json(line) for line in out.read_text().splitlines()] == (
        results
    )
    # Each unit starts from the answers of the one before, as a worker would have it.
    session = Session(parse_spec(series.spec(measurement__repeats=1)))
    again = session.measure(results[1].unit, eta_init=eta_init_hint(results[0]))
    assert numbers(again.model_dump(mode="json")) == numbers(results[1].model_dump(mode="json"))


@pytest.mark.slow
def test_one_rank_of_a_sharded_back_end_needs_no_torchrun(series, tmp_path):
    spec = series.spec(parallel={"backend": "fsdp2"}, checkpoints__last_step=4)
    job = tmp_path / "job.json"
    job.write_text(json.dumps(spec))
    done = subprocess.run(
        [sys.executable, "-m", "probe.rank", "--spec", str(job)],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    [result] = [event["result"] for event in events if event["type"] == "result"]
    assert (result["provenance"]["backend"], result["provenance"]["num_ranks"]) == ("fsdp2", 1)


def test_the_guess_outlives_a_unit_without_an_answer(monkeypatch):
    """As in a queued job, so that both give the same numbers."""
    ref = CheckpointRef(source="local", location="x")
    hints = {"0": {"update": 0.5}, "1": None, "2": None}
    units = [Unit(index=i, unit_id=str(i), checkpoint=ref) for i in range(3)]
    guesses, following = [], []

    def measure(_self, raw, eta_init, upcoming):
        guesses.append(eta_init)
        following.append(upcoming)
        return {"result": raw["unit_id"]}

    monkeypatch.setattr(Measurer, "measure", measure)
    monkeypatch.setattr("probe.rank.parse_result", lambda unit_id: unit_id)
    monkeypatch.setattr("probe.rank.next_eta_init", hints.get)
    assert _run_units(Measurer(lambda _message: None), units, None) == 0
    assert guesses == [None, {"update": 0.5}, {"update": 0.5}]
    assert following == [units[1], units[2], None]  # whose checkpoints are fetched ahead


def test_a_broken_job_file_is_one_error_and_done(tmp_path):
    import io

    from probe.rank import run_spec

    job = tmp_path / "job.yaml"
    job.write_text("kind: checkpoint_serie\n")
    stream = io.StringIO()
    assert run_spec(str(job), None, stream) == 1
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["type"] for event in events] == ["error", "done"]
    assert "checkpoint_series" in events[0]["message"]
