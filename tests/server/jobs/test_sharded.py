"""Jobs of two ranks through the queue: killed and resumed, broken on one rank, silent on one."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from probe.engine import Session
from probe.plan import make_plan
from probe.result import UnitResult, eta_init_hint
from probe.spec_load import parse_spec
from server.launchers import GangShape, LocalLauncher
from server.worker import gang as gang_module
from server.worker.gang import Gang, UnitFailedError

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

BROKEN_RANK = Path(__file__).with_name("broken_rank.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def sharded(series_spec):
    """Each rank has one micro-batch, so that gradients are summed in one order for 1 and 2 ranks.

    By bisection: its etas depend on the signs of slopes only, and slopes are summed otherwise.
    """
    series_spec["batches"] |= {"batch_sequences": 2}
    series_spec["measurement"] |= {"search": "bisect", "repeats": 3}
    return series_spec | {"parallel": {"ranks": 2}}


def submit(lab: Any, raw: dict[str, Any]) -> str:
    plan = make_plan(parse_spec(raw))
    return lab.store.create_job(plan=plan, idempotency_key=None, body_sha256="0")[0].id


def numbers(results: list[UnitResult]) -> list[dict[str, Any]]:
    """Everything measured, unit after unit, durations left out."""
    return [m.model_dump(exclude={"duration_s"}) for r in results for m in r.measurements]


def pid_of_rank(lab: Any, rank: int) -> int:
    for pid in lab.processes():
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in variables:
            return pid
    raise AssertionError(f"rank {rank} is not running: {lab.processes()}")


def retries(lab: Any, job_id: str) -> list[dict[str, Any]]:
    events = lab.store.events_after(job_id, 0)
    return [event.data for event in events if event.type == "unit.retrying"]


def until_searching(lab: Any, job_id: str, index: int) -> None:
    def found() -> bool:
        events = [e.data for e in lab.store.events_after(job_id, 0) if e.type == "unit.progress"]
        return any((e["index"], e["phase"]) == (index, "search") for e in events)

    lab.until(found, f"unit {index} to be searched")


def on_one_rank(raw: dict[str, Any]) -> list[UnitResult]:
    spec = parse_spec(raw | {"parallel": {"backend": "single"}})
    session, results, hint = Session(spec), [], None
    for unit in make_plan(spec).units:
        results.append(session.measure(unit, eta_init=hint))
        hint = eta_init_hint(results[-1]) or hint
    return results


def test_killed_and_resumed_two_ranks_measure_what_they_do_undisturbed_and_one_does(lab, sharded):
    undisturbed, disturbed = submit(lab, sharded), submit(lab, sharded)
    worker = lab.start_worker(rank_command="[]")
    lab.until_status(undisturbed, "succeeded", "failed")
    until_searching(lab, disturbed, 0)
    lab.kill(pid_of_rank(lab, 1))  # one rank only: the gang ends, the unit is tried again
    until_searching(lab, disturbed, 1)
    lab.kill(worker.pid)
    lab.until(lambda: not lab.processes(), "the gang to end with its worker")
    assert lab.job(disturbed).num_units_finished == 1
    lab.start_worker(rank_command="[]")
    view = lab.until_status(disturbed, "succeeded", "failed")
    assert view.status == "succeeded", view.error
    assert [retry["code"] for retry in retries(lab, disturbed)] == ["unit_crashed"]
    results = lab.store.unit_results(disturbed)
    assert numbers(results) == numbers(lab.store.unit_results(undisturbed))
    assert {(r.provenance.backend, r.provenance.num_ranks) for r in results} == {("fsdp2", 2)}
    truth = on_one_rank(sharded)
    for found, expected in zip(numbers(results), numbers(truth), strict=True):
        assert expected["outcome"] == "converged"
        assert found.pop("slope") == pytest.approx(expected.pop("slope"), rel=1e-6)
        assert found == expected  # brackets and every trial's loss
    lab.until(lambda: not lab.children(), "the gang to be gone")


def broken_command(trap: Path, *options: str) -> list[str]:
    rank = [*TORCHRUN, str(BROKEN_RANK), "--socket", "{socket}", "--trap", str(trap), *options]
    return [sys.executable, *rank]


def test_an_error_on_one_rank_fails_the_job_with_that_error(lab, sharded, tmp_path):
    """Rank 0 waits in an exchange meanwhile, for ten minutes if it were left to it."""
    job_id = submit(lab, sharded | {"labels": {"broken": "raise"}})
    lab.start_worker(rank_command=json.dumps(broken_command(tmp_path / "trap")))
    view = lab.until_status(job_id, "succeeded", "failed")
    assert view.status == "failed"
    assert view.error.code == "direction_error"
    assert view.error.message == "rank 1: no direction on this rank"
    assert retries(lab, job_id) == []
    lab.until(lambda: not lab.children(), "the gang to be gone")


def test_a_silent_rank_is_ended_by_the_no_progress_deadline(lab, sharded, tmp_path):
    sharded["parallel"] |= {"backend": "deepspeed"}
    job_id = submit(lab, sharded | {"labels": {"broken": "hang"}})
    (tmp_path / "trap").touch()
    lab.start_worker(
        rank_command=json.dumps(broken_command(tmp_path / "trap")),
        unit_no_progress_s=6,
        unit_max_attempts=10,  # on a busy machine a sound unit may be silent for so long, too
    )
    view = lab.until_status(job_id, "succeeded", "failed")
    assert view.status == "succeeded", view.error
    assert {retry["code"] for retry in retries(lab, job_id)} == {"unit_stalled"}
    found = {result.provenance.backend for result in lab.store.unit_results(job_id)}
    assert found == {"deepspeed"}


def test_the_collective_time_out_ends_a_silent_rank_but_not_an_idle_gang(
    sharded, tmp_path, monkeypatch
):
    monkeypatch.setattr(gang_module, "_VERDICT_S", 1.0)
    raw = sharded | {"labels": {"broken": "hang"}}
    first, second, third = make_plan(parse_spec(raw)).units
    timeout_s, trap = 5.0, tmp_path / "trap"
    gang = Gang(
        log_path=tmp_path / "gang.log",
        launcher=LocalLauncher(
            tuple(broken_command(trap, "--collective-timeout-s", str(timeout_s)))
        ),
        shape=GangShape(num_ranks=2),
    )

    async def on_progress(_progress: dict[str, Any]) -> None: ...

    async def measure_idle_measure_hang() -> None:
        try:
            await gang.start(raw)
            await gang.measure(first, None, on_progress)
            await asyncio.sleep(timeout_s + 1.0)
            await gang.measure(second, None, on_progress)
            trap.touch()
            await gang.measure(third, None, on_progress)
        finally:
            gang.kill()
            await gang._exited

    with pytest.raises(UnitFailedError) as caught:
        asyncio.run(measure_idle_measure_hang())
    assert not trap.exists(), caught.value.message
    assert (caught.value.code, caught.value.retryable) == ("parallelism_error", True)
    assert "rank 0 of 2 lost contact with the others" in caught.value.message
    assert "Timed out waiting" in caught.value.message
