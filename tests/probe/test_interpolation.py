"""The model's root on curves whose root is known, and where the probes go."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from probe.interpolation import estimate_crossing, place_probe

positive = st.floats(0.01, 100.0)


@given(
    root=positive,
    steepness=positive,
    bend=st.floats(0.0, 10.0),
    shares=st.sets(st.floats(0.05, 4.0), min_size=2, max_size=2),
)
def test_a_hyperbola_is_met_exactly(root, steepness, bend, shares):
    def phi(eta: float) -> float:
        return steepness * (eta - root) / (1.0 + bend * eta / root)

    near, far = sorted(share * root for share in shares)
    assume(far - near > 0.02 * root and abs(near - root) > 0.01 * root < abs(far - root))
    points = [(eta, phi(eta)) for eta in (0.0, near, far)]
    lower = max((eta for eta, value in points if value <= 0), default=0.0)
    upper = min((eta for eta, value in points if value > 0), default=math.inf)
    assert estimate_crossing(points, lower, upper) == pytest.approx(root, rel=1e-6)


def test_two_points_make_a_straight_line():
    assert estimate_crossing([(0.0, -2.0), (3.0, 1.0)], 0.0, 3.0) == pytest.approx(2.0)
    assert estimate_crossing([(0.0, -2.0), (1.0, -1.5)], 1.0, math.inf) == pytest.approx(4.0)


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(1.0, -1.0)],
        [(0.0, -1.0), (1.0, -1.0)],  # parallel to the axis
        [(0.0, -1.0), (1.0, -1.5)],  # falling ever faster: its root lies behind
        [(0.0, -1.0), (0.5, -1.1), (1.0, -1.5)],
        [(0.95, -0.01), (1.0, -0.02)],  # close behind, yet behind
    ],
)
def test_points_that_place_no_crossing_ahead_give_none(points):
    assert estimate_crossing(points, 1.0, math.inf) is None


def test_points_on_the_wrong_side_are_left_out():
    # A rise below the bracket, seen on a ray that crosses several times.
    points = [(0.0, -1.0), (0.5, 7.0), (1.0, -1.0), (3.0, 1.0)]
    assert 1.0 < (estimate_crossing(points, 1.0, 3.0) or 0.0) < 3.0
    assert estimate_crossing([(0.5, 7.0), (1.0, -1.0), (3.0, 1.0)], 1.0, 3.0) == pytest.approx(2.0)


@given(lower=positive, width=positive, share=st.floats(0.0, 1.0), tolerance=st.floats(1e-6, 0.9))
def test_a_probe_lies_inside_the_bracket(lower, width, share, tolerance):
    upper = lower * (1.0 + width)
    assume(1.0 - lower / upper > tolerance)
    estimate = min(max(lower + share * (upper - lower), lower), upper)
    assert lower < place_probe(estimate, lower, upper, tolerance) < upper
    assert lower < place_probe(estimate, lower, math.inf, tolerance)
    assert 0.0 < place_probe(estimate, 0.0, upper, tolerance) < upper


@pytest.mark.parametrize(
    ("lower", "upper", "probe"),
    [
        (0.98, math.inf, 0.98 * 16 / 15),  # the widest bracket from 0.98 holds the estimate 1
        (0.0, 1.02, 1.02 * 15 / 16),
        (0.98, 3.0, 0.98 * 16 / 15),
        (0.2, 1.02, 1.02 * 15 / 16),
        (0.2, math.inf, 1.025),  # 0.4 / 16 beyond it
        (0.0, 5.0, 0.975),
        (0.9, 5.0, 1.025),
        (0.1, 1.2, 0.975),
    ],
)
def test_where_the_probe_goes_when_the_estimate_is_one(lower, upper, probe):
    assert place_probe(1.0, lower, upper, 1 / 16) == pytest.approx(probe, rel=1e-12)
