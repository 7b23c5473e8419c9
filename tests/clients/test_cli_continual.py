"""Continual learning on the command line: submitted, watched, its tables, files and progress."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from clients.cli.jobs import absolute_paths
from clients.cli.progress import SeriesProgress, phase_text
from clients.cli.tables import plan_table
from probe.plan import make_plan
from probe.spec_load import parse_spec, resolved
from server.job_views import finished_data


@pytest.fixture
def learned(
    probe: Any, wire: Any, continual_spec: dict[str, Any], make_continual_results: Any
) -> str:
    """A stream that has succeeded on the fake server."""
    results = make_continual_results()
    spec = resolved(parse_spec(continual_spec))
    probe.server.jobs = [
        wire.job("job_01con", "succeeded", kind="continual_learning", num_units=3, spec=spec)
    ]
    probe.server.results = [result.model_dump(mode="json") for result in results]
    events = [wire.event(1, "job.running")]
    for number, result in enumerate(results):
        data = finished_data(result)
        begun = {"unit_id": data["unit_id"], "index": number}
        trained = begun | {"phase": "train", "done": 6, "total": 24, "num_forward_passes": 0}
        events += [
            wire.event(3 * number + 2, "unit.started", **begun),
            wire.event(3 * number + 3, "unit.progress", **trained),
            wire.event(3 * number + 4, "unit.finished", **data),
        ]
    probe.server.events = [*events, wire.event(11, "job.succeeded")]
    return "job_01con"


def check_table(text: str) -> None:
    """Means over the two seeds of `_known_accuracy`, which differ by 0.02."""
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "method control runs first last all predicted r" in rows
    assert "L2 vanilla 2 0.710 ±0.01 0.310 ±0.01 0.510 ±0.01 1.00" in rows
    assert "leaky scheduler 2 0.410 ±0.01 0.610 ±0.01 0.510 ±0.01 -0.99" in rows
    flat = " ".join(text.split())
    assert "correlation of predicted trainability with accuracy over 40 tasks" in flat


def test_results_as_a_table(probe: Any, learned: str) -> None:
    done = probe("results", learned)
    assert done.exit_code == 0
    check_table(done.stdout)


def test_a_run_that_diverged_ends_with_3(
    probe: Any, learned: str, make_continual_results: Any
) -> None:
    results = make_continual_results(accuracy=lambda run, task: None if run.seed else 0.5)
    probe.server.results = [result.model_dump(mode="json") for result in results]
    done = probe("results", learned)
    assert done.exit_code == 3
    assert "2 (-1)" in done.stdout
    assert "1 of 2 runs of L2 / vanilla diverged (seed 1 in task 0)" in done.stdout


def test_watch_tells_every_unit_and_ends_with_the_table(probe: Any, learned: str) -> None:
    done = probe("watch", learned)
    assert done.exit_code == 0
    check_table(done.stdout)
    told = " ".join(done.stderr.split())
    assert "2/3 group-0-tasks-2-3 8 runs, accuracy 0.335 (leaky / vanilla) to 0.660" in told


def test_show_has_no_passes_and_names_what_diverged(probe: Any, wire: Any, learned: str) -> None:
    probe.server.jobs[0] |= {"num_units_finished": 3, "num_units_without_answer": 1}
    shown = probe("show", learned).stdout
    assert "1 with a run that diverged" in shown
    assert "passes" not in shown


def test_results_in_a_file_are_plotted(
    probe: Any, make_continual_results: Any, tmp_path: Path
) -> None:
    file, chart = tmp_path / "r.json", tmp_path / "chart.svg"
    file.write_text(json.dumps([r.model_dump(mode="json") for r in make_continual_results()]))
    done = probe("plot", str(file), "--out", str(chart))
    assert done.exit_code == 0
    assert "accuracy of the task" in chart.read_text()


def test_a_plan_counts_gradient_steps(
    probe: Any, continual_spec: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(continual_spec))
    shown = " ".join(probe("run", str(file), "--plan").stdout.split())
    assert "gradient steps 480, each run's counted" in shown
    assert "evaluation passes 40" in shown
    assert "tokens per pass" not in shown
    assert plan_table(make_plan(parse_spec(continual_spec))).row_count >= 8


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            {"type": "idx", "images": "mnist/a.gz", "labels": "../b"},
            {"type": "idx", "images": "/here/mnist/a.gz", "labels": "/b"},
        ),
        ({"type": "npz", "path": "/there/a.npz"}, {"path": "/there/a.npz", "images": "images"}),
        ({"type": "npz", "path": "a.npz"}, {"path": "/here/a.npz", "labels": "labels"}),
        ({"type": "hub", "repo": "ylecun/mnist"}, {"repo": "ylecun/mnist", "split": "train"}),
        ({"type": "packaged", "name": "digits"}, {"type": "packaged", "name": "digits"}),
    ],
)
def test_files_of_images_are_submitted_absolute(
    continual_spec: dict[str, Any], data: dict[str, str], expected: dict[str, str]
) -> None:
    continual_spec["stream"]["data"] = data
    spec = resolved(parse_spec(continual_spec))
    found = absolute_paths(spec, Path("/here"))
    assert expected.items() <= found["stream"]["data"].items()
    same = found["stream"] | {"data": spec["stream"]["data"]}
    assert found | {"stream": same} == spec


def test_a_stream_is_submitted(
    probe: Any, continual_spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    continual_spec["stream"]["data"] = {"type": "npz", "path": "a.npz"}
    Path("job.yaml").write_text(yaml.safe_dump(continual_spec))
    done = probe("submit", "job.yaml")
    assert done.exit_code == 0
    body = json.loads(probe.server.requests[-1].content)
    assert body["stream"]["data"]["path"] == str(tmp_path / "a.npz")


# --- progress


def test_time_left_is_counted_in_steps(continual_spec: dict[str, Any]) -> None:
    """Units of 2, 2 and 1 of 5 tasks: two fifths, two fifths and one fifth of three."""
    spec = resolved(parse_spec(continual_spec))
    shown = SeriesProgress.of_job(spec, num_units=3, expected_passes=40)
    shown.start_unit(0, 100.0)
    shown.advance(0, {"phase": "load", "done": 1, "total": 1, "num_forward_passes": 0}, 101.0)
    assert (shown.done_units, shown.time_left_s(101.0)) == (0, None)
    step = {"phase": "train", "total": 24, "num_forward_passes": 32}
    shown.advance(0, step | {"done": 12}, 110.0)
    assert shown.done_units == pytest.approx(3 * 0.2)  # half a unit of two fifths
    assert shown.time_left_s(110.0) == pytest.approx(10 / 0.2 * 0.8)
    shown.finish_unit(0, 16)
    shown.finish_unit(1, 16)
    assert shown.done_units == pytest.approx(3 * 0.8)
    assert shown.time_left_s(180.0) == pytest.approx(80 / 0.8 * 0.2)


def test_groups_cost_as_many_epochs_as_their_controls(continual_spec: dict[str, Any]) -> None:
    continual_spec["controls"][1]["epochs"] = 9  # three times as many
    shown = SeriesProgress.of_job(resolved(parse_spec(continual_spec)), 6, 40)
    shown.finish_unit(0, 1)
    shown.finish_unit(1, 1)
    shown.finish_unit(2, 1)
    assert shown.done_units == pytest.approx(6 / 4)


def test_units_finished_before_do_not_set_the_pace(continual_spec: dict[str, Any]) -> None:
    shown = SeriesProgress.of_job(resolved(parse_spec(continual_spec)), 3, 40)
    shown.finish_unit(0, 1)
    shown.start_unit(1, 50.0)
    shown.finish_unit(1, 1)
    assert shown.time_left_s(70.0) == pytest.approx(10.0)  # 20 s for two fifths, one is left


def test_a_spec_of_another_version_still_counts_units() -> None:
    strange = {"kind": "continual_learning", "name": "a", "something": "new"}
    shown = SeriesProgress.of_job(strange, 4, 40)
    shown.advance(0, {"phase": "train", "done": 1, "total": 2}, 0.0)
    assert shown.done_units == pytest.approx(0.5)


def test_a_phase_tells_its_steps() -> None:
    values = {"phase": "train", "done": 40, "total": 2400, "num_forward_passes": 7}
    assert phase_text(values, in_steps=True) == "training 40/2400 steps"
    assert phase_text({"phase": "load", "done": 0, "total": 1}, in_steps=True) == "loading"
