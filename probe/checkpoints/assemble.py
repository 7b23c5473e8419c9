"""A transformers model from a config: without values, or from tensors already in memory.

For formats that store tensors and no Hugging Face directory around them. What the stock loader
would only warn about is an error here, as in `probe.checkpoints.huggingface`.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from probe.checkpoints.layout import read_json_object
from probe.checkpoints.quiet import quiet_transformers
from probe.checkpoints.report import check_report, first_line
from probe.errors import CheckpointError


def read_model_config(path: Path) -> PretrainedConfig:
    """The Hugging Face config a file holds; its class is transformers' own, never the file's.

    Raises:
        CheckpointError: The file is no such config, or of an architecture transformers lacks.
    """
    if "model_type" not in read_json_object(path):
        raise CheckpointError(f"{path}: no model_type; expected a Hugging Face config.json")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers and its config checks each raise their own
        raise CheckpointError(f"{path}: not usable: {first_line(error)}") from error
    return config


def parameter_shapes(config: PretrainedConfig, where: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in `named_parameters` order (tied ones once).

    Raises:
        CheckpointError: transformers has no causal language model for the config.

    Cost: builds the model on the meta device, no memory for weights.
    """
    model = skeleton(config, "eager", where)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def persistent_buffer_shapes(config: PretrainedConfig, where: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every buffer that checkpoints hold; most models have none.

    Raises:
        CheckpointError: As `parameter_shapes`.

    Cost: as `parameter_shapes`.
    """
    model = skeleton(config, "eager", where)
    stored = model.state_dict()
    return {name: tuple(b.shape) for name, b in model.named_buffers() if name in stored}


def skeleton(config: PretrainedConfig, attention: str, where: Path) -> PreTrainedModel:
    """The model without its values: fp32 parameters on the meta device, in eval mode.

    No memory is spent on weights, so every rank can hold the structure of a model of which it
    will own a part. Buffers are on the meta device too; `probe.parallel.buffers` makes them.

    Args:
        config: Its architecture; copied.
        attention: Kernel name for transformers.
        where: For messages.

    Raises:
        CheckpointError: transformers has no causal language model for the config.
    """
    factory: Any = AutoModelForCausalLM
    try:
        with quiet_transformers(), torch.device("meta"):
            model: Any = factory.from_config(
                copy.deepcopy(config),
                dtype=torch.float32,
                attn_implementation=attention,
                trust_remote_code=False,
            )
    except Exception as error:  # as above
        raise CheckpointError(f"{where}: no such model: {first_line(error)}") from error
    model.config.use_cache = False
    empty: PreTrainedModel = model.eval()
    return empty


def assemble_causal_lm(
    config: PretrainedConfig,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    attention: str,
    *,
    where: Path,
) -> PreTrainedModel:
    """The causal language model with these weights, every one accounted for.

    Args:
        config: Its architecture.
        tensors: fqn -> weight in its own shape, any floating dtype.
        dtype: Of the parameters; converted on load.
        attention: Kernel name for transformers.
        where: For messages.

    Returns:
        The model on the CPU, in eval mode, without a key/value cache.

    Raises:
        CheckpointError: A weight is missing, superfluous or of the wrong shape.

    Cost: may share memory with `tensors` where the dtype agrees.
    """
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    try:
        with quiet_transformers():
            model, report = architecture.from_pretrained(
                None,
                config=config,
                state_dict=dict(tensors),
                dtype=dtype,
                attn_implementation=attention,
                ignore_mismatched_sizes=True,  # reported, and raised below with both shapes
                output_loading_info=True,
            )
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise CheckpointError(f"{where}: cannot be loaded: {first_line(error)}") from error
    check_report(where, report)
    model.config.use_cache = False
    loaded: PreTrainedModel = model.eval()
    return loaded
