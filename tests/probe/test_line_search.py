"""Every expected value here comes from a formula, never from an earlier run of the code."""

import itertools
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from probe.errors import ConfigError, NonFiniteLossError
from probe.line_search import LineSearchResult, Search, SearchOutcome, find_critical_learning_rate

Loss = Callable[[float], float]
SEARCHES: tuple[Search, ...] = ("interpolate", "bisect")
both_searches = pytest.mark.parametrize("search", SEARCHES)


def quadratic_ray(eta_c: float, slope: float = -1.0, loss_at_zero: float = 3.0) -> Loss:
    """L0 + slope eta (1 - eta / eta_c): crosses its value at 0 exactly at eta_c."""
    return lambda eta: loss_at_zero + slope * eta * (1.0 - eta / eta_c)


def power_ray(eta_c: float, power: float) -> Loss:
    """-eta + eta_c (eta / eta_c)^power, crossing 0 at eta_c; steep for a large power."""
    return lambda eta: -eta + eta_c * min(eta / eta_c, 1e7) ** power


def exponential_ray(eta_c: float) -> Loss:
    """expm1(eta / eta_c) - (e - 1) eta / eta_c, crossing 0 at eta_c."""
    return lambda eta: math.expm1(min(eta / eta_c, 700.0)) - math.expm1(1.0) * eta / eta_c


def saturating_ray(eta_c: float) -> Loss:
    """Steep near 0, flat far out, like a language model early in training; crosses at eta_c."""
    return lambda eta: (
        -math.sqrt(eta / eta_c) + (1.0 + math.log1p(eta / eta_c)) / (1.0 + math.log(2.0))
    )


def step_ray(eta_c: float, drop: float, rise: float) -> Loss:
    return lambda eta: 0.0 if eta == 0 else (-drop if eta <= eta_c else rise)


def walled_ray(eta_c: float, wall: float, beyond: float) -> Loss:
    """A quadratic that breaks off: not a number, or infinite, from `wall` on."""
    inside = quadratic_ray(eta_c)
    return lambda eta: inside(eta) if eta < wall else beyond


def noisy_ray(eta_c: float, noise: float, seed: int) -> Loss:
    """A quadratic with noise like that of rounding: the same at the same eta, else unrelated."""
    smooth = quadratic_ray(eta_c, loss_at_zero=0.0)
    return lambda eta: (
        0.0
        if eta == 0
        else smooth(eta) + noise * eta_c * (random.Random(f"{seed} {eta}").random() - 0.5)
    )


def patched_ray(seed: int, octaves: float) -> Loss:
    """Rises, falls and holes at random, constant over patches of so many octaves."""

    def loss(eta: float) -> float:
        if eta == 0:
            return 0.0
        patch = random.Random(f"{seed} {math.floor(math.log2(eta) / octaves)}")
        if patch.random() < 0.05:
            return patch.choice([math.nan, math.inf, -math.inf])
        return patch.uniform(-1.0, 1.0) * 10.0 ** patch.randint(-6, 6)

    return loss


etas = st.floats(-5, 2).map(lambda exponent: 10.0**exponent)
seeds = st.integers(0, 10**6)
single_crossing_rays = st.one_of(
    st.builds(quadratic_ray, etas),
    st.builds(power_ray, etas, st.sampled_from([1.1, 1.5, 3.0, 4.0, 12.0, 40.0])),
    st.builds(exponential_ray, etas),
    st.builds(step_ray, etas, etas, etas),
    st.builds(
        lambda eta_c, share, beyond: walled_ray(eta_c, share * eta_c, beyond),
        etas,
        st.floats(1.0, 3.0, exclude_min=True),
        st.sampled_from([math.nan, math.inf, -math.inf]),
    ),
)
any_rays = st.one_of(
    single_crossing_rays,
    st.builds(saturating_ray, etas),
    st.builds(noisy_ray, etas, st.sampled_from([1e-6, 1e-3, 0.1, 10.0]), seeds),
    st.builds(patched_ray, seeds, st.sampled_from([1e-9, 0.05, 0.3, 1.0, 4.0])),
    st.builds(lambda period: lambda eta: -math.sin(eta / period), etas),
    st.sampled_from([lambda eta: 0.0, lambda eta: -eta, lambda eta: eta, lambda eta: -eta * 1e-18]),
)
slopes = st.one_of(st.none(), etas.map(lambda eta: -eta))
tolerances = st.sampled_from([1 / 16, 1 / 16, 0.5, 0.9, 0.01, 1e-6])


