"""The course of the normalised sharpness: its moving average and its volatility.

m_t = nu m_{t-1} + (1 - nu) lambda_bar_t,  mu_t = m_t / (1 - nu^t),
Vol_t = (lambda_bar_t - mu_t)^2 / (mu_t + eps)

Source: arXiv:2509.19698, equation 1, with the correction of the average's bias outside the
recursion and nu as the weight of the past.
"""

import torch
from torch import Tensor

_EPS = 1e-8  # of the volatility


class SharpnessHistory:
    """Moving averages of R runs, per layer and of the whole network.

    Args:
        shape: (R, L + 1).
        nu: Weight of the past, between 0 and 1.
        device: Where they live.
    """

    def __init__(self, shape: tuple[int, int], nu: float, device: torch.device) -> None:
        self._nu = nu
        # m, and how many values are in it; in float64 to take 1 - nu^t exactly.
        self._average = torch.zeros(shape, dtype=torch.float64, device=device)
        self._count = torch.zeros(shape, dtype=torch.int64, device=device)

    def follow(self, sharpness: Tensor) -> tuple[Tensor, Tensor]:
        """Let the values of one measurement enter.

        Args:
            sharpness: lambda_bar, (R, L + 1), float64. A value that is not finite does not enter,
                so that one bad batch does not end a history.

        Returns:
            mu and Vol, (R, L + 1). NaN at a value that is not finite; Vol also where mu is below
            0. The first value is its own mean: Vol is exactly 0.
        """
        exists = sharpness.isfinite()
        moved = self._nu * self._average + (1 - self._nu) * sharpness
        self._average = torch.where(exists, moved, self._average)
        self._count += exists
        mean = self._average / (1 - self._nu ** self._count.double())
        mean = torch.where(self._count == 1, sharpness, mean)  # without rounding
        mean = torch.where(exists, mean, torch.nan)
        volatility = (sharpness - mean).square() / (mean + _EPS)
        return mean, torch.where(mean >= 0, volatility, torch.nan)

    def reset(self, is_reset: Tensor) -> None:
        """Forget the runs where `is_reset` (R,) is true."""
        self._average[is_reset] = 0
        self._count[is_reset] = 0

    def state(self) -> dict[str, Tensor]:
        """Everything a later value depends on."""
        return {"average": self._average, "count": self._count}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self._average.copy_(state["average"])
        self._count.copy_(state["count"])
