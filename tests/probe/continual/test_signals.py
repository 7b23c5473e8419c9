"""The signals against their formulas on plain numbers, and what measuring must not do."""

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from small_networks import KINDS, Case, draws, make_case
from torch import Tensor, nn

from probe.continual.derivatives import BatchDerivatives
from probe.continual.flat_optimizer import FlatOptimizer
from probe.continual.networks import batch_losses
from probe.continual.signals import Measurement, SignalTracker, step_sizes, violations
from probe.result_continual import LAYER_SIGNALS, RUN_SIGNALS, Bound
from probe.spec_continual import Adam, PlainSgd, Signals

RATES = [[1e-3, 2e-3, 5e-3], [1e-2, 1e-3, 1e-4], [3e-3, 3e-3, 3e-3]]
ADAM = Adam(learning_rate=1e-3, betas=(0.8, 0.95), eps=1e-5)
OF_TRAINING = {"accuracy", "loss"}  # a step's by-product, not a measurement's


def flat_optimizer(case: Case, kind: Adam | PlainSgd) -> FlatOptimizer:
    rates = torch.tensor(RATES)[: case.network.num_runs]
    return FlatOptimizer(kind, rates, case.network.columns)


def train(case: Case, optimizer: FlatOptimizer, num_steps: int) -> None:
    """Steps on the case's own batch."""
    for _ in range(num_steps):
        leaves = case.network.leaves(case.parameters)
        losses = batch_losses(case.network.forward(leaves, case.x), case.y)
        gradients = torch.autograd.grad(losses.sum(), leaves)
        flat = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
        optimizer.step(case.parameters, flat)


def measure(tracker: SignalTracker, case: Case, optimizer: FlatOptimizer) -> Measurement:
    return tracker.measure(case.network, case.parameters, case.x, case.y, optimizer)


def trained(
    activation: str = "sloped", normalization: str = "none", num_steps: int = 3
) -> tuple[Case, FlatOptimizer]:
    case = make_case(activation, normalization, dtype=torch.float32)
    optimizer = flat_optimizer(case, ADAM)
    train(case, optimizer, num_steps)
    return case, optimizer


def course(
    case: Case, optimizer: FlatOptimizer, tracker: SignalTracker, length: int
) -> list[Measurement]:
    """Measurements with two steps between them."""
    found = []
    for _ in range(length):
        found.append(measure(tracker, case, optimizer))
        train(case, optimizer, 2)
    return found


def test_step_sizes_are_those_of_torch_optim() -> None:
    case = make_case("sloped", "none")
    optimizer = flat_optimizer(case, ADAM)
    start = case.parameters.clone().float()
    case.parameters, case.x = start.clone(), case.x.float()
    train(case, optimizer, 4)
    found = step_sizes(case.network, ADAM, optimizer)
    case.parameters = start
    for run in range(3):
        model = case.twin(run)
        linears = [module for module in model if isinstance(module, nn.Linear)]
        stock = torch.optim.Adam(
            [
                {"params": list(linear.parameters()), "lr": rate}
                for linear, rate in zip(linears, RATES[run], strict=True)
            ],
            betas=ADAM.betas,
            eps=ADAM.eps,
        )
        for _ in range(4):
            stock.zero_grad()
            nn.functional.cross_entropy(model(case.x[run]), case.y[run]).backward()
            stock.step()
        roots, multipliers, rates = [], [], []
        for group in stock.param_groups:
            second = torch.cat([stock.state[p]["exp_avg_sq"].flatten() for p in group["params"]])
            root = (second.double() / (1 - 0.95**4)).sqrt()
            roots.append(root)
            multipliers.append(group["lr"] / ((1 - 0.8**4) * (root + 1e-5)))
            rates.append(torch.full_like(root, group["lr"]))
        for parts in (roots, multipliers, rates):
            parts.append(torch.cat(parts))
        rate = torch.stack([part.mean() for part in rates])
        root_mean_square = torch.stack([part.square().mean().sqrt() for part in roots])
        # Four fp32 steps by two orders of the same operations, then a root of small numbers.
        close = {"rtol": 1e-3, "atol": 0.0}
        torch.testing.assert_close(found.learning_rate[run], rate, rtol=1e-6, atol=0)
        effective = torch.stack([part.mean() for part in multipliers])
        torch.testing.assert_close(found.effective[run], effective, **close)
        factor = rate / (root_mean_square + 1e-5)
        torch.testing.assert_close(found.sharpness_factor[run], factor, **close)


