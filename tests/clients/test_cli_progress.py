"""What is counted of a running job, and the numbers as they are written."""

import datetime as dt

import pytest

from clients.cli.progress import SeriesProgress, phase_text
from clients.cli.tables import age, byte_size, duration, number, quantity


def test_units_passes_and_the_time_left() -> None:
    shown = SeriesProgress(num_units=4, expected_passes=40)
    assert shown.time_left_s(0) is None
    shown.start_unit(0, 100.0)
    shown.advance(0, {"phase": "search", "num_forward_passes": 1}, 105.0)
    assert shown.time_left_s(105.0) is None  # a tenth of a unit tells no pace
    shown.advance(0, {"num_forward_passes": 5}, 110.0)
    assert (shown.passes_now, shown.done_units) == (5, 0.5)
    assert shown.time_left_s(110.0) == pytest.approx(10 / 0.5 * 3.5)
    shown.finish_unit(0, 12)
    shown.finish_unit(0, 12)  # the same event twice
    assert (shown.passes_now, shown.done_units) == (12, 1)
    assert shown.time_left_s(120.0) == pytest.approx(60.0)


def test_a_unit_that_takes_long_never_counts_as_done() -> None:
    shown = SeriesProgress(num_units=1, expected_passes=4)
    shown.advance(0, {"num_forward_passes": 400}, 0.0)
    assert shown.done_units < 1
    left = shown.time_left_s(10.0)
    assert left is not None
    assert left > 0


def test_units_finished_before_do_not_set_the_pace() -> None:
    shown = SeriesProgress(num_units=4, expected_passes=4)
    shown.finish_unit(0, 1)
    shown.finish_unit(1, 1)
    shown.start_unit(2, 50.0)
    shown.finish_unit(2, 1)
    assert shown.time_left_s(60.0) == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.9, "59.9 s"),
        (59.96, "1 min 0 s"),
        (3599.6, "1 h 0 min"),
        (7500, "2 h 5 min"),
        (90000, "1 d 1 h"),
        (None, "-"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_numbers() -> None:
    assert [number(x) for x in (1234.56, 1e-9, None)] == ["1235", "1e-09", "-"]
    assert [byte_size(n) for n in (0, 1023, 1024, 3 << 30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "3.0 GiB",
    ]
    assert [quantity(n) for n in (9999, 10_000, 4_200_000_000, 3 * 10**12)] == [
        "9999",
        "10K",
        "4.2B",
        "3T",
    ]
    now = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)
    assert age(now - dt.timedelta(minutes=125), now) == "2 h"
    assert age(now + dt.timedelta(seconds=3), now) == "0 s"  # a server whose clock is ahead


def test_phases() -> None:
    assert phase_text({}) == "starting"
    assert phase_text({"phase": "load", "done": 0, "total": 1}) == "loading"
    found = {"phase": "search", "done": 1, "total": 4, "num_forward_passes": 7}
    assert phase_text(found) == "searching 1/4, passes: 7"
