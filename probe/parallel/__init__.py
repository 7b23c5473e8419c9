"""One model, however it is spread over ranks: forward, flat fp32 shards, push.

Everything after this interface (direction, loss along the ray, search) is the same for every
back-end. A back-end is one file here. Torch is imported by the back-ends, not by this name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Shard:
    """What this rank holds of one parameter: elements lo to hi of it, flattened."""

    name: str  # fully qualified parameter name
    lo: int
    hi: int
    # (hi - lo,) unperturbed values, fp32 (fp64 for fp64 models); never perturbed. On the model's
    # device, or in pinned host memory where it is offloaded.
    base: "Tensor"
    live: "Tensor"  # (hi - lo,) view of what the forward pass reads; FSDP2 casts it when gathering

    def base_on_device(self) -> "Tensor":
        """The base beside the live shard: itself, or a copy where it is offloaded."""
        return self.base.to(self.live.device, non_blocking=True)


class ShardedModel(Protocol):
    """A causal language model whose parameters can be moved along a ray.

    Write the `live` shards, then `push`, then run `model`. Lists of tensors are aligned with
    `shards`: one flat tensor each, on `device`.
    """

    backend: str
    num_ranks: int
    model: "nn.Module"
    device: "torch.device"
    dtype: "torch.dtype"  # of the forward pass; live shards may be wider
    shards: Sequence[Shard]

    def push(self) -> None:
        """Make the next forward pass see what was written into the live shards."""

    def gradient(self, backward: Callable[[], None]) -> "list[Tensor | None]":
        """Flat fp32 gradients of what `backward` accumulates; None where a shard has none."""

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Elementwise sums, the same floats on every rank."""
