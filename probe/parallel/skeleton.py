"""A causal language model without its weights: structure on the meta device, buffers made later.

No memory is spent on parameters, so every rank can hold the whole structure of a model of which
it will own a part.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from probe.checkpoints.quiet import quiet_transformers
from probe.errors import CheckpointError


def empty_model(directory: Path, attention: str) -> PreTrainedModel:
    """The model a directory's config.json describes, fp32 parameters on the meta device.

    Args:
        directory: Holds config.json.
        attention: `sdpa`, `eager` or `flash_attention_2`.

    Returns:
        The model in eval mode, without a key/value cache. Buffers are on the meta device too:
        `fill_buffers` makes them once the model has left it.

    Raises:
        CheckpointError: The architecture is unknown or needs code from the checkpoint.
    """
    config_loader: Any = AutoConfig
    model_loader: Any = AutoModelForCausalLM
    try:
        with quiet_transformers(), torch.device("meta"):
            config = config_loader.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
            model = model_loader.from_config(
                config,
                dtype=torch.float32,
                attn_implementation=attention,
                trust_remote_code=False,
            )
    except Exception as error:  # transformers and its config checks each raise their own
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{directory}: cannot be built: {text}") from error
    model.config.use_cache = False
    empty: PreTrainedModel = model.eval()
    return empty


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
