"""Adam and plain gradient descent for R networks at once, a learning rate per layer of each.

The same numbers as `torch.optim.Adam` and `torch.optim.SGD` to rounding. Parameters lie flat,
so that a step is a dozen operations whatever the number of layers and networks. The counts of
steps are tensors on the device: nothing in a step waits for it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from probe.spec_continual import Adam, PlainSgd


class FlatOptimizer:
    """Optimizer state of R networks.

    Args:
        options: Which optimizer; its `learning_rate` is not used here.
        learning_rate: (R, L) one per network and layer.
        layers: The columns of each layer, (start, stop), one after the other.
    """

    def __init__(
        self,
        options: Adam | PlainSgd,
        learning_rate: Tensor,
        layers: Sequence[tuple[int, int]],
    ) -> None:
        self.options = options
        self._layers = list(layers)
        num_runs, size = len(learning_rate), self._layers[-1][1]
        device = learning_rate.device
        self.num_steps = torch.zeros(num_runs, dtype=torch.int64, device=device)
        self.is_adam = isinstance(options, Adam)
        shape = (num_runs, size if self.is_adam else 0)
        self.exp_avg = torch.zeros(shape, device=device)
        self.exp_avg_sq = torch.zeros(shape, device=device)
        self.learning_rate = learning_rate.clone()

    def set_learning_rate(self, learning_rate: Tensor) -> None:
        """Use these rates, (R, L), from the next step on."""
        self.learning_rate.copy_(learning_rate)  # in place: a recorded step reads it there

    def reset(self, is_reset: Tensor) -> None:
        """As new for the networks where `is_reset` (R,) is true; learning rates stay."""
        self.num_steps[is_reset] = 0
        self.exp_avg[is_reset] = 0
        self.exp_avg_sq[is_reset] = 0

    @torch.no_grad()
    def step(self, parameters: Tensor, gradient: Tensor) -> None:
        """One step, in place.

        Args:
            parameters: (R, P).
            gradient: (R, P), regularisers included; is overwritten, which saves the cache a buffer.

        Cost: 7 passes over (R, P) for Adam, one for SGD.
        """
        self.num_steps += 1
        if not isinstance(self.options, Adam):
            self._subtract(parameters, gradient, self.learning_rate)
            return
        beta1, beta2 = self.options.betas
        steps = self.num_steps.double().unsqueeze(1)
        correction1 = 1 - beta1**steps
        correction2 = (1 - beta2**steps).sqrt()
        self.exp_avg.lerp_(gradient, 1 - beta1)
        self.exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        # (m / c1) / (sqrt(v) / c2 + eps) = (c2 / c1) m / (sqrt(v) + c2 eps), a pass less.
        denominator = torch.sqrt(self.exp_avg_sq, out=gradient)
        denominator.add_((correction2 * self.options.eps).float())
        update = torch.div(self.exp_avg, denominator, out=gradient)
        factors = (self.learning_rate * (correction2 / correction1)).float()
        self._subtract(parameters, update, factors)

    def _subtract(self, parameters: Tensor, update: Tensor, factors: Tensor) -> None:
        """Theta -= factor * update, with the factor (R, L) of each network and layer."""
        for number, (start, stop) in enumerate(self._layers):
            factor = factors[:, number : number + 1]
            parameters[:, start:stop].addcmul_(update[:, start:stop], factor, value=-1)

    def state(self) -> dict[str, Tensor]:
        """Everything a later run needs to go on."""
        return {
            "num_steps": self.num_steps,
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "learning_rate": self.learning_rate,
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        for name in ("num_steps", "exp_avg", "exp_avg_sq"):
            getattr(self, name).copy_(state[name])
        self.set_learning_rate(state["learning_rate"])


def initial_learning_rates(rates: Sequence[float], num_layers: int, device: torch.device) -> Tensor:
    """(R, L): every layer of a network begins with the network's rate."""
    return torch.tensor(rates, device=device).unsqueeze(1).repeat(1, num_layers)