def assert_bracket_holds(result: LineSearchResult, loss_at: Loss, rel_tol: float) -> None:
    def rises(eta: float) -> bool:
        return not loss_at(eta) <= result.loss_at_zero or not math.isfinite(loss_at(eta))

    assert result.eta_lower == 0.0 or not rises(result.eta_lower)
    assert result.eta_upper == math.inf or rises(result.eta_upper)
    assert result.eta_lower < result.eta_upper
    # No eta tried lies inside the bracket.
    assert not any(result.eta_lower < eta < result.eta_upper for eta, _ in result.trials)
    if result.outcome is SearchOutcome.CONVERGED:
        assert 1 - result.eta_lower / result.eta_upper <= rel_tol
        assert result.eta_c == 0.5 * (result.eta_lower + result.eta_upper)
        assert result.lambda_c == 2 / result.eta_c
    else:
        assert result.eta_c is None
        assert result.lambda_c is None
    if result.eta_interpolated is not None:
        assert result.eta_lower <= result.eta_interpolated <= result.eta_upper


# ---- the answer


@both_searches
@given(eta_c=etas, slope=etas, eta_init=etas, known=st.booleans(), rel_tol=tolerances)
def test_brackets_the_closed_form_on_a_quadratic(search, eta_c, slope, eta_init, known, rel_tol):
    ray = quadratic_ray(eta_c, slope=-slope, loss_at_zero=0.0)
    result = find_critical_learning_rate(
        ray,
        eta_init=eta_init,
        slope=-slope if known else None,
        search=search,
        rel_tol=rel_tol,
        max_forward_passes=100,
    )
    assert result.outcome is SearchOutcome.CONVERGED
    # 1 - eta / eta_c is rounded to 1e-16, so the crossing itself is where the formula says to that.
    assert result.eta_lower <= eta_c * (1 + 1e-12)
    assert eta_c * (1 - 1e-12) <= result.eta_upper
    assert result.num_extra_sign_changes == 0


@given(eta_c=etas, share=st.floats(0.5, 2.0))
def test_the_interpolated_estimate_is_exact_on_a_quadratic(eta_c, share):
    ray = quadratic_ray(eta_c, loss_at_zero=0.0)
    result = find_critical_learning_rate(ray, eta_init=share * eta_c, slope=-1.0)
    assert result.eta_interpolated == pytest.approx(eta_c, rel=1e-6)


@pytest.mark.parametrize("power", [2.0, 3.0])
def test_the_interpolated_estimate_is_better_than_the_bracket(power):
    ray = power_ray(0.01, power)
    result = find_critical_learning_rate(ray, eta_init=0.013, slope=-1.0)
    assert result.eta_interpolated == pytest.approx(0.01, rel=0.005)  # rel_tol is 0.0625


@both_searches
@given(ray=any_rays, eta_init=etas, slope=slopes, rel_tol=tolerances)
@settings(max_examples=200)
def test_the_bracket_always_holds(search, ray, eta_init, slope, rel_tol):
    result = find_critical_learning_rate(
        ray, eta_init=eta_init, slope=slope, search=search, rel_tol=rel_tol
    )
    assert_bracket_holds(result, ray, rel_tol)


@both_searches
@given(ray=single_crossing_rays, eta_init=etas, slope=slopes, scale=st.floats(-3, 3).map(math.exp))
def test_scaling_delta_by_c_divides_eta_c_by_c(search, ray, eta_init, slope, scale):
    plain = find_critical_learning_rate(ray, eta_init=eta_init, slope=slope, search=search)
    scaled = find_critical_learning_rate(
        lambda eta: ray(scale * eta),
        eta_init=eta_init,
        slope=None if slope is None else scale * slope,
        search=search,
    )
    assume(plain.eta_c is not None and scaled.eta_c is not None)
    # Both brackets hold the one crossing; 1e-9 covers the rounding of scale * eta.
    assert plain.eta_lower <= scale * scaled.eta_upper * (1 + 1e-9)
    assert scale * scaled.eta_lower <= plain.eta_upper * (1 + 1e-9)


