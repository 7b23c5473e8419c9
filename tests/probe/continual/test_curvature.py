"""Top eigenvalues against dense Hessians, and against plain power iteration."""

from itertools import pairwise

import pytest
import torch
from small_networks import KINDS, Case, draws, make_case
from torch import Tensor

from probe.continual.curvature import TopEigenvalues, top_eigenpairs

ENOUGH = 40  # iterations for at most 55 parameters: more than the dimension of most blocks


def top_eigenvalues(case: Case, run: int) -> Tensor:
    """(L + 1,) by a dense solver."""
    hessian = case.dense_hessian(run)
    return torch.stack([torch.linalg.eigvalsh(hessian[p, p])[-1] for p in case.columns()])


def symmetric(eigenvalues: list[float], seed: int) -> Tensor:
    """(n, n) with these eigenvalues in random directions, float64."""
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T


def unit_vector(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(1, size, generator=generator, dtype=torch.float64)
    return vector / vector.norm()


@pytest.mark.parametrize(("activation", "normalization"), KINDS)
def test_converges_to_the_largest_eigenvalue_of_every_block(
    activation: str, normalization: str
) -> None:
    case = make_case(activation, normalization)
    expected = torch.stack([top_eigenvalues(case, run) for run in range(3)])
    case = make_case(activation, normalization, dtype=torch.float32)
    eigenvalues = TopEigenvalues(case.network, draws(3))
    values, residuals = eigenvalues.estimate(case.derivatives(), ENOUGH)
    # fp32 products of numbers up to 10 times the eigenvalue: 1e-6 of those.
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)
    # The value's error is of second order in the residual's, so a residual may be larger.
    assert (residuals < 3e-3).all()


