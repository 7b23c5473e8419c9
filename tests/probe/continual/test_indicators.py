"""Indicators on numbers whose answer is known by hand."""

import math

import torch
from small_networks import make_case
from torch import Tensor

from probe.continual.indicators import unit_signs, weight_norms


def columns(*units: list[float]) -> Tensor:
    """(1, B, units) of pre-activations given unit by unit."""
    return torch.tensor(units).T.unsqueeze(0)


def test_entropy_and_dead_units_of_two_layers() -> None:
    first = columns([1, 2, 3, 4], [-1, -2, 0, -4], [1, 1, -1, -1])  # always, never, half
    second = columns([1, -1, -1, -1])  # a quarter
    entropy, dead = unit_signs([first, second])
    quarter = 0.25 * 2 + 0.75 * math.log2(4 / 3)
    assert math.isclose(entropy.item(), (0 + 0 + 1 + quarter) / 4, rel_tol=1e-12)
    assert dead.item() == 1 / 4  # the one that is never above 0; exactly 0 is not above


def test_a_run_that_diverged_has_neither() -> None:
    z = torch.cat([columns([1, -1]), columns([float("nan"), 1])])
    entropy, dead = unit_signs([z])
    torch.testing.assert_close(entropy, torch.tensor([1.0, torch.nan]).double(), equal_nan=True)
    torch.testing.assert_close(dead, torch.tensor([0.0, torch.nan]).double(), equal_nan=True)


def test_weight_norms_per_layer_and_whole() -> None:
    case = make_case("sloped", "batch")
    found = weight_norms(case.network, case.parameters)
    for column, part in enumerate(case.columns()):
        expected = torch.linalg.vector_norm(case.parameters[:, part], dim=1)
        torch.testing.assert_close(found[:, column], expected)
