"""The ray: theta - eta * delta formed once, cast last, restored bit for bit."""

import pytest
import torch

from probe.errors import DirectionError
from probe.perturb import Ray, compute_dtype

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, 5, generator=generator).to(dtype) for n in (1, 17, 300)]


def _steps(live: list[torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(t.shape, generator=generator).to(compute_dtype(t.dtype)) for t in live]


@pytest.mark.parametrize("dtype", DTYPES)
def test_restored_bit_for_bit_after_many_moves(dtype: torch.dtype) -> None:
    live = _tensors(dtype)
    live[0][0, 0] = -0.0
    before = [t.clone() for t in live]
    delta = _steps(live)
    ray = Ray.through(live, delta)
    for eta in (0.3, 1e-4, 0.0, 7.0, 1e30, float("inf")):
        ray.move(eta)
    ray.restore()
    for now, then in zip(live, before, strict=True):
        assert torch.equal(now.view(torch.uint8), then.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_move_is_the_rounded_exact_point(dtype: torch.dtype) -> None:
    live = _tensors(dtype)
    theta = [t.double().clone() for t in live]
    delta = _steps(live)
    ray = Ray.through(live, delta)
    ray.move(10.0)  # moves leave no drift
    ray.move(0.125)
    for now, base, step in zip(live, theta, delta, strict=True):
        exact = base - 0.125 * step.double()
        # One rounding in the compute dtype, one in the live dtype.
        eps = torch.finfo(dtype).eps / 2 + torch.finfo(compute_dtype(dtype)).eps
        bound = eps * (exact.abs() + base.abs()) + torch.finfo(dtype).tiny
        assert ((now.double() - exact).abs() <= bound).all()


def test_eta_zero_keeps_the_sign_of_zero() -> None:
    live = [torch.tensor([-0.0, 0.0])]
    ray = Ray.through(live, [torch.tensor([-1.0, 1.0])])
    ray.move(0.0)
    assert torch.equal(live[0].view(torch.int32), torch.tensor([-0.0, 0.0]).view(torch.int32))


def test_an_fp32_base_finer_than_live_still_restores_live() -> None:
    base = [torch.tensor([0.02 + 3e-5, 1.0])]
    live = [torch.tensor([0.02, 1.0], dtype=torch.bfloat16)]  # not its base cast down
    live[0][0] = 0.5
    before = live[0].clone()
    ray = Ray(live, base, [torch.ones(2)])
    ray.move(0.25)
    assert torch.equal(live[0], torch.tensor([0.02 + 3e-5 - 0.25, 0.75]).bfloat16())
    ray.restore()
    assert torch.equal(live[0], before)


def test_no_autograd_version_moves_through_data() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    loss = (parameter**2).sum()  # saves parameter for its backward
    ray = Ray.through([parameter.data], [torch.ones(4)])
    ray.move(0.5)
    ray.restore()
    loss.backward()  # raises if the version had moved
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, torch.full((4,), 2.0))


@pytest.mark.parametrize(
    ("base", "delta"),
    [
        (torch.zeros(3), torch.zeros(2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(base: torch.Tensor, delta: torch.Tensor) -> None:
    with pytest.raises(DirectionError, match="tensor 0 of the ray"):
        Ray([torch.zeros(2)], [base], [delta])
    with pytest.raises(DirectionError, match="1 live, 2 base"):
        Ray([torch.zeros(2)], [torch.zeros(2)] * 2, [torch.zeros(2)])
