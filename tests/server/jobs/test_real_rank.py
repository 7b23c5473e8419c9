"""The true chain once per kind of job: worker, torchrun, `probe.rank`, tiny checkpoints on disk."""

from typing import Any

import pytest
import torch

from probe.kinds import JobSpec
from probe.launch import TORCHRUN
from probe.plan import make_plan
from probe.result import Plan
from probe.result_train import MixTrainUnitResult
from probe.sessions import open_session
from probe.spec_load import parse_spec
from probe.unit_results import AnyUnitResult, next_eta_init


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


def spec_of(series_spec: dict[str, Any], job: str) -> dict[str, Any]:
    """The job file of a kind, by the name its test gives it."""
    if job == "series":
        return series_spec
    return grid_of(series_spec) if job == "grid" else scan_of(series_spec, job.split()[0])


def numbers(results: list[AnyUnitResult]) -> list[Any]:
    """Everything measured or trained; durations, memory and what a process keeps left out."""
    return [
        {
            "ran": r.outcome,
            "shares": r.shares,
            "train_losses": r.train_losses,
            "first_batch_sha256": r.first_batch_sha256,
            "tasks": [task.model_dump() for task in r.tasks],
        }
        if isinstance(r, MixTrainUnitResult)
        else [m.model_dump(exclude={"duration_s"}) for m in r.measurements]
        for r in results
    ]


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
@pytest.mark.parametrize("job", ["series", "shared scan", "exact scan", "grid"])
def test_a_killed_and_resumed_job_gives_bit_for_bit_the_same_numbers(
    lab, series_spec, monkeypatch, job
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spec = parse_spec(spec_of(series_spec, job))
    plan = make_plan(spec)
    job_id = lab.store.create_job(plan=plan, idempotency_key=None, body_sha256="0")[0].id
    worker = lab.start_worker(rank_command="[]")
    lab.until(lambda: lab.event_types(job_id).count("unit.finished") >= 1, "a first result")
    lab.kill(worker.pid)
    lab.until(lambda: not lab.processes(), "the gang to end with its worker")
    num_kept = lab.job(job_id).num_units_finished
    lab.start_worker(rank_command="[]")
    view = lab.until_status(job_id, "succeeded", "failed")
    assert view.status == "succeeded", view.error
    assert 1 <= num_kept < len(plan.units)
    assert numbers(lab.store.unit_results(job_id)) == numbers(measured_here(plan, spec))
    events = lab.store.events_after(job_id, 0)
    started = [event.data["index"] for event in events if event.type == "unit.started"]
    assert started.count(0) == 1


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