@both_searches
@given(eta_c=etas, eta_init=etas, factor=st.integers(-8, 8), offset=st.integers(-100, 100))
def test_an_affine_change_of_the_loss_changes_nothing(search, eta_c, eta_init, factor, offset):
    # A power of two and a grid of 2^-20 keep a * L + b exact, so the trials are the same floats.
    def ray(eta: float) -> float:
        return round(quadratic_ray(1.0, slope=-16.0)(min(eta / eta_c, 1e3)) * 2**20) / 2**20

    a = 2.0**factor
    plain = find_critical_learning_rate(ray, eta_init=eta_init, slope=-1.0, search=search)
    changed = find_critical_learning_rate(
        lambda eta: a * ray(eta) + offset, eta_init=eta_init, slope=-a, search=search
    )
    assert [eta for eta, _ in changed.trials] == [eta for eta, _ in plain.trials]
    assert (changed.outcome, changed.eta_c) == (plain.outcome, plain.eta_c)


@both_searches
def test_the_crossing_is_the_first_strict_rise(search):
    # Flat at L(0) up to 0.1: equal is not above, so the plateau belongs to the lower side.
    result = find_critical_learning_rate(
        lambda eta: 2.0 if eta <= 0.1 else 2.5, eta_init=1e-3, search=search
    )
    assert result.eta_lower <= 0.1 < result.eta_upper


@both_searches
@pytest.mark.parametrize("slope", [None, -1.0])
@pytest.mark.parametrize("eta_init", [1e-9, 1e-7, 1e-5, 1e-3, 1.0])
def test_losses_rounded_to_fp32_do_not_mislead_the_search(search, slope, eta_init):
    # Between 2 and 4 fp32 numbers lie 2^-22 apart: below eta = 1e-7 this ray is all rounding. Its
    # slope at the crossing is +1, so rounding moves that by 2^-22 at most.
    smooth = quadratic_ray(0.01)
    result = find_critical_learning_rate(
        lambda eta: round(smooth(eta) * 2**22) / 2**22,
        eta_init=eta_init,
        slope=slope,
        search=search,
    )
    assert result.outcome is SearchOutcome.CONVERGED
    assert result.eta_lower <= 0.01 + 2**-22
    assert result.eta_upper >= 0.01 - 2**-22


# ---- what it costs


@given(eta_c=etas, share=st.floats(0.5, 2.0), slope=etas)
@settings(max_examples=300)
def test_three_passes_on_a_quadratic_with_slope_from_within_a_factor_two(eta_c, share, slope):
    ray = quadratic_ray(eta_c, slope=-slope, loss_at_zero=0.0)
    result = find_critical_learning_rate(
        ray, eta_init=share * eta_c, slope=-slope, loss_at_zero=0.0
    )
    assert result.outcome is SearchOutcome.CONVERGED
    assert result.num_forward_passes <= 3


@given(eta_c=etas, octaves=st.floats(-12, 12))
def test_few_passes_on_a_quadratic_with_slope_from_any_guess(eta_c, octaves):
    # One far probe on bisect's grid, then the two that close the bracket.
    ray = quadratic_ray(eta_c, loss_at_zero=0.0)
    result = find_critical_learning_rate(
        ray, eta_init=eta_c * 2**octaves, slope=-1.0, loss_at_zero=0.0
    )
    assert result.num_forward_passes <= 4


@pytest.mark.parametrize("octaves", [-9.3, -4.8, -2.1, 2.1, 4.8, 9.3])
def test_a_far_probe_lies_on_the_path_of_bisect(octaves):
    # So that it is not lost when the model is wrong and the safeguard goes back to that path.
    eta_init = 2.0**octaves
    result = find_critical_learning_rate(quadratic_ray(1.0), eta_init=eta_init, slope=-1.0)
    assert result.trials[1][0] == eta_init * 2.0 ** -round(octaves)


@pytest.mark.parametrize("eta_init", [1e-3, 0.02, 20.0])
def test_a_slope_that_is_wrong_by_far_costs_two_passes_at_most(eta_init):
    ray = step_ray(0.3, drop=1e-9, rise=1e9)  # nothing any model of the loss could foresee
    paper = find_critical_learning_rate(ray, eta_init=eta_init, search="bisect")
    for slope in (-1e-9, -1e-3, -1.0, -1e9):
        result = find_critical_learning_rate(ray, eta_init=eta_init, slope=slope)
        assert result.outcome is SearchOutcome.CONVERGED
        assert result.num_forward_passes <= paper.num_forward_passes + 2


