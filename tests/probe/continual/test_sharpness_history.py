"""The moving average of the sharpness and its volatility, on numbers by hand."""

import math

import torch

from probe.continual.sharpness_history import SharpnessHistory

NU = 0.8


def history() -> SharpnessHistory:
    return SharpnessHistory((1, 2), NU, torch.device("cpu"))


def values(*numbers: float) -> torch.Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


def test_mean_is_the_weighted_one_and_volatility_its_relative_distance() -> None:
    followed = history()
    seen = [2.0, 5.0, 3.0]
    for count, value in enumerate(seen, 1):
        mean, volatility = followed.follow(values(value, 1.0))
        weights = [NU ** (count - 1 - index) for index in range(count)]
        pairs = zip(weights, seen, strict=False)
        expected = sum(weight * past for weight, past in pairs) / sum(weights)
        assert math.isclose(mean[0, 0].item(), expected, rel_tol=1e-12)
        distance = (value - expected) ** 2 / (expected + 1e-8)
        assert math.isclose(volatility[0, 0].item(), distance, rel_tol=1e-9, abs_tol=1e-30)
        assert math.isclose(mean[0, 1].item(), 1.0, rel_tol=1e-12)


def test_the_first_value_has_no_volatility_at_all() -> None:
    mean, volatility = history().follow(values(0.1, 0.0))
    assert mean.tolist() == [[0.1, 0.0]]
    assert volatility.tolist() == [[0.0, 0.0]]


def test_a_mean_below_zero_has_no_volatility() -> None:
    followed = history()
    followed.follow(values(-3.0, 1.0))
    mean, volatility = followed.follow(values(1.0, 2.0))
    assert mean[0, 0] < 0
    assert volatility[0].isnan().tolist() == [True, False]


def test_what_is_not_finite_does_not_enter() -> None:
    followed, without = history(), history()
    for value in (values(2.0, 1.0), values(torch.nan, torch.inf), values(3.0, 2.0)):
        found = followed.follow(value)
        if not value.isfinite().all():
            assert found[0].isnan().all()
            assert found[1].isnan().all()
    without.follow(values(2.0, 1.0))
    for a, b in zip(found, without.follow(values(3.0, 2.0)), strict=True):
        assert torch.equal(a, b)


def test_reset_forgets_one_run() -> None:
    followed = SharpnessHistory((2, 1), NU, torch.device("cpu"))
    followed.follow(torch.tensor([[1.0], [1.0]], dtype=torch.float64))
    followed.reset(torch.tensor([True, False]))
    for value in (3.0, 5.0):
        mean, _ = followed.follow(torch.full((2, 1), value, dtype=torch.float64))
    expected = [[(NU * 3 + 5) / (NU + 1)], [(NU * NU + NU * 3 + 5) / (NU * NU + NU + 1)]]
    torch.testing.assert_close(mean, torch.tensor(expected, dtype=torch.float64))