def test_of_sgd_steps_are_the_rate_and_sharpness_stays_as_it_is() -> None:
    case = make_case("sloped", "none", dtype=torch.float32)
    kind = PlainSgd(name="sgd")
    tracker = SignalTracker(case.network, Signals(), kind, draws(3))
    layers = measure(tracker, case, flat_optimizer(case, kind)).layers
    assert torch.equal(layers["effective_step"], layers["learning_rate"])
    assert torch.equal(layers["normalized_sharpness"], layers["sharpness"])
    sizes = torch.tensor([layer.stop - layer.start for layer in case.network.layers]).double()
    mean = (torch.tensor(RATES) * sizes).sum(dim=1) / sizes.sum()
    torch.testing.assert_close(layers["learning_rate"][:, -1], mean)


def test_history_and_bounds_follow_the_formulas() -> None:
    case, optimizer = trained()
    signals = Signals(ema=0.7, kappa=3.0, beta=0.6)
    tracker = SignalTracker(case.network, signals, ADAM, draws(3))
    found = course(case, optimizer, tracker, 4)
    num_images = case.x.shape[1]
    for run in range(3):
        for layer in range(4):
            average = 0.0
            for count, measurement in enumerate(found, 1):
                now = {k: v[run, layer].item() for k, v in measurement.layers.items()}
                average = 0.7 * average + 0.3 * now["normalized_sharpness"]
                mean = average / (1 - 0.7**count)
                deviation = (now["normalized_sharpness"] - mean) ** 2
                volatility = deviation / (mean + 1e-8) if count > 1 else 0.0
                squared, noise = now["gradient_norm"] ** 2, now["noise_variance"]
                signal = num_images * squared
                expected = {
                    "sharpness_mean": mean,
                    "volatility": volatility,
                    "bound_gradient": signal / noise,
                    "bound_curvature": 1 / (3 * volatility) if count > 1 else math.inf,
                    "bound_combined": signal / (noise + 0.6 * squared * volatility),
                    "gradient_to_parameter": now["gradient_norm"] / now["weight_norm"],
                }
                for name, value in expected.items():
                    # float64; a difference of nearly equal numbers may lose 5 digits
                    assert now[name] == pytest.approx(value, rel=1e-9), (name, count)


def test_sharpness_is_normalised_by_the_steps() -> None:
    case, optimizer = trained()
    tracker = SignalTracker(case.network, Signals(), ADAM, draws(3))
    layers = measure(tracker, case, optimizer).layers
    factor = step_sizes(case.network, ADAM, optimizer).sharpness_factor
    assert torch.equal(layers["normalized_sharpness"], factor * layers["sharpness"])
    for run in range(3):
        case.parameters = case.parameters.double()
        case.x = case.x.double()
        hessian = case.dense_hessian(run)
        top = [torch.linalg.eigvalsh(hessian[p, p])[-1] for p in case.columns()]
        # 20 steps of power iteration, then 2: the eigenvalue's error is the residual's square.
        torch.testing.assert_close(layers["sharpness"][run], torch.stack(top), rtol=1e-3, atol=0)


def test_every_signal_is_there_and_its_name_is_known() -> None:
    case, optimizer = trained()
    tracker = SignalTracker(case.network, Signals(), ADAM, draws(3))
    found = measure(tracker, case, optimizer)
    assert set(found.layers) == set(LAYER_SIGNALS)
    assert set(found.runs) == set(RUN_SIGNALS) - OF_TRAINING
    assert {tuple(value.shape) for value in found.layers.values()} == {(3, 4)}
    assert {tuple(value.shape) for value in found.runs.values()} == {(3,)}
    assert found.violations.shape == (3, 3)


