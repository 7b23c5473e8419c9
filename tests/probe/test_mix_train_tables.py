"""Tables, rows, limits and heat maps of a training grid, from runs whose changes are known."""

import datetime as dt
import json
import re
import xml.etree.ElementTree as ET

import pytest
from pydantic import ValidationError

from probe.chart_style import to_png, to_svg, to_vega
from probe.chart_train import cell_rows, edges, train_chart
from probe.errors import ConfigError
from probe.line_search import SearchOutcome
from probe.reports import long_form, result_chart
from probe.result import CheckpointRef, Provenance, Unit
from probe.result_mix import MixMeasurement, MixUnitResult
from probe.result_train import MixTrainUnitResult, TaskChange
from probe.spec_train import MixTrainSpec
from probe.tables import to_csv
from probe.tables_train import TRAIN_COLUMNS, train_rows, train_summary_rows
from probe.train_summary import summarise_training
from probe.train_text import change_text, harmless_sentences
from probe.unit_results import next_eta_init, parse_result

SOURCES = [
    {"type": "files", "name": "web", "paths": ["web.jsonl"]},
    {"type": "files", "name": "math", "paths": ["math.jsonl"]},
]
RATES = [1e-4, 1e-3, 1e-2]


def raw_spec(**changes):
    raw = {
        "kind": "mix_train",
        "name": "grid",
        "checkpoints": {"source": "local", "path": "runs/step-7"},
        "mixture": {"sources": SOURCES},
        "train": {"ratios": [0.0, 0.5], "learning_rates": RATES, "steps": 9},
        "eval_tasks": [
            {"data": s | {"name": f"{s['name']}_task"}, "sequences": 2} for s in SOURCES
        ],
        "batches": {"sequence_length": 8, "batch_sequences": 4},
    }
    for key, value in changes.items():
        target, _, inner = key.partition("__")
        raw[target] = raw[target] | {inner: value} if inner else value
    return raw


SPEC = MixTrainSpec.model_validate(raw_spec()).model_dump(mode="json")
CHECKPOINT = CheckpointRef(source="local", location="runs/step-7", step=7)
NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
PROVENANCE = Provenance(
    spec_sha256="0" * 64, versions={}, git_commit=None, device="cpu", dtype="float32",
    attention="sdpa", moments="warmup", moments_detail="", num_parameters=1000, hostname="here",
    started_at=NOW, finished_at=NOW,
)  # fmt: skip


def change(task, loss, accuracy, error=0.01):
    ended = loss is not None
    return TaskChange(
        task=task,
        loss_start=2.0,
        loss_end=2.0 + loss if ended else None,
        loss_change=loss,
        loss_change_standard_error=error if ended else None,
        accuracy_kind="choice",
        accuracy_count=8,
        accuracy_chance=0.25,
        accuracy_start=0.5,
        accuracy_end=0.5 + accuracy if ended else None,
        accuracy_change=accuracy if ended else None,
        accuracy_change_standard_error=error if ended else None,
        loss_batch_sha256="1" * 64,
    )


def run(index, ratio, rate, web, math_task):
    diverged = web is None
    unit = Unit(
        index=index, unit_id=f"{index:04d}", checkpoint=CHECKPOINT, ratio=ratio, learning_rate=rate
    )
    return MixTrainUnitResult(
        unit=unit,
        spec=SPEC,
        ratio=ratio,
        learning_rate=rate,
        shares=[ratio, 1 - ratio],
        outcome="diverged" if diverged else "finished",
        num_steps=3 if diverged else 9,
        train_losses=[2.0] * 3 + ([None] if diverged else [2.0] * 6),
        first_batch_sha256="2" * 64,
        tasks=[
            change("web_task", web, None if diverged else -web / 10),
            change("math_task", math_task, None if diverged else 0.005),
        ],
        num_forward_passes=4,
        num_backward_passes=9,
        duration_s=1.0,
        memory_bytes=1,
        provenance=PROVENANCE,
    )


