"""Likelihood and most likely token of the output layer, without ever holding all logits.

At 4,096 tokens and a vocabulary of 100,278 the logits alone take 1.6 GB in fp32, and the plain
path holds two copies. Here rows go through the head in blocks whose fp32 logits fit in
`HEAD_BUFFER_BYTES`; the backward pass makes them again, vocabulary tile by vocabulary tile.
Logits are always fp32: rounding them to bf16 is an error of 1.5e-2 nats per token.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

HEAD_BUFFER_BYTES = 64 * 2**20  # of fp32 logits; 167 rows of a 100,278 vocabulary
CUDA_HEAD_BUFFER_BYTES = 512 * 2**20  # a GPU needs more rows at a time to be busy: 1,338
_TILE_COLUMNS = 8192  # vocabulary rows whose weights are upcast to fp32 at a time
_HALF = (torch.bfloat16, torch.float16)


def _blocks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _block_rows(row_bytes: int, device: torch.device) -> int:
    """How many rows of fp32 (fp64) logits are held at a time."""
    held = CUDA_HEAD_BUFFER_BYTES if device.type == "cuda" else HEAD_BUFFER_BYTES
    return max(1, held // row_bytes)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The product left @ right with fp32 sums and an fp32 result, whatever the stored dtypes."""
    if right.is_cuda and right.dtype in _HALF:
        return torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)
    return torch.mm(left.to(_wide(right.dtype)), right.to(_wide(right.dtype)))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Float32 for half precision, else the dtype itself."""
    return torch.float32 if dtype in _HALF else dtype


def _fill_logits(out: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Out (num_rows, vocab) <- rows @ weight.T + bias in full precision."""
    if weight.dtype == out.dtype:
        torch.mm(rows, weight.t(), out=out)
    else:
        for tile in _blocks(weight.shape[0], _TILE_COLUMNS):
            out[:, tile] = _product(rows, weight[tile].t())
    if bias is not None:
        out += bias


class _HeadNll(torch.autograd.Function):
    """Nll of the chosen rows; backward recomputes the logits tile by tile."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor
    ) -> Tensor:
        vocab = weight.shape[0]
        dtype = _wide(weight.dtype)
        size = _block_rows(dtype.itemsize * vocab, hidden.device)
        nll = torch.empty(rows.numel(), dtype=dtype, device=hidden.device)
        log_norm = torch.empty_like(nll)
        buffer = torch.empty(min(size, rows.numel()), vocab, dtype=dtype, device=hidden.device)
        for block in _blocks(rows.numel(), size):
            logits = buffer[: block.stop - block.start]  # (num_rows, vocab)
            _fill_logits(logits, hidden.index_select(0, rows[block]), weight, bias)
            at_target = logits.gather(1, targets[block, None])[:, 0]
            top = logits.amax(1)
            log_norm[block] = logits.sub_(top[:, None]).exp_().sum(1).log_().add_(top)
            nll[block] = log_norm[block] - at_target
        ctx.save_for_backward(hidden, weight, bias, rows, targets, log_norm)
        return nll

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        hidden, weight, bias, rows, targets, log_norm = ctx.saved_tensors
        grad_rows = torch.zeros(
            rows.numel(), hidden.shape[1], dtype=log_norm.dtype, device=hidden.device
        )
        grad_weight = torch.empty_like(weight)
        grad_bias = None if bias is None else torch.empty_like(bias)
        size = _block_rows(log_norm.element_size() * _TILE_COLUMNS, hidden.device)
        for tile in _blocks(weight.shape[0], _TILE_COLUMNS):
            tile_weight = weight[tile]  # (tile, hidden)
            tile_grad = _zeros_to_add_to(grad_weight[tile], log_norm.dtype)
            tile_bias = torch.zeros_like(tile_grad[:, 0])
            for block in _blocks(rows.numel(), size):
                inputs = hidden.index_select(0, rows[block])
                # d nll / d logits = softmax - one_hot
                logits = _product(inputs, tile_weight.t())  # (num_rows, tile)
                if bias is not None:
                    logits += bias[tile]
                logits.sub_(log_norm[block, None]).exp_()
                _subtract_one_hot(logits, targets[block] - tile.start)
                logits.mul_(grad_nll[block, None])
                _add_product(grad_rows[block], logits, tile_weight)
                _add_product(tile_grad, logits.t(), inputs)
                tile_bias += logits.sum(0)
            if weight.dtype != log_norm.dtype:
                grad_weight[tile] = tile_grad
            if grad_bias is not None:
                grad_bias[tile] = tile_bias
        grad_hidden = torch.zeros_like(hidden).index_copy_(0, rows, grad_rows.to(hidden.dtype))
        return grad_hidden, grad_weight, grad_bias, None, None


def _zeros_to_add_to(out: Tensor, dtype: torch.dtype) -> Tensor:
    """`out` itself, zeroed, where it has the dtype sums are kept in; else zeros in that dtype."""
    return out.zero_() if out.dtype == dtype else torch.zeros_like(out, dtype=dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """In place: total += left @ right, without a temporary where the dtypes allow."""
    if left.dtype == right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += _product(left, right)


def _subtract_one_hot(probabilities: Tensor, columns: Tensor) -> None:
    """Probabilities[i, columns[i]] -= 1 where the column lies in this tile."""
    inside = ((columns >= 0) & (columns < probabilities.shape[1])).nonzero()[:, 0]
    probabilities[inside, columns[inside]] -= 1.0


def head_nll(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor
) -> Tensor:
    """Nll of `targets` under softmax(hidden @ weight.T + bias), chosen rows only; differentiable.

    Args:
        hidden: (num_tokens, hidden) inputs of the output layer.
        weight: (vocab, hidden) of the output layer, same dtype as hidden.
        bias: (vocab,) or None.
        rows: (num_rows,) int64, distinct: which tokens are asked for.
        targets: (num_rows,) int64: the token each of them should predict.

    Returns:
        (num_rows,) nats; fp32 for half-precision and fp32 inputs, fp64 for fp64 ones.

    Cost: beside the result, one fp32 block of `HEAD_BUFFER_BYTES` (`CUDA_HEAD_BUFFER_BYTES` on a
    GPU) forward; backward two of them, the gradients themselves, and one more product with the
    weight to make the logits again.
    """
    return _HeadNll.apply(hidden, weight, bias, rows, targets)  # type: ignore[no-any-return,no-untyped-call]


@torch.no_grad()
def head_argmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """The most likely token after each chosen row; the first of those that tie.

    Args:
        hidden: (num_tokens, hidden) inputs of the output layer.
        weight: (vocab, hidden) of the output layer, same dtype as hidden.
        bias: (vocab,) or None.
        rows: (num_rows,) int64: which tokens are asked for.

    Returns:
        (num_rows,) int64.

    Cost: one fp32 block of logits at a time, as `head_nll`.
    """
    vocab, dtype = weight.shape[0], _wide(weight.dtype)
    size = _block_rows(dtype.itemsize * vocab, hidden.device)
    best = torch.empty_like(rows)
    buffer = torch.empty(min(size, rows.numel()), vocab, dtype=dtype, device=hidden.device)
    for block in _blocks(rows.numel(), size):
        logits = buffer[: block.stop - block.start]  # (num_rows, vocab)
        _fill_logits(logits, hidden.index_select(0, rows[block]), weight, bias)
        best[block] = logits.argmax(1)
    return best
