"""Leave a model, its gradients and the random number generators as they were found.

Parameters are the ray's business (`probe.perturb`); this covers everything else that a forward
pass can change: buffers, train/eval mode, random states, `requires_grad`, `.grad`. Not covered:
plain Python attributes a module changes in its forward, and private `torch.Generator`s.
"""

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class StateGuard:
    """What a model and the random generators looked like when the guard was made.

    Cost: a copy of every buffer and of the generators' states; no copy of gradients.
    """

    def __init__(self, model: nn.Module, devices: Iterable[torch.device] = ()) -> None:
        self._modules = [(m, m.training, dict(m._buffers)) for m in model.modules()]
        self._buffers = [(b, b.detach().clone()) for b in model.buffers()]
        self._parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
        tensors = [*model.parameters(), *model.buffers()]
        self._random = _capture_random_state({*devices, *(t.device for t in tensors)})

    def hide_gradients(self) -> None:
        """Take every `.grad` away, so that a backward inside a loss cannot add to it."""
        for parameter, _, _ in self._parameters:
            parameter.grad = None

    def rewind(self) -> None:
        """Put buffers, modes and random states back: every trial starts from the same point."""
        for module, training, buffers in self._modules:
            module.training = training
            _put_back(module._buffers, buffers)
        for buffer, saved in self._buffers:
            buffer.data.copy_(saved)  # .data: no autograd version counter moves
        for put_back in self._random:
            put_back()
        # Under autocast, cached half-precision casts would answer for weights since moved.
        torch.clear_autocast_cache()

    def restore(self) -> None:
        """Put everything back, `requires_grad` and `.grad` included."""
        self.rewind()
        for parameter, requires_grad, grad in self._parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


@contextmanager
def undisturbed(model: nn.Module, devices: Iterable[torch.device] = ()) -> Iterator[StateGuard]:
    """A block after which the model is as before it, however the block ends.

    Args:
        model: Its modules' state is kept.
        devices: Where its forward runs, besides where its tensors are (offloaded shards).
    """
    guard = StateGuard(model, devices)
    with finally_restored(guard.restore):
        guard.hide_gradients()
        yield guard


@contextmanager
def finally_restored(restore: Callable[[], None]) -> Iterator[None]:
    """Call `restore` when the block ends, once more if Ctrl-C cut the first call short.

    Args:
        restore: Idempotent: calling it again finishes what an interrupted call left.
    """
    try:
        yield
    finally:
        try:
            restore()
        except KeyboardInterrupt:
            restore()
            raise


def _put_back(current: dict[str, Tensor | None], saved: dict[str, Tensor | None]) -> None:
    """Undo re-assigned, added and removed buffers; the usual case is that none was."""
    same = current.keys() == saved.keys() and all(current[k] is v for k, v in saved.items())
    if not same:
        current.clear()
        current.update(saved)


def _capture_random_state(devices: set[torch.device]) -> list[Callable[[], None]]:
    """One function per generator that puts its state back; each can be called many times."""
    put_back = [
        _setter(random.setstate, random.getstate()),
        _setter(torch.set_rng_state, torch.get_rng_state()),
    ]
    numpy = sys.modules.get("numpy")  # only where the program uses it already
    if numpy is not None:
        put_back.append(_setter(numpy.random.set_state, numpy.random.get_state()))
    for device in devices:
        if device.type in {"cuda", "xpu"}:
            accelerator = torch.get_device_module(device)
            state = accelerator.get_rng_state(device)
            put_back.append(_setter(accelerator.set_rng_state, state, device))
    return put_back


def _setter(function: Callable[..., Any], *arguments: Any) -> Callable[[], None]:
    def put_back() -> None:
        function(*arguments)

    return put_back
