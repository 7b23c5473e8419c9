"""Run a half-precision model at fp32 weights, without touching its half-precision ones.

Why: near 0.02 neighbouring bf16 numbers lie 1.2e-4 apart. Written into bf16 weights, a step of
3e-5 in every weight moves 30 % of them, each too far: what the forward pass then sees is not the
step but its rounding (cosine 0.55), even when theta - eta * delta is formed in fp32 and cast
last. So for the length of a measurement the modules hold fp32 twins of their half-precision
parameters and buffers. The originals are out of the way and are never written.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from probe.guard import finally_restored
from probe.perturb import HALF_PRECISION

UPCAST_NOTE = (
    "During this measurement the model's half-precision parameters are fp32, so that small steps "
    "are not rounded away; if the model cannot run so, pass half_precision='cast'."
)


class Fp32Twins:
    """fp32 stand-ins for a model's half-precision parameters and buffers.

    Cost: 4 bytes per half-precision element, trained or frozen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._of: dict[int, nn.Parameter] = {}
        self._slots: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._buffer_slots: list[tuple[nn.Module, str, Tensor]] = []
        self._hooks: list[Any] = []
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dtype in HALF_PRECISION:
                    self._slots.append((module, name, parameter))
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.dtype in HALF_PRECISION:
                    self._buffer_slots.append((module, name, buffer))

    def install(self) -> None:
        """Put the twins where the model's forward looks for its parameters."""
        for module in {module for module, _, _ in self._slots}:
            self._hooks.append(
                module.register_forward_pre_hook(_cast_inputs, with_kwargs=True, prepend=True)
            )
        for module, name, parameter in self._slots:
            if id(parameter) not in self._of:  # a tied parameter keeps one twin
                twin = nn.Parameter(parameter.data.float(), parameter.requires_grad)
                self._of[id(parameter)] = twin
            setattr(module, name, self._of[id(parameter)])

    def refresh_buffers(self) -> None:
        """Give the modules new fp32 copies of their half-precision buffers' present values."""
        for module, name, buffer in self._buffer_slots:
            module._buffers[name] = buffer.detach().float()

    def remove(self) -> None:
        """Put the originals back; the same objects, never written."""
        for hook in self._hooks:
            hook.remove()
        for module, name, parameter in self._slots:
            setattr(module, name, parameter)
        for module, name, buffer in self._buffer_slots:
            module._buffers[name] = buffer

    def live(self, parameter: nn.Parameter) -> Tensor:
        """The tensor the forward pass reads for this parameter."""
        return self._of.get(id(parameter), parameter).data


@contextmanager
def fp32_twins(model: nn.Module) -> Iterator[Fp32Twins]:
    """A block inside which the model runs at fp32 twins of its half-precision parameters."""
    twins = Fp32Twins(model)
    with finally_restored(twins.remove):
        twins.install()
        yield twins


def _cast_inputs(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Let half-precision activations into a module whose weights are fp32 now."""
    return _to_fp32(args), _to_fp32(kwargs)


def _to_fp32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALF_PRECISION else value
    if type(value) in (tuple, list):
        return type(value)(_to_fp32(item) for item in value)
    if type(value) is dict:
        return {key: _to_fp32(item) for key, item in value.items()}
    return value
