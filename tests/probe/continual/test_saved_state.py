"""States on disk: the right one is found, a broken one is passed over, an unwritable disk said."""

import os

import numpy as np
import pytest
import torch

from probe.continual.saved_state import SavedStates, StateStorageError
from probe.result import RunRef
from probe.result_continual import RunTask, Windows

RUNS = [RunRef(method="m", control="c", seed=0)]


def row(task: int) -> list[RunTask]:
    nothing = Windows(last_step=[], runs={}, layers={})
    return [
        RunTask(
            task=task,
            outcome="finished",
            accuracy=0.5,
            accuracy_end=0.5,
            loss=1.0,
            loss_end=1.0,
            violation_share=None,
            windows=nothing,
        )
    ]


def states(tmp_path, spec=None, device="cpu (1 threads)", images="abc") -> SavedStates:
    return SavedStates(spec or {"name": "a", "seeds": [0]}, RUNS, images, device, root=tmp_path)


def save(kept: SavedStates, next_task: int, rows) -> None:
    kept.save(next_task, {"x": torch.full((2,), float(next_task))}, rows)


def test_the_latest_state_of_the_unit_comes_back_with_its_results(tmp_path):
    kept = states(tmp_path)
    save(kept, 5, [row(4)])
    save(kept, 6, [row(5)])
    task, state, rows = states(tmp_path).load_latest(5, 8)
    assert task == 6
    assert torch.equal(state["x"], torch.tensor([6.0, 6.0]))
    assert rows == [row(5)]


def test_a_state_after_the_units_end_is_not_taken_and_one_before_it_brings_no_results(tmp_path):
    kept = states(tmp_path)
    save(kept, 5, [row(3), row(4)])
    save(kept, 6, [row(5)])
    assert states(tmp_path).load_latest(5, 5)[0] == 5
    task, _, rows = states(tmp_path).load_latest(7, 9)
    assert (task, rows) == (6, [])
    assert states(tmp_path).load_latest(0, 4) is None


def test_a_state_whose_unit_began_later_than_ours_is_not_taken(tmp_path):
    kept = states(tmp_path)
    save(kept, 6, [row(5)])  # results of tasks 3 and 4 are with another unit
    assert kept.load_latest(3, 8) is None


def test_two_states_are_kept(tmp_path):
    kept = states(tmp_path)
    for task in range(1, 6):
        save(kept, task, [row(task - 1)])
    names = sorted(path.name for path in kept.directory.iterdir())
    assert names == ["before-task-000004.safetensors", "before-task-000005.safetensors"]


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_broken_file_is_passed_over(tmp_path, damage, caplog):
    kept = states(tmp_path)
    save(kept, 1, [row(0)])
    save(kept, 2, [row(0), row(1)])
    path = kept.directory / "before-task-000002.safetensors"
    path.write_bytes(path.read_bytes()[:-3] if damage is None else damage)
    assert kept.load_latest(0, 4)[0] == 1
    assert "passed over" in caplog.text


def test_other_specs_devices_and_data_have_states_of_their_own(tmp_path):
    kept = states(tmp_path)
    save(kept, 1, [row(0)])
    assert states(tmp_path, device="cpu (2 threads)").load_latest(0, 4) is None
    assert states(tmp_path, images="other").load_latest(0, 4) is None
    assert states(tmp_path, spec={"name": "a", "seeds": [1]}).load_latest(0, 4) is None
    renamed = {"name": "b", "labels": {"x": "y"}, "seeds": [0]}
    assert states(tmp_path, spec=renamed).load_latest(0, 4)[0] == 1


@pytest.mark.parametrize("library", [np, torch])
def test_a_state_of_another_version_is_not_taken(tmp_path, monkeypatch, library):
    save(states(tmp_path), 1, [row(0)])
    assert states(tmp_path).load_latest(0, 4)[0] == 1
    monkeypatch.setattr(library, "__version__", "0.1")
    assert states(tmp_path).load_latest(0, 4) is None


def test_a_directory_that_cannot_be_made_is_an_error_to_try_again(tmp_path):
    (tmp_path / "taken").write_text("a file")
    kept = SavedStates({}, RUNS, "abc", "cpu", root=tmp_path / "taken")
    with pytest.raises(StateStorageError, match="PROBE_CACHE_DIR") as error:
        save(kept, 1, [row(0)])
    assert error.value.retryable


def test_groups_nobody_came_back_for_are_removed(tmp_path):
    old, new = states(tmp_path, images="old"), states(tmp_path, images="new")
    for kept in (old, new):
        save(kept, 1, [row(0)])
    os.utime(old.directory, (1_000_000, 1_000_000))
    states(tmp_path).remove_forgotten()
    assert not old.directory.exists()
    assert new.directory.exists()
