"""Every sharded back-end gives the single process's numbers, the losses bit for bit."""

import pytest
import torch
from sharded_cases import CASES, ETAS, joined

pytestmark = pytest.mark.distributed

GANGS = [("fsdp2", 2), ("fsdp2", 3), ("deepspeed3", 2)]


@pytest.fixture(params=GANGS, ids=[f"{name} on {size}" for name, size in GANGS])
def gang(request, run_gang):
    return run_gang(*request.param)


@pytest.mark.parametrize("name", CASES)
def test_losses_along_the_ray_are_identical(gang, name):
    for rank in gang.ranks:
        assert rank[name]["losses"] == gang.truths[name]["losses"]
        assert rank[name]["losses_again"] == gang.truths[name]["losses"][:2]
        assert rank[name]["losses_after_backward"] == gang.truths[name]["losses"][:2]
        assert rank[name]["head_path"] == "chunked"
        assert rank[name]["unseen"] == []


@pytest.mark.parametrize("name", CASES)
def test_brackets_and_trials_are_identical(gang, name):
    for rank in gang.ranks:
        assert rank[name]["searches"] == gang.truths[name]["searches"]


@pytest.mark.parametrize("name", CASES)
def test_the_engines_search_records_the_same(gang, name):
    # The loss resolution is bf16's too, though FSDP2's live shards are fp32.
    assert gang.truths[name]["measured"]["outcome"] == "converged"
    for rank in gang.ranks:
        assert rank[name]["measured"] == gang.truths[name]["measured"]


@pytest.mark.parametrize("name", CASES)
def test_the_base_is_the_checkpoint_in_fp32_and_is_restored(gang, name):
    truth = gang.truths[name]
    base = joined(gang.ranks, name, "shards")
    assert base.keys() == truth["base"].keys()
    for fqn, value in truth["base"].items():
        assert base[fqn].dtype == torch.float32
        assert torch.equal(base[fqn], value), fqn
    for rank in gang.ranks:
        assert rank[name]["restored"]
        assert rank[name]["buffers"].keys() == truth["buffers"].keys()
        for fqn, buffer in truth["buffers"].items():
            assert torch.equal(rank[name]["buffers"][fqn], buffer), fqn


@pytest.mark.parametrize("name", CASES)
def test_no_rank_reads_more_than_its_rows(gang, name):
    for rank in gang.ranks:
        own = {fqn: hi - lo for fqn, lo, hi, _ in rank[name]["shards"]}
        assert rank[name]["num_read"] == own
    total = sum(v.numel() for v in gang.truths[name]["base"].values())
    assert sum(sum(rank[name]["num_read"].values()) for rank in gang.ranks) == total
    assert {rank[name]["num_parameters"] for rank in gang.ranks} == {total}


@pytest.mark.parametrize("name", CASES)
def test_gradients_agree_to_rounding(gang, name):
    # Both add the same 5 fp32 micro-batch gradients, in another order: at most 4 roundings
    # of partial sums, which are no larger than a few times the largest element.
    truth = gang.truths[name]
    found = joined(gang.ranks, name, "gradient")
    for fqn, gradient in truth["gradient"].items():
        assert found[fqn].dtype == torch.float32
        torch.testing.assert_close(
            found[fqn], gradient, rtol=0, atol=16 * 2**-24 * gradient.abs().max().item()
        )
    for rank in gang.ranks:
        assert rank[name]["backward_mean"] == truth["backward_mean"]


@pytest.mark.parametrize("name", CASES)
def test_clip_direction_and_slope_are_of_the_whole_gradient(gang, name):
    truth = gang.truths[name]
    assert len({rank[name]["slope"] for rank in gang.ranks}) == 1
    # First order in the gradient's relative error of about 1e-6.
    assert gang.ranks[0][name]["slope"] == pytest.approx(truth["slope"], rel=1e-5)
    found = joined(gang.ranks, name, "delta")
    for fqn, delta in truth["delta"].items():
        torch.testing.assert_close(
            found[fqn], delta, rtol=1e-4, atol=1e-5 * delta.abs().max().item()
        )


@pytest.mark.parametrize("name", CASES)
def test_directions_after_a_warm_up_agree(gang, name):
    # Adam of an unchanging gradient: nearly its sign, so elements near 0 are left out.
    truth = gang.truths[name]
    assert gang.ranks[0][name]["warm_slope"] == pytest.approx(truth["warm_slope"], rel=1e-5)
    found = joined(gang.ranks, name, "warm_delta")
    for fqn, delta in truth["warm_delta"].items():
        gradient = truth["gradient"][fqn].abs()
        clear = gradient > 1e-3 * gradient.max()
        torch.testing.assert_close(found[fqn][clear], delta[clear], rtol=1e-3, atol=1e-6)


def test_every_rank_runs_as_many_passes(gang):
    num_ranks = len(gang.ranks)
    rounds = -(-5 // num_ranks)
    for rank in gang.ranks:
        assert rank["plain-float32"]["num_passes"] == rounds * len(ETAS)
