"""Put theta - eta * delta into live tensors, and put theta back bit for bit.

A `Ray` knows tensors only: which parameters they are, where delta came from and what is
evaluated at each point stands elsewhere. The base is never written, so any number of moves
leaves no drift.
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from probe.errors import DirectionError

HALF_PRECISION = frozenset({torch.float16, torch.bfloat16})


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a step is formed in: fp32 for half precision, else the parameter's own."""
    return torch.float32 if dtype in HALF_PRECISION else dtype


class Ray:
    """The points theta - eta * delta, written into live tensors in place.

    The difference is formed in delta's precision and cast last. Without temporaries where all
    three share a dtype; else one tensor's worth at a time.

    Args:
        live: Tensors the forward pass reads; written by `move`, through `.data`-like aliases
            (pass `p.data`, so that no autograd version counter moves).
        base: theta, same shapes, in delta's dtype, or in half precision where live is fp32.
            Never written. Must not alias live. It may be in host memory: each move then copies
            it to live's device, one tensor at a time.
        delta: Update direction, same shapes, fp32 or fp64. Never written.
        exact: The caller knows that live is base, cast, so no copy of live need be thought of.

    Raises:
        DirectionError: The lists do not match in length, shape or dtype.

    Cost: memory 0 beyond the lists, except a copy of each live tensor that is not exactly
    its base cast down. A move reads base and delta and writes live once.
    """

    def __init__(
        self,
        live: Sequence[Tensor],
        base: Sequence[Tensor],
        delta: Sequence[Tensor],
        *,
        exact: bool = False,
    ) -> None:
        if not len(live) == len(base) == len(delta):
            found = f"{len(live)} live, {len(base)} base, {len(delta)} delta"
            raise DirectionError(f"a ray needs as many tensors of each kind; found {found}.")
        for index, (at, theta, step) in enumerate(zip(live, base, delta, strict=True)):
            fits = at.shape == theta.shape == step.shape
            if not fits or compute_dtype(theta.dtype) != step.dtype:
                raise DirectionError(
                    f"tensor {index} of the ray: live {_kind(at)}, base {_kind(theta)} and delta "
                    f"{_kind(step)} do not fit. Give all one shape; delta fp32, or fp64 with base."
                )
        self._live, self._base, self._delta = list(live), list(base), list(delta)
        self._saved = [
            None if exact else _copy_unless_exact(at, theta)
            for at, theta in zip(live, base, strict=True)
        ]

    @classmethod
    def through(cls, live: Sequence[Tensor], delta: Sequence[Tensor]) -> Self:
        """A ray from where the live tensors are now; the base is copied from them.

        Cost: 4 bytes per parameter (8 in fp64) for the base.
        """
        base = [at.detach().to(compute_dtype(at.dtype), copy=True) for at in live]
        return cls(live, base, delta, exact=True)

    @torch.no_grad()
    def move(self, eta: float) -> None:
        """Make every live tensor theta - eta * delta. Cost: one pass over memory."""
        if eta == 0.0:  # base - 0 * delta would turn some -0.0 into 0.0
            torch._foreach_copy_(self._live, self._base)
            return
        for at, theta, step in zip(self._live, self._base, self._delta, strict=True):
            here = theta.to(at.device, non_blocking=True)  # a copy only where it is offloaded
            torch.sub(here, step, alpha=eta, out=at)

    @torch.no_grad()
    def restore(self) -> None:
        """Make every live tensor what it was when the ray was made, bit for bit."""
        for at, theta, saved in zip(self._live, self._base, self._saved, strict=True):
            at.copy_(theta if saved is None else saved)


def _copy_unless_exact(at: Tensor, theta: Tensor) -> Tensor | None:
    """A copy of `at`, or None where casting theta gives it back exactly (NaN: a copy)."""
    at = at.detach()
    return None if torch.equal(theta.to(at.dtype), at) else at.clone()


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
