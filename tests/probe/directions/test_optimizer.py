"""Update directions against the step torch's own optimizers take."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from probe.directions import adamw_direction, optimizer_direction
from probe.errors import DirectionError

OptimizerFactory = Callable[..., torch.optim.Optimizer]
SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW

CASES: list[tuple[OptimizerFactory, dict[str, Any]]] = [
    (SGD, {}),
    (SGD, {"weight_decay": 0.1}),
    (SGD, {"momentum": 0.9}),
    (SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    (SGD, {"momentum": 0.9, "nesterov": True}),
    (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True}),
    (SGD, {"maximize": True}),
    (SGD, {"momentum": 0.9, "foreach": True}),
    (SGD, {"momentum": 0.9, "fused": True}),
    *(
        (cls, {"weight_decay": decay, **options})
        for cls in (Adam, AdamW)
        for decay in (0.0, 0.1)
        for options in (
            {},
            {"betas": (0.9, 0.95), "eps": 1e-3},
            {"betas": (0.3, 0.95)},
            {"amsgrad": True},
            {"maximize": True},
            {"amsgrad": True, "maximize": True},
            {"foreach": True},
            {"fused": True},
            {"fused": True, "amsgrad": True},
            {"foreach": False, "lr": torch.tensor(0.01, dtype=torch.float64)},
        )
    ),
    (Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
]


def _id(case: Any) -> str:
    return f"{case[0].__name__}-" + "-".join(f"{k}={v}" for k, v in case[1].items())


def _model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def _backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    weight = next(model.parameters())
    inputs = torch.randn(8, 6, generator=generator, dtype=torch.float64).to(weight.dtype)
    model.zero_grad()
    (model(inputs) ** 2).mean().backward()


def _real_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, lr: float
) -> dict[str, torch.Tensor]:
    """(theta before - theta after) / lr of the real step, taken on a copy."""
    grads = [p.grad for p in model.parameters()]
    model, optimizer = copy.deepcopy((model, optimizer))
    for parameter, grad in zip(model.parameters(), grads, strict=True):  # deepcopy drops them
        parameter.grad = None if grad is None else grad.clone()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    return {n: (before[n] - p.detach()) / lr for n, p in model.named_parameters()}


def _assert_equals_real_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, lr: float, tolerance: float
) -> None:
    update = optimizer_direction(model, optimizer)
    moved = dict(zip(update.names, update.delta, strict=True))
    for name, expected in _real_step(model, optimizer, lr).items():
        found = moved.get(name, torch.zeros_like(expected))
        assert (found - expected).abs().max() <= tolerance * (1 + expected.abs().max()), name


@pytest.mark.parametrize("case", CASES, ids=_id)
@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_equals_the_real_step(
    case: tuple[OptimizerFactory, dict[str, Any]], num_steps: int
) -> None:
    factory, options = case
    model = _model()
    optimizer = factory(model.parameters(), **{"lr": 0.01, **options})
    for step in range(num_steps):
        _backward(model, step)
        optimizer.step()
    _backward(model, num_steps)
    # fp64: theta's rounding over lr is 1e-14; fused kernels keep bias corrections in fp32.
    tolerance = 1e-6 if options.get("fused") else 1e-11
    _assert_equals_real_step(model, optimizer, 0.01, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factory", [SGD, Adam, AdamW])
def test_equals_the_real_step_in_lower_precision(
    factory: OptimizerFactory, dtype: torch.dtype
) -> None:
    model = _model(dtype)
    optimizer = factory(model.parameters(), lr=0.5, weight_decay=0.1)
    for step in range(2):
        _backward(model, step)
        optimizer.step()
    _backward(model, 2)
    # |theta| < 4 rounds by eps * 4 / lr, and torch keeps Adam's arithmetic in the same dtype.
    _assert_equals_real_step(model, optimizer, 0.5, 16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("factory", [Adam, AdamW])
def test_capturable_state(factory: OptimizerFactory) -> None:
    """Tensor steps and tensor lr as CUDA graphs need them; the CPU can hold but not run them."""
    model = _model()
    optimizer = factory(model.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(3):
        _backward(model, step)
        optimizer.step()
    _backward(model, 3)
    expected = _real_step(model, optimizer, 0.01)
    for group in optimizer.param_groups:
        group["capturable"] = True
        group["lr"] = torch.tensor(0.01, dtype=torch.float64)
        group["betas"] = tuple(torch.tensor(b, dtype=torch.float64) for b in group["betas"])
    for state in optimizer.state.values():
        assert torch.is_tensor(state["step"])
    update = optimizer_direction(model, optimizer)
    for name, delta in zip(update.names, update.delta, strict=True):
        assert torch.allclose(delta, expected[name], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("num_steps", [0, 3])
def test_groups_keep_their_ratio_to_the_first_lr(num_steps: int) -> None:
    model = _model()
    first, second = model[0], model[2]
    optimizer = AdamW(
        [
            {"params": first.weight, "lr": 0.01, "weight_decay": 0.1},
            {"params": first.bias, "lr": 0.03, "betas": (0.5, 0.9), "weight_decay": 0.0},
            {"params": second.parameters(), "lr": 0.002, "eps": 1e-2, "amsgrad": True},
        ]
    )
    for step in range(num_steps):
        _backward(model, step)
        optimizer.step()
    _backward(model, num_steps)
    _assert_equals_real_step(model, optimizer, 0.01, 1e-11)


def test_what_step_leaves_alone_stays() -> None:
    """Frozen parameters, and parameters without a gradient, do not move, not even by decay."""
    model = _model()
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    _backward(model, 0)
    model[0].weight.requires_grad_(False)
    model[0].weight.grad = None
    model[2].bias.grad = None
    update = optimizer_direction(model, optimizer)
    assert list(update.names) == ["0.bias", "2.weight"]
    _assert_equals_real_step(model, optimizer, 0.01, 1e-11)


def test_tied_parameters_move_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)).double()
    model[1].weight = model[0].weight
    optimizer = SGD(model.parameters(), lr=0.01)
    _backward(model, 0)
    update = optimizer_direction(model, optimizer)
    assert list(update.names) == ["0.weight"]
    _assert_equals_real_step(model, optimizer, 0.01, 1e-11)


def test_slope_is_minus_delta_dot_gradient() -> None:
    model = _model()
    optimizer = AdamW(model.parameters(), lr=0.01)
    _backward(model, 0)
    update = optimizer_direction(model, optimizer)
    product = sum(
        float((d * p.grad).sum()) for d, p in zip(update.delta, update.parameters, strict=True)
    )
    assert update.slope == pytest.approx(-product, rel=1e-12)
    norm = torch.cat([d.flatten() for d in update.delta]).norm()
    assert update.norm == pytest.approx(float(norm), rel=1e-12)


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_nothing_is_written(case: tuple[OptimizerFactory, dict[str, Any]]) -> None:
    factory, options = case
    model = _model()
    optimizer = factory(model.parameters(), **{"lr": 0.01, **options})
    for step in range(2):
        if step:
            optimizer.step()
        _backward(model, step)
        state = copy.deepcopy(optimizer.state_dict())
        params = [p.detach().clone() for p in model.parameters()]
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer_direction(model, optimizer)
        assert len(optimizer.state) == len(state["state"])
        for index, entry in optimizer.state_dict()["state"].items():
            for key, value in entry.items():
                saved = state["state"][index][key]
                assert torch.equal(value, saved) if torch.is_tensor(value) else value == saved
        assert all(torch.equal(a, b) for a, b in zip(params, model.parameters(), strict=True))
        assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))


def test_lr_zero_in_one_group_is_fine_and_in_the_first_of_two_an_error() -> None:
    model = _model()
    _backward(model, 0)
    warmup = optimizer_direction(model, AdamW(model.parameters(), lr=0.0))
    later = optimizer_direction(model, AdamW(model.parameters(), lr=0.01))
    assert all(torch.equal(a, b) for a, b in zip(warmup.delta, later.delta, strict=True))
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    with pytest.raises(DirectionError, match="the first of 2 parameter groups has lr 0"):
        optimizer_direction(model, AdamW(groups, lr=0.1))


def test_refusals_name_what_was_found() -> None:
    model = _model()
    with pytest.raises(DirectionError, match="no parameter of the optimizer has a gradient"):
        optimizer_direction(model, SGD(model.parameters(), lr=0.1))
    _backward(model, 0)
    with pytest.raises(DirectionError, match=r"RMSprop; supported: torch\.optim\.SGD"):
        optimizer_direction(model, torch.optim.RMSprop(model.parameters()))

    class OwnSgd(SGD):
        pass

    with pytest.raises(DirectionError, match="OwnSgd"):
        optimizer_direction(model, OwnSgd(model.parameters(), lr=0.1))
    with pytest.raises(DirectionError, match=r"shape \(5, 6\) that is not in the model"):
        optimizer_direction(model[2], SGD(model.parameters(), lr=0.1))
    model[0].weight.grad[0, :2] = float("nan")
    with pytest.raises(DirectionError, match=r"'0\.weight' has 2 of 30 elements"):
        optimizer_direction(model, SGD(model.parameters(), lr=0.1))
    model.zero_grad(set_to_none=False)
    with pytest.raises(DirectionError, match="zero in all 4 parameters"):
        optimizer_direction(model, SGD(model.parameters(), lr=0.1))


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(DirectionError, match="'weight' is sparse_coo"):
        optimizer_direction(embedding, SGD(embedding.parameters(), lr=0.1))


def test_two_parameters_in_one_memory_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)).double()
    model[1].weight = nn.Parameter(model[0].weight.data)
    _backward(model, 0)
    with pytest.raises(DirectionError, match="two Parameters in the same memory"):
        optimizer_direction(model, SGD(model.parameters(), lr=0.1))


def test_adamw_direction_by_hand() -> None:
    """One element, second step, worked out from the formula: t = 2, b1 = 0.5, b2 = 0.75."""
    delta = adamw_direction(
        torch.tensor([2.0], dtype=torch.float64),
        torch.tensor([3.0], dtype=torch.float64),
        torch.tensor([1.0], dtype=torch.float64),
        torch.tensor([4.0], dtype=torch.float64),
        step_after=2,
        betas=(0.5, 0.75),
        eps=0.5,
        weight_decay=0.1,
    )
    m_hat = (0.5 * 1 + 0.5 * 3) / (1 - 0.25)
    v_hat = (0.75 * 4 + 0.25 * 9) / (1 - 0.5625)
    assert delta.item() == pytest.approx(m_hat / (v_hat**0.5 + 0.5) + 0.2, rel=1e-14)
    with pytest.raises(ValueError, match="step_after"):
        adamw_direction(torch.ones(1), torch.ones(1), None, None, step_after=0)
