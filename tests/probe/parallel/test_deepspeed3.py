"""What only ZeRO-3 can get wrong: each guard is needed, each failure is told."""

import subprocess
import sys

import pytest
import torch
from sharded_cases import ROOT, joined

from probe.errors import ConfigError, ParallelismError
from probe.parallel import deepspeed_library
from probe.parallel.deepspeed3 import DeepSpeed3Model
from probe.parallel.deepspeed_library import import_deepspeed

pytestmark = pytest.mark.distributed

CPU = torch.device("cpu")


@pytest.fixture
def gang(run_gang):
    return run_gang("deepspeed3", 2)


def test_persistent_parameters_are_seen_only_when_pushed(gang):
    """By DeepSpeed's own threshold all of this model's parameters stay gathered."""
    truth = gang.truths["plain-float32"]["losses"]
    for rank in gang.ranks:
        assert rank["traps"]["persistent_but_pushed"] == truth
        assert rank["traps"]["persistent_not_pushed"] != truth


def test_gathered_parameters_answer_with_old_weights_unless_pushed(gang):
    truth = gang.truths["plain-float32"]["losses"]
    for rank in gang.ranks:
        assert rank["traps"]["gathered_but_pushed"] == truth
        assert rank["traps"]["gathered_not_pushed"] != truth


def test_partitioning_must_not_take_the_gathered_copy_back(gang):
    truth = gang.truths["plain-float32"]["losses"]
    for rank in gang.ranks:
        assert rank["traps"]["partitioned_as_updated"] != truth


def test_rotary_angles_in_half_precision_would_change_bf16_losses(gang):
    for rank in gang.ranks:
        assert rank["traps"]["angles_rounded"] != gang.truths["plain-bfloat16"]["losses"]


def test_buffers_outside_the_checkpoint_must_be_filled(gang):
    for rank in gang.ranks:
        assert rank["traps"]["buffers_not_filled"] != gang.truths["plain-float32"]["losses"]


def test_shards_that_are_not_deepspeeds_own_are_noticed(gang):
    for rank in gang.ranks:
        assert rank["traps"]["not_deepspeeds_own"] == "parallelism_error"


def test_bf16_gradients_are_the_single_process_ones(gang):
    """The nodes DeepSpeed puts into the graph would have them added in another order."""
    for name in ("plain-bfloat16", "tied-bfloat16"):
        found = joined(gang.ranks, name, "gradient")
        for fqn, gradient in gang.truths[name]["gradient"].items():
            torch.testing.assert_close(
                found[fqn], gradient, rtol=0, atol=16 * 2**-24 * gradient.abs().max().item()
            )


def test_no_gathered_weight_outlives_its_forward_pass(gang):
    for rank in gang.ranks:
        assert rank["memory"]["ours"] == []
        assert "model.layers.0.mlp.up_proj.weight" in rank["memory"]["autograds_own"]


def test_a_gradient_that_broke_off_leaves_nothing_behind(gang):
    for rank in gang.ranks:
        for found, expected in zip(rank["again"], rank["plain-float32"]["gradient"], strict=True):
            assert torch.equal(found, expected)


def test_torchs_linear_is_left_alone(gang):
    assert all(rank["linear_is_torchs"] for rank in gang.ranks)


def test_a_failure_on_one_rank_is_raised_on_all(gang):
    for index, rank in enumerate(gang.ranks):
        code, message = rank["refusals"]["one_rank_cannot_read"]
        assert code == ("checkpoint_error" if index == 1 else "parallelism_error")
        assert ("cannot read model.norm.weight" if index == 1 else "rank 1") in message


def test_a_weight_of_another_size_is_refused(gang):
    for rank in gang.ranks:
        code, message = rank["refusals"]["wrong_size"]
        assert code == "checkpoint_error"
        assert "'model.embed_tokens.weight' has shape [97, 20], expected [96, 20]" in message


def test_a_dtype_deepspeed_does_not_run_here_is_refused(gang):
    for rank in gang.ranks:
        code, message = rank["refusals"]["half_precision"]
        assert code == "config_error"
        assert "does not run float16 on this cpu device" in message


def test_without_a_process_group_the_error_says_what_to_start():
    with pytest.raises(ParallelismError, match="torchrun"):
        DeepSpeed3Model(None, None, CPU, dtype=torch.float32)


def test_without_deepspeed_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(deepspeed_library, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'sharpness-probe\[deepspeed\]'"):
        import_deepspeed(CPU, torch.float32)


def test_deepspeed_is_imported_only_by_who_asks_for_it():
    program = (
        "import sys, probe.engine, probe.parallel.deepspeed3\n"
        "sys.exit(any(name.partition('.')[0] == 'deepspeed' for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=120)
    assert done.returncode == 0
