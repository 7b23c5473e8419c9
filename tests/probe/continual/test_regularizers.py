"""Gradients of the regularisers: by hand, and by autograd on the formula."""

import pytest
import torch

from probe.continual.networks import TensorPlace
from probe.continual.regularizers import terms_of
from probe.spec_continual import L2, Method, Wasserstein

PLACES = [TensorPlace("fc1.weight", 0, 6, (2, 3)), TensorPlace("fc1.bias", 6, 8, (2,))]


def method(*regularizers) -> Method:
    return Method(name="m", regularizers=list(regularizers))


def gradient_of(methods, parameters, initial) -> torch.Tensor:
    gradient = torch.zeros_like(parameters)
    for term in terms_of(methods, PLACES, initial):
        term.add_gradient(gradient, parameters)
    return gradient


def draw(seed: int) -> torch.Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))


def test_l2_adds_strength_times_theta_where_a_method_has_it():
    parameters = draw(0)
    found = gradient_of(
        [method(L2(type="l2", strength=0.5)), method(), method()], parameters, draw(1)
    )
    assert torch.equal(found[0], 0.5 * parameters[0])
    assert torch.equal(found[1:], torch.zeros(2, 8))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_wasserstein_is_the_gradient_of_the_squared_distance_of_sorted_values(reduction):
    parameters, initial = draw(0), draw(1)
    term = Wasserstein(type="wasserstein", strength=0.7, reduction=reduction)
    found = gradient_of([method(), method(term), method()], parameters, initial)

    theta = parameters[1].clone().requires_grad_()
    distance = torch.zeros(())
    for part in (slice(0, 6), slice(6, 8)):
        squares = (theta[part].sort().values - initial[1, part].sort().values) ** 2
        distance = distance + getattr(squares, reduction)()
    (0.7 * distance).backward()
    torch.testing.assert_close(found[1], theta.grad)
    assert torch.equal(found[0], torch.zeros(8))
    assert torch.equal(found[2], torch.zeros(8))


def test_wasserstein_is_zero_at_any_order_of_the_initial_values():
    initial = draw(1)
    parameters = torch.cat([initial[:, [3, 1, 0, 2, 5, 4]], initial[:, [7, 6]]], dim=1)
    methods = [method(Wasserstein(type="wasserstein", strength=1.0))] * 3
    assert torch.equal(gradient_of(methods, parameters, initial), torch.zeros(3, 8))


def test_terms_add_up_and_no_term_costs_nothing():
    parameters, initial = draw(0), draw(1)
    l2, distance = L2(type="l2", strength=0.1), Wasserstein(type="wasserstein", strength=0.2)
    both = gradient_of([method(l2, distance)] * 3, parameters, initial)
    apart = [gradient_of([method(term)] * 3, parameters, initial) for term in (l2, distance)]
    torch.testing.assert_close(both, apart[0] + apart[1])
    assert terms_of([method()] * 3, PLACES, initial) == []


def test_new_initial_values_move_the_target():
    initial, later = draw(1), draw(2)
    (term,) = terms_of([method(Wasserstein(type="wasserstein", strength=1.0))] * 3, PLACES, initial)
    term.start_from(later)
    gradient = torch.zeros(3, 8)
    term.add_gradient(gradient, later)
    assert torch.equal(gradient, torch.zeros(3, 8))
