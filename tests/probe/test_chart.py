"""A chart shows every number once, what has no answer as such, and is safe to put on a page."""

import json
import re
import xml.etree.ElementTree as ET

import pytest

from probe.chart import THRESHOLD, series_chart
from probe.chart_style import to_png, to_svg, to_vega
from probe.errors import ConfigError
from probe.result import CheckpointRef


def rows_of(vega):
    """Every row of every data set in the chart."""
    return [row for rows in vega["datasets"].values() for row in rows]


def y_domain(vega):
    """The limits of the logarithmic axis."""
    scales = re.findall(r'"scale": (\{[^{}]*"log"[^{}]*\})', json.dumps(vega))
    (domain,) = {tuple(json.loads(scale)["domain"]) for scale in scales}
    return domain


def texts(svg):
    """Every piece of text drawn; also proves that the SVG is well-formed XML."""
    return ["".join(e.itertext()) for e in ET.fromstring(svg).iter() if e.tag.endswith("text")]


def test_means_repeats_and_errors_are_drawn_as_measured(make_unit_result):
    etas = {"update": [0.1, 0.2], "held_out": [0.02, 0.02]}
    vega = to_vega(series_chart([make_unit_result(i, 100 * (i + 1), etas) for i in range(3)]))
    rows = rows_of(vega)
    (mean,) = {r["lambda_c"] for r in rows if r.get("loss_batch") == "update" and "error" in r}
    assert mean == pytest.approx(15)  # 2/0.1 = 20 and 2/0.2 = 10
    summary = next(r for r in rows if r.get("loss_batch") == "update" and "error" in r)
    assert (summary["low"], summary["high"]) == (pytest.approx(10), pytest.approx(20))
    repeats = [r for r in rows if r.get("loss_batch") == "update" and "error" not in r]
    assert sorted({round(r["lambda_c"], 9) for r in repeats}) == [10, 20]
    assert {r["x"] for r in rows if "loss_batch" in r} == {100, 200, 300}


def test_threshold_is_two_over_the_learning_rate_between_checkpoints_too(make_unit_result):
    # Schedule of the fixture: 0 -> 0.01 over 100 steps, 0.01 to step 400, then to 0 at 600.
    results = [make_unit_result(i, step) for i, step in enumerate([50, 400, 500])]
    line = {r["x"]: r["lambda_c"] for r in rows_of(to_vega(series_chart(results))) if
            r.get("series") == THRESHOLD}  # fmt: skip
    assert line[50] == pytest.approx(400)  # lr 0.005
    assert line[100] == pytest.approx(200)  # the corner, where no checkpoint is
    assert line[400] == pytest.approx(200)
    assert line[500] == pytest.approx(400)


def test_the_threshold_of_a_published_run_follows_its_own_schedule(make_unit_result, series_spec):
    spec = {k: v for k, v in series_spec.items() if k != "schedule"}
    repo = "allenai/OLMo-2-1124-7B"
    found = []
    for index, step in enumerate((1000, 9000)):
        result = make_unit_result(index, step, learning_rate=6.1499e-5, spec=spec)
        revision = f"stage2-ingredient1-step{step}-tokens{step * 4194304 // 10**9 + 1}B"
        at = CheckpointRef(source="hub", location=repo, revision=revision, step=step)
        unit = result.unit.model_copy(update={"checkpoint": at})
        found.append(result.model_copy(update={"unit": unit}))
    line = {r["x"]: r["lambda_c"] for r in rows_of(to_vega(series_chart(found)))
            if r.get("series") == THRESHOLD}  # fmt: skip
    assert len(line) > 20
    for step, threshold in line.items():  # a line to 0 over 11920 steps
        rate = 6.1499e-5 * (1 - (step + 1) / 11920)
        assert threshold == pytest.approx(2 / rate, rel=1e-9)


def test_searches_without_an_answer_are_marked_and_break_the_line(make_unit_result):
    results = [
        make_unit_result(0, 100, {"update": [0.1]}),
        make_unit_result(1, 200, {"update": ["no_crossing"]}),
        make_unit_result(2, 300, {"update": [0.1]}),
    ]
    chart = series_chart(results)
    marks = [r for r in rows_of(to_vega(chart)) if "outcome" in r]
    assert [(m["x"], m["outcome"], m["searches"]) for m in marks] == [
        (200, "no_crossing", "1 of 1")
    ]
    assert "no_crossing" in texts(to_svg(chart))
    assert any(r.get("lambda_c", 0) is None for r in rows_of(to_vega(chart)))