@pytest.fixture
def results():
    """Web: hurt from the start at 0; at 0.5 harmless to 1e-3. Math: a run at 1e-2 diverged."""
    web = {0.0: [0.1, 0.4, 0.9], 0.5: [-0.1, -0.2, None]}
    math_task = {0.0: [-0.1, -0.3, -0.2], 0.5: [-0.05, 0.1, None]}
    cells = [(r, i) for i in (2, 0, 1) for r in (0.5, 0.0)]  # in whatever order they were run
    return [run(n, r, RATES[i], web[r][i], math_task[r][i]) for n, (r, i) in enumerate(cells)]


def scan_unit():
    """eta_c of web at 0: not descended, at 0.5: 4e-3; of math 2e-3 at both."""
    found = []
    for ratio, web in ((0.0, None), (0.5, 4e-3)):
        for task, eta in (("web_task", web), ("math_task", 2e-3)):
            outcome = SearchOutcome.CONVERGED if eta else SearchOutcome.NOT_A_DESCENT_DIRECTION
            found.append(
                MixMeasurement(
                    repeat=0,
                    ratio=ratio,
                    task=task,
                    shares=[ratio, 1 - ratio],
                    update_batch_sha256=["3"],
                    outcome=outcome,
                    eta_c=eta,
                    eta_lower=0.97 * eta if eta else 0.0,
                    eta_upper=1.03 * eta if eta else 1e-12,
                    eta_interpolated=eta,
                    lambda_c=2 / eta if eta else None,
                    loss_at_zero=2.0,
                    slope=-1.0 if eta else 1.0,
                    num_forward_passes=3,
                    num_extra_sign_changes=0,
                    trials=[],
                    loss_resolution=1e-7,
                    loss_batch_sha256="1",
                    duration_s=0.1,
                )
            )
    return MixUnitResult(
        unit=Unit(index=0, unit_id="0000", checkpoint=CHECKPOINT),
        spec=SPEC, measurements=found, num_forward_passes=3, num_backward_passes=3,
        duration_s=1.0, direction_s=0.5, memory_bytes=1, provenance=PROVENANCE,
    )  # fmt: skip


def test_limits_are_the_last_harmless_rate_and_the_next(results):
    (table,) = summarise_training(results)
    assert (table.checkpoint, table.step, table.varied) == ("step 7", 7, "web")
    assert [(c.ratio, c.learning_rate) for c in table.cells[::2]] == [
        (r, rate) for r in (0.0, 0.5) for rate in RATES
    ]
    found = {(m.ratio, m.task): (m.largest_harmless, m.smallest_harmful) for m in table.limits}
    assert found == {
        (0.0, "web_task"): (None, 1e-4),
        (0.0, "math_task"): (1e-2, None),
        (0.5, "web_task"): (1e-3, 1e-2),
        (0.5, "math_task"): (1e-4, 1e-3),
    }


def test_a_rate_beyond_a_harmful_one_is_not_harmless():
    (table,) = summarise_training(
        [run(i, 0.5, rate, loss, 0.0) for i, (rate, loss) in enumerate(
            zip(RATES, [-0.1, 0.01, -0.5], strict=True))]
    )  # fmt: skip
    web, same = table.limits
    assert (web.largest_harmless, web.smallest_harmful) == (1e-4, 1e-3)
    assert same.largest_harmless == 1e-2  # unchanged is not worse


def test_rows_hold_every_run_and_task(results):
    rows = train_rows(results)
    assert [list(row) for row in rows] == [list(TRAIN_COLUMNS)] * 12
    assert len({(r["ratio"], r["learning_rate"], r["task"]) for r in rows}) == 12
    diverged = [r for r in rows if r["outcome"] == "diverged"]
    assert {(r["ratio"], r["learning_rate"]) for r in diverged} == {(0.5, 1e-2)}
    assert all(r["loss_change"] is None and r["loss_start"] == 2.0 for r in diverged)
    for row in rows:
        for column, kind in TRAIN_COLUMNS.items():
            assert row[column] is None or isinstance(row[column], kind), column
    assert to_csv(rows).count("\r\n") == 13
    summary = train_summary_rows(results)
    assert [r["learning_rate"] for r in summary[:4:2]] == RATES[:2]


def test_results_survive_json(results):
    for result in results:
        assert MixTrainUnitResult.model_validate_json(result.model_dump_json()) == result


