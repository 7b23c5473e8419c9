"""What a training grid would do, counted by hand; and the kind's way through the shared parts."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from probe.kinds import data_sources
from probe.model_size import ModelSize
from probe.placement import memory_bytes_per_rank
from probe.plan import expand_units, make_plan
from probe.spec_load import SpecError, parse_spec


@pytest.fixture
def grid(mix_spec, tmp_path):
    """Two checkpoints without optimizer state, and changes to the spec by dotted path."""
    for step in (100, 200):
        directory = tmp_path / f"step-{step}"
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
        save_file({"w": np.zeros((2, 2), np.float32)}, str(directory / "model.safetensors"))
    raw = {k: v for k, v in mix_spec.items() if k != "measurement"}
    raw |= {
        "kind": "mix_train",
        "checkpoints": {"source": "local", "path": str(tmp_path / "step-*")},
        "mixture": {"sources": mix_spec["mixture"]["sources"]},
        "train": {"ratios": [0.0, 0.5], "learning_rates": [1e-4, 1e-3, 0.01], "steps": 7},
    }

    def build(**changes):
        copy = json.loads(json.dumps(raw))
        for path, value in changes.items():
            target, _, key = path.partition("__")
            copy[target] = copy.get(target, {}) | {key: value} if key else value
        return parse_spec(copy)

    return build


def test_a_unit_is_a_checkpoint_a_ratio_and_a_learning_rate(grid):
    units = expand_units(grid())
    assert [unit.unit_id for unit in units[:4]] == [
        "0000-step-100-ratio-0-lr-0.0001", "0001-step-100-ratio-0-lr-0.001",
        "0002-step-100-ratio-0-lr-0.01", "0003-step-100-ratio-0.5-lr-0.0001",
    ]  # fmt: skip
    assert [(u.checkpoint.step, u.ratio, u.learning_rate) for u in units] == [
        (step, ratio, rate)
        for step in (100, 200)
        for ratio in (0.0, 0.5)
        for rate in (1e-4, 1e-3, 0.01)
    ]
    assert [unit.index for unit in units] == list(range(12))
    assert len({unit.unit_id for unit in units}) == 12


def test_passes_are_counted_by_hand(grid):
    plan = make_plan(grid())
    assert plan.kind == "mix_train"
    # 12 runs and 2 starts, each of 2 tasks scored for loss and accuracy.
    assert plan.num_forward_passes == (12 + 2) * 2 * 2
    assert plan.max_forward_passes == 24 * 2 * 2  # every unit in a process of its own
    assert plan.num_backward_passes == 12 * (7 + 3)  # steps, and batches of the moments
    assert plan.num_tokens_per_pass == 128 * 16
    assert make_plan(grid(train__moments="zero")).num_backward_passes == 12 * 7


def test_the_plan_says_what_the_accuracy_is(grid):
    (note,) = [n for n in make_plan(grid()).notes if "accuracy" in n]
    assert "web_task, gsm8k_test" in note


def test_files_that_are_missing_are_noted(grid):
    assert any("'web.jsonl' is not on this machine" in note for note in make_plan(grid()).notes)
    assert sorted(data_sources(grid())) == [
        "eval_tasks.0.data", "eval_tasks.1.data", "mixture.sources.0", "mixture.sources.1",
    ]  # fmt: skip


def test_memory_is_what_adamw_keeps(grid):
    size = ModelSize(num_parameters=1000, largest_group=100)
    # live, base, gradient, two moments; in bf16 also the fp32 weights that are trained.
    assert memory_bytes_per_rank(grid(), size, 1) == 1000 * 4 * 5
    assert memory_bytes_per_rank(grid(model__dtype="bfloat16"), size, 1) == 1000 * (2 + 4 * 5)


def test_a_wrong_key_is_named_with_the_nearest(grid):
    with pytest.raises(SpecError, match=r"train\.learning_rate: unknown key; did you mean"):
        grid(train__learning_rate=1e-3)
    with pytest.raises(SpecError, match=r"mixture\.ratios: unknown key"):
        grid(mixture__ratios=[0.5])
    with pytest.raises(SpecError, match="train: is required"):
        parse_spec({k: v for k, v in grid().model_dump(mode="json").items() if k != "train"})


def test_a_grid_says_where_a_share_is_no_sequence(grid, mix_spec):
    """Shares 0.5 of web, and 0.5 in proportion 3 to 1: 2, 1.5 and 0.5 of four sequences."""
    web, gsm8k = mix_spec["mixture"]["sources"]
    third = {"type": "files", "name": "wiki", "paths": ["wiki.jsonl"]}
    plan = make_plan(grid(mixture={"sources": [web, gsm8k | {"share": 3.0}, third]}))
    assert [note for note in plan.notes if "no whole sequence" in note] == [
        "batches.batch_sequences 4 leaves wiki no whole sequence at ratio 0.5: units will fail "
        "there; raise it, or choose ratios further from 0 and 1"
    ]
