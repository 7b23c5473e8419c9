"""Simple signs of a network's health: how its units fire, and norms.

Older explanations of the loss of trainability, measured beside the signals that
arXiv:2509.19698 proposes.
"""

import math

import torch
from torch import Tensor

from probe.continual.derivatives import squares_by_layer, with_whole
from probe.continual.networks import BatchedMlp


@torch.no_grad()
def unit_signs(pre_activations: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Unit-sign entropy and dead units over all hidden units.

        entropy = mean over units of H2(p),  p = share of the batch with pre-activation > 0

    For every activation the sign is that of the pre-activation, after normalisation; so for
    tanh, linear and leaky ReLU a "dead" unit is one that never leaves its negative side, not
    one that gives nothing.

    Args:
        pre_activations: Of every hidden layer, (R, B, units).

    Returns:
        (R,) mean binary entropy, bits, and (R,) share of units with p = 0; both float64, NaN
        where a pre-activation is not finite.
    """
    shares = [(z > 0).double().mean(dim=1) for z in pre_activations]
    positive = torch.cat(shares, dim=1)  # (R, all hidden units)
    negative = 1 - positive
    nats = -torch.special.xlogy(positive, positive) - torch.special.xlogy(negative, negative)
    is_finite = torch.stack([z.isfinite().flatten(1).all(dim=1) for z in pre_activations])
    exists = is_finite.all(dim=0)
    entropy = nats.mean(dim=1) / math.log(2)
    dead = (positive == 0).double().mean(dim=1)
    return torch.where(exists, entropy, torch.nan), torch.where(exists, dead, torch.nan)


@torch.no_grad()
def weight_norms(network: BatchedMlp, parameters: Tensor) -> Tensor:
    """(R, L + 1) Euclidean norm of every layer's parameters, of the whole network last."""
    return with_whole(squares_by_layer(network, parameters)).sqrt()
