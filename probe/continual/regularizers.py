"""What the loss gains beside the data's, as gradients on flat parameters: L2 and Wasserstein.

Each term has a strength per network, 0 where the network has none; a term no network has costs
nothing. A further regulariser is one more class with `add_gradient`, and one line in `terms_of`.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from probe.continual.networks import TensorPlace
from probe.continual.row_sort import sorted_rows
from probe.spec_continual import L2, Method, Wasserstein

Kind = TypeVar("Kind", L2, Wasserstein)


class Term(Protocol):
    """One regulariser of all networks."""

    def start_from(self, initial: Tensor) -> None:
        """Take (R, P) as the initial parameters."""

    def add_gradient(self, gradient: Tensor, parameters: Tensor) -> None:
        """Add the term's gradient to (R, P) in place."""


class L2Term:
    """gradient += strength * theta, on every parameter (coupled decay, as `weight_decay` of Adam).

    Args:
        strengths: (R, 1).
    """

    def __init__(self, strengths: Tensor) -> None:
        self._strengths = strengths

    def start_from(self, initial: Tensor) -> None:
        """Nothing: the term knows no initial values."""

    def add_gradient(self, gradient: Tensor, parameters: Tensor) -> None:
        """Add strength * theta. Cost: one pass over (R, P)."""
        gradient.addcmul_(parameters, self._strengths)


class WassersteinTerm:
    """strength * sum over tensors of the mean (or sum) of (sorted theta - sorted theta_0)^2.

    Source: arXiv:2312.00246 as used in arXiv:2509.19698. The gradient of the sorted values goes
    to the places they came from.

    Args:
        strengths: (R, 1).
        is_mean: (R, 1), whether the entries' mean is taken; else their sum.
        places: Every tensor.
    """

    def __init__(self, strengths: Tensor, is_mean: Tensor, places: Sequence[TensorPlace]) -> None:
        self._rows = torch.nonzero(strengths[:, 0]).squeeze(1)
        self._places = places
        self._factors = [
            (2 * strengths / torch.where(is_mean, place.stop - place.start, 1))[self._rows]
            for place in places
        ]
        self._initial: list[Tensor] = []

    def start_from(self, initial: Tensor) -> None:
        """Take (R, P) as the initial parameters."""
        rows = initial[self._rows]
        found = [sorted_rows(rows[:, p.start : p.stop])[0] for p in self._places]
        if not self._initial:
            self._initial = found
        for kept, new in zip(self._initial, found, strict=True):
            kept.copy_(new)  # in place: a recorded step reads them there

    def add_gradient(self, gradient: Tensor, parameters: Tensor) -> None:
        """Add the term's gradient. Cost: a sort of every tensor of the networks that have it."""
        rows = parameters[self._rows]
        added = torch.empty_like(rows)
        for place, factor, initial in zip(self._places, self._factors, self._initial, strict=True):
            values, order = sorted_rows(rows[:, place.start : place.stop])
            added[:, place.start : place.stop].scatter_(1, order, factor * (values - initial))
        gradient.index_add_(0, self._rows, added)


def terms_of(
    methods: Sequence[Method], places: Sequence[TensorPlace], initial: Tensor
) -> list[Term]:
    """The terms that some network has.

    Args:
        methods: Of every network.
        places: Every tensor of a network.
        initial: (R, P) parameters at the start of the stream.
    """
    device = initial.device
    terms: list[Term] = []
    decay = [_find(method, L2) for method in methods]
    if any(decay):
        strengths = [0.0 if found is None else found.strength for found in decay]
        terms.append(L2Term(torch.tensor(strengths, device=device).unsqueeze(1)))
    distance = [_find(method, Wasserstein) for method in methods]
    if any(distance):
        strengths = [0.0 if found is None else found.strength for found in distance]
        is_mean = [found is None or found.reduction == "mean" for found in distance]
        column = torch.tensor(strengths, device=device).unsqueeze(1)
        means = torch.tensor(is_mean, device=device).unsqueeze(1)
        terms.append(WassersteinTerm(column, means, places))
    for term in terms:
        term.start_from(initial)
    return terms


def _find(method: Method, kind: type[Kind]) -> Kind | None:
    return next((r for r in method.regularizers if isinstance(r, kind)), None)
