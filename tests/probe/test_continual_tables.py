"""Rows, lines and charts of continual learning, from runs whose numbers are known."""

import csv
import io
import xml.etree.ElementTree as ET

import pyarrow.parquet as pq
import pytest

from probe.chart_continual import accuracy_rows, continual_chart
from probe.chart_continual_panels import drawn_layers, thinning
from probe.chart_style import to_png, to_svg, to_vega
from probe.continual_lines import arms_of, clipped_domain, layer_line, run_line
from probe.continual_summary import summarise_continual
from probe.errors import ConfigError
from probe.reports import long_form, result_chart
from probe.result_continual import LAYER_SIGNALS, RUN_SIGNALS, ContinualUnitResult
from probe.tables import to_csv
from probe.tables_continual import CONTINUAL_COLUMNS, continual_rows, continual_summary_rows


@pytest.fixture
def results(make_continual_results):
    """Three units of one group: tasks 0-1, 2-3 and 4; accuracies as `_known_accuracy`."""
    return make_continual_results()


def diverging(run, task):
    """0.5, but seed 1 of L2 / vanilla diverges in task 3."""
    return None if (run.method, run.control, run.seed) == ("L2", "vanilla", 1) and task > 2 else 0.5


def test_rows_hold_every_run_task_window_and_layer(results):
    rows = continual_rows(results)
    assert len(rows) == 8 * 5 * 2 * 4
    assert [list(row) for row in rows] == [list(CONTINUAL_COLUMNS)] * len(rows)
    row = next(
        r for r in rows
        if (r["method"], r["control"], r["seed"], r["task"], r["window"], r["layer"])
        == ("leaky", "scheduler", 1, 3, 1, "fc2")
    )  # fmt: skip
    assert (row["unit_id"], row["last_step"], row["num_steps_per_task"]) == (
        "0001-group-0-tasks-2-3", 12, 12,
    )  # fmt: skip
    for place, signal in enumerate(LAYER_SIGNALS):  # as the fixture makes them: layer 1, window 1
        assert row[signal] == 1 + place + 10 + 100
    assert all(row[signal] is None for signal in RUN_SIGNALS)
    assert row["task_accuracy"] is None
    network = [r for r in rows if r["layer"] == "network" and r["window"] == 0]
    assert len(network) == 8 * 5
    assert network[0]["loss"] == pytest.approx(0.01)
    assert (network[0]["task_accuracy"], network[0]["task_loss"]) == pytest.approx((0.7, 1.3))
    assert network[8]["violation_share_combined"] == pytest.approx(0.0)
    for column, kind in CONTINUAL_COLUMNS.items():
        assert all(r[column] is None or isinstance(r[column], kind) for r in rows), column


def test_a_task_without_a_window_keeps_a_row(make_continual_results):
    rows = continual_rows(make_continual_results(accuracy=diverging))
    gone = [r for r in rows if r["outcome"] == "diverged"]
    assert [(r["task"], r["layer"], r["window"]) for r in gone] == [
        (3, "network", None), (4, "network", None),
    ]  # fmt: skip
    assert all(r["task_accuracy"] is None for r in gone)


def test_windows_without_a_measurement_have_empty_signals(results):
    task = results[0].runs[0].tasks[0]
    bare = task.model_copy(
        update={
            "windows": task.windows.model_copy(
                update={"layers": {key: [] for key in LAYER_SIGNALS}}
            )
        }
    )
    record = results[0].runs[0].model_copy(update={"tasks": [bare]})
    rows = continual_rows([results[0].model_copy(update={"runs": [record]})])
    assert len(rows) == 2 * 4
    assert all(row["sharpness"] is None for row in rows)


def test_a_name_that_is_a_formula_is_text_in_csv(continual_spec, make_continual_results):
    continual_spec["methods"][0]["name"] = "=1+1"
    table = list(csv.DictReader(io.StringIO(to_csv(continual_rows(make_continual_results())))))
    assert table[0]["method"] == "'=1+1"


def test_summary_rows_hold_a_row_per_curve(results):
    rows = continual_summary_rows(results)
    assert [(r["method"], r["control"]) for r in rows][1] == ("L2", "scheduler")
    assert rows[0]["accuracy_first"] == pytest.approx(0.71)
    assert rows[0]["accuracy_last_standard_error"] == pytest.approx(0.01)
    assert rows[0]["pearson_curvature"] is None
    assert rows[0]["spearman_combined"] > 0.9
    assert continual_summary_rows([]) == []


def test_tables_and_chart_are_chosen_by_kind(results):
    form = long_form("continual_learning", results)
    assert form.columns is CONTINUAL_COLUMNS
    table = pq.read_table(io.BytesIO(form.parquet()))
    assert table.num_rows == 320
    assert table.schema.field("violation_share_gradient").type == "double"
    assert long_form("continual_learning", []).csv().startswith("unit_id,unit_index,method")
    assert "accuracy of the task" in to_svg(result_chart(results))


# --- chart