@pytest.mark.parametrize(
    ("eta_init", "num_forward_passes"),
    [
        # By hand, eta_c = 1, counting L(0): bracketing steps, then bisections.
        (33 / 32, 1 + 2 + 3),  # (33/64, 33/32), upper half three times: 15/16 of the upper end
        (1.1, 1 + 2 + 4),  # 1.1, 0.55; 0.825, 0.9625, 1.03125, 0.996875
        (0.01, 1 + 8 + 4),  # 0.01 ... 0.64, 1.28; 0.96, 1.12, 1.04, 1.0
        (10.0, 1 + 5 + 4),  # 10, 5, 2.5, 1.25, 0.625; 0.9375, 1.09375, 1.015625, 0.9765625
    ],
)
def test_bisect_passes_counted_by_hand(eta_init, num_forward_passes):
    result = find_critical_learning_rate(
        quadratic_ray(1.0), eta_init=eta_init, slope=-1.0, search="bisect"
    )
    assert result.num_forward_passes == num_forward_passes


@given(ray=any_rays, eta_init=etas, slope=slopes, rel_tol=tolerances)
@settings(max_examples=600)
def test_never_more_than_two_passes_over_bisect(ray, eta_init, slope, rel_tol):
    bisect, interpolate = (
        find_critical_learning_rate(
            ray,
            eta_init=eta_init,
            slope=slope,
            rel_tol=rel_tol,
            search=search,
            max_forward_passes=200,
        )
        for search in ("bisect", "interpolate")
    )
    assume(bisect.outcome is SearchOutcome.CONVERGED)
    assert interpolate.outcome is SearchOutcome.CONVERGED
    assert interpolate.num_forward_passes <= bisect.num_forward_passes + 2


@both_searches
@given(ray=any_rays, eta_init=etas, slope=slopes, budget=st.integers(1, 12), given_l0=st.booleans())
def test_the_budget_is_a_hard_limit_and_every_call_is_counted(
    search, ray, eta_init, slope, budget, given_l0
):
    calls = []

    def loss_at(eta: float) -> float:
        calls.append((eta, ray(eta)))
        return calls[-1][1]

    result = find_critical_learning_rate(
        loss_at,
        eta_init=eta_init,
        slope=slope,
        search=search,
        loss_at_zero=ray(0.0) if given_l0 else None,
        max_forward_passes=budget,
    )
    assert result.num_forward_passes == len(calls) <= budget
    assert len(set(result.trials)) == len(result.trials) == len(calls) - (not given_l0)
    assert repr(list(result.trials)) == repr(calls if given_l0 else calls[1:])  # NaN != NaN
    if result.outcome is SearchOutcome.BUDGET_EXHAUSTED:
        assert len(calls) == budget


@both_searches
@given(ray=any_rays, eta_init=etas, slope=slopes, below=st.floats(1, 1e3), above=st.floats(1, 1e3))
def test_no_eta_outside_the_limits_is_tried(search, ray, eta_init, slope, below, above):
    eta_min, eta_max = eta_init / below, eta_init * above
    result = find_critical_learning_rate(
        ray, eta_init=eta_init, slope=slope, search=search, eta_min=eta_min, eta_max=eta_max
    )
    assert all(eta_min <= eta <= eta_max for eta, _ in result.trials)
    tried = [eta for eta, _ in result.trials]
    if result.outcome is SearchOutcome.NO_CROSSING:
        assert eta_max in tried
    if result.outcome is SearchOutcome.NOT_A_DESCENT_DIRECTION:
        assert eta_min in tried


# ---- no answer


