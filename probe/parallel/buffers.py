"""Buffers that no checkpoint holds, made again after a model has left the meta device."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from probe.errors import CheckpointError


def non_persistent_buffers(module: nn.Module) -> list[str]:
    """Names of a module's own buffers that no checkpoint holds (rotary frequencies, mostly)."""
    present = {name for name, _ in module.named_buffers(recurse=False)}
    return sorted(present & module._non_persistent_buffers_set)


@torch.no_grad()
def fill_buffers(model: PreTrainedModel) -> None:
    """Give the buffers no checkpoint holds the values the model's own initialisation has.

    They are set to NaN first, so that one which nothing fills shows. Parameters of the modules
    concerned may be drawn anew: call this before weights are loaded.

    Raises:
        CheckpointError: The architecture has a buffer that is not made this way.
    """
    for name, module in model.named_modules():
        buffers = non_persistent_buffers(module)
        values = [getattr(module, buffer) for buffer in buffers]
        if not values:
            continue
        for value in values:
            if value.is_floating_point():
                value.fill_(torch.nan)
        initialise: Any = model._init_weights  # what from_pretrained itself calls for them
        initialise(module)
        for buffer, value in zip(buffers, values, strict=True):
            known = value.is_floating_point() and not bool(value.isnan().any())
            if not known:
                raise CheckpointError(
                    f"{type(model).__name__}: buffer {name}.{buffer} is in no checkpoint and "
                    "cannot be recomputed. Use one rank: this architecture cannot be sharded."
                )
