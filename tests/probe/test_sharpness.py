"""critical_sharpness against formulas, and its conditions on what it is given."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from probe import SearchOutcome, critical_sharpness
from probe.errors import ConfigError, DirectionError, NonFiniteLossError, ParallelismError

REL_TOL = 1 / 16


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Quadratic(nn.Module):
    """L(theta) = theta' H theta / 2 - c' theta, with a chosen H, in two parameters."""

    def __init__(self, hessian: Tensor, theta: Tensor, linear: Tensor | None = None) -> None:
        super().__init__()
        self.head = nn.Parameter(theta[:2].clone())
        self.tail = nn.Parameter(theta[2:].clone())
        self.register_buffer("hessian", hessian)
        self.register_buffer("linear", torch.zeros_like(theta) if linear is None else linear)

    def forward(self) -> Tensor:
        theta = torch.cat([self.head, self.tail])
        return 0.5 * theta @ (self.hessian @ theta) - self.linear @ theta


def _random_hessian(seed: int, size: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """(H, eigenvalues ascending, eigenvectors) with eigenvalues from 1 to 50."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    values = torch.linspace(1, 50, size, dtype=torch.float64)
    return basis @ torch.diag(values) @ basis.T, values, basis


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


@pytest.mark.parametrize("search", ["interpolate", "bisect"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("use_adamw", [False, True])
def test_quadratic_eta_c_is_two_a_over_b(search: str, seed: int, use_adamw: bool) -> None:
    hessian, _, _ = _random_hessian(seed)
    theta = torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    model = Quadratic(hessian, theta)
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
        if use_adamw
        else torch.optim.SGD(model.parameters(), lr=1e-3)
    )
    for _ in range(3):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    optimizer.zero_grad()
    model().backward()
    before = _flat(list(model.parameters()))
    g = _flat([p.grad for p in model.parameters() if p.grad is not None])
    found = critical_sharpness(model, model.forward, optimizer=optimizer, search=search)
    optimizer.step()
    delta = (before - _flat(list(model.parameters()))) / 1e-3
    a, b = delta @ g, delta @ (hessian @ delta)
    assert found.outcome is SearchOutcome.CONVERGED
    assert found.slope == pytest.approx(-float(a), rel=1e-9)
    # 1e-9: theta's fp64 rounding over lr, times the curvature's spread of 50.
    assert found.eta_lower <= float(2 * a / b) * (1 + 1e-9)
    assert found.eta_upper >= float(2 * a / b) * (1 - 1e-9)
    assert 1 - found.eta_lower / found.eta_upper <= REL_TOL
    assert found.lambda_c == pytest.approx(float(b / a), rel=REL_TOL)


@pytest.mark.parametrize("seed", range(4))
def test_gradient_descent_is_at_most_the_top_eigenvalue(seed: int) -> None:
    hessian, values, basis = _random_hessian(seed)
    generator = torch.Generator().manual_seed(10 + seed)
    theta = torch.randn(6, generator=generator, dtype=torch.float64)
    for point, is_top in ((theta, False), (0.3 * basis[:, -1], True)):
        model = Quadratic(hessian, point)
        model().backward()
        found = critical_sharpness(
            model, model.forward, optimizer=torch.optim.SGD(model.parameters(), lr=1.0)
        )
        top = float(values[-1])
        # 2 / eta_upper is lambda_c's lower end: never above lambda_max but for rounding.
        assert 2 / found.eta_upper <= top * (1 + 1e-9)
        if is_top:
            assert 2 / found.eta_upper <= top * (1 + 1e-9) <= 2 / found.eta_lower * (1 + 2e-9)


def test_mlp_brackets_the_crossing_of_the_real_loss() -> None:
    """eta_lower does not raise the loss, eta_upper does, in a dense twin of the same ray."""
    model, loss_fn = _mlp_and_loss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss_fn().backward()
    found = critical_sharpness(model, loss_fn, optimizer=optimizer)
    before = _flat(list(model.parameters()))
    optimizer.step()
    delta = (before - _flat(list(model.parameters()))) / 1e-2

    def loss_at(eta: float) -> float:
        nn.utils.vector_to_parameters(before - eta * delta, model.parameters())
        with torch.no_grad():
            return float(loss_fn())

    assert found.outcome is SearchOutcome.CONVERGED
    assert loss_at(found.eta_lower) <= loss_at(0.0) < loss_at(found.eta_upper)
    for eta, loss in found.trials:  # fp64, |delta| known to 1e-14 / lr
        assert loss_at(eta) == pytest.approx(loss, rel=1e-9)


def test_lambda_c_is_lambda_dir_near_a_minimum_of_a_real_model() -> None:
    """Linear regression is quadratic: curvature from Hessian-vector products, by autograd."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    x, y = torch.randn(32, 4).double(), torch.randn(32, 2).double()

    def loss_fn() -> Tensor:
        return ((model(x) - y) ** 2).mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.step()
    optimizer.zero_grad()
    params = list(model.parameters())
    grads = torch.autograd.grad(loss_fn(), params, create_graph=True)
    for p, g in zip(params, grads, strict=True):
        p.grad = g.detach()
    buffers = [optimizer.state[p]["momentum_buffer"] for p in params]
    delta = [0.9 * b + p.grad for b, p in zip(buffers, params, strict=True)]
    product = sum((g * d).sum() for g, d in zip(grads, delta, strict=True))
    hvp = torch.autograd.grad(product, params)
    curvature = sum(float((h * d).sum()) for h, d in zip(hvp, delta, strict=True))
    lambda_dir = curvature / product.item()
    found = critical_sharpness(model, loss_fn, optimizer=optimizer)
    assert 2 / found.eta_upper <= lambda_dir * (1 + 1e-9)
    assert 2 / found.eta_lower >= lambda_dir * (1 - 1e-9)


def test_relative_direction_against_the_formula() -> None:
    """Another task's direction: eta_c = 2 delta'g1 / delta'H1 delta, slope not asked for."""
    hessian, _, _ = _random_hessian(1)
    theta = torch.linspace(1, 2, 6, dtype=torch.float64)
    model = Quadratic(hessian, theta)
    delta = hessian @ theta + 0.1
    named = {"head": delta[:2], "tail": delta[2:]}
    exact = float(2 * delta @ (hessian @ theta) / (delta @ hessian @ delta))
    found = critical_sharpness(model, model.forward, direction=named)
    assert found.slope is None
    assert found.eta_lower <= exact * (1 + 1e-9)
    assert found.eta_upper >= exact * (1 - 1e-9)
    for scale in (0.5, 8.0):  # scaling delta by c divides eta_c by c
        scaled = {name: scale * tensor for name, tensor in named.items()}
        again = critical_sharpness(model, model.forward, direction=scaled, eta_init=1e-3 / scale)
        assert again.eta_upper == pytest.approx(found.eta_upper / scale, rel=1e-12)
    uphill = {name: -tensor for name, tensor in named.items()}
    slope = float(delta @ (hessian @ theta))
    found = critical_sharpness(model, model.forward, direction=uphill, slope=slope)
    assert found.outcome is SearchOutcome.NOT_A_DESCENT_DIRECTION
    assert found.eta_c is None


def test_several_groups_measure_the_first_lr() -> None:
    """Halving every lr changes nothing; eta is the first group's, the other rides along."""
    hessian, _, _ = _random_hessian(2)
    theta = torch.linspace(1, 2, 6, dtype=torch.float64)
    g = hessian @ theta
    delta = torch.cat([g[:2], 3 * g[2:]])
    exact = float(2 * delta @ g / (delta @ hessian @ delta))
    for lr in (1e-3, 5e-4):
        model = Quadratic(hessian, theta)
        model().backward()
        groups = [{"params": [model.head], "lr": lr}, {"params": [model.tail], "lr": 3 * lr}]
        found = critical_sharpness(model, model.forward, optimizer=torch.optim.SGD(groups))
        assert found.eta_lower <= exact * (1 + 1e-9)
        assert found.eta_upper >= exact * (1 - 1e-9)


def test_maximize_climbs_so_its_objective_has_no_eta_c() -> None:
    hessian, _, _ = _random_hessian(3)
    model = Quadratic(hessian, torch.ones(6, dtype=torch.float64))
    model().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, maximize=True)
    found = critical_sharpness(model, model.forward, optimizer=optimizer)
    g = hessian @ torch.ones(6, dtype=torch.float64)
    assert found.slope == pytest.approx(float(g @ g))
    assert found.outcome is SearchOutcome.NOT_A_DESCENT_DIRECTION


