"""The true chain once per kind of job: worker, torchrun, `probe.rank`, tiny checkpoints on disk."""

import signal
from typing import Any

import pytest
import torch

from probe.kinds import JobSpec
from probe.launch import TORCHRUN
from probe.plan import make_plan
from probe.result import Plan
from probe.result_continual import ContinualUnitResult
from probe.result_train import MixTrainUnitResult
from probe.sessions import open_session
from probe.spec_load import parse_spec
from probe.unit_results import AnyUnitResult, next_eta_init

DIES_IN_UNIT_1 = """
import os, signal, sys
if "server.worker" in sys.orig_argv:
    from server.store import SqlStore
    def append_event(self, job_id, type, data, owner=None):
        event = original(self, job_id, type, data, owner)
        if type == "unit.progress" and data["index"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return event
    original, SqlStore.append_event = SqlStore.append_event, append_event
"""


def scan_of(series_spec: dict[str, Any], gradients: str) -> dict[str, Any]:
    """A mix scan of three units: three checkpoints at all ratios, or one at a ratio each."""
    (words,) = series_spec["batches"]["sources"]
    path = series_spec["checkpoints"]["path"]
    return {
        "kind": "mix_scan",
        "name": "tiny scan",
        "checkpoints": {
            "source": "local",
            "path": path if gradients == "shared" else path.replace("*", "1"),
        },
        "optimizer": {"warmup_steps": 2},
        "mixture": {
            "sources": [words, words | {"name": "again"}],
            "ratios": [0.25, 0.5, 0.75],
            "gradients": gradients,
        },
        "eval_tasks": [
            {"data": words | {"name": "words_task"}, "sequences": 4},
            {"data": words | {"name": "other_task"}, "sequences": 3},
        ],
        "batches": {"sequence_length": 16, "batch_sequences": 4},
        "measurement": {"repeats": 2},
    }


def grid_of(series_spec: dict[str, Any]) -> dict[str, Any]:
    """A training grid of six units: one checkpoint, two ratios, three learning rates."""
    scan = scan_of(series_spec, "exact")
    return {key: value for key, value in scan.items() if key != "measurement"} | {
        "kind": "mix_train",
        "name": "tiny grid",
        "mixture": {"sources": scan["mixture"]["sources"]},
        "train": {"ratios": [0.25, 0.75], "learning_rates": [1e-4, 1e-3, 1e-2], "steps": 10},
    }


def stream_of() -> dict[str, Any]:
    """Continual learning in three units: two tasks each, of one group of four runs."""
    return {
        "kind": "continual_learning",
        "name": "tiny stream",
        "stream": {
            "type": "random_labels",
            "data": {"type": "packaged", "name": "digits"},
            "num_images": 96,
            "num_tasks": 6,
            "epochs": 8,
            "batch_size": 32,
        },
        "model": {"hidden": [8]},
        "methods": [{"name": "relu"}],
        "controls": [{"name": "vanilla"}, {"name": "scheduler", "scheduler": {}}],
        "seeds": [0, 1],
        "signals": {"log_every": 4, "control_every": 4, "rank_samples": 8},
        "tasks_per_unit": 2,
    }


def spec_of(series_spec: dict[str, Any], job: str) -> dict[str, Any]:
    """The job file of a kind, by the name its test gives it."""
    if job == "series":
        return series_spec
    if job == "stream":
        return stream_of()
    return grid_of(series_spec) if job == "grid" else scan_of(series_spec, job.split()[0])


def numbers(results: list[AnyUnitResult]) -> list[Any]:
    """Everything measured or trained; durations, memory and what a process keeps left out."""
    return [_numbers_of(result) for result in results]


def _numbers_of(result: AnyUnitResult) -> Any:
    if isinstance(result, ContinualUnitResult):
        return [record.model_dump() for record in result.runs]
    if isinstance(result, MixTrainUnitResult):
        return {
            "ran": result.outcome,
            "shares": result.shares,
            "train_losses": result.train_losses,
            "first_batch_sha256": result.first_batch_sha256,
            "tasks": [task.model_dump() for task in result.tasks],
        }
    return [m.model_dump(exclude={"duration_s"}) for m in result.measurements]


def measured_here(plan: Plan, spec: JobSpec) -> list[AnyUnitResult]:
    """The same units without worker, gang or database, in this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    session = open_session(spec)
    results: list[AnyUnitResult] = []
    hint = None
    for unit in plan.units:
        results.append(session.measure(unit, eta_init=hint))
        hint = next_eta_init(results[-1]) or hint
    torch.set_num_threads(before)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("job", ["series", "shared scan", "exact scan", "grid", "stream"])
def test_a_killed_and_resumed_job_gives_bit_for_bit_the_same_numbers(
    lab, series_spec, monkeypatch, job, tmp_path
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PROBE_CACHE_DIR", str(tmp_path / "of-the-job"))
    spec = parse_spec(spec_of(series_spec, job))
    plan = make_plan(spec)
    job_id = lab.store.create_job(plan=plan, idempotency_key=None, body_sha256="0")[0].id
    (tmp_path / "sitecustomize.py").write_text(DIES_IN_UNIT_1)
    worker = lab.start_worker(rank_command="[]", environment={"PYTHONPATH": str(tmp_path)})
    lab.until(lambda: worker.poll() is not None, "the worker to be killed")
    assert worker.returncode == -signal.SIGKILL
    lab.until(lambda: not lab.processes(), "the gang to end with its worker")
    assert lab.job(job_id).num_units_finished == 1
    lab.start_worker(rank_command="[]")
    view = lab.until_status(job_id, "succeeded", "failed")
    assert view.status == "succeeded", view.error
    monkeypatch.setenv(
        "PROBE_CACHE_DIR", str(tmp_path / "elsewhere")
    )  # what the job kept is not used
    assert numbers(lab.store.unit_results(job_id)) == numbers(measured_here(plan, spec))
    events = lab.store.events_after(job_id, 0)
    started = [event.data["index"] for event in events if event.type == "unit.started"]
    assert (started.count(0), started.count(1)) == (1, 2)


@pytest.mark.slow
def test_kill_9_of_the_rank_that_trains_a_grid(lab, series_spec, monkeypatch):
    """The worker lives: it starts another rank, and only the run that was cut off is repeated."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spec = parse_spec(grid_of(series_spec))
    plan = make_plan(spec)
    job_id = lab.store.create_job(plan=plan, idempotency_key=None, body_sha256="0")[0].id
    worker = lab.start_worker(rank_command="[]")
    lab.until(lambda: lab.event_types(job_id).count("unit.started") >= 2, "a second unit")
    of_the_gang = {pid: line for pid, line in lab.children().items() if "probe.rank" in line}
    (rank,) = [pid for pid, line in of_the_gang.items() if TORCHRUN not in line]
    lab.kill(rank)
    view = lab.until_status(job_id, "succeeded", "failed")
    assert view.status == "succeeded", view.error
    assert worker.poll() is None
    events = lab.store.events_after(job_id, 0)
    (retrying,) = [event.data for event in events if event.type == "unit.retrying"]
    assert retrying["code"] == "unit_crashed"
    assert f"(SIGKILL) received by PID {rank}" in retrying["message"]
    started = [event.data["index"] for event in events if event.type == "unit.started"]
    finished = [event.data["index"] for event in events if event.type == "unit.finished"]
    assert started[0] == 0
    assert started.count(0) == 1
    assert finished == list(range(len(plan.units)))
    assert numbers(lab.store.unit_results(job_id)) == numbers(measured_here(plan, spec))
