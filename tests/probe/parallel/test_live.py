"""critical_sharpness in a user's own FSDP2 or DeepSpeed loop, against one process.

Two launches of two ranks and one of three run everything and save what they saw; the truth beside
it is the stock optimizer and plain PyTorch on one process (`live_model`).
"""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from probe import critical_sharpness
from probe.errors import ParallelismError
from probe.parallel.zero_partitions import Partition, _check

# The first test of a kind waits for what all of them read.
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[3]
RANKS = Path(__file__).with_name("live_ranks.py")
TIMEOUT_S = 400
LEARNING_RATE = 1e-2  # of the first group, which eta stands for
FSDP2_CASES = ["float32", "bfloat16", "tied", "resharded", "kept gathered", "hybrid", "offloaded"]
ZERO_CASES = [
    *[f"zero{stage} {dtype}" for stage in (1, 2, 3) for dtype in ("float32", "bfloat16")],
    "zero1 bf16 optimizer",
    "zero3 float16",
]
CLIPPED = ["zero1 clipped", "zero3 clipped", "bf16 clipped"]
ALL = [("fsdp2", c) for c in FSDP2_CASES] + [("deepspeed", c) for c in ZERO_CASES + CLIPPED]
EXACT = [(kind, case) for kind, case in ALL if case not in CLIPPED]