def test_violations_are_steps_above_a_bound_in_some_layer() -> None:
    case, optimizer = trained()
    tracker = SignalTracker(case.network, Signals(), ADAM, draws(3))
    found = course(case, optimizer, tracker, 5)
    seen = set()
    for measurement in found:
        for column, name in enumerate(get_args(Bound)):
            steps = measurement.layers["effective_step"].tolist()
            bounds = measurement.layers[f"bound_{name}"].tolist()
            for run in range(3):
                pairs = list(zip(steps[run], bounds[run], strict=True))[:-1]
                expected = any(step > bound for step, bound in pairs)
                assert bool(measurement.violations[run, column]) == expected
                seen.add(expected)
    assert seen == {True, False}  # else the comparison above says little


def test_the_whole_network_and_what_does_not_exist_are_no_violation() -> None:
    effective = torch.tensor([[1.0, 2.0, 9.0]])
    bounds = {
        "gradient": torch.tensor([[1.0, 3.0, 5.0]]),  # equal is not above
        "curvature": torch.tensor([[torch.nan, torch.inf, 5.0]]),
        "combined": torch.tensor([[5.0, 1.9, 50.0]]),
    }
    assert violations(effective, bounds).tolist() == [[False, False, True]]


def test_without_noise_the_bounds_are_infinite() -> None:
    case, optimizer = trained()
    case.x, case.y = case.x[:, :1], case.y[:, :1]  # one image: nothing differs from the mean
    tracker = SignalTracker(case.network, Signals(), ADAM, draws(3))
    layers = measure(tracker, case, optimizer).layers
    # Rounding of a mean over one sample: the bound is infinite or beyond any step.
    assert (layers["bound_gradient"] > 1e6).all()
    assert layers["bound_curvature"].isposinf().all()  # the first measurement has no volatility


def test_before_the_first_step_of_adam_there_are_no_step_sizes() -> None:
    case, optimizer = trained(num_steps=0)
    tracker = SignalTracker(case.network, Signals(), ADAM, draws(3))
    first = measure(tracker, case, optimizer)
    assert first.layers["effective_step"].isnan().all()
    assert first.layers["sharpness_mean"].isnan().all()
    assert not first.violations.any()
    train(case, optimizer, 1)
    second = measure(tracker, case, optimizer).layers  # and the history begins only now
    assert torch.equal(second["sharpness_mean"], second["normalized_sharpness"])
    assert (second["volatility"] == 0).all()


