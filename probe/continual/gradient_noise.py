"""How much the gradient of single samples differs within a batch, without a loop over samples.

A sample's gradient by a linear map is an outer product, delta_i a_i' and delta_i for the bias, so
|g_i|^2 = |delta_i|^2 (|a_i|^2 + 1): exact, from what one backward pass leaves.

With batch normalisation samples interact and a sample has no loss of its own. The gradient of a
single sample is then that with the batch's statistics taken as constants, in both terms of the
variance; the norm of the gradient is that of the true gradient of the batch's loss.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from probe.continual.derivatives import BatchDerivatives, Deltas, squares_by_layer, with_whole


@dataclass(frozen=True, slots=True)
class GradientNoise:
    """Per run and layer, the whole network last; float64.

    Attributes:
        gradient_squared: |g|^2 of the batch's data loss, (R, L + 1).
        variance: sigma2_ps = (1 / B) sum_i |g_i - mean g_i|^2, (R, L + 1).
    """

    gradient_squared: Tensor
    variance: Tensor


@torch.no_grad()
def gradient_noise(derivatives: BatchDerivatives) -> GradientNoise:
    """|g|^2 and the variance of the samples' gradients.

        sigma2_ps = mean_i |g_i|^2 - |mean_i g_i|^2

    Source: arXiv:2509.19698, appendix C.1 (which loops over samples).

    Returns:
        Both. The variance's error is that of |mean g_i|^2, about 1e-6 of it in float32: the first
        term is summed in float64. Where the two nearly cancel, so that less than that would be
        left, the variance is of that order and never below 0; alpha_g* is then above 1e6.

    Cost: half a backward pass beside what `derivatives` shares with other measurements; with
    batch normalisation one and a half more.
    """
    network = derivatives.network
    own = derivatives.deltas
    gradient_squared = squares_by_layer(network, derivatives.gradient(own))
    single = derivatives.sample_deltas
    mean_squared = gradient_squared
    if single is not own:
        mean_squared = squares_by_layer(network, derivatives.gradient(single))
    squares = _mean_squares(derivatives, single)
    # A clamp from below keeps NaN: a run that diverged has no variance.
    variance = (with_whole(squares) - with_whole(mean_squared)).clamp(min=0)
    return GradientNoise(with_whole(gradient_squared), variance)


def _mean_squares(derivatives: BatchDerivatives, deltas: Deltas) -> Tensor:
    """(R, L) mean over samples of |g_i|^2."""
    columns = []
    for number, inputs in enumerate(derivatives.trace.inputs):
        squares = _squares(deltas.linear[number]) * (_squares(inputs) + 1)
        if number < len(deltas.pre_activation):
            normalized = derivatives.trace.normalized[number]
            if normalized is not None:
                shift = deltas.pre_activation[number]
                squares = squares + _squares(shift) + _squares(shift * normalized)
        columns.append(squares.mean(dim=1))
    return torch.stack(columns, dim=1)


def _squares(vectors: Tensor) -> Tensor:
    """(R, B, n) -> (R, B) squared norms in float64."""
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=2, dtype=torch.float64)
    return norms.square()
