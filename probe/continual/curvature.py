"""The top eigenvalue of every layer's Hessian block and of the whole Hessian, for R networks.

Power iteration from the vector of the measurement before, with Hessian-vector products. The plain
method goes to the eigenvalue of largest magnitude, which may be negative. Here the iterates
v, Hv, H^2 v ... of one measurement are kept, orthogonal, and the best vector they span is taken
instead of the last (Lanczos, Rayleigh-Ritz): it goes to the largest eigenvalue whatever the
others are, needs no shift, and never lies below what the last iterate of power iteration gives.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from probe.continual.derivatives import BatchDerivatives
from probe.continual.networks import BatchedMlp
from probe.plan_continual import KEPT_ITERATES

# (R, P) -> (R, P): the product with the Hessian, or with all its diagonal blocks.
Product = Callable[[Tensor], Tensor]
Columns = Sequence[tuple[int, int]]
_EXHAUSTED = 1e-6  # of float32: what is left of an iterate beside the kept ones is rounding


class TopEigenvalues:
    """Vectors that follow the top eigenvectors of R networks as they are trained.

    Args:
        network: The networks.
        draws: One generator per network, for its start vectors (standard normal).

    Attributes:
        layers: (R, P), within every layer's columns a unit vector.
        whole: (R, P) unit vectors.
    """

    def __init__(self, network: BatchedMlp, draws: Sequence[np.random.Generator]) -> None:
        self._blocks = [(layer.start, layer.stop) for layer in network.layers]
        self._everything = [(0, network.num_parameters)]
        start = np.stack([self._start(draw) for draw in draws])
        self.layers = torch.from_numpy(start).to(network.device)
        self.whole = self.layers.clone()
        self._normalize(torch.ones(len(start), dtype=torch.bool, device=network.device))

    def reset(self, is_reset: Tensor, draws: Sequence[np.random.Generator]) -> None:
        """New start vectors where `is_reset` (R,) is true.

        Args:
            is_reset: (R,).
            draws: One generator per network; those of the others are not touched.
        """
        for row in torch.nonzero(is_reset).flatten().tolist():
            start = torch.from_numpy(self._start(draws[row]))
            self.layers[row] = start
            self.whole[row] = start
        self._normalize(is_reset)

    def estimate(
        self, derivatives: BatchDerivatives, iterations: int, is_updated: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Top eigenvalues of the batch's Hessian, the vectors moved towards their eigenvectors.

        Args:
            derivatives: Of the batch.
            iterations: Steps of power iteration; `iterations` + 1 products.
            is_updated: (R,) whose vectors are moved; None: all. Others' results are made too.

        Returns:
            Largest eigenvalue (algebraically) of every layer's diagonal block, of the whole
            Hessian last, (R, L + 1), and |H v - lambda v| / |lambda|, 0 where v has converged;
            float64. NaN where a product is not finite (the vector then stays); the residual also
            where lambda is 0. A layer on which the loss does not depend at all has lambda 0.

        Cost: per product, of the blocks and of the whole Hessian: about 2.4 gradient steps of a
        network with two hidden layers.
        """
        last = len(self._blocks) - 1

        def blocks(vectors: Tensor) -> Tensor:
            result = torch.empty_like(vectors)
            for number in range(last + 1):
                derivatives.hessian_product(vectors, number, number, result)
            return result

        def whole(vectors: Tensor) -> Tensor:
            result = torch.empty_like(vectors)
            derivatives.hessian_product(vectors, 0, last, result)
            return result

        found = []
        for product, vectors, columns in (
            (blocks, self.layers, self._blocks),
            (whole, self.whole, self._everything),
        ):
            values, residuals, moved = top_eigenpairs(product, vectors, columns, iterations)
            if is_updated is not None:
                moved = torch.where(is_updated.unsqueeze(1), moved, vectors)
            vectors.copy_(moved)
            found.append((values, residuals))
        (of_layers, layers_residual), (of_whole, whole_residual) = found
        values = torch.cat([of_layers, of_whole], dim=1)
        residuals = torch.cat([layers_residual, whole_residual], dim=1) / values.abs()
        return values, torch.where(values == 0, torch.nan, residuals)

    def state(self) -> dict[str, Tensor]:
        """Everything a later run needs to go on."""
        return {"layers": self.layers, "whole": self.whole}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self.layers.copy_(state["layers"])
        self.whole.copy_(state["whole"])

    def _start(self, draw: np.random.Generator) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
        return draw.standard_normal(self._everything[0][1], dtype=np.float32)

    def _normalize(self, is_new: Tensor) -> None:
        rows = is_new.unsqueeze(1)
        for vectors, columns in ((self.layers, self._blocks), (self.whole, self._everything)):
            norms = _norms(vectors, columns)
            vectors.copy_(torch.where(rows, _scaled(vectors, 1 / norms, columns), vectors))


