"""Everything that is measured on a batch of a training step, and the signals made of it.

Per layer and for the whole network: how large the optimizer's steps are, and the bounds on them
that gradient noise and the volatility of the sharpness set. Source: arXiv:2509.19698, sections 4
and 5 and appendix C.1; where its text is misprinted, `docs/continual-learning.md` says what is
meant. Measuring changes nothing of the training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from probe.continual.curvature import TopEigenvalues
from probe.continual.derivatives import BatchDerivatives, sums_by_layer, with_whole
from probe.continual.gradient_noise import GradientNoise, gradient_noise
from probe.continual.hessian_rank import hessian_rank
from probe.continual.indicators import unit_signs, weight_norms
from probe.continual.networks import BatchedMlp
from probe.continual.sharpness_history import SharpnessHistory
from probe.result_continual import Bound
from probe.spec_continual import Adam, PlainSgd, Signals


class OptimizerView(Protocol):
    """What the signals need of an optimizer."""

    learning_rate: Tensor  # (R, L)
    exp_avg_sq: Tensor  # (R, P) of Adam; not read for SGD
    num_steps: Tensor  # (R,) taken so far


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measurement of R runs; float64. NaN: the value does not exist.

    Attributes:
        layers: Every name of `LAYER_SIGNALS` -> (R, L + 1), the whole network last. A bound
            whose noise is zero is infinite.
        runs: `hessian_rank`, `unit_sign_entropy`, `dead_units` -> (R,).
        violations: (R, 3) in the order of `Bound`: whether some layer's effective step was above
            its bound. A value that does not exist is no violation.
    """

    layers: dict[str, Tensor]
    runs: dict[str, Tensor]
    violations: Tensor


@dataclass(frozen=True, slots=True)
class StepSizes:
    """What the optimizer's state says, (R, L + 1), float64; NaN before the first step of Adam.

    Attributes:
        learning_rate: eta; of the network the mean over its parameters.
        effective: Mean over parameters of eta / ((1 - b1^t)(sqrt(vhat) + eps)); SGD: eta.
        sharpness_factor: lambda_bar / lambda = eta / (RMS(sqrt(vhat)) + eps); SGD: 1.
    """

    learning_rate: Tensor
    effective: Tensor
    sharpness_factor: Tensor


