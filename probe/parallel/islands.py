"""Models that keep a few weights in fp32 under half precision."""

import torch
from transformers import PreTrainedModel

from probe.errors import ConfigError
from probe.perturb import HALF_PRECISION


def refuse_fp32_islands(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Refuse a model whose weights could not all be sharded in one half precision.

    Raises:
        ConfigError: transformers keeps some of its weights in fp32.
    """
    islands = [
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
    ]
    if islands and dtype in HALF_PRECISION:
        raise ConfigError(
            f"{type(model).__name__} keeps {', '.join(sorted(islands))} in float32 under "
            "half precision, which a sharded model cannot. Use model.dtype: float32, or one rank."
        )
