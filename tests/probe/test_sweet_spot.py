"""The sweet spot of curves whose best ratio and crossings are known by hand."""

import math

import pytest

from probe.sweet_spot import find_crossings, find_sweet_spot, next_ratio

RATIOS = [0.0, 0.25, 0.5, 0.75, 1.0]


def table(web, math_task):
    return [{"web": w, "math": m} for w, m in zip(web, math_task, strict=True)]


# log2 eta_c: web rises by 2 per quarter, math falls by 1: they meet at 2 r' = 5 - r', r' = 5/3.
CURVES = table([2.0**k for k in (0, 2, 4, 6, 8)], [2.0**k for k in (5, 4, 3, 2, 1)])


def test_the_sweet_spot_maximises_the_least_eta_c():
    found = find_sweet_spot(RATIOS, [CURVES])
    assert (found.ratio, found.eta_c, found.task) == (0.5, 8.0, "math")
    assert found.lower is None
    assert found.upper is None


def test_the_crossing_is_where_the_logarithms_meet():
    (found,) = find_crossings(RATIOS, CURVES)
    assert found.ratio == pytest.approx(0.25 * 5 / 3)
    assert found.eta_c == pytest.approx(2 ** (10 / 3))
    assert found.tasks == ("web", "math")  # web objects first at smaller ratios


def test_a_crossing_at_a_ratio_counts_once_and_touching_does_not():
    crossing = table([1.0, 4.0, 16.0], [16.0, 4.0, 1.0])
    assert [c.ratio for c in find_crossings([0.0, 0.5, 1.0], crossing)] == [0.5]
    touching = table([1.0, 4.0, 1.0], [16.0, 4.0, 16.0])
    assert find_crossings([0.0, 0.5, 1.0], touching) == []


def test_points_without_an_answer_take_no_part_in_crossings():
    curves = table([0.0, 4.0, 16.0], [1.0, 8.0, math.inf])
    assert find_crossings([0.0, 0.5, 1.0], curves) == []
    gap = table([1.0, 0.0, 16.0], [2.0, 8.0, 4.0])  # they change places somewhere in the gap
    assert find_crossings([0.0, 0.5, 1.0], gap) == []


def test_a_task_that_is_hurt_at_once_rules_a_ratio_out():
    curves = table([0.0, 1.0, 2.0, 4.0, 8.0], [99.0, 99.0, 99.0, 99.0, 0.0])
    assert find_sweet_spot(RATIOS, [curves]).ratio == 0.75
    assert find_sweet_spot(RATIOS, [table([0.0] * 5, [1.0] * 5)]) is None


def test_where_no_task_objects_no_largest_step_is_known():
    assert find_sweet_spot(RATIOS, [table([math.inf] * 5, [math.inf] * 5)]) is None


def test_the_interval_covers_the_repeats_best_ratios_and_is_the_same_each_time():
    def repeat(best):
        return table([10.0 - abs(best - i) for i in range(5)], [99.0] * 5)

    alike = find_sweet_spot(RATIOS, [repeat(2)] * 4)
    assert (alike.lower, alike.upper) == (0.5, 0.5)
    noisy = [repeat(1), repeat(2), repeat(3), repeat(2), repeat(3)]
    found = find_sweet_spot(RATIOS, noisy)
    assert found.lower <= found.ratio <= found.upper
    assert (found.lower, found.upper) == (0.25, 0.75)
    assert find_sweet_spot(RATIOS, noisy) == found


def test_the_next_ratio_halves_the_wider_neighbouring_interval():
    assert next_ratio(RATIOS, [CURVES]) == 0.375  # 4 beside 8 on both sides: the left ties first
    uneven = [0.0, 0.25, 0.5, 1.0]
    curves = table([1.0, 4.0, 16.0, 64.0], [32.0, 16.0, 8.0, 2.0])
    assert next_ratio(uneven, [curves]) == 0.75
    assert next_ratio([0.5], [curves[:1]]) is None
