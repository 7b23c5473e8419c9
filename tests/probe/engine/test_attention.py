"""flash_attention_2 runs only where every condition holds; each one missing is named."""

import sys
import types

import pytest
import torch
from transformers.utils import import_utils

from probe.attention import choose_attention
from probe.errors import ConfigError

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def everything_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(import_utils, "is_flash_attn_2_available", lambda: True)
    for name in ("flash_attn", "flash_attn_2_cuda"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


@pytest.mark.usefixtures("everything_there")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("requested", ["auto", "flash_attention_2"])
def test_flash_attention_where_everything_is_there(dtype, requested):
    assert choose_attention(requested, device=CUDA, dtype=dtype) == "flash_attention_2"


def _old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))


def _no_package(monkeypatch):
    monkeypatch.setattr(import_utils, "is_flash_attn_2_available", lambda: False)


def _broken_extension(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_2_cuda", None)  # import raises ImportError


@pytest.mark.usefixtures("everything_there")
@pytest.mark.parametrize(
    ("device", "dtype", "break_it", "named"),
    [
        (CPU, torch.bfloat16, None, "device is cpu"),
        (CUDA, torch.float32, None, "model.dtype is float32"),
        (CUDA, torch.bfloat16, _old_gpu, "this GPU has 7.5"),
        (CUDA, torch.bfloat16, _no_package, "no usable flash_attn"),
        (CUDA, torch.bfloat16, _broken_extension, "import flash_attn_2_cuda fails"),
    ],
)
def test_each_condition_missing_falls_back_or_is_named(monkeypatch, device, dtype, break_it, named):
    if break_it is not None:
        break_it(monkeypatch)
    assert choose_attention("auto", device=device, dtype=dtype) == "sdpa"
    with pytest.raises(ConfigError, match=named):
        choose_attention("flash_attention_2", device=device, dtype=dtype)


@pytest.mark.usefixtures("everything_there")
@pytest.mark.parametrize("requested", ["sdpa", "eager"])
def test_other_kernels_are_taken_as_asked(requested):
    assert choose_attention(requested, device=CUDA, dtype=torch.bfloat16) == requested
