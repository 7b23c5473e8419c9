"""DeepSpeed, imported where it is used and nowhere else, and kept off standard output.

It logs and prints to stdout, which belongs to our results; it compiles a CPU operator that gloo
does not need; and it wants a few things of its environment that torchrun sets and others do not.
"""

import importlib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from typing import Any

import torch

from probe.errors import ConfigError

_COMPILED_FOR_CPU = "deepspeed_shm_comm"  # shared-memory collectives; needs a compiler and ninja


def import_deepspeed(device: torch.device, dtype: torch.dtype) -> Any:
    """The `deepspeed` module, set up for a process group that exists already.

    Args:
        device: Where this rank runs; decides the accelerator DeepSpeed takes.
        dtype: Of the forward pass.

    Raises:
        ConfigError: DeepSpeed is not installed, was imported before for another kind of device, or
            does not run this dtype on this one.

    Cost: seconds, the first time.
    """
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "parallel.backend is deepspeed, which is not installed. Install it with "
            "pip install 'sharpness-probe[deepspeed]', or use parallel.backend: fsdp2."
        )
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # asked for in every forward pass
    with off_stdout():
        deepspeed: Any = importlib.import_module("deepspeed")
        accelerator = deepspeed.accelerator.get_accelerator().device_name()
        if accelerator != device.type:
            raise ConfigError(
                f"model.device is {device.type}, but DeepSpeed was imported for {accelerator}. Set "
                f"DS_ACCELERATOR={device.type} before anything imports it."
            )
        _refuse_unsupported(deepspeed.accelerator.get_accelerator(), device, dtype)
        if device.type == "cpu":
            deepspeed.ops.__compatible_ops__[_COMPILED_FOR_CPU] = False
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    return deepspeed


def _refuse_unsupported(accelerator: Any, device: torch.device, dtype: torch.dtype) -> None:
    supported = {
        torch.float16: accelerator.is_fp16_supported,
        torch.bfloat16: accelerator.is_bf16_supported,
    }
    if dtype in supported and not supported[dtype]():
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"DeepSpeed does not run {name} on this {device.type} device. Use another model.dtype, "
            "or parallel.backend: fsdp2."
        )


@contextmanager
def off_stdout() -> Iterator[None]:
    """Inside, and from then on in its log, what DeepSpeed prints goes to stderr."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger = logging.getLogger("DeepSpeed")
        logger.setLevel(logging.WARNING)
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
                handler.setStream(sys.stderr)