@both_searches
@pytest.mark.parametrize("slope", [None, -1.0])
@pytest.mark.parametrize(
    ("ray", "outcome"),
    [
        (lambda eta: -eta, SearchOutcome.NO_CROSSING),
        (lambda eta: 0.0, SearchOutcome.NO_CROSSING),
        (lambda eta: +eta, SearchOutcome.NOT_A_DESCENT_DIRECTION),
        (lambda eta: 1.0 if eta == 0 else math.nan, SearchOutcome.NOT_A_DESCENT_DIRECTION),
    ],
    ids=["falls forever", "flat", "rises at once", "not a number at once"],
)
def test_a_ray_without_a_crossing_is_an_outcome(search, ray, outcome, slope):
    result = find_critical_learning_rate(
        ray, eta_init=1e-3, search=search, slope=slope, max_forward_passes=80
    )
    assert result.outcome is outcome
    assert result.eta_c is None
    assert result.lambda_c is None
    assert result.eta_interpolated is None
    rose = outcome is SearchOutcome.NOT_A_DESCENT_DIRECTION
    assert (result.eta_lower == 0.0) is rose
    assert (result.eta_upper == math.inf) is not rose


@both_searches
@pytest.mark.parametrize("slope", [0.0, 2.5])
def test_a_slope_that_does_not_fall_is_decided_without_a_search(search, slope):
    calls = []

    def loss_at(eta: float) -> float:
        calls.append(eta)
        return 2.0

    known = find_critical_learning_rate(loss_at, slope=slope, loss_at_zero=2.0, search=search)
    assert known.outcome is SearchOutcome.NOT_A_DESCENT_DIRECTION
    assert (known.num_forward_passes, known.trials, calls) == (0, (), [])
    assert (known.eta_lower, known.eta_upper, known.eta_c) == (0.0, math.inf, None)
    unknown = find_critical_learning_rate(loss_at, slope=slope, search=search)
    assert unknown.outcome is SearchOutcome.NOT_A_DESCENT_DIRECTION
    assert (unknown.num_forward_passes, unknown.loss_at_zero, calls) == (1, 2.0, [0.0])


