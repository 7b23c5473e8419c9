"""Derivatives written out against autograd on stock modules, in float64."""

import pytest
import torch
from small_networks import KINDS, make_case

# Two orders of the same few hundred float64 operations on numbers of order 1 to 100.
EXACT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.mark.parametrize(("activation", "normalization"), KINDS)
def test_gradient_is_that_of_the_batch_loss(activation: str, normalization: str) -> None:
    case = make_case(activation, normalization)
    derivatives = case.derivatives()
    found = derivatives.gradient(derivatives.deltas)
    for run in range(3):
        flat = case.parameters[run].clone().requires_grad_()
        (expected,) = torch.autograd.grad(case.loss_of(run, flat), flat)
        torch.testing.assert_close(found[run], expected, **EXACT)


@pytest.mark.parametrize(("activation", "normalization"), KINDS)
def test_products_are_those_of_the_dense_hessian(activation: str, normalization: str) -> None:
    case = make_case(activation, normalization)
    derivatives = case.derivatives()
    vectors = torch.randn(
        case.parameters.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    last = len(case.network.layers) - 1
    blocks, whole = torch.empty_like(vectors), torch.empty_like(vectors)
    derivatives.hessian_product(vectors, 0, last, whole)
    for number in range(last + 1):
        derivatives.hessian_product(vectors, number, number, blocks)
    for run in range(3):
        hessian = case.dense_hessian(run)
        torch.testing.assert_close(whole[run], hessian @ vectors[run], **EXACT)
        for part in list(case.columns())[:-1]:
            expected = hessian[part, part] @ vectors[run, part]
            torch.testing.assert_close(blocks[run, part], expected, **EXACT)


def test_product_over_some_layers_leaves_the_columns_of_others_alone() -> None:
    case = make_case("tanh", "layer")
    vectors = torch.ones_like(case.parameters)
    result = torch.full_like(vectors, 7.0)
    case.derivatives().hessian_product(vectors, 1, 2, result)
    first, second, third, _ = case.columns()
    both = slice(second.start, third.stop)
    assert (result[:, first] == 7).all()
    for run in range(3):
        expected = case.dense_hessian(run)[both, both] @ vectors[run, both]
        torch.testing.assert_close(result[run, both], expected, **EXACT)


def test_neither_parameters_nor_running_statistics_change() -> None:
    case = make_case("sloped", "batch", dtype=torch.float32)
    parameters = case.parameters.clone()
    running = [value.clone() for value in case.network.running]
    derivatives = case.derivatives()
    derivatives.gradient(derivatives.sample_deltas)
    derivatives.hessian_product(parameters, 0, 2, torch.empty_like(parameters))
    assert torch.equal(case.parameters, parameters)
    for before, after in zip(running, case.network.running, strict=True):
        assert torch.equal(before, after)
