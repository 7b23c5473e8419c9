"""The direction of a sharded run, on the only rank of one: its sums, and what is no number."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from probe.agreement import Agreement
from probe.directions.sharded import sharded_mapping_direction, sharded_optimizer_direction
from probe.errors import DirectionError
from probe.parallel.live import LiveShard, ShardStep


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(2))
        self.b = nn.Parameter(torch.zeros(3))


def run_of(model: Model, deltas: dict[str, Tensor] | None = None) -> Any:
    """A run in the middle of a step: gradients of ones, and these as the optimizer's step."""
    shards = [
        LiveShard(name, p.shape, p.detach(), p.detach(), lambda whole: whole)
        for name, p in model.named_parameters()
    ]

    def steps(optimizer: Any) -> list[ShardStep]:
        assert deltas is not None
        return [
            ShardStep(shard, torch.ones(shard.shape), lambda grad, name=shard.name: deltas[name])
            for shard in shards
        ]

    return SimpleNamespace(
        shards=lambda: shards, steps=steps, num_copies=1, loss_scale=1.0, clip_grad_norm=None
    )


def test_norm_and_slope_are_sums_over_the_shards() -> None:
    model = Model()
    deltas = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([0.0, -4.0, 0.0])}
    own = sharded_optimizer_direction(run_of(model, deltas), None, Agreement())
    assert own.norm == 5.0
    assert own.slope == 1.0  # -delta.g, g of ones: -(3 - 4)
    given = sharded_mapping_direction(run_of(model), model, deltas, Agreement())
    assert (given.norm, given.slope) == (5.0, None)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_direction_that_is_no_number_is_named(broken: float) -> None:
    model = Model()
    deltas = {"a": torch.ones(2), "b": torch.tensor([1.0, broken, broken])}
    message = r"update direction of 'b' has 2 elements that are NaN or infinite on this rank"
    with pytest.raises(DirectionError, match=message):
        sharded_optimizer_direction(run_of(model, deltas), None, Agreement())
    with pytest.raises(DirectionError, match=message):
        sharded_mapping_direction(run_of(model), model, deltas, Agreement())
