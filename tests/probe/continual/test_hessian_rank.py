"""The effective rank against explicit gradients of single samples."""

import pytest
import torch
from small_networks import KINDS, make_case, make_certain_case

from probe.continual.hessian_rank import gradient_gram, hessian_rank

EXACT = {"rtol": 1e-9, "atol": 1e-12}  # float64; eigenvalues of a matrix of rank below its size


@pytest.mark.parametrize(("activation", "normalization"), KINDS)
def test_gram_and_rank_are_those_of_explicit_gradients(activation: str, normalization: str) -> None:
    case = make_case(activation, normalization)
    derivatives = case.derivatives()
    gram, rank = gradient_gram(derivatives, 5), hessian_rank(derivatives, 5)
    for run in range(3):
        gradients = case.sample_gradients(run)[:5]
        torch.testing.assert_close(gram[run], gradients @ gradients.T, **EXACT)
        shares = torch.linalg.svdvals(gradients).square()
        shares = shares / shares.sum()
        expected = torch.exp(-(shares * shares.log()).sum())
        torch.testing.assert_close(rank[run], expected, rtol=1e-6, atol=0)


def test_equal_samples_have_rank_one() -> None:
    case = make_case("tanh", "none")
    case.x, case.y = case.x[:, :1].expand(3, 7, -1), case.y[:, :1].expand(3, 7)
    rank = hessian_rank(case.derivatives(), 7)
    # Six eigenvalues of rounding, 1e-16 each: p ln p of them is below 1e-13.
    torch.testing.assert_close(rank, torch.ones(3, dtype=torch.float64), rtol=1e-12, atol=0)


def test_orthogonal_gradients_of_equal_size_have_full_rank() -> None:
    # Zero weights and biases: every sample's gradient is that of the last bias, p - onehot(y).
    # Of 3 classes, one sample each, these span 2 dimensions with equal eigenvalues.
    case = make_case("sloped", "none", batch_size=3)
    case.parameters.zero_()
    case.y = torch.arange(3).expand(3, 3)
    rank = hessian_rank(case.derivatives(), 3)
    torch.testing.assert_close(rank, torch.full((3,), 2.0, dtype=torch.float64))


def test_a_small_batch_is_taken_whole() -> None:
    case = make_case("sloped", "none")
    derivatives = case.derivatives()
    assert torch.equal(hessian_rank(derivatives, 100), hessian_rank(derivatives, 7))
    assert gradient_gram(derivatives, 100).shape == (3, 7, 7)


def test_float32_of_a_batch_learned_by_heart() -> None:
    exact = hessian_rank(make_certain_case(torch.float64).derivatives(), 64)
    found = hessian_rank(make_certain_case(torch.float32).derivatives(), 64)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=0)  # logits of 60: to 4e-6


def test_no_rank_without_gradients_and_neighbours_keep_theirs() -> None:
    case = make_case("sloped", "none")
    expected = hessian_rank(case.derivatives(), 7)
    case.parameters[1] = torch.nan
    found = hessian_rank(case.derivatives(), 7)
    assert found[1].isnan()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    # Certain and right on every sample: softmax rounds to 1 and all gradients to 0.
    case.parameters[1] = 0
    case.parameters[1, -3] = 1e4
    case.y = torch.zeros_like(case.y)
    assert hessian_rank(case.derivatives(), 7)[1].isnan()
