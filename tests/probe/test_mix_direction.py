"""The direction of a mixture is refused where it is no number."""

import math
from types import SimpleNamespace

import pytest
import torch

from probe.errors import DirectionError
from probe.mix_direction import WarmupMixtures
from probe.spec import AdamW


def rule(*weights: torch.Tensor) -> WarmupMixtures:
    """On a model of these weights, all on this rank."""
    shards = [
        SimpleNamespace(name=f"w{i}", live=w, base=w, base_on_device=lambda w=w: w)
        for i, w in enumerate(weights)
    ]
    model = SimpleNamespace(shards=shards, sum_over_ranks=lambda values: values)
    return WarmupMixtures(model, AdamW(no_decay=[]), 2, buffers=torch.float32)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_direction_that_is_no_number_is_named(broken):
    mixtures = rule(torch.zeros(3), torch.zeros(0), torch.tensor([0.0, broken]))
    grads = [torch.ones(3), torch.ones(0), torch.ones(2)]
    mixtures.begin_repeat([grads, grads])
    with pytest.raises(DirectionError, match=r"'w2' at shares 0\.25, 0\.75 is not finite"):
        mixtures.direction([0.25, 0.75])


def test_weights_no_source_reaches_stay():
    mixtures = rule(torch.ones(2), torch.ones(2))
    mixtures.begin_repeat([[torch.ones(2), None], [torch.ones(2), None]])
    moved, still = mixtures.direction([0.5, 0.5])
    torch.testing.assert_close(moved, torch.full((2,), 1.0 + 0.1))  # the gradient's sign, decay
    assert torch.equal(still, torch.zeros(2))