def test_cells_meet_halfway():
    assert edges([0.0, 0.5, 0.6], log=False) == {
        0.0: (-0.25, 0.25),
        0.5: (0.25, 0.55),
        0.6: (0.55, pytest.approx(0.65)),
    }
    found = edges([1e-4, 1e-3, 1e-1], log=True)
    assert found[1e-4] == (pytest.approx(10**-4.5), pytest.approx(10**-3.5))
    assert found[1e-3] == (pytest.approx(10**-3.5), pytest.approx(1e-2))
    assert found[1e-1] == (pytest.approx(1e-2), pytest.approx(1.0))
    assert edges([0.5], log=False)[0.5] == (0.4, 0.6)
    assert edges([1e-3], log=True)[1e-3] == (5e-4, 2e-3)


def test_cells_carry_the_change_in_the_units_shown(results):
    (table,) = summarise_training(results)
    cells = [cell for cell in table.cells if cell.change.task == "web_task"]
    loss = {(r["ratio"], r["learning_rate"]): r for r in cell_rows(cells, "loss")}
    points = {(r["ratio"], r["learning_rate"]): r for r in cell_rows(cells, "accuracy")}
    assert loss[0.0, 1e-3]["text"] == "+0.40"
    assert points[0.0, 1e-3]["change"] == pytest.approx(-4.0)  # % points
    assert points[0.0, 1e-3]["text"] == "-4.0"
    assert loss[0.5, 1e-2]["text"] == "diverged"
    assert loss[0.5, 1e-2]["change"] is None


def scales(vega):
    """Domain and colours of every diverging scale, in the order drawn."""
    found = []

    def walk(node):
        if isinstance(node, dict):
            scale = node.get("scale")
            if isinstance(scale, dict) and "range" in scale and len(scale["range"]) == 3:
                found.append((scale["domain"], scale["range"]))
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk({k: v for k, v in vega.items() if k != "datasets"})
    return found


def test_red_is_worse_white_the_same_and_blue_better(results):
    red, white, blue = "#B2182B", "#FFFFFF", "#2166AC"
    web_loss, web_accuracy, math_loss, _ = scales(to_vega(train_chart(results)))
    assert web_loss == ([-0.2, 0, 0.2], [blue, white, red])  # the largest improvement saturates
    assert web_accuracy == ([pytest.approx(-2.0), 0, pytest.approx(2.0)], [red, white, blue])
    assert math_loss[0] == [-0.3, 0, 0.3]
    worse = [run(0, 0.5, 1e-3, 0.4, 0.1)]
    assert scales(to_vega(train_chart(worse)))[0][0] == [-0.4, 0, 0.4]


def texts(svg):
    return ["".join(e.itertext()) for e in ET.fromstring(svg).iter() if e.tag.endswith("text")]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_number_is_drawn(results, theme):
    drawn = texts(to_svg(train_chart(results, theme)))
    assert {"+0.10", "+0.40", "+0.90", "-0.10", "-0.20", "diverged", "step 7"} <= set(drawn)
    assert drawn.count("diverged") == 4
    assert "web_task: loss, nats per token" in drawn
    assert "web_task: choice accuracy, % points" in drawn


def test_the_scan_is_drawn_over_the_runs_of_its_checkpoint(results):
    vega = to_vega(train_chart(results, scan=[scan_unit()]))
    rows = [row for rows in vega["datasets"].values() for row in rows if "what" in row]
    curve = {(r["ratio"], r["eta_c"]) for r in rows if r["what"] == "eta_c"}
    assert {(0.5, 4e-3), (0.0, 2e-3), (0.5, 2e-3), (0.0, 0.0)} <= curve
    assert {(r["ratio"], r["eta_c"]) for r in rows if r["what"] == "sweet spot"} == {(0.5, 2e-3)}
    assert to_png(train_chart(results, scan=[scan_unit()]), scale=0.5).startswith(b"\x89PNG")
    other = scan_unit()
    elsewhere = other.unit.model_copy(
        update={"checkpoint": CheckpointRef(source="local", location="runs/other", step=7)}
    )
    alone = to_vega(train_chart(results, scan=[other.model_copy(update={"unit": elsewhere})]))
    assert not any("what" in row for rows in alone["datasets"].values() for row in rows)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_what_is_drawn_over_the_runs_shows_on_both_pages(results, theme):
    """The axis reaches beyond the cells to an eta_c there: dark ink alone is lost on dark paper."""
    vega = json.dumps(to_vega(train_chart(results, theme, scan=[scan_unit()])))
    white, ink = (
        '"stroke": "#FFFFFF", "strokeWidth": 3.6',
        '"stroke": "#1B1F24", "strokeWidth": 1.4',
    )
    for mark in ('"shape": "cross"', '"type": "line"'):
        drawn = [part for part in re.findall(r'"mark": {[^{}]*}', vega) if mark in part]
        assert drawn
        assert all(white in part for part in drawn[::2])
        assert all(ink in part for part in drawn[1::2])