def launch(directory: Path, kind: str, world_size: int) -> list[Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with ExitStack() as stack:
        children = [
            subprocess.Popen(
                [sys.executable, str(RANKS), str(directory), kind, str(rank), str(world_size)],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=stack.enter_context((directory / f"errors-{rank}").open("w")),
            )
            for rank in range(world_size)
        ]
        try:
            for child in children:
                child.wait(timeout=TIMEOUT_S)
        finally:
            for child in children:
                child.kill()
                child.wait()
    errors = "\n".join((directory / f"errors-{rank}").read_text() for rank in range(world_size))
    assert [child.returncode for child in children] == [0] * world_size, errors[-4000:]
    return [
        torch.load(directory / f"found-{rank}.pt", weights_only=True) for rank in range(world_size)
    ]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return {kind: launch(tmp_path_factory.mktemp(kind), kind, 2) for kind in ("fsdp2", "deepspeed")}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch(tmp_path_factory.mktemp("three"), "fsdp2", 3)


@pytest.mark.parametrize(("kind", "case"), ALL)
def test_training_goes_on_as_if_there_had_been_no_probe(ranks, kind, case):
    for rank in ranks[kind]:
        found, unprobed = rank[case], rank[case]["unprobed"]
        assert found["losses"] == unprobed["losses"]
        for (name, value), (other, expected) in zip(found["end"], unprobed["end"], strict=True):
            assert name == other
            assert torch.equal(value, expected), name


@pytest.mark.parametrize(("kind", "case"), ALL)
def test_nothing_is_changed_not_by_a_bit(ranks, kind, case):
    for rank in ranks[kind]:
        changed = rank[case]["changed"]
        assert len(changed) == 8  # every kind of measurement, failed ones too
        assert not any(changed.values()), changed


@pytest.mark.parametrize(("kind", "case"), EXACT)
def test_losses_along_the_optimizers_ray_are_one_process_bit_for_bit(ranks, kind, case):
    for rank in ranks[kind]:
        assert rank[case]["sweep"] == rank[case]["truth"]["sweep"]


@pytest.mark.parametrize(("kind", "case"), ALL)
def test_losses_along_a_given_direction_are_one_process_bit_for_bit(ranks, kind, case):
    for rank in ranks[kind]:
        assert rank[case]["direction_sweep"] == rank[case]["truth"]["direction_sweep"]
        assert rank[case]["direction_search"] == rank[case]["truth"]["direction_search"]


@pytest.mark.parametrize(("kind", "case"), EXACT)
def test_brackets_and_trials_are_those_of_one_process(ranks, kind, case):
    for rank in ranks[kind]:
        assert rank[case]["searches"] == rank[case]["truth"]["searches"]


@pytest.mark.parametrize("case", CLIPPED)
def test_clipping_inside_the_step_is_accounted_for(ranks, case):
    # DeepSpeed's norm is a sum of fp32 norms, torch's another: 1e-6 in the factor, and so in eta.
    for rank in ranks["deepspeed"]:
        truth = rank[case]["truth"]
        assert rank[case]["sweep"] == pytest.approx(truth["sweep"], rel=1e-5)
        for algorithm, expected in truth["searches"].items():
            outcome, lower, upper, *_ = rank[case]["searches"][algorithm]
            assert outcome == expected[0] == "converged"
            assert [lower, upper] == pytest.approx(expected[1:3], rel=1e-4)


@pytest.mark.parametrize(("kind", "case"), ALL)
def test_the_slope_is_that_of_the_loss_before_clipping(ranks, kind, case):
    # Sums of the same fp64 products in another order; with clipping its factor's 1e-6.
    for rank in ranks[kind]:
        rel = 1e-6 if case in CLIPPED else 1e-13
        assert rank[case]["slope"] == pytest.approx(rank[case]["truth"]["slope"], rel=rel)


@pytest.mark.parametrize(("kind", "case"), ALL)
def test_delta_is_what_the_next_step_subtracts_over_its_lr(ranks, kind, case):
    """The stock library's own step, taken right after; several groups, decay, clipping, scale."""
    for rank in ranks[kind]:
        found = rank[case]
        before, after = dict(found["before"]), dict(found["stepped"])
        assert before.keys() == {name for name, _ in found["delta"]}
        for name, delta in found["delta"]:
            if not delta.numel():
                continue
            subtracted = (before[name].double() - after[name].double()) / LEARNING_RATE
            # Decay and step each round a weight, fp32 moments differ by a few roundings.
            weight, size = before[name].abs().max().item(), delta.abs().max().item()
            atol = 4 * 2**-24 * weight / LEARNING_RATE + 1e-5 * size
            torch.testing.assert_close(delta.double(), subtracted, rtol=0, atol=atol)


@pytest.mark.parametrize(("kind", "case"), ALL)
def test_a_failure_on_one_rank_ends_all_and_hangs_none(ranks, kind, case):
    for where in ("before", "inside", "after"):
        error = [rank[case][f"fails {where}"] for rank in ranks[kind]]
        assert error[1] == ("ValueError", f"no luck {where}")
        assert error[0][0] == "ParallelismError"
        assert "failed on rank [1]" in error[0][1]


def test_a_failure_elsewhere_cannot_be_hidden(fsdp2):
    assert fsdp2[0]["swallowed"].startswith("ParallelismError: the measurement failed on rank [1]")
    assert fsdp2[1]["swallowed"] == "ValueError: no luck"


@pytest.mark.parametrize("case", ["float32", "bfloat16"])
def test_three_ranks(three, case):
    for rank in three:
        found, truth = rank[case], rank[case]["truth"]
        assert not any(found["changed"].values()), found["changed"]
        assert found["losses"] == found["unprobed"]["losses"]
        assert found["direction_sweep"] == truth["direction_sweep"]
        assert found["direction_search"] == truth["direction_search"]
        # A third of a sum is rounded: the gradients are not one process's to the bit.
        rel = 1e-5 if case == "float32" else 2e-3
        assert found["sweep"] == pytest.approx(truth["sweep"], rel=rel)
        assert {found[f"fails {where}"][0] for where in ("before", "inside", "after")} == {
            "ValueError" if rank is three[1] else "ParallelismError"
        }


@pytest.fixture
def fsdp2(ranks) -> list[Any]:
    return [rank["extras"] for rank in ranks["fsdp2"]]


@pytest.fixture
def deepspeed(ranks) -> list[Any]:
    return [rank["extras"] for rank in ranks["deepspeed"]]


def test_fsdp2_groups_left_gathered_would_answer_with_old_weights(fsdp2):
    for rank in fsdp2:
        assert rank["sweep without reshard"] != rank["sweep"]


def test_fsdp2_groups_gathered_ahead_would_answer_with_old_weights(fsdp2):
    for rank in fsdp2:
        assert rank["prefetched"] == rank["sweep"]
        assert rank["prefetched and kept"] != rank["sweep"]


def test_fsdp2_shards_are_not_taken_before_the_first_forward(fsdp2):
    for rank in fsdp2:
        assert rank["before any forward"].startswith("DirectionError: FSDP sets up its shards")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("unreduced", "DirectionError: gradients are accumulated but not reduced"),
        ("ignored", "ParallelismError: 'few' is trainable, but under no fully_shard"),
        ("two meshes", "ParallelismError: '1.few' is placed (Replicate(), Shard(dim=0))"),
        ("tensor parallel", "ParallelismError: 'weight' is a DTensor placed (Shard(dim=0),)"),
        ("neither", "ConfigError: pass exactly one of optimizer= and direction=; found neither"),
        ("replicated", "DirectionError: the direction of 'few' is a DTensor placed (Replicate(),)"),
        ("wrong shape", "DirectionError: the direction of 'norm.weight' has shape (3,); the"),
        ("missing", "DirectionError: the direction names 14 of 15 parameters; missing: 'norm.b"),
        ("one more", "ParallelismError: ranks [1] are inside a forward pass that the others"),
        ("hidden", "ParallelismError: ranks [0] are inside a forward pass that the others"),
    ],
)
def test_fsdp2_refusals_on_every_rank(fsdp2, key, message):
    for rank in fsdp2:
        assert rank[key].startswith(message), rank[key]


def test_fsdp2_directions_whole_or_placed_like_the_parameters(fsdp2):
    for rank in fsdp2:
        assert rank["whole"] == rank["placed"] != rank["sweep"]
        assert rank["after all that"] == rank["sweep"]


