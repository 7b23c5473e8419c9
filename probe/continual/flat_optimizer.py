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
        layer_of_parameter: (P,) the layer of each column.
    """

    def __init__(
        self, options: Adam | PlainSgd, learning_rate: Tensor, layer_of_parameter: Tensor
    ) -> None:
        self.options = options
        self._layer_of_parameter = layer_of_parameter
        num_runs, size = len(learning_rate), len(layer_of_parameter)
        device = learning_rate.device
        self.num_steps = torch.zeros(num_runs, dtype=torch.int64, device=device)
        self.is_adam = isinstance(options, Adam)
        shape = (num_runs, size if self.is_adam else 0)
        self.exp_avg = torch.zeros(shape, device=device)
        self.exp_avg_sq = torch.zeros(shape, device=device)
        self._buffer = torch.empty(num_runs, size, device=device)
        self._rate_of_parameter = torch.empty(num_runs, size, device=device)
        self.learning_rate = learning_rate
        self.set_learning_rate(learning_rate)

    def set_learning_rate(self, learning_rate: Tensor) -> None:
        """Use these rates, (R, L), from the next step on."""
        self.learning_rate = learning_rate
        torch.index_select(learning_rate, 1, self._layer_of_parameter, out=self._rate_of_parameter)

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
            gradient: (R, P), regularisers included.

        Cost: 8 passes over (R, P) for Adam, 2 for SGD.
        """
        self.num_steps += 1
        if not isinstance(self.options, Adam):
            parameters.addcmul_(self._rate_of_parameter, gradient, value=-1)
            return
        beta1, beta2 = self.options.betas
        steps = self.num_steps.double().unsqueeze(1)
        correction1 = 1 - beta1**steps
        correction2 = (1 - beta2**steps).sqrt()
        self.exp_avg.lerp_(gradient, 1 - beta1)
        self.exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        # (m / c1) / (sqrt(v) / c2 + eps) = (c2 / c1) m / (sqrt(v) + c2 eps), a pass less.
        denominator = torch.sqrt(self.exp_avg_sq, out=self._buffer)
        denominator.add_((correction2 * self.options.eps).float())
        update = torch.div(self.exp_avg, denominator, out=self._buffer)
        update.mul_(self._rate_of_parameter)
        parameters.addcmul_(update, (correction2 / correction1).float(), value=-1)

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
        self.set_learning_rate(state["learning_rate"].to(self.learning_rate.device))


def initial_learning_rates(rates: Sequence[float], num_layers: int, device: torch.device) -> Tensor:
    """(R, L): every layer of a network begins with the network's rate."""
    return torch.tensor(rates, device=device).unsqueeze(1).repeat(1, num_layers)
