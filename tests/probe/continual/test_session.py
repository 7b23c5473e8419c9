"""Units end to end: stretch after stretch, interrupted anywhere, the numbers are the same."""

from pathlib import Path

import numpy as np
import pytest
from small_streams import made_images, small_spec

from probe.continual.saved_state import SavedStates, StateStorageError
from probe.continual.session import ContinualSession
from probe.errors import ConfigError
from probe.plan_continual import expand_continual_units
from probe.result import CheckpointRef, Unit
from probe.result_continual import LAYER_SIGNALS, RUN_SIGNALS, ContinualUnitResult
from probe.spec_continual import ContinualLearningSpec


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ContinualLearningSpec:
    """Data on disk, states in a directory of the test's own; two groups of two units."""
    monkeypatch.setenv("PROBE_CACHE_DIR", str(tmp_path / "cache"))
    images = made_images()
    np.savez(tmp_path / "images.npz", images=images.inputs, labels=images.labels)
    stream = small_spec().stream.model_dump()
    stream["data"] = {"type": "npz", "path": str(tmp_path / "images.npz")}
    methods = [{"name": "plain"}, {"name": "crelu", "activation": "crelu"}]
    controls = [{"name": "vanilla"}, {"name": "scheduler", "scheduler": {"min_effective_step": 0}}]
    return small_spec(stream=stream, methods=methods, controls=controls, seeds=[0, 1])


def numbers(result: ContinualUnitResult) -> list[object]:
    """All that must not depend on interruptions."""
    return [result.unit, result.layer_names, result.runs, result.num_steps_per_task]


class Killed(BaseException):
    """Ends a unit as a signal does: nothing of ours catches it."""


def test_a_job_gives_every_run_every_task_with_every_signal(spec):
    units = expand_continual_units(spec)
    session = ContinualSession(spec)
    results = [session.measure(unit) for unit in units]
    assert [(len(r.runs), r.unit.first_task, r.unit.num_tasks) for r in results] == [
        (4, 0, 2),
        (4, 2, 1),
        (4, 0, 2),
        (4, 2, 1),
    ]
    for result in results:
        assert result.layer_names == ["fc1", "fc2", "fc3", "network"]
        assert result.has_every_answer
        assert result.resumed_at_task is None
        first, count = result.unit.first_task, result.unit.num_tasks
        for record, run in zip(result.runs, result.unit.runs, strict=True):
            assert record.run == run
            assert [task.task for task in record.tasks] == list(range(first, first + count))
            for task in record.tasks:
                assert set(task.windows.layers) == set(LAYER_SIGNALS)
                assert set(task.windows.runs) == set(RUN_SIGNALS)
                assert task.windows.runs["hessian_rank"][0] >= 1
                assert len(task.windows.layers["sharpness"]) == 4
        assert ContinualUnitResult.model_validate_json(result.model_dump_json()) == result
    # 6 steps a task, 2 tasks, 4 runs; one evaluation a task and run
    assert results[0].num_backward_passes == 6 * 2 * 4
    assert results[0].num_forward_passes == 2 * 4


@pytest.mark.parametrize("after_steps", [3, 9, 12])
def test_a_unit_killed_anywhere_goes_on_from_its_last_finished_task(spec, after_steps):
    unit = expand_continual_units(spec)[0]
    expected = numbers(ContinualSession(spec).measure(unit))

    def kill(progress):
        if progress["phase"] == "train" and progress["done"] >= after_steps:
            raise Killed

    fresh = spec.model_copy(update={"runs_per_unit": 31})  # another key: no state of the run above
    with pytest.raises(Killed):
        ContinualSession(fresh).measure(unit, on_progress=kill)
    result = ContinualSession(fresh).measure(unit)
    assert numbers(result) == expected
    # a task is 6 steps; the second one's state is written after its last report
    assert result.resumed_at_task == (None if after_steps == 3 else 1)


def test_a_unit_whose_result_was_lost_is_given_again_without_training(spec):
    unit = expand_continual_units(spec)[0]
    first = ContinualSession(spec).measure(unit)
    again = ContinualSession(spec).measure(unit)
    assert numbers(again) == numbers(first)
    assert (again.resumed_at_task, again.num_backward_passes) == (2, 0)


def test_a_later_unit_without_any_state_is_trained_from_the_groups_start(spec, tmp_path):
    units = expand_continual_units(spec)
    session = ContinualSession(spec)
    expected = [numbers(session.measure(unit)) for unit in units[:2]]
    for path in (tmp_path / "cache" / "continual").rglob("*.safetensors"):
        path.write_bytes(b"broken")
    result = ContinualSession(spec).measure(units[1])
    assert numbers(result) == expected[1]
    assert result.resumed_at_task == 0
    assert result.num_backward_passes == 6 * 3 * 4


def test_after_a_failed_task_nothing_resident_is_used(spec, monkeypatch):
    units = expand_continual_units(spec)
    expected = numbers(ContinualSession(spec).measure(units[0]))
    fresh = spec.model_copy(update={"runs_per_unit": 31})
    session = ContinualSession(fresh)
    save = SavedStates.save

    def refuse(self, *arguments):
        raise StateStorageError("the disk is full")

    monkeypatch.setattr(SavedStates, "save", refuse)
    with pytest.raises(StateStorageError):
        session.measure(units[0])
    monkeypatch.setattr(SavedStates, "save", save)
    assert numbers(session.measure(units[0])) == expected


def test_progress_counts_the_steps_of_the_unit(spec):
    seen = []
    ContinualSession(spec).measure(expand_continual_units(spec)[0], on_progress=seen.append)
    steps = [(p["done"], p["total"]) for p in seen if p["phase"] == "train"]
    assert steps == [(3, 12), (6, 12), (9, 12), (12, 12)]


def test_a_unit_of_another_kind_is_refused(spec):
    checkpoint = CheckpointRef(source="local", location="somewhere")
    with pytest.raises(ConfigError, match="another kind of job"):
        ContinualSession(spec).measure(Unit(index=0, unit_id="0000-x", checkpoint=checkpoint))