@pytest.mark.parametrize(("activation", "normalization"), KINDS)
def test_measuring_changes_nothing(activation: str, normalization: str) -> None:
    case, optimizer = trained(activation, normalization)
    watched: Callable[[], list[Tensor]] = lambda: [  # noqa: E731
        case.parameters,
        case.x,
        *case.network.running,
        *optimizer.state().values(),
    ]
    before = [value.clone() for value in watched()]
    measure(SignalTracker(case.network, Signals(), ADAM, draws(3)), case, optimizer)
    for old, new in zip(before, watched(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize(("activation", "normalization"), KINDS)
def test_a_run_does_not_depend_on_the_runs_beside_it(activation: str, normalization: str) -> None:
    case = make_case(activation, normalization, dtype=torch.float32)
    alone = case.single(1)
    optimizers = flat_optimizer(case, ADAM), flat_optimizer(alone, ADAM)
    optimizers[1].set_learning_rate(torch.tensor(RATES[1:2]))
    # Signals of one and the same point: training would amplify rounding.
    gradient = torch.randn(case.parameters.shape, generator=torch.Generator().manual_seed(5))
    kept = alone.parameters.clone()
    optimizers[0].step(case.parameters, gradient.clone())
    optimizers[1].step(alone.parameters, gradient[1:2])
    torch.testing.assert_close(case.parameters[1:2], alone.parameters)
    assert not torch.equal(kept, alone.parameters)
    together = SignalTracker(case.network, Signals(), ADAM, draws(3))
    by_itself = SignalTracker(alone.network, Signals(), ADAM, draws(3)[1:2])
    found = measure(together, case, optimizers[0])
    expected = measure(by_itself, alone, optimizers[1])
    for name, value in expected.runs.items():
        torch.testing.assert_close(found.runs[name][1:2], value, rtol=1e-4, atol=1e-6)
    for name, value in expected.layers.items():
        if name != "sharpness_residual":  # converged: what is left of it is rounding
            torch.testing.assert_close(found.layers[name][1:2], value, rtol=2e-4, atol=1e-6)
    assert torch.equal(found.violations[1:2], expected.violations)


def test_a_run_that_diverged_leaves_its_neighbours_alone() -> None:
    case, optimizer = trained()
    expected = measure(SignalTracker(case.network, Signals(), ADAM, draws(3)), case, optimizer)
    case.parameters[1] = torch.nan
    found = measure(SignalTracker(case.network, Signals(), ADAM, draws(3)), case, optimizer)
    others = torch.tensor([0, 2])
    of_state = {"learning_rate", "effective_step"}  # the optimizer's are still finite here
    for name, value in found.layers.items():
        assert name in of_state or value[1].isnan().all(), name
        close = {"rtol": 1e-4, "atol": 1e-6, "equal_nan": True}
        torch.testing.assert_close(value[others], expected.layers[name][others], **close)
    for name, value in found.runs.items():
        assert value[1].isnan()
        torch.testing.assert_close(value[others], expected.runs[name][others])
    assert not found.violations[1].any()


def test_one_bad_batch_does_not_end_a_history() -> None:
    case, optimizer = trained()
    tracker = SignalTracker(case.network, Signals(), ADAM, draws(3))
    first = measure(tracker, case, optimizer).layers
    x = case.x
    case.x = torch.full_like(x, torch.inf)
    assert measure(tracker, case, optimizer).layers["volatility"].isnan().all()
    case.x = x
    after = measure(tracker, case, optimizer).layers
    average = 0.9 * 0.1 * first["normalized_sharpness"] + 0.1 * after["normalized_sharpness"]
    torch.testing.assert_close(after["sharpness_mean"], average / (1 - 0.9**2))


def test_a_reset_run_starts_anew_and_the_others_go_on() -> None:
    case, optimizer = trained()
    trackers = [SignalTracker(case.network, Signals(), ADAM, draws(3)) for _ in range(2)]
    for tracker in trackers:
        measure(tracker, case, optimizer)
    train(case, optimizer, 1)
    is_reset = torch.tensor([True, False, False])
    trackers[0].reset(is_reset, draws(3, seed=4))
    found, kept = (measure(tracker, case, optimizer).layers for tracker in trackers)
    assert (found["volatility"][0] == 0).all()
    assert (kept["volatility"][0] > 0).all()
    fresh = SignalTracker(case.network, Signals(), ADAM, draws(3, seed=4))
    as_new = measure(fresh, case, optimizer).layers
    for name, value in found.items():
        assert torch.equal(value[0], as_new[name][0]), name
        assert torch.equal(value[1:], kept[name][1:]), name
    train(case, optimizer, 1)
    again, as_new = (measure(t, case, optimizer).layers for t in (trackers[0], fresh))
    assert (again["volatility"][0] > 0).all()
    for name, value in again.items():
        assert torch.equal(value[0], as_new[name][0]), name


def test_many_iterations_are_taken_after_a_start_only(monkeypatch: pytest.MonkeyPatch) -> None:
    case, optimizer = trained()
    signals = Signals(first_power_iterations=5, power_iterations=2)
    tracker = SignalTracker(case.network, signals, ADAM, draws(3))
    num_products, product = 0, BatchDerivatives.hessian_product

    def counted(self: BatchDerivatives, v: Tensor, first: int, last: int, result: Tensor) -> None:
        nonlocal num_products
        num_products += first == 0 and last == 2  # of the whole network
        product(self, v, first, last, result)

    monkeypatch.setattr(BatchDerivatives, "hessian_product", counted)
    counts = []
    for is_reset in (False, False, True, False):
        if is_reset:
            tracker.reset(torch.tensor([False, True, False]), draws(3))
        num_products = 0
        measure(tracker, case, optimizer)
        counts.append(num_products)
    assert counts == [6 + 3, 3, 6 + 3, 3]


def test_state_goes_on_with_the_same_numbers() -> None:
    case, optimizer = trained()
    tracker = SignalTracker(case.network, Signals(), ADAM, draws(3))
    course(case, optimizer, tracker, 2)
    kept = {name: value.clone() for name, value in tracker.state().items()}
    expected = measure(tracker, case, optimizer)
    resumed = SignalTracker(case.network, Signals(), ADAM, draws(3, seed=8))
    resumed.load(kept)
    found = measure(resumed, case, optimizer)
    for name, value in expected.layers.items():
        assert torch.equal(found.layers[name], value), name