def test_iterates_go_on_where_their_squares_are_zero_in_float32() -> None:
    operator = symmetric([3.0, 2.0, 1.0, 0.5], seed=1).float()
    start = unit_vector(4, seed=2).float()
    expected, _, _ = top_eigenpairs(lambda v: v @ operator, start, [(0, 4)], 3)
    found, _, _ = top_eigenpairs(lambda v: v @ (1e-26 * operator), start, [(0, 4)], 3)
    torch.testing.assert_close(found * 1e26, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("iterations", [1, 2, 5, 7, 8, 15])
def test_residual_is_that_of_the_vector_it_leaves(iterations: int) -> None:
    hessian = symmetric([3, 2.9, 2.5, 1, 0.5, 0.2, 0.1, 0, 0, -0.3, -0.5, -1], seed=3)
    values, residuals, vectors = top_eigenpairs(
        lambda v: v @ hessian, unit_vector(12, 1), [(0, 12)], iterations
    )
    product = vectors @ hessian
    expected = (product - values * vectors).norm()
    torch.testing.assert_close((product * vectors).sum(), values[0, 0], rtol=1e-12, atol=0)
    torch.testing.assert_close(residuals[0, 0], expected, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(vectors.norm(), torch.tensor(1.0, dtype=torch.float64))


def test_a_dominant_negative_eigenvalue_is_not_taken() -> None:
    hessian = symmetric([1.0, 0.3, 0.1, 0, 0, -0.1, -2, -10], seed=1)
    vectors = unit_vector(8, 2)
    for _ in range(40):
        values, residuals, vectors = top_eigenpairs(lambda v: v @ hessian, vectors, [(0, 8)], 2)
    torch.testing.assert_close(values[0, 0].item(), 1.0, rtol=1e-9, atol=0)
    assert residuals[0, 0] < 1e-4


def test_a_networks_dominant_negative_eigenvalue_is_not_taken() -> None:
    case = make_case("crelu", "layer")
    spectrum = torch.linalg.eigvalsh(case.dense_hessian(0))
    assert -spectrum[0] > 5 * spectrum[-1]  # the case is what it should be
    case = make_case("crelu", "layer", dtype=torch.float32)
    eigenvalues = TopEigenvalues(case.network, draws(3))
    for _ in range(30):
        values, _ = eigenvalues.estimate(case.derivatives(), 2)
    # fp32 products are of the size of the negative one, 6 times the top one.
    torch.testing.assert_close(values[0, -1], spectrum[-1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("iterations", [1, 3, 6])
def test_never_below_power_iteration_of_the_same_steps(iterations: int) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        spectrum = torch.randn(15, generator=generator, dtype=torch.float64).tolist()
        hessian = symmetric(spectrum, seed)
        start = unit_vector(15, seed + 100)
        values, _, _ = top_eigenpairs(lambda v, h=hessian: v @ h, start, [(0, 15)], iterations)
        vector = start
        for _ in range(iterations):
            vector = vector @ hessian
            vector = vector / vector.norm()
        assert values[0, 0] >= (vector @ hessian * vector).sum() - 1e-12


@pytest.mark.parametrize(("iterations", "num_products"), [(1, 2), (2, 3), (7, 8), (8, 10)])
def test_number_of_products(iterations: int, num_products: int) -> None:
    hessian, count = symmetric([float(i) for i in range(30)], seed=0), 0

    def product(vectors: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return vectors @ hessian

    top_eigenpairs(product, unit_vector(30, 0), [(0, 30)], iterations)
    assert count == num_products


def test_goes_on_from_the_vector_of_the_measurement_before() -> None:
    case = make_case("tanh", "none", dtype=torch.float32)
    eigenvalues = TopEigenvalues(case.network, draws(3))
    course = [eigenvalues.estimate(case.derivatives(), 1)[0] for _ in range(6)]
    for before, after in pairwise(course):
        assert (after >= before - 1e-6).all()  # fp32 rounding; else it only rises
    assert (course[-1] > course[0] + 1e-3).any()


def test_exhausted_iterates_and_a_block_of_zeros() -> None:
    # From an eigenvector there is no second iterate; where all is zero there is not even a first.
    hessian = torch.block_diag(-2 * torch.eye(3), torch.zeros(3, 3)).double()
    start = torch.ones(1, 6, dtype=torch.float64) / 3**0.5
    values, residuals, vectors = top_eigenpairs(lambda v: v @ hessian, start, [(0, 3), (3, 6)], 4)
    torch.testing.assert_close(values, torch.tensor([[-2.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(residuals, torch.zeros(1, 2, dtype=torch.float64))
    torch.testing.assert_close(vectors, start)


def test_a_run_does_not_depend_on_its_neighbours() -> None:
    case = make_case("sloped", "layer", dtype=torch.float32)
    together = TopEigenvalues(case.network, draws(3))
    alone = case.single(1)
    by_itself = TopEigenvalues(alone.network, draws(3)[1:2])
    for _ in range(3):
        values, _ = together.estimate(case.derivatives(), 2)
        expected, _ = by_itself.estimate(alone.derivatives(), 2)
    torch.testing.assert_close(values[1:2], expected, rtol=1e-4, atol=1e-6)  # fp32, 9 products


def test_a_run_that_diverged_keeps_its_vectors_and_its_neighbours_their_values() -> None:
    case = make_case("sloped", "none", dtype=torch.float32)
    expected = TopEigenvalues(case.network, draws(3)).estimate(case.derivatives(), 9)
    case.parameters[1] = torch.nan
    eigenvalues = TopEigenvalues(case.network, draws(3))
    before = eigenvalues.layers.clone()
    values, residuals = eigenvalues.estimate(case.derivatives(), 9)
    assert values[1].isnan().all()
    assert residuals[1].isnan().all()
    assert torch.equal(eigenvalues.layers[1], before[1])
    torch.testing.assert_close(values[[0, 2]], expected[0][[0, 2]], rtol=1e-5, atol=1e-6)


def test_only_chosen_runs_are_moved_and_reset() -> None:
    case = make_case("sloped", "none", dtype=torch.float32)
    eigenvalues = TopEigenvalues(case.network, draws(3))
    start = {name: value.clone() for name, value in eigenvalues.state().items()}
    is_second = torch.tensor([False, True, False])
    eigenvalues.estimate(case.derivatives(), 2, is_second)
    for name, value in eigenvalues.state().items():
        assert torch.equal(value[~is_second], start[name][~is_second])
        assert not torch.equal(value[1], start[name][1])
    generators = draws(3)
    eigenvalues.reset(is_second, generators)
    for name, value in eigenvalues.state().items():
        torch.testing.assert_close(value, start[name])  # the same draw, normalised again
    assert generators[0].random() == draws(3)[0].random()  # nothing was drawn from it


def test_state_goes_on() -> None:
    case = make_case("sloped", "none", dtype=torch.float32)
    eigenvalues = TopEigenvalues(case.network, draws(3))
    eigenvalues.estimate(case.derivatives(), 2)
    kept = {name: value.clone() for name, value in eigenvalues.state().items()}
    expected = eigenvalues.estimate(case.derivatives(), 2)
    resumed = TopEigenvalues(case.network, draws(3, seed=9))
    resumed.load(kept)
    for a, b in zip(resumed.estimate(case.derivatives(), 2), expected, strict=True):
        assert torch.equal(a, b)
