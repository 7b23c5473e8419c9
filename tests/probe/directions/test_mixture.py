"""Every mixture's AdamW direction from per-source gradients, against AdamW itself."""

import math

import pytest
import torch

from probe.directions import mixture
from probe.directions.mixture import MixtureMoments, first_moment_bound

BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.1
SHARES = {
    2: [(0.0, 1.0), (0.3, 0.7), (0.5, 0.5), (1.0, 0.0)],
    3: [(1.0, 0.0, 0.0), (0.2, 0.3, 0.5), (1 / 3, 1 / 3, 1 / 3)],
}
NUM = 400


def gradients(num_sources: int, num_steps: int, dtype=torch.float64) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    common = torch.randn(NUM, generator=generator, dtype=dtype)
    return [
        [common + torch.randn(NUM, generator=generator, dtype=dtype) for _ in range(num_sources)]
        for _ in range(num_steps)
    ]


def stock_direction(theta, steps, shares) -> torch.Tensor:
    """What torch's AdamW subtracts at its last step over its lr; until then lr is 0."""
    parameter = torch.nn.Parameter(theta.clone())
    optimizer = torch.optim.AdamW(
        [parameter], lr=0.0, betas=BETAS, eps=EPS, weight_decay=DECAY, foreach=False
    )
    for index, grads in enumerate(steps):
        parameter.grad = sum(s * g.double() for s, g in zip(shares, grads, strict=True))
        if index == len(steps) - 1:
            optimizer.param_groups[0]["lr"] = 1.0
        optimizer.step()
    return theta - parameter.detach()


def absorbed(num_sources, steps, **options) -> MixtureMoments:
    moments = MixtureMoments(num_sources, 1, BETAS, **options)
    for grads in steps:
        moments.absorb(0, grads)
    return moments


@pytest.mark.parametrize("num_sources", [2, 3])
@pytest.mark.parametrize("num_steps", [1, 2, 12])
def test_every_mixture_is_adamw_on_the_weighted_gradients(num_sources, num_steps):
    theta = torch.randn(NUM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    steps = gradients(num_sources, num_steps)
    moments = absorbed(num_sources, steps, storage=torch.float64)
    for shares in SHARES[num_sources]:
        found = moments.direction(0, theta, shares, eps=EPS, weight_decay=DECAY)
        torch.testing.assert_close(
            found, stock_direction(theta, steps, shares), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize(("storage", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)])
def test_fp32_and_bf16_storage_stay_within_their_rounding(storage, tolerance):
    theta = torch.zeros(NUM)
    steps = gradients(2, 12, torch.float32)
    moments = absorbed(2, steps, storage=storage)
    for shares in SHARES[2]:
        found = moments.direction(0, theta, shares, eps=EPS, weight_decay=DECAY).double()
        truth = stock_direction(theta.double(), steps, shares)
        assert float((found - truth).norm() / truth.norm()) < tolerance


def test_bf16_storage_errs_by_a_few_percent_where_sources_are_opposed():
    steps = [[a, b - 2 * a] for a, b in gradients(2, 12, torch.float32)]
    moments = absorbed(2, steps, storage=torch.bfloat16)
    found = moments.direction(0, torch.zeros(NUM), (0.5, 0.5), eps=EPS, weight_decay=0.0).double()
    truth = stock_direction(torch.zeros(NUM, dtype=torch.float64), steps, (0.5, 0.5))
    assert 0.005 < float((found - truth).norm() / truth.norm()) < 0.05


def cancelling(num_steps: int = 40) -> list[list[torch.Tensor]]:
    """Two sources whose gradients are opposite up to rounding."""
    generator = torch.Generator().manual_seed(2)
    steps = []
    for _ in range(num_steps):
        grad = torch.randn(NUM, generator=generator)
        steps.append([grad, -grad * (1 + 1e-7 * torch.randn(NUM, generator=generator))])
    return steps


def beyond_adam(moments: MixtureMoments) -> int:
    """How many entries of the even mixture's direction no AdamW could have made."""
    found = moments.direction(0, torch.zeros(NUM), (0.5, 0.5), eps=1e-12, weight_decay=0.0)
    limit = math.sqrt(first_moment_bound(40, BETAS)) * (1 + 1e-5)
    return int((~(found.abs() <= limit)).sum())  # NaN among them


def test_cancelling_gradients_give_no_nan_and_no_impossible_step(monkeypatch):
    moments = absorbed(2, cancelling())
    assert beyond_adam(moments) == 0
    with monkeypatch.context() as unguarded:
        unguarded.setattr(mixture, "first_moment_bound", lambda *_: -1e-30)
        found = moments.direction(0, torch.zeros(NUM), (0.5, 0.5), eps=1e-12, weight_decay=0.0)
    assert found.isnan().any()


def test_the_bound_holds_and_is_reached():
    # Equality where every gradient is proportional to w1_i / w2_i.
    steps, (beta1, beta2) = 7, BETAS
    ages = range(steps - 1, -1, -1)
    first = [(1 - beta1) * beta1**a / (1 - beta1**steps) for a in ages]
    second = [(1 - beta2) * beta2**a / (1 - beta2**steps) for a in ages]
    grads = [w1 / w2 for w1, w2 in zip(first, second, strict=True)]
    mean = sum(w * g for w, g in zip(first, grads, strict=True))
    square = sum(w * g * g for w, g in zip(second, grads, strict=True))
    assert first_moment_bound(steps, BETAS) == pytest.approx(mean**2 / square, rel=1e-12)
    assert first_moment_bound(1, BETAS) == pytest.approx(1.0)
    assert first_moment_bound(3, (0.9, 0.0)) == math.inf


def test_a_source_without_gradient_counts_as_zero_and_none_at_all_leaves_the_weight_alone():
    grad = torch.ones(3)
    moments = MixtureMoments(2, 2, BETAS)
    moments.absorb(0, [grad, None])
    moments.absorb(1, [None, None])
    found = moments.direction(0, torch.zeros(3), (0.25, 0.75), eps=0.0, weight_decay=DECAY)
    torch.testing.assert_close(found, torch.ones(3))  # sign of the mixture's gradient
    assert moments.direction(1, torch.zeros(3), (0.25, 0.75), eps=0.0, weight_decay=0.1) is None
