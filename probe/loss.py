"""The mean loss of a batch, and its gradient, for a causal language model.

Losses are summed per sequence in fp64 over fp32 per-token values, added exactly, and divided by
the number of target tokens once: a mean of micro-batch means is wrong as soon as sizes differ.
Micro-batches all have one shape (the last is filled up with sequences that do not count),
because in bf16 the composition of a micro-batch moves the loss by 1e-4.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional

from probe.chunked_head import head_argmax, head_nll
from probe.errors import BatchError

HeadPath = Literal["chunked", "plain"]
TargetScore = Callable[[Tensor, Tensor], Tensor]  # (ids, mask) of a micro-batch -> (num_targets,)


class TokenBatch(Protocol):
    """What a loss needs of a batch (`probe.batches.Batch` has it)."""

    @property
    def input_ids(self) -> Tensor:
        """(num_sequences, sequence_length) int64; padding on the right only."""

    @property
    def loss_mask(self) -> Tensor:
        """Same shape, bool: the token at t is a target, predicted from t - 1."""


@dataclass(frozen=True, slots=True)
class LossSums:
    """Per-sequence sums of one batch, in batch order: what ranks would gather."""

    nll: tuple[float, ...]  # nats, summed over the targets of each sequence
    num_targets: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Nats per target token; NaN or inf where the model diverged."""
        if not all(map(math.isfinite, self.nll)):
            return math.nan
        return math.fsum(self.nll) / sum(self.num_targets)


def micro_batches(batch: TokenBatch, size: int, device: torch.device) -> Iterator[tuple[Any, Any]]:
    """(ids, mask) of exactly `size` sequences each, on `device`; fill-up rows have no target."""
    for index in range(num_micro_batches(batch, size)):
        yield micro_batch(batch, index, size, device)


