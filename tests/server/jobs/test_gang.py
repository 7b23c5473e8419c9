"""A gang of two ranks: who is heard, and whose error counts."""

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from server.launchers import GangShape, LocalLauncher
from server.worker import gang as gang_module
from server.worker import oom_killer
from server.worker.gang import Gang, UnitFailedError

RANKS = Path(__file__).with_name("gang_ranks.py")
READY: list[Any] = [
    [rank, {"type": "ready", "rank": rank, "device": f"d{rank}"}] for rank in (1, 0)
]
FAR_S = 60.0  # no test waits so long unless it fails


def error(rank: int, code: str) -> list[Any]:
    words = {"code": code, "message": f"{code} here", "retryable": False, "unit_id": None}
    return [rank, {"type": "error", "rank": rank, **words}]


@pytest.fixture
def run(tmp_path, make_plan, make_result, monkeypatch):
    """Runs one unit on two ranks that follow a script; gives its result."""
    monkeypatch.setattr(gang_module, "_EXIT_S", 0.1)  # these ranks do not end by themselves
    [unit] = make_plan(1).units
    result = make_result(unit).model_dump(mode="json")
    told: list[Any] = []

    async def on_progress(progress: dict[str, Any]) -> None:
        told.append(progress)

    async def measure(script: dict[str, Any], **options: float) -> tuple[Any, list[Any]]:
        gang = Gang(
            log_path=tmp_path / "gang.log",
            launcher=LocalLauncher(
                (sys.executable, str(RANKS), "{socket}", "{ranks}", json.dumps(script))
            ),
            shape=GangShape(num_ranks=2),
            **{"start_s": FAR_S, "no_progress_s": FAR_S, **options},
        )
        try:
            await gang.start({})
            assert gang.device == "d0"
            found = await gang.measure(unit, None, on_progress)
            await gang.stop()
            return found, told
        finally:
            gang.kill()
            await gang._exited

    def run(*turns: Any, start: list[Any] | None = None, **options: float) -> Any:
        script = {"start": READY if start is None else start, "unit": list(turns)}
        return asyncio.run(measure(script, **options))

    run.result = {"type": "result", "unit_id": unit.unit_id, "result": result}
    run.progress = {"type": "progress", "unit_id": unit.unit_id, "data": {"done": 1}}
    return run


def failure(run: Any, *turns: Any, **options: Any) -> UnitFailedError:
    with pytest.raises(UnitFailedError) as caught:
        run(*turns, **options)
    return caught.value


def test_every_rank_is_sent_everything_and_the_first_speaks(run, tmp_path, monkeypatch):
    monkeypatch.setattr(gang_module, "_EXIT_S", FAR_S)  # told to stop, these end by themselves
    found, told = run([0, run.progress], [0, run.result])
    assert found.model_dump(mode="json") == run.result["result"]
    assert told == [{"done": 1}]
    log = (tmp_path / "gang.log").read_text().splitlines()
    for rank in (0, 1):
        mine = [line for line in log if line.startswith(f"rank {rank} ")]
        assert mine == [f"rank {rank} is sent {what}" for what in ("job", "unit", "stop")]


def test_a_rank_s_own_error_ends_the_wait_though_the_others_hang(run):
    found = failure(run, error(1, "direction_error"))
    assert (found.code, found.message) == ("direction_error", "rank 1: direction_error here")
    assert not found.retryable


def test_the_rank_that_failed_counts_not_those_that_noticed(run):
    found = failure(run, error(0, "parallelism_error"), error(1, "checkpoint_error"))
    assert (found.code, found.message) == ("checkpoint_error", "rank 1: checkpoint_error here")


def test_a_rank_that_is_gone_without_a_word_counts_before_those_that_noticed(run):
    found = failure(run, error(0, "parallelism_error"), [1, None])
    assert (found.code, found.retryable) == ("unit_crashed", True)
    assert "rank 1 ended without a result" in found.message


def test_where_all_have_only_noticed_the_first_error_counts(run, monkeypatch):
    both = [error(0, "parallelism_error"), error(1, "parallelism_error")]
    assert failure(run, *both).code == "parallelism_error"
    monkeypatch.setattr(gang_module, "_VERDICT_S", 0.1)
    found = failure(run, error(0, "parallelism_error"))  # the other says nothing at all
    assert (found.code, found.message) == ("parallelism_error", "rank 0: parallelism_error here")


def test_the_end_of_a_rank_that_has_told_its_error_is_no_reason_of_its_own(run, monkeypatch):
    monkeypatch.setattr(gang_module, "_VERDICT_S", 0.3)
    assert failure(run, error(0, "parallelism_error"), [0, None]).code == "parallelism_error"


def test_a_gang_of_which_one_rank_never_reports(run):
    found = failure(run, start=READY[:1], start_s=5.0)
    assert found.code == "unit_crashed"
    assert "1 of 2 ranks reported within 5 s" in found.message


def test_a_rank_that_fails_before_all_have_reported(run):
    found = failure(run, start=[READY[1], error(1, "config_error")])
    assert (found.code, found.message) == ("config_error", "rank 1: config_error here")


def test_silent_ranks_are_given_up(run):
    started = time.monotonic()
    assert failure(run, no_progress_s=0.2).code == "unit_stalled"
    assert time.monotonic() - started < FAR_S


def test_a_rank_the_kernel_killed_for_lack_of_memory_is_reported_so(run, tmp_path, monkeypatch):
    counters = tmp_path / "vmstat"
    counters.write_text("oom_kill 3\n")
    monkeypatch.setattr(oom_killer, "COUNTERS", counters)
    assert "lack of memory" not in str(failure(run, [0, None]))
    remark = oom_killer.remark
    monkeypatch.setattr(oom_killer, "remark", lambda before: remark(before - 1))
    lost = failure(run, [0, None])
    assert (lost.code, lost.retryable) == ("unit_crashed", True)
    assert "meanwhile the kernel killed a process for lack of memory" in lost.message
