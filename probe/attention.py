"""Which attention kernel a model runs with, decided once and recorded in the result.

Different kernels give different numbers (eager and sdpa differ by 8e-2 nats per 564-nat sequence
in bf16), so a job uses one kernel throughout.
"""

import importlib

import torch

from probe.errors import ConfigError


def flash_attention_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why flash_attention_2 cannot run here; None where it can.

    It needs CUDA, half precision, compute capability 8.0 and a flash_attn package that really
    imports: transformers may otherwise fetch a kernel from the hub, or fail at the first forward.
    """
    if device.type != "cuda":
        return f"it needs a CUDA device, the device is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, model.dtype is {str(dtype).removeprefix('torch.')}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    from transformers.utils.import_utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        return "transformers finds no usable flash_attn package"
    for module in ("flash_attn", "flash_attn_2_cuda"):
        try:
            importlib.import_module(module)
        except Exception as error:  # a wheel built for another torch fails with any error at all
            return f"import {module} fails: {error}"
    return None


def choose_attention(requested: str, *, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel to run: sdpa, eager or flash_attention_2.

    Args:
        requested: `model.attention` of the spec. `auto` takes flash_attention_2 where it can
            run, else sdpa.
        device: Where the model runs.
        dtype: Of the forward pass.

    Returns:
        A name for `attn_implementation` of transformers.

    Raises:
        ConfigError: flash_attention_2 was asked for and cannot run; names the condition.
    """
    if requested not in ("auto", "flash_attention_2"):
        return requested
    obstacle = flash_attention_obstacle(device, dtype)
    if obstacle is None:
        return "flash_attention_2"
    if requested == "auto":
        return "sdpa"
    raise ConfigError(
        f"model.attention is flash_attention_2, but {obstacle}. Use attention: auto or sdpa."
    )