def test_a_grid_of_one_run_and_one_that_only_diverged_still_draw():
    for loss in (0.0, None):
        chart = train_chart([run(0, 0.5, 1e-3, loss, loss)])
        assert to_svg(chart).startswith("<svg")


def test_nothing_finished_is_an_error():
    with pytest.raises(ConfigError, match="at least one finished unit"):
        train_chart([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__ratios": [0.5, 0.0]}, "ratios must ascend"),
        ({"train__learning_rates": [1e-3, 1e-3]}, "learning_rates must ascend"),
        ({"train__learning_rates": [0.0]}, "greater than 0"),
        ({"train__warmup_steps": 10}, "would never be reached"),
        ({"train__ratios": [0.1]}, "train.ratios has 0.1"),
        ({"train__ratios": [0.9]}, "train.ratios has 0.9"),
        ({"mixture__varied": "books"}, "varied is 'books', the sources are web, math"),
        ({"mixture__sources": [SOURCES[0], SOURCES[0]]}, "source names must differ"),
        ({"mixture__ratios": [0.5]}, "Extra inputs are not permitted"),
        ({"eval_tasks": [{"data": SOURCES[0], "sequences": 1}] * 2}, "names of eval_tasks"),
    ],
)
def test_a_spec_that_cannot_be_run_says_why(changes, message):
    with pytest.raises(ValidationError, match=message):
        MixTrainSpec.model_validate(raw_spec(**changes))


@pytest.mark.parametrize(
    ("train", "optimizer", "expected"),
    [
        ("optimizer", {"moments": "warmup", "warmup_steps": 3}, 3),
        ("optimizer", {"moments": "auto", "warmup_steps": 3}, 3),
        ("optimizer", {"moments": "checkpoint"}, 0),
        ("zero", {"moments": "auto"}, 0),
    ],
)
def test_training_begins_after_the_batches_of_the_moments(train, optimizer, expected):
    spec = MixTrainSpec.model_validate(raw_spec(train__moments=train, optimizer=optimizer))
    assert spec.num_moment_steps == expected


def test_the_spec_in_a_result_is_json(results):
    json.dumps(results[0].spec)


def test_the_kind_is_read_back_and_hands_on_nothing(results):
    for result in results:
        found = parse_result(result.model_dump(mode="json"))
        assert type(found) is MixTrainUnitResult
        assert found == result
        assert next_eta_init(found) == {}
        assert found.has_every_answer == (found.outcome == "finished")


def test_tables_and_chart_are_chosen_by_kind(results):
    assert len(long_form("mix_train", results).rows) == 12
    assert long_form("mix_train", []).columns is TRAIN_COLUMNS
    assert long_form("mix_train", []).csv().startswith("unit_id,")
    assert long_form("mix_train", results).parquet().startswith(b"PAR1")
    assert "diverged" in texts(to_svg(result_chart(results)))


def test_sentences_name_who_objects_first(results):
    (table,) = summarise_training(results)
    assert harmless_sentences(table) == [
        "0 web: at 0.0001, the smallest learning rate, the loss of web_task rose",
        "0.5 web: no task's loss rose up to 0.0001; at 0.001 that of math_task did",
    ]
    calm = summarise_training([run(0, 0.5, 1e-3, -0.1, 0.0)])[0]
    assert harmless_sentences(calm) == ["0.5 web: no task's loss rose at any learning rate"]


def test_changes_as_text():
    assert change_text(change("t", -0.1234, 0.031, error=0.0123), "loss") == "-0.123 ±0.012"
    assert change_text(change("t", -0.1234, 0.031, error=0.0123), "accuracy") == "+3.1 ±1.2"
    assert change_text(change("t", None, None), "loss") == "diverged"