def test_a_linear_loss_never_crosses() -> None:
    zero = torch.zeros(6, 6, dtype=torch.float64)
    linear = torch.ones(6, dtype=torch.float64)
    model = Quadratic(zero, linear, linear=linear)
    model().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = critical_sharpness(model, model.forward, optimizer=optimizer, eta_max=1e3)
    assert found.outcome is SearchOutcome.NO_CROSSING
    assert found.eta_c is None


def test_num_forward_passes_counts_every_call() -> None:
    model, loss_fn = _mlp_and_loss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = loss_fn()
    loss.backward()
    calls = []

    def counted() -> Tensor:
        calls.append(1)
        return loss_fn()

    found = critical_sharpness(model, counted, optimizer=optimizer)
    assert found.num_forward_passes == len(calls)
    calls.clear()
    given = critical_sharpness(model, counted, optimizer=optimizer, loss_at_zero=loss)
    assert given.num_forward_passes == len(calls) == found.num_forward_passes - 1
    assert (given.eta_lower, given.eta_upper) == (found.eta_lower, found.eta_upper)
    calls.clear()
    capped = critical_sharpness(
        model, counted, optimizer=optimizer, eta_init=1e-9, max_forward_passes=3
    )
    assert len(calls) == capped.num_forward_passes <= 3
    assert capped.outcome is SearchOutcome.BUDGET_EXHAUSTED


