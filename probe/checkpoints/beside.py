"""Weights of one format with the optimizer state of another, which lies beside them."""

from collections.abc import Mapping
from functools import cached_property
from typing import Literal, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from probe.checkpoints.betas import Betas, SaysBetas
from probe.checkpoints.source import Source, TensorKind
from probe.errors import CheckpointError

MomentKind = Literal["exp_avg", "exp_avg_sq"]


class Moments(Protocol):
    """The part of a source that is the optimizer's; see `probe.checkpoints.source.Source`."""

    @property
    def has_moments(self) -> bool:
        """Whether AdamW moments are stored."""

    def moment_shape(self, name: str) -> tuple[int, ...]:
        """Shape of both moments of one parameter.

        Raises:
            CheckpointError: None are stored for it.
        """

    def read(self, name: str, kind: MomentKind, lo: int = 0, hi: int | None = None) -> torch.Tensor:
        """See `Source.read`."""

    def hyper(self, name: str) -> dict[str, float]:
        """See `Source.hyper`."""


class WithMoments:
    """A `Source` of somebody else's weights and somebody else's moments.

    Args:
        weights: Gives model, weights and tokenizer; moments it has itself are not asked for.
        moments: Of the same parameters; every shape is checked when a moment is first read.
        format_name: For the reference.
        size_bytes: Of the optimizer's files.
    """

    def __init__(
        self, weights: Source, moments: Moments, *, format_name: str, size_bytes: int
    ) -> None:
        self._weights = weights
        self._moments = moments
        self._checked: set[str] = set()
        update = {
            "format": format_name,
            "has_moments": moments.has_moments,
            "size_bytes": (weights.ref.size_bytes or 0) + size_bytes,
        }
        self.ref = weights.ref.model_copy(update=update)

    @property
    def has_moments(self) -> bool:
        """Whether AdamW moments are stored."""
        return self._moments.has_moments

    def load_model(self, dtype: torch.dtype, attention: str) -> PreTrainedModel:
        """See `Source.load_model`."""
        return self._weights.load_model(dtype, attention)

    def skeleton(self, attention: str) -> PreTrainedModel:
        """See `Source.skeleton`."""
        return self._weights.skeleton(attention)

    def weight_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `Source.weight_shapes`."""
        return self._shapes

    def read(self, name: str, kind: TensorKind, lo: int = 0, hi: int | None = None) -> torch.Tensor:
        """See `Source.read`."""
        if kind == "weight":
            return self._weights.read(name, kind, lo, hi)
        if name not in self._checked:
            self._check(name)
        return self._moments.read(name, kind, lo, hi)

    def hyper(self, name: str) -> dict[str, float]:
        """See `Source.hyper`."""
        return self._moments.hyper(name)

    @property
    def stored_betas(self) -> Betas | None:
        """See `SaysBetas`."""
        return self._moments.stored_betas if isinstance(self._moments, SaysBetas) else None

    def load_tokenizer(self, override: str | None = None) -> PreTrainedTokenizerBase:
        """See `Source.load_tokenizer`."""
        return self._weights.load_tokenizer(override)

    @cached_property
    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._weights.weight_shapes()

    def _check(self, name: str) -> None:
        found, expected = self._moments.moment_shape(name), self._shapes.get(name)
        if found != expected:
            raise CheckpointError(
                f"{self.ref.location}: the moments of {name!r} have shape {list(found)}, its "
                f"weight has {expected and list(expected)}; the optimizer state is another model's"
            )
        self._checked.add(name)
