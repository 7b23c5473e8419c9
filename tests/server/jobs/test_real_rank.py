"""The true chain once: worker, torchrun, `probe.rank`, a tiny checkpoint series on disk."""

from typing import Any

import pytest
import torch

from probe.engine import Session
from probe.plan import make_plan
from probe.result import Plan, UnitResult, eta_init_hint
from probe.spec import CheckpointSeriesSpec
from probe.spec_load import parse_spec


def numbers(results: list[UnitResult]) -> list[list[dict[str, Any]]]:
    """Everything measured, durations left out."""
    return [[m.model_dump(exclude={"duration_s"}) for m in r.measurements] for r in results]


def measured_here(plan: Plan, spec: CheckpointSeriesSpec) -> list[UnitResult]:
    """The same units without worker, gang or database, in this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    session = Session(spec)
    results: list[UnitResult] = []
    hint = None
    for unit in plan.units:
        results.append(session.measure(unit, eta_init=hint))
        hint = eta_init_hint(results[-1]) or hint
    torch.set_num_threads(before)
    return results


@pytest.mark.slow
def test_a_killed_and_resumed_job_gives_bit_for_bit_the_same_numbers(lab, series_spec, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spec = parse_spec(series_spec)
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
    assert 1 <= num_kept < 3
    assert numbers(lab.store.unit_results(job_id)) == numbers(measured_here(plan, spec))
    events = lab.store.events_after(job_id, 0)
    started = [event.data["index"] for event in events if event.type == "unit.started"]
    assert started.count(0) == 1