def test_forms_of_a_loss() -> None:
    model, loss_fn = _mlp_and_loss()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    loss_fn().backward()
    plain = critical_sharpness(model, loss_fn, optimizer=optimizer)
    # Powers of two: sums and products exact.
    forms: list[Callable[[], object]] = [
        lambda: loss_fn().item(),
        lambda: (loss_fn() * 64, 64),
        lambda: (loss_fn().item() * 64, torch.tensor(64)),
        lambda: loss_fn().reshape(1),
    ]
    for form in forms:
        assert critical_sharpness(model, form, optimizer=optimizer) == plain


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(3), r"shape \(3,\)"),
        ((1.0, 2.0, 3.0), "3 values"),
        ((1.0, -2.0), "count -2"),
        ((1.0, 0), "sum to 0"),
        ("low", "returned str"),
        (None, "returned NoneType"),
    ],
)
def test_what_is_no_loss_is_refused(value: object, message: str) -> None:
    model, loss_fn = _mlp_and_loss()
    loss_fn().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with pytest.raises(ConfigError, match=message):
        critical_sharpness(model, lambda: value, optimizer=optimizer)


def test_loss_not_finite_at_zero_is_an_error_and_a_rise_elsewhere() -> None:
    model, loss_fn = _mlp_and_loss()
    loss_fn().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with pytest.raises(NonFiniteLossError):
        critical_sharpness(model, lambda: math.nan, optimizer=optimizer)
    theta = _flat(list(model.parameters()))

    def walled() -> Tensor:  # NaN beyond a distance far below the real crossing
        far = (_flat(list(model.parameters())) - theta).norm() > 1e-4
        return loss_fn() * (math.nan if far else 1.0)

    found = critical_sharpness(model, walled, optimizer=optimizer)
    g = _flat([p.grad for p in model.parameters() if p.grad is not None])
    assert found.outcome is SearchOutcome.CONVERGED
    assert found.eta_lower <= 1e-4 / float(g.norm()) <= found.eta_upper


def test_arguments_that_do_not_fit_are_refused() -> None:
    model, loss_fn = _mlp_and_loss()
    loss_fn().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    direction = {n: p.grad for n, p in model.named_parameters()}
    with pytest.raises(ConfigError, match=r"exactly one.*found neither"):
        critical_sharpness(model, loss_fn)
    with pytest.raises(ConfigError, match=r"exactly one.*found both"):
        critical_sharpness(model, loss_fn, optimizer=optimizer, direction=direction)
    with pytest.raises(ConfigError, match="slope"):
        critical_sharpness(model, loss_fn, optimizer=optimizer, slope=math.nan)
    with pytest.raises(ConfigError, match="half_precision"):
        critical_sharpness(model, loss_fn, optimizer=optimizer, half_precision="fp32")


def test_models_whose_parameters_are_not_ours_to_move_are_refused() -> None:
    model, loss_fn = _mlp_and_loss()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
    with pytest.raises(DirectionError, match="'weight' is on the meta device"):
        critical_sharpness(empty, loss_fn, optimizer=optimizer)
    model[0].weight.ds_id = 0  # what ZeRO-3 marks parameters with
    with pytest.raises(ParallelismError, match="DeepSpeed"):
        critical_sharpness(model, loss_fn, optimizer=optimizer)


def _mlp_and_loss() -> tuple[nn.Sequential, Callable[[], Tensor]]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(64, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (64,), generator=generator)
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    return model, lambda: nn.functional.cross_entropy(model(x), labels)


def test_eta_c_of_a_measurement_without_an_answer_is_a_valid_first_guess() -> None:
    hessian, _, _ = _random_hessian(0)
    model = Quadratic(hessian, torch.ones(6, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model().backward()
    last = critical_sharpness(model, model.forward, optimizer=optimizer, eta_max=2e-3)
    assert last.outcome is SearchOutcome.NO_CROSSING
    found = critical_sharpness(model, model.forward, optimizer=optimizer, eta_init=last.eta_c)
    assert found.trials[0][0] == 1e-3
    assert found.outcome is SearchOutcome.CONVERGED


@pytest.mark.parametrize("search", ["interpolate", "bisect"])
def test_a_learning_rate_that_is_a_tensor_is_a_valid_first_guess(search: str) -> None:
    hessian, _, _ = _random_hessian(0)
    model = Quadratic(hessian, torch.ones(6, dtype=torch.float64))
    rate = torch.tensor(1e-3, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, capturable=True, foreach=True)
    model().backward()
    found = critical_sharpness(
        model, model.forward, optimizer=optimizer, eta_init=rate, search=search
    )
    same = critical_sharpness(
        model, model.forward, optimizer=optimizer, eta_init=1e-3, search=search
    )
    assert found.outcome is SearchOutcome.CONVERGED
    assert found.trials == same.trials
    assert all(type(eta) is float for eta, _ in found.trials)


def test_a_closure_that_calls_backward_is_told_not_to() -> None:
    hessian, _, _ = _random_hessian(0)
    model = Quadratic(hessian, torch.ones(6, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model()
        loss.backward()
        return loss

    closure()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with pytest.raises(RuntimeError) as caught:
        critical_sharpness(model, closure, optimizer=optimizer)
    assert any("return the loss, without" in note for note in caught.value.__notes__)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
