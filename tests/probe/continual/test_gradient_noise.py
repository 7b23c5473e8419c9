"""The variance of samples' gradients against a plain loop over samples."""

import pytest
import torch
from small_networks import KINDS, make_case, make_certain_case

from probe.continual.gradient_noise import gradient_noise

EXACT = {"rtol": 1e-10, "atol": 1e-13}  # the same sums in another order, float64


@pytest.mark.parametrize(("activation", "normalization"), KINDS)
def test_variance_equals_the_loop_over_samples(activation: str, normalization: str) -> None:
    case = make_case(activation, normalization)
    found = gradient_noise(case.derivatives())
    for run in range(3):
        samples = case.sample_gradients(run)
        centred = samples - samples.mean(dim=0)
        for column, part in enumerate(case.columns()):
            expected = centred[:, part].square().sum(dim=1).mean()
            torch.testing.assert_close(found.variance[run, column], expected, **EXACT)


@pytest.mark.parametrize(("activation", "normalization"), KINDS)
def test_norm_is_that_of_the_batch_losses_own_gradient(activation: str, normalization: str) -> None:
    case = make_case(activation, normalization)
    found = gradient_noise(case.derivatives())
    for run in range(3):
        flat = case.parameters[run].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(case.loss_of(run, flat), flat)
        for column, part in enumerate(case.columns()):
            expected = gradient[part].square().sum()
            torch.testing.assert_close(found.gradient_squared[run, column], expected, **EXACT)


def test_with_batch_normalisation_the_two_gradients_differ() -> None:
    # Else the test of the variance would not tell constant statistics from the batch's own.
    case = make_case("sloped", "batch")
    derivatives = case.derivatives()
    own, single = derivatives.deltas, derivatives.sample_deltas
    difference = derivatives.gradient(own) - derivatives.gradient(single)
    assert difference.abs().max() > 1e-3


def test_float32_where_all_samples_agree() -> None:
    # One sample, many times: sigma2_ps is 0, and what is found is rounding of |g|^2, never below 0.
    case = make_case("sloped", "none", batch_size=64, dtype=torch.float32)
    case.x = case.x[:, :1].expand(3, 64, -1)
    case.y = case.y[:, :1].expand(3, 64)
    found = gradient_noise(case.derivatives())
    assert (found.variance >= 0).all()
    assert (found.variance <= 1e-6 * found.gradient_squared).all()


def test_float32_loses_nothing_that_matters_where_noise_is_small() -> None:
    # Samples that differ by 1e-2: sigma2_ps is some 1e-4 of |g|^2, whose error is 1e-6 of it.
    case = make_case("tanh", "none", batch_size=64)
    case.x = case.x[:, :1] + 1e-2 * case.x
    case.y = case.y[:, :1].expand(3, 64)
    exact = gradient_noise(case.derivatives())
    case.x, case.parameters = case.x.float(), case.parameters.float()
    rounded = gradient_noise(case.derivatives())
    assert (exact.variance < 1e-2 * exact.gradient_squared).all()
    error = (rounded.variance - exact.variance).abs()
    assert (error <= 1e-6 * exact.gradient_squared).all()


def test_float32_of_a_batch_learned_by_heart() -> None:
    exact = gradient_noise(make_certain_case(torch.float64).derivatives())
    found = gradient_noise(make_certain_case(torch.float32).derivatives())
    assert (exact.gradient_squared < 1e-47).all()
    # Logits of 60 are rounded to 4e-6, which is the relative error of exp(-60), twice squared.
    for name in ("gradient_squared", "variance"):
        ratio = getattr(found, name) / getattr(exact, name)
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-4, atol=0)


def test_a_run_that_diverged_has_no_variance_and_its_neighbours_theirs() -> None:
    case = make_case("sloped", "layer")
    expected = gradient_noise(case.derivatives())
    case.parameters[1] = torch.nan
    found = gradient_noise(case.derivatives())
    assert found.variance[1].isnan().all()
    assert torch.equal(found.variance[[0, 2]], expected.variance[[0, 2]])
