"""The base in host memory, for models whose live weights and moments fill the device."""

import torch
from torch import Tensor

from probe.perturb import compute_dtype


def empty_base(live: Tensor, *, offload: bool) -> Tensor:
    """Memory for the base of one shard, not filled yet.

    Args:
        live: (n,) the shard the forward pass reads.
        offload: In pinned host memory instead of beside `live`. Without effect on a CPU, where
            the two are one.

    Returns:
        (n,) fp32, fp64 for fp64 shards.
    """
    if offload and live.device.type != "cpu":
        return torch.empty(live.shape, dtype=compute_dtype(live.dtype), pin_memory=True)
    return torch.empty_like(live, dtype=compute_dtype(live.dtype))