@torch.no_grad()
def top_eigenpairs(
    product: Product, start: Tensor, columns: Columns, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Top eigenvalues of symmetric operators by the best combination of power iterates.

    Args:
        product: The operator, acting within each of `columns` by itself.
        start: (R, P), within each of `columns` a unit vector.
        columns: S ranges (start, stop) that partition P.
        iterations: Steps, at least 1.

    Returns:
        (R, S) eigenvalues, (R, S) norms |H v - lambda v|, float64, and (R, P) vectors v, unit in
        each of `columns`. Where something is not finite: NaN, NaN and `start`.

    Cost: `iterations` + 1 products (one more per 7 further steps), and as many passes over the
    kept vectors; memory of at most 9 vectors.
    """
    left = iterations
    vectors = start
    while True:
        steps = min(left, KEPT_ITERATES - 1)
        values, residuals, moved = _best_of_iterates(product, vectors, columns, steps)
        vectors = _chosen(values.isfinite(), moved, vectors, columns)
        left -= steps
        if left <= 0:
            return values, residuals, vectors


def _best_of_iterates(
    product: Product, start: Tensor, columns: Columns, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Lanczos of `steps` + 1 products from unit vectors, each orthogonal to all before."""
    size = steps + 1
    kept = start.new_zeros(start.shape[0], size, start.shape[1])
    kept[:, 0] = start
    diagonal, beside = [], []
    scale = torch.zeros((), dtype=torch.float64)
    for step in range(size):
        current = kept[:, step]
        image = product(current)
        diagonal.append(_dots(current, image, columns))
        if step == 0:
            scale = _norms(image, columns)
        for _ in range(2):  # twice is enough for orthogonality to rounding
            _subtract_projections(image, kept[:, : step + 1], columns)
        norms = _norms(image, columns)
        scale = torch.maximum(scale, norms)
        is_left = (norms > _EXHAUSTED * scale) & (norms > torch.finfo(start.dtype).tiny)
        norms = torch.where(is_left, norms, torch.zeros_like(norms))
        beside.append(norms)
        if step + 1 < size:
            inverse = torch.where(norms == 0, norms, 1 / norms)
            kept[:, step + 1] = _scaled(image, inverse, columns)
    values, weights = _top_of_tridiagonal(diagonal, beside[:-1])
    residuals = beside[-1] * weights[:, :, -1].abs()
    vectors = torch.empty_like(start)
    for number, (first, last) in enumerate(columns):
        weight = weights[:, number].unsqueeze(1).to(start.dtype)
        torch.bmm(weight, kept[:, :, first:last], out=vectors[:, None, first:last])
    norms = _norms(vectors, columns)
    return values, residuals, _scaled(vectors, 1 / norms, columns)


def _top_of_tridiagonal(diagonal: list[Tensor], beside: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Largest eigenvalue (R, S) and its unit vector (R, S, n) of each tridiagonal matrix.

    Where an entry beside the diagonal is 0 the iterates were exhausted: what comes after it is
    made of zero vectors and is left out.
    """
    matrix = torch.diag_embed(torch.stack(diagonal, dim=-1))
    if beside:
        off = torch.diag_embed(torch.stack(beside, dim=-1), offset=1)
        matrix = matrix + off + off.transpose(-1, -2)
        is_alive = (torch.stack(beside, dim=-1) != 0).cumprod(dim=-1).bool()
        # Below every eigenvalue of the rest, so never the largest.
        low = -1 - matrix.abs().sum(dim=(-1, -2)).unsqueeze(-1)
        entries = matrix.diagonal(dim1=-2, dim2=-1)[:, :, 1:]
        entries.copy_(torch.where(is_alive, entries, low))
    exists = matrix.isfinite().flatten(2).all(dim=2)
    # The solver refuses a whole batch for one matrix that is not finite.
    fitting = torch.where(exists[:, :, None, None], matrix, torch.zeros_like(matrix))
    values, vectors = torch.linalg.eigh(fitting)
    return torch.where(exists, values[:, :, -1], torch.nan), vectors[:, :, :, -1]


def _dots(a: Tensor, b: Tensor, columns: Columns) -> Tensor:
    """(R, S) inner products within each of `columns`, float64."""
    parts = [torch.einsum("rp,rp->r", a[:, i:j], b[:, i:j]) for i, j in columns]
    return torch.stack(parts, dim=1).double()


def _norms(vectors: Tensor, columns: Columns) -> Tensor:
    """(R, S) norms within each of `columns`, float64: float32 has no squares below 1e-45."""
    parts = [
        torch.linalg.vector_norm(vectors[:, i:j], dim=1, dtype=torch.float64) for i, j in columns
    ]
    return torch.stack(parts, dim=1)


def _scaled(vectors: Tensor, factors: Tensor, columns: Columns) -> Tensor:
    """(R, P) times its own factor (R, S) within each of `columns`."""
    result = torch.empty_like(vectors)
    for number, (first, last) in enumerate(columns):
        factor = factors[:, number : number + 1].to(vectors.dtype)
        torch.mul(vectors[:, first:last], factor, out=result[:, first:last])
    return result


def _subtract_projections(vectors: Tensor, basis: Tensor, columns: Columns) -> None:
    """Make (R, P) orthogonal to the unit vectors (R, n, P) within each of `columns`, in place."""
    for first, last in columns:
        within = basis[:, :, first:last]
        part = vectors[:, first:last].unsqueeze(1)
        part.baddbmm_(part @ within.transpose(1, 2), within, alpha=-1)


def _chosen(is_taken: Tensor, new: Tensor, old: Tensor, columns: Columns) -> Tensor:
    """(R, P): `new` where (R, S) is true for its columns, else `old`."""
    result = torch.empty_like(old)
    for number, (first, last) in enumerate(columns):
        taken = is_taken[:, number : number + 1]
        result[:, first:last] = torch.where(taken, new[:, first:last], old[:, first:last])
    return result
