"""What only FSDP2 can get wrong: each guard is needed, each failure is told."""

import pytest
import torch
from sharded_cases import write_model

from probe.checkpoints import open_checkpoint
from probe.errors import CheckpointError, ConfigError, ParallelismError
from probe.parallel.buffers import fill_buffers
from probe.parallel.fsdp2 import Fsdp2Model
from probe.parallel.islands import refuse_fp32_islands
from probe.result import CheckpointRef

pytestmark = pytest.mark.distributed

CPU = torch.device("cpu")


@pytest.fixture(params=[2, 3], ids=["2 ranks", "3 ranks"])
def gang(request, run_gang):
    return run_gang("fsdp2", request.param)


def test_a_group_left_gathered_answers_with_old_weights_unless_pushed(gang):
    truth = gang.truths["plain-float32"]["losses"]
    for rank in gang.ranks:
        assert rank["traps"]["kept_gathered_but_pushed"] == truth
        assert rank["traps"]["kept_gathered_not_pushed"] != truth


def test_shards_taken_before_the_lazy_set_up_are_not_what_is_run(gang):
    truth = gang.truths["plain-float32"]["losses"]
    for rank in gang.ranks:
        assert rank["traps"]["captured_late"] == truth  # after the warm-up pass, as the code does
        assert rank["traps"]["captured_early"] != truth


def test_shards_that_are_not_fsdps_own_are_noticed(gang):
    for rank in gang.ranks:
        assert rank["traps"]["not_fsdps_own"] == "parallelism_error"


def test_cast_forward_inputs_would_change_bf16_losses(gang):
    for rank in gang.ranks:
        assert rank["traps"]["inputs_cast"] != gang.truths["plain-bfloat16"]["losses"]


def test_buffers_outside_the_checkpoint_must_be_filled(gang):
    for rank in gang.ranks:
        assert rank["traps"]["buffers_not_filled"] != gang.truths["plain-float32"]["losses"]


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


def skeleton_of(directory):
    ref = CheckpointRef(source="local", location=str(directory))
    return open_checkpoint(ref).skeleton("sdpa")


def test_without_a_process_group_the_error_says_what_to_start():
    with pytest.raises(ParallelismError, match="torchrun"):
        Fsdp2Model(None, None, CPU, dtype=torch.float32)


def test_a_buffer_nobody_can_recompute_is_refused(prepared):
    model = skeleton_of(prepared.root / "plain").to_empty(device="cpu")
    model.model.register_buffer("mask", torch.ones(3), persistent=False)
    with pytest.raises(CheckpointError, match=r"model\.mask is in no checkpoint"):
        fill_buffers(model)


def test_weights_kept_in_fp32_are_refused_under_half_precision(prepared):
    model = skeleton_of(prepared.root / "plain")
    model._keep_in_fp32_modules = ["norm"]
    refuse_fp32_islands(model, torch.float32)
    with pytest.raises(ConfigError, match="keeps norm in float32"):
        refuse_fp32_islands(model, torch.bfloat16)


def test_an_architecture_nobody_knows_is_a_checkpoint_error(tmp_path):
    write_model(tmp_path / "model", tied=False)
    (tmp_path / "model" / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(CheckpointError, match=r"config\.json: not usable"):
        skeleton_of(tmp_path / "model")
