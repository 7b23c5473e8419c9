"""What a mix scan would do, counted by hand."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from probe.model_size import ModelSize
from probe.placement import memory_bytes_per_rank
from probe.plan import expand_units, make_plan
from probe.spec_load import parse_spec


@pytest.fixture
def scan(mix_spec, tmp_path):
    """Two checkpoints without optimizer state, and changes to the spec by dotted path."""
    for step in (100, 200):
        directory = tmp_path / f"step-{step}"
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
        save_file({"w": np.zeros((2, 2), np.float32)}, str(directory / "model.safetensors"))
    mix_spec["checkpoints"]["path"] = str(tmp_path / "step-*")

    def build(**changes):
        raw = json.loads(json.dumps(mix_spec))
        for path, value in changes.items():
            target, _, key = path.partition("__")
            if key:
                raw.setdefault(target, {})[key] = value
            else:
                raw[target] = value
        return parse_spec(raw)

    return build


def test_shared_gradients_make_a_unit_of_every_checkpoint(scan):
    units = expand_units(scan())
    assert [unit.unit_id for unit in units] == ["0000-step-100", "0001-step-200"]
    assert [unit.ratio for unit in units] == [None, None]


def test_exact_gradients_make_a_unit_of_every_checkpoint_and_ratio(scan):
    spec = scan(mixture__gradients="exact", mixture__ratios={"start": 0.1, "stop": 0.3, "num": 3})
    units = expand_units(spec)
    assert [unit.unit_id for unit in units] == [
        "0000-step-100-ratio-0.1", "0001-step-100-ratio-0.2", "0002-step-100-ratio-0.3",
        "0003-step-200-ratio-0.1", "0004-step-200-ratio-0.2", "0005-step-200-ratio-0.3",
    ]  # fmt: skip
    assert [unit.ratio for unit in units] == [0.1, 0.2, 0.3] * 2
    assert [unit.index for unit in units] == list(range(6))


def test_a_long_name_leaves_the_ratio_in_the_unit_id(scan, tmp_path):
    name = "a" * 100
    (tmp_path / "step-100").rename(tmp_path / name)
    spec = scan(
        mixture__gradients="exact",
        mixture__ratios=[0.25, 0.5],
        checkpoints={"source": "local", "path": str(tmp_path / name)},
    )
    assert [unit.unit_id for unit in expand_units(spec)] == [
        f"0000-{'a' * 40}-ratio-0.25",
        f"0001-{'a' * 40}-ratio-0.5",
    ]


def test_passes_and_tokens_of_a_shared_scan(scan):
    plan = make_plan(scan())
    # 2 checkpoints; per checkpoint 3 ratios x 2 tasks x 2 repeats searches of about 3 passes, and
    # for each task L(0) and one more at eta = 0.
    assert plan.num_forward_passes == 2 * (3 * 2 * 2 * 3 + 2 * 2)
    assert plan.max_forward_passes == 2 * (3 * 2 * 2 * 40 + 2 * 2)
    # A gradient per task, then one per source for each of 3 warm-up steps and 2 repeats.
    assert plan.num_backward_passes == 2 * (2 + 2 * (3 + 2))
    assert plan.num_tokens_per_pass == 128 * 16  # the largest batch is gsm8k_test's
    assert plan.num_parameters == 4
    assert plan.kind == "mix_scan"


def test_further_ratios_count_as_ratios(scan):
    more = make_plan(scan(mixture__refine=4)).num_forward_passes
    assert more - make_plan(scan()).num_forward_passes == 2 * 4 * 2 * 2 * 3


def test_passes_of_an_exact_scan(scan):
    plan = make_plan(scan(mixture__gradients="exact"))
    # 6 units: one ratio each, and every unit takes the tasks' gradients and losses anew.
    assert plan.num_forward_passes == 6 * (2 * 2 * 3 + 2 * 2)
    assert plan.num_backward_passes == 6 * (2 + 3 + 2)


def test_saved_moments_need_no_warm_up_but_must_be_there(scan):
    plan = make_plan(scan(optimizer={"moments": "checkpoint"}, mixture__gradients="exact"))
    assert plan.num_backward_passes == 6 * (2 + 2)
    # Checkpoints are counted, not units.
    assert any(note.startswith("2 of 2 checkpoints hold no optimizer state") for note in plan.notes)


def test_what_can_be_known_to_go_wrong_is_said(scan, tmp_path):
    notes = make_plan(scan(measurement={"repeats": 1})).notes
    assert "data file 'web.jsonl' is not on this machine: units will fail" in notes
    assert [note for note in notes if "gsm8k.jsonl" in note].__len__() == 1  # source and task
    assert any("one repeat gives no spread" in note for note in notes)
    assert not any("one ratio" in note for note in notes)
    one = make_plan(scan(mixture__ratios=[0.5], mixture__gradients="exact")).notes
    assert any("one ratio gives no sweet spot" in note for note in one)


SIZE = ModelSize(num_parameters=1000, largest_group=100)
FP32, BF16 = 4, 2


@pytest.mark.parametrize(
    ("mixture", "optimizer", "kept"),
    [
        # 2 tasks' gradients, 2 sources' gradients, 2 (2 + 3) / 2 = 5 moments
        ({}, {}, (2 + 2 + 5) * FP32),
        ({"buffers": "bfloat16"}, {}, (2 + 2) * FP32 + 5 * BF16),
        # saved moments are read as needed: the sources' gradients and the direction
        ({}, {"moments": "checkpoint"}, (2 + 2 + 1) * FP32),
        ({}, {"moments": "auto"}, (2 + 2 + 5) * FP32),
        # the gradient, which turns into the direction, and two moments; or none that are kept
        ({"gradients": "exact"}, {}, (2 + 1 + 2) * FP32),
        ({"gradients": "exact"}, {"moments": "checkpoint"}, (2 + 1) * FP32),
    ],
)
def test_memory_of_one_rank(scan, mixture, optimizer, kept):
    changes = {f"mixture__{key}": value for key, value in mixture.items()}
    changes |= {f"optimizer__{key}": value for key, value in optimizer.items()}
    spec = scan(**changes)
    assert memory_bytes_per_rank(spec, SIZE, 1) == 1000 * (2 * FP32 + kept)  # live, base
    # Half of everything on each of two, and a group of layers while it is gathered.
    assert memory_bytes_per_rank(spec, SIZE, 2) == 500 * (2 * FP32 + kept) + 100 * FP32


def test_three_sources_keep_nine_moments(scan, mix_spec):
    third = {"type": "files", "name": "wiki", "paths": ["wiki.jsonl"]}
    spec = scan(mixture__sources=[*mix_spec["mixture"]["sources"], third])
    assert memory_bytes_per_rank(spec, SIZE, 1) == 1000 * (2 + 2 + 3 + 9) * FP32


def test_an_offloaded_base_is_not_counted(scan):
    spec = scan(parallel={"offload_base": True})
    assert memory_bytes_per_rank(spec, SIZE, 1) == 1000 * (1 + 2 + 2 + 5) * FP32


def lost(plan):
    return [note for note in plan.notes if "no whole sequence" in note]


def test_an_exact_scan_says_where_a_share_is_no_sequence(scan):
    # Of 4 sequences a share of 0.1 is 0.4: none. 0.125 is 0.5, and of equal remainders the source
    # named first takes the sequence, so at 0.875 it takes all four.
    ratios = [0.0, 0.1, 0.125, 0.5, 0.875, 1.0]
    plan = make_plan(scan(mixture__gradients="exact", mixture__ratios=ratios))
    say = "units will fail there; raise it, choose ratios further apart, or use gradients: shared"
    assert lost(plan) == [
        f"batches.batch_sequences 4 leaves web no whole sequence at ratio 0.1: {say}",
        f"batches.batch_sequences 4 leaves gsm8k no whole sequence at ratio 0.875: {say}",
    ]
    assert lost(make_plan(scan(mixture__ratios=ratios))) == []  # shared: weights, not counts


def test_many_lost_ratios_are_counted(scan):
    # 4 r < 0.5: nine ratios of web, 0 not among them.
    grid = {"start": 0.0, "stop": 0.09, "num": 10}
    (note,) = lost(make_plan(scan(mixture__gradients="exact", mixture__ratios=grid)))
    assert "leaves web no whole sequence at ratios 0.01, 0.02, 0.03, 0.04, 0.05 and 4 more" in note


def test_a_source_beside_the_varied_one_can_be_lost(scan, mix_spec):
    """Shares 0.5 of web, and 0.5 in proportion 3 to 1: 2, 1.5 and 0.5 of four sequences."""
    web, gsm8k = mix_spec["mixture"]["sources"]
    third = {"type": "files", "name": "wiki", "paths": ["wiki.jsonl"]}
    sources = [web, gsm8k | {"share": 3.0}, third]
    plan = make_plan(
        scan(mixture__gradients="exact", mixture__ratios=[0.5], mixture__sources=sources)
    )
    (note,) = lost(plan)
    assert "leaves wiki no whole sequence at ratio 0.5" in note
