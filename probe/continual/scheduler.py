"""The step-size scheduler of arXiv:2509.19698, algorithm 1, for R networks at once.

Every K steps, per layer: above its safe bound (1 - safety) * bound a layer's learning rate is
cooled; far below it, early in the stream, it is warmed. Its variants (one decision for the whole
network, one of the two signals alone) are the same rule on other numbers.
"""

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from probe.result_continual import Bound
from probe.spec_continual import Scheduler


class SchedulerGroup:
    """The schedulers of R networks; a network without one keeps its learning rates.

    Args:
        schedulers: Of every network.
        total_steps: Of the whole stream (T).
        device: Where the learning rates live.
    """

    def __init__(
        self, schedulers: Sequence[Scheduler | None], total_steps: int, device: torch.device
    ) -> None:
        self.is_any = any(scheduler is not None for scheduler in schedulers)
        plain = Scheduler()
        filled = [scheduler or plain for scheduler in schedulers]

        def column(values: list[float] | list[bool]) -> Tensor:
            return torch.tensor(values, device=device).unsqueeze(1)

        self._has_one = column([scheduler is not None for scheduler in schedulers])
        self._is_network = column([s.scope == "network" for s in filled])
        self._safe_share = column([1 - s.safety for s in filled])
        self._cool = column([s.cool for s in filled])
        self._warm = column([s.warm for s in filled])
        self._min_step = column([s.min_effective_step for s in filled])
        ends = [[s.warm_until * total_steps] for s in filled]
        # In float32 0.3 is too large, and the last decision could fall on the wrong side.
        self._warm_before = torch.tensor(ends, dtype=torch.float64, device=device)
        self._warm_below = column([s.warm_below for s in filled])
        numbers = [get_args(Bound).index(s.signal) for s in filled]
        self._signal = torch.tensor(numbers, device=device)
        self._row = torch.arange(len(filled), device=device)

    def decide(self, learning_rate: Tensor, layers: dict[str, Tensor], step: int) -> Tensor:
        """The learning rates from now on.

        Args:
            learning_rate: (R, L) now.
            layers: Signals (R, L + 1), the whole network last: `effective_step` and the bounds.
                A bound that is infinite never cools; one that is NaN (no measurement) changes
                nothing.
            step: Number of the step about to be taken, from 1 (t): K, 2K, ...

        Returns:
            (R, L).
        """
        bounds = torch.stack([layers[f"bound_{name}"] for name in get_args(Bound)])
        bound = bounds[self._signal, self._row]
        effective = self._per_layer(layers["effective_step"])
        safe = self._safe_share * self._per_layer(bound)
        is_hot = (effective > safe) & (effective > self._min_step)
        is_early = step < self._warm_before
        is_timid = ~is_hot & is_early & (effective < self._warm_below * safe)
        factor = torch.ones_like(learning_rate)
        factor = torch.where(is_hot, self._cool, factor)
        factor = torch.where(is_timid, self._warm, factor)
        return torch.where(self._has_one, learning_rate * factor, learning_rate)

    def _per_layer(self, values: Tensor) -> Tensor:
        """(R, L + 1) -> (R, L): each layer's own value, or the network's for all its layers."""
        return torch.where(self._is_network, values[:, -1:], values[:, :-1])