class SignalTracker:
    """Measures R runs, with the history that the signals need.

    The first measurement, and the first after a reset, starts from random vectors and takes
    `signals.first_power_iterations` steps of power iteration before its own, for those runs only.

    Args:
        network: The networks.
        signals: What is measured, and its constants.
        optimizer: The kind of optimizer and its constants.
        draws: One generator per network, for start vectors of power iteration.
    """

    def __init__(
        self,
        network: BatchedMlp,
        signals: Signals,
        optimizer: Adam | PlainSgd,
        draws: Sequence[np.random.Generator],
    ) -> None:
        self._signals = signals
        self._optimizer = optimizer
        self._eigenvalues = TopEigenvalues(network, draws)
        shape = (network.num_runs, len(network.layers) + 1)
        self._history = SharpnessHistory(shape, signals.ema, network.device)
        self._is_fresh = torch.ones(network.num_runs, dtype=torch.bool, device=network.device)

    def reset(self, is_reset: Tensor, draws: Sequence[np.random.Generator]) -> None:
        """Forget the history of the runs where `is_reset` (R,) is true.

        Args:
            is_reset: (R,).
            draws: One generator per network; those of the others are not touched.
        """
        self._eigenvalues.reset(is_reset, draws)
        self._history.reset(is_reset)
        self._is_fresh |= is_reset

    @torch.no_grad()
    def measure(
        self,
        network: BatchedMlp,
        parameters: Tensor,
        x: Tensor,
        y: Tensor,
        optimizer: OptimizerView,
    ) -> Measurement:
        """Measure every run on its batch, as it stands before the step.

        Args:
            network: The networks.
            parameters: (R, P).
            x: (R, B, num_inputs).
            y: (R, B) classes.
            optimizer: Its state.

        Returns:
            The measurement; it has entered the moving averages. Neither parameters nor running
            statistics of normalisation have changed.

        Cost: about 2 gradient steps and 2.4 for each of `power_iterations` + 1 products, for two
        hidden layers; eigenvalues of an M x M matrix per run.
        """
        derivatives = BatchDerivatives(network, parameters, x, y)
        noise = gradient_noise(derivatives)
        sharpness, residual = self._sharpness(derivatives)
        steps = step_sizes(network, self._optimizer, optimizer)
        normalized = steps.sharpness_factor * sharpness
        mean, volatility = self._history.follow(normalized)
        bounds = _bounds(self._signals, x.shape[1], noise, volatility)
        gradient_norm = noise.gradient_squared.sqrt()
        weight_norm = weight_norms(network, parameters)
        layers = {
            "learning_rate": steps.learning_rate,
            "effective_step": steps.effective,
            "gradient_norm": gradient_norm,
            "noise_variance": noise.variance,
            "sharpness": sharpness,
            "sharpness_residual": residual,
            "normalized_sharpness": normalized,
            "sharpness_mean": mean,
            "volatility": volatility,
            **{f"bound_{name}": bound for name, bound in bounds.items()},
            "weight_norm": weight_norm,
            "gradient_to_parameter": gradient_norm / weight_norm,
        }
        return Measurement(layers, self._of_runs(derivatives), violations(steps.effective, bounds))

    def _of_runs(self, derivatives: BatchDerivatives) -> dict[str, Tensor]:
        entropy, dead = unit_signs(derivatives.trace.pre_activations)
        return {
            "hessian_rank": hessian_rank(derivatives, self._signals.rank_samples),
            "unit_sign_entropy": entropy,
            "dead_units": dead,
        }

    def state(self) -> dict[str, Tensor]:
        """Everything a later measurement depends on."""
        vectors = {f"vectors.{name}": value for name, value in self._eigenvalues.state().items()}
        return {"is_fresh": self._is_fresh, **self._history.state(), **vectors}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave for the same networks."""
        self._history.load(state)
        self._is_fresh.copy_(state["is_fresh"])
        prefix = "vectors."
        self._eigenvalues.load(
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        )

    def _sharpness(self, derivatives: BatchDerivatives) -> tuple[Tensor, Tensor]:
        if bool(self._is_fresh.any()):
            first = self._signals.first_power_iterations
            self._eigenvalues.estimate(derivatives, first, self._is_fresh)
            self._is_fresh.zero_()
        return self._eigenvalues.estimate(derivatives, self._signals.power_iterations)


def step_sizes(network: BatchedMlp, kind: Adam | PlainSgd, optimizer: OptimizerView) -> StepSizes:
    """The sizes of an optimizer's steps.

    Args:
        network: Says which parameter belongs to which layer.
        kind: The optimizer and its constants.
        optimizer: Its state.

    Cost: three passes over (R, P) for Adam.
    """
    rates = optimizer.learning_rate.double()
    widths = [layer.stop - layer.start for layer in network.layers]
    sizes = torch.tensor(widths, dtype=torch.float64, device=rates.device)
    counts = with_whole(sizes.expand_as(rates))
    learning_rate = with_whole(rates * sizes) / counts
    if not isinstance(kind, Adam):
        return StepSizes(learning_rate, learning_rate, torch.ones_like(learning_rate))
    num_steps = optimizer.num_steps.double().unsqueeze(1)
    beta1, beta2 = kind.betas
    corrected = optimizer.exp_avg_sq * (1 / (1 - beta2**num_steps)).to(optimizer.exp_avg_sq.dtype)
    root_mean_square = (with_whole(sums_by_layer(network, corrected)) / counts).sqrt()
    multipliers = sums_by_layer(network, corrected.sqrt().add_(kind.eps).reciprocal_())
    effective = with_whole(multipliers * rates) / (counts * (1 - beta1**num_steps))
    return StepSizes(learning_rate, effective, learning_rate / (root_mean_square + kind.eps))


def _bounds(
    signals: Signals, batch_size: int, noise: GradientNoise, volatility: Tensor
) -> dict[str, Tensor]:
    """The three bounds on the effective step, (R, L + 1) each.

    alpha_g* = B |g|^2 / sigma2_ps,  alpha_vol* = 1 / (kappa Vol),
    alpha~* = B |g|^2 / (sigma2_ps + beta |g|^2 Vol)
    """
    squared = noise.gradient_squared
    return {
        "gradient": batch_size * squared / noise.variance,
        "curvature": 1 / (signals.kappa * volatility),
        "combined": batch_size * squared / (noise.variance + signals.beta * squared * volatility),
    }


def violations(effective: Tensor, bounds: dict[str, Tensor]) -> Tensor:
    """(R, 3) in the order of `Bound`: whether some layer's effective step was above its bound.

    Args:
        effective: (R, L + 1); the whole network, the last column, does not count.
        bounds: Of every name of `Bound`, (R, L + 1). One that is NaN is not exceeded.
    """
    above = [(effective > bounds[name])[:, :-1].any(dim=1) for name in get_args(Bound)]
    return torch.stack(above, dim=1)
