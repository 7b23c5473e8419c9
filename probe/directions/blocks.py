"""Walk over large tensors block by block, so that temporaries stay small and in cache.

A step's formula reads five tensors and makes several temporaries. Over whole tensors of a
large model every temporary is fresh memory, which costs more than the arithmetic.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CPU_BLOCK = 2**18  # elements: temporaries of 1 MiB in fp32, re-used by the allocator and cached
DEVICE_BLOCK = 2**24  # a GPU wants few, large kernels: 64 MiB in fp32


def in_blocks(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The same elements of every tensor, a block at a time, as views; None stays None.

    Tensors share one shape. Where one is not contiguous there is a single block, the tensors
    themselves: then flat views would not hold the same elements.
    """
    present = [t for t in tensors if t is not None]
    block = CPU_BLOCK if present[0].device.type == "cpu" else DEVICE_BLOCK
    if not all(t.is_contiguous() for t in present) or present[0].numel() <= block:
        yield tensors
        return
    flat = [None if t is None else t.view(-1) for t in tensors]
    for start in range(0, present[0].numel(), block):
        yield tuple(None if t is None else t[start : start + block] for t in flat)


def inner_product(left: Tensor, right: Tensor) -> float:
    """left.right with fp64 products and sums. Cost: one pass, temporaries of one block."""
    total = torch.zeros((), dtype=torch.float64, device=left.device)
    for a, b in in_blocks(left.detach(), right.detach()):
        total += torch.dot(a.double().reshape(-1), b.double().reshape(-1))
    return float(total)
