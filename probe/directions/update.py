"""A whole model's update direction: which parameters move, and by what per unit of eta."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from probe.directions.blocks import inner_product
from probe.errors import DirectionError


@dataclass(frozen=True, eq=False)
class UpdateDirection:
    """Parameters that move and delta of each: a step is theta - eta * delta.

    Raises:
        DirectionError: Nothing moves, a delta is not finite, all deltas are zero, or two
            parameters share memory, so that one would be moved twice.

    Cost: one pass over delta (for its norm).
    """

    names: Sequence[str]  # fqn of each parameter
    parameters: Sequence[nn.Parameter]
    delta: Sequence[Tensor]  # each like its parameter; fp32 for half-precision ones
    slope: float | None  # dL/d eta at 0 = -delta.g where g is known
    norm: float = math.nan  # |delta| over all parameters; worked out here

    def __post_init__(self) -> None:
        _refuse_shared_memory(self.names, self.parameters)
        squares = 0.0
        for name, delta in zip(self.names, self.delta, strict=True):
            square = inner_product(delta, delta)
            if not math.isfinite(square):
                num_bad = int((~torch.isfinite(delta)).sum())
                raise DirectionError(
                    f"the update direction of {name!r} has {num_bad} of {delta.numel()} elements "
                    "that are NaN or infinite. Look at its gradient and optimizer state: an "
                    "overflowed backward, or eps = 0 with a zero second moment, does this."
                )
            squares += square
        if squares == 0.0:
            raise DirectionError(
                f"the update direction is zero in all {len(self.delta)} parameters that could "
                "move, so there is no ray to measure. Measure after a backward pass with a "
                "gradient that is not zero, or give another direction."
            )
        object.__setattr__(self, "norm", math.sqrt(squares))


def _refuse_shared_memory(names: Sequence[str], parameters: Sequence[nn.Parameter]) -> None:
    seen: dict[tuple[torch.device, int], str] = {}
    for name, parameter in zip(names, parameters, strict=True):
        if parameter.numel() == 0:
            continue
        first = seen.setdefault((parameter.device, parameter.data_ptr()), name)
        if first != name:
            raise DirectionError(
                f"{first!r} and {name!r} are two Parameters in the same memory, so a step would "
                "move it twice. Tie them by assigning one Parameter to both modules."
            )