def texts(svg):
    return ["".join(e.itertext()) for e in ET.fromstring(svg).iter() if e.tag.endswith("text")]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_method_layer_and_signal_has_its_panel(results, theme):
    drawn = texts(to_svg(continual_chart(results, theme)))
    assert {"demo stream", "L2", "leaky", "vanilla", "scheduler"} <= set(drawn)
    for layer in ("fc1", "fc2", "fc3", "network"):
        assert drawn.count(f"step and bound: {layer}") == 2  # once per method
    assert drawn.count("Hessian rank") == 2
    assert to_png(continual_chart(results, theme), scale=0.3).startswith(b"\x89PNG")


def test_bands_are_the_standard_error_and_crosses_the_divergence(make_continual_results):
    summary = summarise_continual(make_continual_results())
    rows, diverged = accuracy_rows([("vanilla", summary.curves[0])], 5)
    assert [(r["low"], r["high"]) for r in rows] == [
        (pytest.approx(0.7 - 0.1 * t), pytest.approx(0.72 - 0.1 * t)) for t in range(5)
    ]
    assert diverged == []
    gone = summarise_continual(make_continual_results(accuracy=diverging))
    rows, diverged = accuracy_rows([("vanilla", gone.curves[0])], 5)
    assert diverged == [{"series": "vanilla", "task": 3, "seed": 1}]
    assert all(row["low"] is None for row in rows)  # one run is left
    drawn = to_svg(continual_chart(make_continual_results(accuracy=diverging)))
    assert "1 of 8 runs diverged (cross) and are left out" in drawn


def test_one_control_draws_all_methods_in_one_panel(continual_spec, make_continual_results):
    continual_spec["controls"] = [{"name": "vanilla"}]
    drawn = texts(to_svg(continual_chart(make_continual_results())))
    assert drawn.count("accuracy of the task") == 1


def test_a_job_of_one_task_or_of_diverged_runs_alone_still_draws(
    continual_spec, make_continual_results
):
    assert to_svg(continual_chart(make_continual_results(accuracy=lambda *_: None))).startswith(
        "<svg"
    )
    continual_spec["stream"]["num_tasks"] = 1
    assert to_svg(continual_chart(make_continual_results())).startswith("<svg")
    with pytest.raises(ConfigError, match="at least one finished unit"):
        continual_chart([])


def test_long_streams_are_thinned(continual_spec, make_continual_results):
    continual_spec |= {
        "seeds": [0],
        "methods": continual_spec["methods"][:1],
        "tasks_per_unit": 450,
    }
    continual_spec["stream"]["num_tasks"] = 450
    results = make_continual_results(accuracy=lambda run, task: 0.5)
    assert thinning(450) == 3
    vega = to_vega(continual_chart(results))
    assert max(len(rows) for rows in vega["datasets"].values()) <= 4 * 151
    summary = summarise_continual(results)
    rows, _ = accuracy_rows([("vanilla", summary.curves[0])], 450)
    assert [row["task"] for row in rows][-2:] == [447, 449]  # the last is always there
    assert "every 3. task is drawn" in to_svg(continual_chart(results))


def test_lines_are_medians_over_seeds_by_window_or_task(continual_spec, make_continual_results):
    arm = arms_of(make_continual_results())[0]
    effective = list(LAYER_SIGNALS).index("effective_step")
    line = layer_line(arm, "effective_step", 0)
    assert [point["task"] for point in line] == [t + w for t in range(5) for w in (0.5, 1)]
    assert [point["value"] for point in line] == [1.0 + effective, 101.0 + effective] * 5
    whole = layer_line(arm, "effective_step", -1)
    assert whole[0]["value"] == 1.0 + effective + 30
    assert len(run_line(arm, "hessian_rank")) == 10
    continual_spec["stream"]["num_tasks"] = 70
    long = layer_line(arms_of(make_continual_results())[0], "effective_step", 0)
    assert [point["task"] for point in long] == list(range(70))  # 140 windows would be too many
    assert long[0]["value"] == 51.0 + effective


def test_a_window_without_a_measurement_is_no_gap_in_a_line(results):
    """A value that is None though something was measured is one."""
    spoilt = []
    for result in results:
        raw = result.model_dump(mode="json")
        for record in raw["runs"]:
            for task in record["tasks"]:
                for values in task["windows"]["layers"].values():
                    for row in values:
                        row[0] = None  # nothing fell into the first window
                task["windows"]["layers"]["bound_combined"][0][1] = None
        spoilt.append(ContinualUnitResult.model_validate(raw))
    arm = arms_of(spoilt)[0]
    assert [p["task"] for p in layer_line(arm, "sharpness", 0)] == [1, 2, 3, 4, 5]
    bounds = layer_line(arm, "bound_combined", 0)
    assert [(p["task"], p["value"]) for p in bounds] == [(t, None) for t in (1, 2, 3, 4, 5)]


def test_log_axes_leave_out_the_wildest_bounds_but_no_step():
    def row(value, what):
        return {"value": value, "what": what}

    rows = [row(1.0, "bound")] * 38 + [row(1e9, "bound"), row(0.01, "step"), row(None, "bound")]
    low, high = clipped_domain(rows, {"step"})
    assert (low, high) == (pytest.approx(0.01 / 1.3), pytest.approx(1.3))
    assert clipped_domain([row(0.0, "step"), row(None, "step")], ()) is None


def test_deep_networks_show_four_columns():
    assert drawn_layers(4) == [0, 1, 2, 3]
    assert drawn_layers(9) == [0, 3, 7, 8]  # fc1, fc4, the last layer fc8, the network
