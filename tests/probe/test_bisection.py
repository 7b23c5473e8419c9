"""The paper's path, and the two counts the safeguard rests on, against brute force."""

import itertools
import math

import pytest

from probe.bisection import (
    SearchRange,
    fewest_passes,
    follow_bisection,
    halving_reach,
    is_narrow,
)


def search_range(eta_min: float = 1 / 64, eta_max: float = 64.0) -> SearchRange:
    return SearchRange(eta_init=1.0, eta_min=eta_min, eta_max=eta_max, rel_tol=1 / 4)


def shortest_end(rises: dict[float, bool], where: SearchRange, longest: int = 12) -> int:
    """Steps to the soonest end of the path over every way the losses could go on."""
    path = follow_bisection(rises, where)
    if path.next_eta is None or path.num_steps >= longest:
        return path.num_steps
    return min(
        shortest_end(rises | {path.next_eta: answer}, where, longest) for answer in (False, True)
    )


def test_the_path_of_one_crossing_by_hand():
    rises: dict[float, bool] = {}
    asked = []
    while (eta := follow_bisection(rises, search_range()).next_eta) is not None:
        asked.append(eta)
        rises[eta] = eta > 5.2
    assert asked == [1.0, 2.0, 4.0, 8.0, 6.0, 5.0]
    path = follow_bisection(rises, search_range())
    assert (path.eta_lower, path.eta_upper, path.num_steps) == (5.0, 6.0, 6)


@pytest.mark.parametrize(("answer", "last"), [(False, 3.0), (True, 0.3)])
def test_the_limits_are_tried_before_the_path_ends(answer, last):
    where = search_range(eta_min=0.3, eta_max=3.0)
    rises: dict[float, bool] = {}
    while (eta := follow_bisection(rises, where).next_eta) is not None:
        rises[eta] = answer
    assert list(rises)[-1] == last
    assert follow_bisection(rises, where).eta_upper == (last if answer else math.inf)


def test_answers_off_the_path_do_not_move_it():
    path = follow_bisection({1.0: False, 3.0: True, 8.0: True}, search_range())
    assert (path.eta_lower, path.next_eta, path.num_steps) == (1.0, 2.0, 1)


@pytest.mark.parametrize("answers", list(itertools.product([False, True], repeat=4)))
@pytest.mark.parametrize("limit", [1.0, 1.5, 2.0, 5.0, 64.0])
def test_fewest_passes_is_the_soonest_end_of_any_loss(answers, limit):
    where = search_range(eta_min=1 / limit, eta_max=limit)
    rises: dict[float, bool] = {}
    for answer in answers:
        eta = follow_bisection(rises, where).next_eta
        if eta is None:
            break
        rises[eta] = answer
        assert fewest_passes(follow_bisection(rises, where), where) == shortest_end(rises, where)


@pytest.mark.parametrize("rel_tol", [0.5, 1 / 16, 1e-3, 1e-6])
@pytest.mark.parametrize("num_halvings", range(6))
def test_halving_reach_is_the_widest_ratio_that_so_many_halvings_close(rel_tol, num_halvings):
    def closes(ratio: float) -> bool:
        # 1 - lower / upper is largest at the lower end, so this half is the worst to keep.
        return is_narrow(1.0, 1.0 + (ratio - 1.0) / 2**num_halvings, rel_tol)

    reach = halving_reach(num_halvings, rel_tol)
    assert closes(reach)
    assert not closes(1.0 + (reach - 1.0) * (1 + 1e-5))


@pytest.mark.parametrize(
    ("lower", "upper", "narrow"),
    [(15.0, 16.0, True), (14.9, 16.0, False), (0.0, 1.0, False), (1.0, math.inf, False)],
)
def test_a_narrow_bracket_has_two_ends_and_the_ratio_asked_for(lower, upper, narrow):
    assert is_narrow(lower, upper, 1 / 16) is narrow