def test_one_failed_repeat_is_marked_beside_the_mean_of_the_others(make_unit_result):
    chart = series_chart([make_unit_result(0, 1, {"update": [0.1, "budget_exhausted"]})])
    (mark,) = [r for r in rows_of(to_vega(chart)) if "outcome" in r]
    assert mark["searches"] == "1 of 2"


def test_marks_of_two_loss_batches_do_not_lie_on_each_other(make_unit_result):
    result = make_unit_result(0, 1, {"update": ["no_crossing"], "held_out": ["no_crossing"]})
    layers = to_vega(series_chart([result]))["vconcat"][0]["layer"]
    heights = [one["encoding"]["y"]["value"] for one in layers if "shape" in one["encoding"]]
    assert len(set(heights)) == 2


def test_a_narrow_axis_has_numbers(make_unit_result):
    result = make_unit_result(0, None, {"update": ["no_crossing"]}, learning_rate=2 / 2500)
    assert {"2.4k", "2.5k", "2.6k"} <= set(texts(to_svg(series_chart([result]))))


@pytest.mark.parametrize("learning_rate", [0.01, None])
def test_no_answer_at_all_still_draws(make_unit_result, learning_rate):
    chart = series_chart(
        [
            make_unit_result(i, 10 * i, {"held_out": ["no_crossing"]}, learning_rate=learning_rate)
            for i in range(2)
        ]
    )
    assert any("no checkpoint has an answer" in text for text in texts(to_svg(chart)))


def test_a_single_checkpoint_without_a_step_stands_at_its_name(make_unit_result):
    chart = series_chart([make_unit_result(0, None, location="models/smollm2.gguf")])
    drawn = texts(to_svg(chart))
    assert "smollm2.gguf" in drawn
    assert THRESHOLD in drawn


def test_checkpoints_of_the_same_name_stay_apart(make_unit_result):
    chart = series_chart([make_unit_result(i, None, location=f"run-{i}/final") for i in range(3)])
    assert {"final", "final (2)", "final (3)"} <= set(texts(to_svg(chart)))


def test_two_hundred_checkpoints(make_unit_result):
    chart = series_chart([make_unit_result(i, 1000 * i) for i in range(200)])
    assert len({r["x"] for r in rows_of(to_vega(chart)) if "loss_batch" in r}) == 200
    assert to_png(chart, scale=0.5).startswith(b"\x89PNG\r\n\x1a\n")


def test_the_axis_holds_every_answer_but_not_an_infinite_threshold(make_unit_result):
    results = [
        make_unit_result(0, 100, {"update": [2.0]}),  # lambda_c = 1
        make_unit_result(1, 599, {"update": [0.02]}, learning_rate=5e-5),  # 100; 2/eta = 40,000
    ]
    low, high = y_domain(to_vega(series_chart(results)))
    assert 0 < low < 1
    assert 100 < high < 2_000


def test_a_standard_error_as_large_as_the_mean_stays_on_the_log_axis(make_unit_result):
    # lambda_c 1e18 and 1e-3: mean and standard error round to the same float, their difference
    # to 0, which a logarithmic axis cannot hold.
    vega = to_vega(series_chart([make_unit_result(0, 10, {"update": [2e-18, 2e3]})]))
    (low,) = {r["low"] for r in rows_of(vega) if r.get("low") is not None}
    assert low == pytest.approx(1e-3, rel=0.05)  # the lower end of the brackets
    assert 0 < y_domain(vega)[0] < 1e-3


def test_legend_and_axes_name_what_is_drawn(make_unit_result):
    drawn = texts(to_svg(series_chart([make_unit_result(i, 100 * i) for i in range(3)])))
    for name in ("λ_c on the update batch", "λ_c on the held-out batch", THRESHOLD):
        assert name in drawn
    assert "training step" in drawn
    assert any("critical sharpness" in text and "1/η" in text for text in drawn)
    assert "loss (nats/token)" in drawn


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_hostile_name_is_text_in_the_svg(make_unit_result, series_spec, theme):
    spec = series_spec | {"name": "<script>alert(1)</script> \x01 & 'q'"}
    svg = to_svg(series_chart([make_unit_result(0, 5, spec=spec)], theme))
    assert "<script" not in svg
    assert any(text.startswith("<script>alert(1)</script>") for text in texts(svg))


def test_order_of_the_results_does_not_matter(make_unit_result):
    results = [make_unit_result(i, 100 * i) for i in range(4)]
    assert to_vega(series_chart(results[::-1])) == to_vega(series_chart(results))


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ConfigError, match="at least one"):
        series_chart([])
