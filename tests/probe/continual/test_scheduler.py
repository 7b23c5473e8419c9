"""The rule of algorithm 1, case by case; two layers and the whole network."""

import math

import pytest
import torch

from probe.continual.scheduler import SchedulerGroup
from probe.spec_continual import Scheduler

CPU = torch.device("cpu")
TOTAL = 1000
EARLY, LATE = 299, 300  # warming ends at 0.3 of the stream


def decide(scheduler, effective, combined, step=EARLY, gradient=None, curvature=None):
    group = SchedulerGroup([scheduler], TOTAL, CPU)
    layers = {
        "effective_step": torch.tensor([effective]),
        "bound_combined": torch.tensor([combined]),
        "bound_gradient": torch.tensor([gradient or combined]),
        "bound_curvature": torch.tensor([curvature or combined]),
    }
    rates = torch.tensor([[1.0, 1.0]])
    return group.decide(rates, layers, step)[0].tolist()


COOL, WARM, KEEP = pytest.approx(0.99), pytest.approx(1.01), 1.0


@pytest.mark.parametrize(
    ("effective", "bound", "step", "expected"),
    [
        (1.0, 1.005, EARLY, COOL),  # above (1 - 0.01) * 1.005
        (0.98, 1.0, EARLY, KEEP),  # below it, but not timid
        (0.49, 1.0, EARLY, WARM),  # below half of 0.99
        (0.496, 1.0, EARLY, KEEP),
        (0.49, 1.0, LATE, KEEP),  # too late to warm
        (1.0, 0.5, LATE, COOL),  # never too late to cool
        (0.11, 0.01, EARLY, KEEP),  # at or below 0.12 nothing is cooled
        (0.13, 0.01, EARLY, COOL),
        (1.0, math.inf, EARLY, WARM),  # no noise at all: any step is timid
        (1.0, math.nan, EARLY, KEEP),  # no measurement, no decision
        (math.nan, 1.0, EARLY, KEEP),
    ],
)
def test_each_layer_follows_its_own_bound(effective, bound, step, expected):
    other = [0.9, 1.0]  # the second layer and the network: nothing to do
    found = decide(Scheduler(), [effective, *other[:1], 0.9], [bound, 1.0, 1.0], step)
    assert found == [expected, KEEP]


def test_warming_ends_at_the_papers_step():
    # 0.3 of 830,000 steps is the 6,225th decision; in float32 it would come a hundredth later.
    group = SchedulerGroup([Scheduler()], 830_000, CPU)
    names = ("effective_step", "bound_combined", "bound_gradient", "bound_curvature")
    layers = dict(zip(names, torch.tensor([[[0.1, 0.1]], *[[[1.0, 1.0]]] * 3]), strict=True))
    rates = torch.ones(1, 1)
    assert group.decide(rates, layers, 248_960).item() == WARM
    assert group.decide(rates, layers, 249_000).item() == KEEP


def test_one_decision_of_the_network_moves_every_layer():
    found = decide(Scheduler(scope="network"), [0.1, 0.1, 2.0], [9.0, 9.0, 1.0])
    assert found == [COOL, COOL]


@pytest.mark.parametrize(
    ("signal", "expected"), [("combined", KEEP), ("gradient", COOL), ("curvature", WARM)]
)
def test_a_signal_alone_is_the_same_rule_on_its_bound(signal, expected):
    effective = [0.8, 0.8, 0.8]
    found = decide(
        Scheduler(signal=signal),
        effective,
        [1.0] * 3,
        gradient=[0.5] * 3,
        curvature=[5.0] * 3,
    )
    assert found == [expected, expected]


def test_networks_are_decided_apart_and_those_without_a_scheduler_are_left_alone():
    group = SchedulerGroup([None, Scheduler(), Scheduler(cool=0.5)], TOTAL, CPU)
    layers = {name: torch.ones(3, 3) for name in ("bound_gradient", "bound_curvature")}
    layers |= {"effective_step": torch.full((3, 3), 2.0), "bound_combined": torch.ones(3, 3)}
    found = group.decide(torch.ones(3, 2), layers, LATE)
    assert found.tolist() == [[1, 1], [COOL, COOL], [0.5, 0.5]]
    assert group.is_any
    assert not SchedulerGroup([None, None], TOTAL, CPU).is_any