def num_micro_batches(batch: TokenBatch, size: int) -> int:
    """How many micro-batches of `size` sequences hold the batch."""
    return -(-batch.input_ids.shape[0] // size)


def micro_batch(
    batch: TokenBatch, index: int, size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(ids, mask) of one of them; see `micro_batches`."""
    rows = slice(index * size, (index + 1) * size)
    ids, mask = batch.input_ids[rows], batch.loss_mask[rows]
    missing = size - ids.shape[0]
    if missing:
        ids = functional.pad(ids, (0, 0, 0, missing))
        mask = functional.pad(mask, (0, 0, 0, missing))
    return ids.to(device), mask.to(device)


class CausalLoss:
    """Loss and gradient of a transformers causal language model, forward pass by forward pass.

    Args:
        model: Its forward takes `input_ids` and `use_cache` and returns `.logits`.
        micro_batch_sequences: Sequences of one forward call.

    The head path is decided here: `chunked` where the model provably returns what its output
    layer returns (see `plain_path_reason`), else `plain` with the reason in `head_reason`.
    """

    def __init__(self, model: nn.Module, *, micro_batch_sequences: int) -> None:
        self.model = model
        self.micro_batch_sequences = micro_batch_sequences
        self.device = next(model.parameters()).device
        self.head_reason = plain_path_reason(model)
        self.head_path: HeadPath = "chunked" if self.head_reason is None else "plain"

    def sums(self, batch: TokenBatch) -> LossSums:
        """Per-sequence sums at the current parameters. Cost: one forward pass of the batch."""
        counts = tuple(batch.loss_mask.sum(1).tolist())
        return LossSums(self._per_sequence(batch, self._target_nll), counts)

    def num_right(self, batch: TokenBatch) -> tuple[int, ...]:
        """Targets of each sequence that are the most likely token after the true ones before.

        Cost: one forward pass of the batch.
        """
        return tuple(int(count) for count in self._per_sequence(batch, self._target_is_best))

    def mean(self, batch: TokenBatch) -> float:
        """Mean loss in nats per token; NaN where any sequence diverged."""
        return self.sums(batch).mean

    def backward(self, batch: TokenBatch) -> float:
        """Add the gradient of the SUM of all target losses to `.grad`; returns their mean.

        The caller divides by the number of targets once, in fp32: an fp16 gradient of a mean
        would underflow. Cost: one forward and one backward pass of the batch.

        Raises:
            BatchError: no token of the batch is a target.
        """
        if not bool(batch.loss_mask.any()):
            raise BatchError("no token of this batch is a target: its loss mask is all False")
        total = 0.0
        for ids, mask in micro_batches(batch, self.micro_batch_sequences, self.device):
            total += self._backward_sum(ids, mask)
        return total / int(batch.loss_mask.sum())

    def _per_sequence(self, batch: TokenBatch, score: TargetScore) -> tuple[float, ...]:
        """Sums of a score over the targets of each sequence, in batch order."""
        sums: list[float] = []
        with torch.no_grad():
            for ids, mask in micro_batches(batch, self.micro_batch_sequences, self.device):
                sums += self._sequence_sums(ids, mask, score)
        return tuple(sums[: batch.input_ids.shape[0]])

    def _sequence_sums(self, ids: Tensor, mask: Tensor, score: TargetScore) -> list[float]:
        """A score over the targets of each sequence of one micro-batch, added in fp64."""
        per_token = torch.zeros(mask.numel(), dtype=torch.float64, device=self.device)
        per_token[mask.flatten()] = score(ids, mask).double()
        sums: list[float] = per_token.view_as(mask).sum(1).tolist()
        return sums

    def _backward_sum(self, ids: Tensor, mask: Tensor) -> float:
        """Backward of one micro-batch; nats over all its targets."""
        with torch.enable_grad():
            nll = self._target_nll(ids, mask)
            nll.sum().backward()  # type: ignore[no-untyped-call]
        return float(nll.detach().double().sum())

    def _target_is_best(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(num_targets,) bool in row-major order of the mask: no token is more likely."""
        rows, targets = _rows_and_targets(ids, mask)
        best = chunked_best if self.head_path == "chunked" else plain_best
        return best(self.model, ids, rows) == targets

    def _target_nll(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(num_targets,) nats in row-major order of the mask."""
        rows, targets = _rows_and_targets(ids, mask)
        if self.head_path == "chunked":
            return chunked_nll(self.model, ids, rows, targets)
        return plain_nll(self.model, ids, rows, targets)


def _rows_and_targets(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Flat positions that predict, and the tokens they should: logits at t - 1 predict token t."""
    assert not bool(mask[:, 0].any()), "the first token has nothing to be predicted from"
    positions = mask.flatten().nonzero()[:, 0]
    return positions - 1, ids.flatten()[positions]


def plain_best(model: nn.Module, ids: Tensor, rows: Tensor) -> Tensor:
    """The most likely token after each row, from the model's own logits."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits  # (sequences, length, vocab)
    return logits.flatten(0, 1).index_select(0, rows).argmax(1)


def chunked_best(model: nn.Module, ids: Tensor, rows: Tensor) -> Tensor:
    """The same with the output layer replaced by `head_argmax` for this one call."""
    found: list[Tensor] = []
    head: nn.Linear = model.get_output_embeddings()  # type: ignore[operator]

    def forward(hidden: Tensor) -> Tensor:  # (num_sequences, length, hidden)
        found.append(head_argmax(hidden.flatten(0, 1), head.weight, head.bias, rows))
        return found[-1][None, None]

    with _replaced_forward(head, forward):
        model(input_ids=ids, use_cache=False)
    return found[0]


def plain_nll(model: nn.Module, ids: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """Nll from the model's own logits, in fp32. Holds (num_tokens, vocab) logits twice."""
    logits = model(input_ids=ids, use_cache=False).logits  # (num_sequences, length, vocab)
    chosen = logits.flatten(0, 1).index_select(0, rows)
    wide = chosen if chosen.dtype == torch.float64 else chosen.float()
    return functional.cross_entropy(wide, targets, reduction="none")


def chunked_nll(model: nn.Module, ids: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """Nll with the output layer replaced by `head_nll` for this one call."""
    found: list[Tensor] = []
    head: nn.Linear = model.get_output_embeddings()  # type: ignore[operator]

    def forward(hidden: Tensor) -> Tensor:  # (num_sequences, length, hidden)
        nll = head_nll(hidden.flatten(0, 1), head.weight, head.bias, rows, targets)
        # What comes out must be the tensor backward starts from, and no view of another: FSDP
        # hangs the hook on it that gathers the weight again.
        found.append(nll[None, None].clone())
        return found[-1]

    with _replaced_forward(head, forward):
        model(input_ids=ids, use_cache=False)
    return found[0].flatten()


@contextmanager
def _replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    module.__dict__["forward"] = forward  # hooks on Module.__call__ still run
    try:
        yield
    finally:
        del module.__dict__["forward"]


def plain_path_reason(model: nn.Module) -> str | None:
    """Why the chunked head would be wrong for this model; None where it is right.

    Three things are checked on 8 tokens: the output layer is a bare `nn.Linear`; the model hands
    back the very tensor that layer returned (large made-up logits, compared bit for bit, so that
    soft-capping, scaling or masking shows); and both paths agree to rounding.

    Cost: four forward passes of 8 tokens.
    """
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    kind, gathers = type(head), isinstance(head, FSDPModule)
    if (kind.__mro__[2] if gathers else kind) is not nn.Linear:  # fully_shard puts its class first
        return f"the output layer is {kind.__name__}, not a plain Linear"
    # A sharded layer has two hooks that gather and free it, also around a replaced forward.
    num_hooks = len(head._forward_hooks) + len(head._forward_pre_hooks)
    sharded = gathers or hasattr(head.weight, "ds_shape")
    if num_hooks > (2 if sharded else 0) or "forward" in head.__dict__:
        return "the output layer has hooks"
    ids = (torch.arange(8, device=head.weight.device) % num_rows(head.weight))[None]
    seen: list[Tensor] = []

    def made_up(hidden: Tensor) -> Tensor:
        shape = (*hidden.shape[:-1], head.weight.shape[0])
        ramp = torch.arange(math.prod(shape), device=hidden.device) % 251 - 125
        seen.append(ramp.view(shape).to(hidden.dtype))  # integers below 256: exact in bf16
        return seen[-1]

    with torch.no_grad():
        with _replaced_forward(head, made_up):
            logits = model(input_ids=ids, use_cache=False).logits
        if len(seen) != 1 or seen[0].shape[:-1] != ids.shape:
            return "the output layer is not called once on every token"
        if not torch.equal(logits.to(seen[0].dtype), seen[0]):
            return "the model changes its logits after the output layer"
        return _disagreement(model, ids)


def num_rows(weight: Tensor) -> int:
    """Rows of a weight. Under ZeRO-3 `shape` is empty while it is not gathered."""
    shape: torch.Size = getattr(weight, "ds_shape", weight.shape)
    return shape[0]


def _disagreement(model: nn.Module, ids: Tensor) -> str | None:
    rows, targets = torch.arange(7, device=ids.device), ids[0, 1:]
    logits = model(input_ids=ids, use_cache=False).logits
    plain = plain_nll(model, ids, rows, targets)
    chunked = chunked_nll(model, ids, rows, targets)
    # Each logit carries a rounding error of its own dtype, the sum over the width a few more.
    rounding = 16 * torch.finfo(logits.dtype).eps * (1.0 + float(logits.abs().max()))
    gap = float((plain - chunked).abs().max())
    if gap <= rounding:
        return None
    return f"the chunked head is off by {gap:.2g} nats where rounding explains {rounding:.2g}"
