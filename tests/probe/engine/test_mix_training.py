"""The loop of training steps: what it keeps, and where it ends."""

import math
import weakref
from itertools import count
from typing import Any

import torch
from torch import Tensor

from probe.mix_training import train_steps
from probe.progress import Meter


class Steps:
    """Stands for the model and its optimizer: losses are given, gradients only made."""

    def __init__(self, losses: list[float]) -> None:
        self._losses = iter(losses)
        self._made: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []  # earlier gradients, when another was made
        self.rates: list[float] = []

    def loss_and_gradient(self, batch: Any, meter: Meter) -> tuple[float, list[Tensor | None]]:
        self.alive.append(sum(earlier() is not None for earlier in self._made))
        grad = torch.ones(2)
        self._made.append(weakref.ref(grad))
        return next(self._losses), [grad]

    def step(self, grads: list[Tensor | None], learning_rate: float) -> None:
        self.rates.append(learning_rate)


def trained(steps: Steps, rates: list[float]) -> Any:
    return train_steps(steps, steps, count(), rates, Meter(None))  # type: ignore[arg-type]


def test_one_gradient_stands_in_memory_at_a_time() -> None:
    steps = Steps([3.0, 2.0, 1.0])
    run = trained(steps, [0.1, 0.2, 0.3])
    assert (run.losses, run.num_steps, run.diverged) == ([3.0, 2.0, 1.0], 3, False)
    assert steps.rates == [0.1, 0.2, 0.3]
    assert steps.alive == [0, 0, 0]


def test_a_loss_that_is_no_number_ends_the_run_before_its_step() -> None:
    for broken in (math.nan, math.inf):
        steps = Steps([3.0, broken, 1.0])
        run = trained(steps, [0.1, 0.2, 0.3])
        assert (run.losses, run.num_steps, run.diverged) == ([3.0, None], 1, True)
        assert steps.rates == [0.1]