@both_searches
@pytest.mark.parametrize("beyond", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("eta_init", [1e-3, 0.1, 5.0])
def test_a_loss_that_is_not_finite_counts_as_a_rise(search, beyond, eta_init):
    crossing_first = find_critical_learning_rate(
        walled_ray(0.1, wall=0.12, beyond=beyond), eta_init=eta_init, search=search
    )
    assert crossing_first.eta_lower <= 0.1 * (1 + 1e-9)
    assert crossing_first.eta_upper >= 0.1 * (1 - 1e-9)
    wall_first = find_critical_learning_rate(
        walled_ray(0.1, wall=0.03, beyond=beyond), eta_init=eta_init, search=search
    )
    assert wall_first.outcome is SearchOutcome.CONVERGED
    assert wall_first.eta_lower < 0.03 <= wall_first.eta_upper


@both_searches
@given(eta_c=etas, share=st.floats(0.2, 3.0), eta_init=etas, slope=slopes)
def test_one_kind_of_diverged_loss_is_like_another(search, eta_c, share, eta_init, slope):
    tried = [
        [
            eta
            for eta, _ in find_critical_learning_rate(
                walled_ray(eta_c, share * eta_c, beyond),
                eta_init=eta_init,
                slope=slope,
                search=search,
            ).trials
        ]
        for beyond in (math.nan, math.inf, -math.inf)
    ]
    assert tried[0] == tried[1] == tried[2]


@both_searches
def test_the_budget_ends_a_search_with_the_bracket_it_has(search):
    result = find_critical_learning_rate(
        step_ray(0.1, drop=1.0, rise=1e6), eta_init=0.09, search=search, max_forward_passes=4
    )
    assert result.outcome is SearchOutcome.BUDGET_EXHAUSTED
    assert 0.0 < result.eta_lower <= 0.1 < result.eta_upper < math.inf
    assert result.eta_c is None


def test_extra_sign_changes_are_counted_and_the_lower_crossing_is_reported():
    # The loss is above L(0) on (1, 3) and from 10 on. The slope sends the first far probe to 4,
    # where the loss is lower; the way back to bisect's grid then meets the rise at 2.
    def ray(eta: float) -> float:
        return 1.0 if 1.0 < eta < 3.0 or eta >= 10.0 else -0.75 * eta

    result = find_critical_learning_rate(ray, eta_init=1.0, slope=-1.0)
    seen = [loss > 0.0 for _, loss in sorted(result.trials)]
    num_changes = sum(a != b for a, b in itertools.pairwise([False, *seen]))
    assert num_changes > 1
    assert result.num_extra_sign_changes == num_changes - 1
    assert result.outcome is SearchOutcome.CONVERGED
    assert result.eta_lower <= 1.0 < result.eta_upper
    paper = find_critical_learning_rate(ray, eta_init=1.0, search="bisect")
    assert paper.num_extra_sign_changes == 0
    assert result.num_forward_passes <= paper.num_forward_passes + 2


@both_searches
@given(ray=any_rays, eta_init=etas, slope=slopes)
def test_extra_sign_changes_match_the_trials(search, ray, eta_init, slope):
    result = find_critical_learning_rate(ray, eta_init=eta_init, slope=slope, search=search)
    rises = [not math.isfinite(loss) or loss > ray(0.0) for _, loss in sorted(result.trials)]
    num_changes = sum(a != b for a, b in itertools.pairwise([False, *rises]))
    assert result.num_extra_sign_changes == max(0, num_changes - 1)
    if search == "bisect":
        assert result.num_extra_sign_changes == 0  # it only ever probes inside its bracket


# ---- bad input


@both_searches
@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_at_zero_that_is_not_finite_is_an_error(search, loss):
    with pytest.raises(NonFiniteLossError, match="eta = 0"):
        find_critical_learning_rate(lambda eta: loss, search=search)
    with pytest.raises(NonFiniteLossError, match="eta = 0"):
        find_critical_learning_rate(lambda eta: 1.0, loss_at_zero=loss, slope=1.0, search=search)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eta_init": 0.0}, "eta_init=0.0"),
        ({"eta_init": math.nan}, "eta_init=nan"),
        ({"eta_init": 1e-13}, "eta_min <= eta_init"),
        ({"eta_init": 1e7}, "eta_init <= eta_max"),
        ({"eta_min": 0.0}, "eta_min=0.0"),
        ({"eta_min": 5e-324}, "1e-30 <= eta_min"),
        ({"eta_max": 1e39}, "eta_max <= 1e\\+30"),
        ({"eta_max": math.inf}, "eta_max=inf"),
        ({"rel_tol": 0.0}, "rel_tol"),
        ({"rel_tol": 1.0}, "rel_tol"),
        ({"rel_tol": math.nan}, "rel_tol"),
        ({"slope": math.nan}, "slope must be finite"),
        ({"slope": -math.inf}, "slope must be finite"),
        ({"search": "newton"}, "'newton'"),
        ({"max_forward_passes": 0}, "max_forward_passes"),
    ],
)
def test_a_bad_argument_is_refused_before_the_first_pass(arguments, message):
    def loss_at(eta: float) -> float:
        raise AssertionError("no pass may be spent")

    with pytest.raises(ConfigError, match=message):
        find_critical_learning_rate(loss_at, **arguments)


@both_searches
@pytest.mark.parametrize("eta_init", [1e-30, 1e-6, 12.0, 1e6, 1e30])
def test_a_slope_of_next_to_nothing_points_nowhere_but_breaks_nothing(search, eta_init):
    result = find_critical_learning_rate(
        lambda eta: 1.0 - eta * (1.0 - eta),
        eta_init=eta_init,
        slope=-5e-324,
        search=search,
        eta_min=1e-30,
        eta_max=1e30,
        max_forward_passes=200,
    )
    assert result.outcome is SearchOutcome.CONVERGED
    assert result.eta_lower <= 1.0 + 1e-6
    assert result.eta_upper >= 1.0 - 1e-6


@both_searches
def test_without_a_first_guess_the_search_starts_at_its_default(search):
    ray = lambda eta: 1.0 - eta * (1.0 - eta)  # noqa: E731
    assert find_critical_learning_rate(ray, eta_init=None, search=search).trials[0][0] == 1e-3
    limits = {"eta_min": 0.1, "eta_max": 10.0}
    near = find_critical_learning_rate(ray, eta_init=None, search=search, **limits)
    assert near.trials[0][0] == 0.1


@both_searches
def test_an_error_of_the_loss_function_comes_through(search):
    def loss_at(eta: float) -> float:
        if eta > 0:
            raise RuntimeError("out of memory")
        return 1.0

    with pytest.raises(RuntimeError, match="out of memory"):
        find_critical_learning_rate(loss_at, search=search)
