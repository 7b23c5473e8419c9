"""The direction of a mixture is refused where it is no number."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from probe.errors import DirectionError
from probe.mix_direction import CheckpointMixtures, WarmupMixtures
from probe.spec import AdamW


def model_of(*weights: torch.Tensor, broken_elsewhere: float = 0.0) -> Any:
    """Of these weights on this rank, and of another rank with so many broken shards."""
    shards = [
        SimpleNamespace(name=f"w{i}", live=w, base=w, base_on_device=lambda w=w: w)
        for i, w in enumerate(weights)
    ]
    return SimpleNamespace(
        shards=shards, sum_over_ranks=lambda values: [v + broken_elsewhere for v in values]
    )


def rule(*weights: torch.Tensor, broken_elsewhere: float = 0.0) -> WarmupMixtures:
    model = model_of(*weights, broken_elsewhere=broken_elsewhere)
    return WarmupMixtures(model, AdamW(no_decay=[]), 2, buffers=torch.float32)


def saved_rule(weight: torch.Tensor, exp_avg: float, exp_avg_sq: float) -> CheckpointMixtures:
    """Moments as a checkpoint saved them after one step, alike in all elements but the last."""

    def but_the_last(value: float) -> torch.Tensor:
        moment = torch.ones_like(weight)
        moment[-1] = value
        return moment

    moments = SimpleNamespace(
        before=lambda index: (but_the_last(exp_avg), but_the_last(exp_avg_sq)),
        step_after=lambda index: 2,
    )
    return CheckpointMixtures(model_of(weight), AdamW(no_decay=[]), moments)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_direction_that_is_no_number_is_named(broken):
    mixtures = rule(torch.zeros(3), torch.zeros(0), torch.tensor([0.0, broken]))
    grads = [torch.ones(3), torch.ones(0), torch.ones(2)]
    mixtures.begin_repeat([grads, grads])
    with pytest.raises(DirectionError, match=r"'w2' at shares 0\.25, 0\.75 is not finite"):
        mixtures.direction([0.25, 0.75])


@pytest.mark.parametrize(
    ("exp_avg", "exp_avg_sq"),
    [(math.nan, 1.0), (math.inf, 1.0), (-math.inf, 1.0), (1.0, math.nan), (1.0, -5.0)],
)
def test_saved_moments_that_give_no_number_are_named(exp_avg, exp_avg_sq):
    grads = [torch.ones(3)]
    whole = saved_rule(torch.zeros(3), 1.0, 1.0)
    whole.begin_repeat([grads, grads])
    assert whole.direction([0.25, 0.75])[0].isfinite().all()
    mixtures = saved_rule(torch.zeros(3), exp_avg, exp_avg_sq)
    mixtures.begin_repeat([grads, grads])
    with pytest.raises(DirectionError, match=r"'w0' at shares 0\.25, 0\.75 is not finite"):
        mixtures.direction([0.25, 0.75])


def test_a_rank_whose_own_part_is_whole_stops_with_the_others():
    """It would wait for them for ever in the next loss."""
    mixtures = rule(torch.zeros(2), broken_elsewhere=1.0)
    mixtures.begin_repeat([[torch.ones(2)], [torch.ones(2)]])
    with pytest.raises(DirectionError, match=r"another rank's shard at shares 0\.5, 0\.5"):
        mixtures.direction([0.5, 0.5])


def test_weights_no_source_reaches_stay():
    mixtures = rule(torch.ones(2), torch.ones(2))
    mixtures.begin_repeat([[torch.ones(2), None], [torch.ones(2), None]])
    moved, still = mixtures.direction([0.5, 0.5])
    torch.testing.assert_close(moved, torch.full((2,), 1.0 + 0.1))  # the gradient's sign, decay
    assert torch.equal(still, torch.zeros(2))
