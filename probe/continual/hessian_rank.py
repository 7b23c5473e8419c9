"""The effective rank of the empirical Fisher matrix, from the Gram matrix of samples' gradients.

For M samples with gradients g_i the Fisher matrix has the eigenvalues of K / M, K_ij = g_i . g_j
(M x M), beside zeros. K is built layer by layer from outer-product factors, so no gradient of a
single sample is ever formed.
"""

import torch
from torch import Tensor

from probe.continual.derivatives import BatchDerivatives


@torch.no_grad()
def hessian_rank(derivatives: BatchDerivatives, num_samples: int) -> Tensor:
    """Effective rank of the empirical Fisher matrix: e to the entropy of its eigenvalues.

        rank = exp(-sum_i p_i ln p_i),   p = eigenvalues of K / their sum

    Source: arXiv:2509.19698, appendix C.1: "the spectrum of the Gram matrix K = G G'"; so the
    eigenvalues of K, the squares of the singular values of G.

    Args:
        derivatives: Of the batch; gradients of single samples as in
            `probe.continual.gradient_noise`.
        num_samples: M; of a smaller batch all are taken, which bounds the rank by its size.

    Returns:
        (R,) between 1 and M, float64. NaN where all gradients are zero or some is not finite.

    Cost: M^2 products of the layers' widths; eigenvalues of R matrices M x M.
    """
    gram = gradient_gram(derivatives, num_samples)
    trace = gram.diagonal(dim1=1, dim2=2).sum(dim=1)
    exists = gram.isfinite().all(dim=2).all(dim=1) & (trace > 0)
    # The solver refuses a whole batch for one matrix that is not finite.
    fitting = torch.where(exists.view(-1, 1, 1), gram, torch.zeros_like(gram))
    eigenvalues = torch.linalg.eigvalsh(fitting).clamp(min=0)  # below 0 by rounding only
    shares = eigenvalues / eigenvalues.sum(dim=1, keepdim=True)
    entropy = -torch.special.xlogy(shares, shares).sum(dim=1)
    return torch.where(exists, entropy.exp(), torch.nan)


@torch.no_grad()
def gradient_gram(derivatives: BatchDerivatives, num_samples: int) -> Tensor:
    """(R, M, M) inner products of the gradients of the batch's first M samples, float64."""
    deltas = derivatives.sample_deltas
    pairs: list[Tensor] = []
    for number, inputs in enumerate(derivatives.trace.inputs):
        own = deltas.linear[number][:, :num_samples]
        pairs.append(_gram(own) * (_gram(inputs[:, :num_samples]) + 1))
        if number < len(deltas.pre_activation):
            normalized = derivatives.trace.normalized[number]
            if normalized is not None:
                shift = deltas.pre_activation[number][:, :num_samples]
                pairs += [_gram(shift), _gram(shift * normalized[:, :num_samples])]
    return torch.stack(pairs).sum(dim=0)


def _gram(rows: Tensor) -> Tensor:
    rows = rows.double()  # products of float32 below 1e-38 would be 0
    return rows @ rows.transpose(1, 2)
