"""After a measurement everything is as before it, bit for bit, however it ended."""

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from probe import critical_sharpness
from probe.guard import finally_restored, undisturbed

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    """Batch norm, dropout, a frozen layer, tied weights, a buffer that is re-assigned."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3))
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.out = nn.Linear(16, 16)
        self.tied = nn.Linear(16, 16, bias=False)
        self.tied.weight = self.out.weight
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls = self.num_calls + 1
        return self.tied(torch.tanh(self.out(self.frozen(self.body(x)))))


def _training(dtype: torch.dtype) -> tuple[Net, torch.optim.Optimizer, Callable[[], Tensor]]:
    torch.manual_seed(7)
    model = Net().to(dtype)
    x, y = torch.randn(32, 8).to(dtype), torch.randn(32, 16).to(dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def loss_fn() -> Tensor:
        return ((model(x) - y) ** 2).mean()

    for _ in range(3):
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.step()
    optimizer.zero_grad()
    loss_fn().backward()
    return model, optimizer, loss_fn


def _snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return copy.deepcopy(
        {
            "parameters": {n: p.detach() for n, p in model.named_parameters()},
            "identity": {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)},
            "grads": {n: (id(p.grad), p.grad) for n, p in model.named_parameters()},
            "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
            "versions": {n: p._version for n, p in model.named_parameters()},
            "buffers": dict(model.named_buffers()),
            "buffer_identity": {n: id(b) for n, b in model.named_buffers()},
            "modes": {n: m.training for n, m in model.named_modules()},
            "hooks": {n: len(m._forward_pre_hooks) for n, m in model.named_modules()},
            "optimizer": optimizer.state_dict(),
            "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
        }
    )


def _assert_same(now: Any, then: Any, path: str = "") -> None:
    assert type(now) is type(then), path
    if isinstance(now, torch.Tensor):
        assert now.dtype == then.dtype, path
        assert torch.equal(now, then), path
    elif isinstance(now, np.ndarray):
        assert np.array_equal(now, then), path
    elif isinstance(now, dict):
        assert list(now) == list(then), path
        for key in now:
            _assert_same(now[key], then[key], f"{path}/{key}")
    elif isinstance(now, list | tuple):
        assert len(now) == len(then), path
        for index, pair in enumerate(zip(now, then, strict=True)):
            _assert_same(*pair, f"{path}/{index}")
    else:
        assert now == then, path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("half_precision", ["upcast", "cast"])
def test_success(dtype: torch.dtype, half_precision: str) -> None:
    model, optimizer, loss_fn = _training(dtype)
    before = _snapshot(model, optimizer)
    found = critical_sharpness(model, loss_fn, optimizer=optimizer, half_precision=half_precision)
    assert found.num_forward_passes > 1
    _assert_same(_snapshot(model, optimizer), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("half_precision", ["upcast", "cast"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at_call", [1, 3])
def test_loss_fn_raises(
    dtype: torch.dtype, half_precision: str, error: type[BaseException], at_call: int
) -> None:
    model, optimizer, loss_fn = _training(dtype)
    before = _snapshot(model, optimizer)
    calls = []

    def raising() -> Tensor:
        loss = loss_fn()
        calls.append(1)
        if len(calls) == at_call:
            raise error("on purpose")
        return loss

    with pytest.raises(error, match="on purpose"):
        critical_sharpness(
            model, raising, optimizer=optimizer, slope=None, half_precision=half_precision
        )
    _assert_same(_snapshot(model, optimizer), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_loss_fn_that_changes_everything_it_can(dtype: torch.dtype) -> None:
    model, optimizer, loss_fn = _training(dtype)
    model.out.eval()
    before = _snapshot(model, optimizer)

    def rude() -> float:
        random.random()
        np.random.rand()
        model.eval() if model.training else model.train()
        model.body[1].running_mean = torch.ones_like(model.body[1].running_mean)
        model.register_buffer("extra", torch.ones(2))
        with torch.enable_grad():
            loss = loss_fn()
            loss.backward()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        value = loss.item()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return value

    critical_sharpness(model, rude, optimizer=optimizer)
    _assert_same(_snapshot(model, optimizer), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_trial_is_one_function_of_eta(dtype: torch.dtype) -> None:
    """With dropout and batch norm in training mode, L(eta) repeats to the bit."""
    model, optimizer, loss_fn = _training(dtype)
    first = critical_sharpness(model, loss_fn, optimizer=optimizer)
    random_numbers = []

    def probing() -> Tensor:
        loss = loss_fn()
        random_numbers.append(torch.rand(()).item())
        return loss

    assert critical_sharpness(model, probing, optimizer=optimizer) == first
    assert len(set(random_numbers)) == 1
    loss_at_zero = loss_fn().item()  # the state here is the one every trial started from
    if dtype is not torch.bfloat16:
        assert loss_at_zero == first.loss_at_zero


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_training_with_probes_equals_training_without(dtype: torch.dtype, name: str) -> None:
    def losses(probed: bool) -> list[float]:
        model, _, loss_fn = _training(dtype)
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(trainable, lr=1e-2, momentum=0.9)
            if name == "sgd"
            else torch.optim.AdamW(trainable, lr=1e-2)
        )
        seen = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = loss_fn()
            loss.backward()
            seen.append(loss.item())
            if probed:
                critical_sharpness(model, loss_fn, optimizer=optimizer)
            optimizer.step()
        return seen

    with_probes, without = losses(True), losses(False)
    assert with_probes == without
    assert len(set(without)) > 1  # it trains; bf16 losses can coincide


def test_interrupted_restore_is_finished() -> None:
    done = []

    def restore() -> None:
        done.append(1)
        if len(done) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), finally_restored(restore):
        pass
    assert len(done) == 2


def test_autocast_does_not_answer_from_cached_casts() -> None:
    """Inside one autocast block, casts of fp32 weights are cached: every eta would look alike."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    x = torch.randn(16, 4)

    def loss_fn() -> Tensor:
        return (model(x).float() ** 2).mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_fn()
        loss.backward()
        found = critical_sharpness(model, loss_fn, optimizer=optimizer)
        after = loss_fn().item()
    assert found.eta_c is not None
    assert len({value for _, value in found.trials}) == len(found.trials)
    assert after == loss.item() == found.loss_at_zero


def test_guard_alone_restores_on_exit() -> None:
    model = nn.BatchNorm1d(3)
    with undisturbed(model) as guard:
        model(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
        assert model.num_batches_tracked == 1
        guard.rewind()
        assert model.num_batches_tracked == 0
        model(torch.ones(4, 3))
    assert model.num_batches_tracked == 0
    assert torch.equal(model.running_mean, torch.zeros(3))