def test_every_point_draws_the_same_dropout_masks(fsdp2):
    for rank in fsdp2:
        first, again, moved = rank["random masks"]
        assert first == again != moved


def test_fsdp2_what_was_gathered_is_gathered_afterwards(fsdp2):
    for rank in fsdp2:
        assert rank["gathered before"] == [True, True, False]


def test_ranks_meet_on_the_cpu_where_their_group_does_not_move_cpu_memory(fsdp2):
    for rank in fsdp2:
        losses, num_groups = rank["through a gloo twin"]
        assert losses == [rank["sweep"]] * 2
        assert num_groups == 1  # made once, for both


def test_fsdp2_a_forward_cut_short_leaves_no_old_weights(fsdp2):
    for rank in fsdp2:
        assert rank["interrupted"] == ["KeyboardInterrupt: ", rank["not interrupted"]]
        assert rank["not reset"] != ["KeyboardInterrupt: ", rank["not interrupted"]]


def test_models_prepared_by_accelerate(ranks, fsdp2):
    for rank, extras in zip(ranks["fsdp2"], fsdp2, strict=True):
        expected = rank["float32"]["truth"]["searches"]["interpolate"]
        assert extras["accelerated"] == expected
        assert extras["replicated by accelerate"] == "DistributedDataParallel"
        assert extras["accelerated replica"] == expected


def test_zero_writes_must_be_pushed(deepspeed):
    # ZeRO-2: replicas of the other rank's part are old. ZeRO-3: so is what stays gathered.
    for rank in deepspeed:
        for stage in (2, 3):
            assert rank[f"sweep {stage} without push"] != rank[f"sweep {stage}"]


def test_moments_are_not_read_through_deepspeeds_links_which_miss_the_second_group(deepspeed):
    for rank in deepspeed:
        assert rank["linked"] == [True, False]


def test_the_engines_optimizer_in_any_wrapping_or_none(deepspeed):
    for rank in deepspeed:
        found = rank["optimizers"]
        assert found.keys() == {"zero", "inner", "accelerate", "none"}
        assert all(value == found["none"] for value in found.values())


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("another", "ConfigError: optimizer= is SGD, which is not this engine's"),
        ("both", "ConfigError: pass exactly one of optimizer= and direction=; found both"),
        *[(f"nothing {s}", "DirectionError: the engine holds no averaged") for s in (1, 2, 3)],
        *[(f"micro-batch {s}", "DirectionError: 2 micro-batches make a step") for s in (2, 3)],
        *[(f"after step {s}", "DirectionError: 2 micro-batches make a step") for s in (2, 3)],
        ("nan", "DirectionError: the gradient holds NaN or infinite values"),
        ("stage 0", "ParallelismError: this DeepSpeed engine uses AdamW (ZeRO stage 0)"),
        ("offload 2", "ParallelismError: this DeepSpeed engine uses optimizer offload"),
        ("offload 3", "ParallelismError: this DeepSpeed engine uses optimizer offload"),
        ("unmanaged", "ParallelismError: with managed_gradient_accumulation false"),
        ("frozen", "DirectionError: 'module.few' cannot be moved: it is frozen"),
    ],
)
def test_deepspeed_refusals_on_every_rank(deepspeed, key, message):
    for rank in deepspeed:
        assert rank[key].startswith(message), rank[key]


def test_the_last_micro_batch_of_a_step_can_be_measured(deepspeed):
    for rank in deepspeed:
        assert rank["last micro-batch 2"] == rank["last micro-batch 3"] == "converged"


def test_the_engine_itself_is_asked_for(deepspeed):
    for rank in deepspeed:
        assert "belongs to a DeepSpeed engine. Pass the engine itself" in rank["its module"]


def test_deepspeed_interrupted_in_the_middle(deepspeed):
    for rank in deepspeed:
        (stranded, put_back_2), (notes, put_back_3) = rank["interrupted"]
        assert len(stranded) == 1
        assert "load a checkpoint" in stranded[0]  # ZeRO-2 needs the others for its replicas
        assert notes == []  # ZeRO-3 does not
        assert put_back_2
        assert put_back_3


def test_fsdp1_is_refused():
    class FullyShardedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    with pytest.raises(ParallelismError, match=r"FSDP1.*fully_shard"):
        critical_sharpness(FullyShardedDataParallel(), lambda: 0.0, direction={})


def test_masters_in_half_precision_are_refused():
    live, masters = torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.bfloat16)
    with pytest.raises(ParallelismError, match=r"masters are torch\.bfloat16"):
        _check(Partition(masters, live, 0, [], None))


def test_deepspeed_is_not_imported_for_other_models():
    code = (
        "import sys, torch; from probe import critical_sharpness as measure; "
        "m = torch.nn.Linear(2, 1); o = torch.optim.SGD(m.parameters(), lr=0.1); "
        "f = lambda: m(torch.ones(1, 2)).square().mean(); f().backward(); "
        "measure(m, f, optimizer=o); print('deepspeed' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr
