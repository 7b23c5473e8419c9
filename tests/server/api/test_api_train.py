"""A training grid over HTTP: planned, queued, recorded, read in every format, shown, told."""

import csv
import datetime as dt
import io
import re

import pytest
from fastapi.testclient import TestClient
from rich.console import Console

from clients.cli.train_tables import run_text, training_report
from probe.plan import expand_units
from probe.result import Provenance
from probe.result_train import MixTrainUnitResult, TaskChange
from probe.spec_load import parse_spec, resolved
from probe.tables_train import TRAIN_COLUMNS
from probe.train_summary import summarise_run
from server.api.app import create_app
from server.job_views import finished_data
from server.settings import Settings
from server.wire import ResultList

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


@pytest.fixture
def train_spec(mix_spec, workspace):
    """Two runs from one of the workspace's checkpoints, its data there too."""
    mix_spec["checkpoints"]["path"] = str(workspace / "runs" / "step-300")
    for source in mix_spec["mixture"]["sources"]:
        source["paths"] = [str(workspace / "text.jsonl")]
    for task in mix_spec["eval_tasks"]:
        task["data"]["paths"] = [str(workspace / "text.jsonl")]
    raw = {k: v for k, v in mix_spec.items() if k != "measurement"}
    return raw | {
        "kind": "mix_train",
        "mixture": {"sources": mix_spec["mixture"]["sources"]},
        "train": {"ratios": [0.5], "learning_rates": [1e-3, 1e-2], "steps": 9},
    }


@pytest.fixture
def results(train_spec):
    """The smaller learning rate helps web and hurts gsm8k; the larger one diverged."""
    spec = parse_spec(train_spec)

    def change(task, loss, accuracy):
        return TaskChange(
            task=task, loss_start=2.0, loss_end=None if loss is None else 2 + loss,
            loss_change=loss, loss_change_standard_error=None if loss is None else 0.01,
            accuracy_kind="token", accuracy_count=90, accuracy_chance=None, accuracy_start=0.5,
            accuracy_end=None if loss is None else 0.5 + accuracy, accuracy_change=accuracy,
            accuracy_change_standard_error=None if loss is None else 0.01,
            loss_batch_sha256="1" * 64,
        )  # fmt: skip

    def result(unit, changes):
        diverged = changes[0].loss_end is None
        return MixTrainUnitResult(
            unit=unit, spec=resolved(spec), ratio=unit.ratio, learning_rate=unit.learning_rate,
            shares=[0.5, 0.5], outcome="diverged" if diverged else "finished",
            num_steps=4 if diverged else 9, train_losses=[2.0] * 4, first_batch_sha256="2" * 64,
            tasks=changes, num_forward_passes=8, num_backward_passes=12, duration_s=1.0,
            memory_bytes=1,
            provenance=Provenance(
                spec_sha256="0" * 64, versions={}, git_commit=None, device="cpu", dtype="float32",
                attention="sdpa", moments="warmup", moments_detail="", num_parameters=1000,
                hostname="here", started_at=NOW, finished_at=NOW,
            ),
        )  # fmt: skip

    units = expand_units(spec)
    return [
        result(units[0], [change("web_task", -0.25, 0.04), change("gsm8k_test", 0.125, -0.02)]),
        result(units[1], [change(t, None, None) for t in ("web_task", "gsm8k_test")]),
    ]


@pytest.fixture
def trained(client, store, train_spec, results):
    """Id of a grid with both runs recorded."""
    job_id = client.post("/v1/jobs", json=train_spec).json()["id"]
    assert all(store.record_unit(job_id, result) for result in results)
    assert not store.record_unit(job_id, results[0])  # once
    return job_id


def test_a_grid_is_planned(client, train_spec):
    plan = client.post("/v1/jobs:plan", json=train_spec).json()
    assert [unit["unit_id"] for unit in plan["units"]] == [
        "0000-step-300-ratio-0.5-lr-0.001", "0001-step-300-ratio-0.5-lr-0.01",
    ]  # fmt: skip


def test_a_wrong_grid_is_refused_with_its_field(client, train_spec):
    train_spec["train"]["learning_rates"] = []
    answer = client.post("/v1/jobs", json=train_spec)
    assert answer.status_code == 422
    assert [e["field"] for e in answer.json()["errors"]] == ["train.learning_rates"]


def test_data_outside_the_roots_is_refused(store, train_spec, workspace, tmp_path):
    roots = [workspace / "runs", workspace / "text.jsonl"]
    settings = Settings(data_dir=tmp_path / "data", roots=roots)
    with TestClient(create_app(settings, store), "http://127.0.0.1") as fenced:
        assert fenced.post("/v1/jobs:plan", json=train_spec).status_code == 200
        train_spec["eval_tasks"][1]["data"]["paths"] = ["/etc/passwd"]
        for url in ("/v1/jobs", "/v1/jobs:plan"):
            answer = fenced.post(url, json=train_spec)
            assert answer.json()["code"] == "path_not_allowed"
            assert [e["field"] for e in answer.json()["errors"]] == ["eval_tasks.1.data.paths.0"]


def test_results_are_read_as_they_were_recorded(client, store, trained, results):
    assert store.unit_results(trained) == results
    listed = ResultList.model_validate(client.get(f"/v1/jobs/{trained}/results").json())
    assert listed.data == results
    assert listed.scans == []
    (table,) = listed.trainings
    assert [(m.task, m.largest_harmless, m.smallest_harmful) for m in table.limits] == [
        ("web_task", 1e-3, 1e-2), ("gsm8k_test", None, 1e-3),
    ]  # fmt: skip
    job = client.get(f"/v1/jobs/{trained}").json()
    assert job["num_units_finished"] == 2
    assert job["num_units_without_answer"] == 1  # the one that diverged


def test_csv_has_a_row_per_run_and_task(client, trained):
    text = client.get(f"/v1/jobs/{trained}/results", params={"format": "csv"}).text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0]) == list(TRAIN_COLUMNS)
    assert [(r["task"], r["loss_change"]) for r in rows] == [
        ("web_task", "-0.25"), ("gsm8k_test", "0.125"), ("web_task", ""), ("gsm8k_test", ""),
    ]  # fmt: skip


def test_the_chart_is_the_heat_maps(client, trained):
    drawn = client.get(f"/v1/jobs/{trained}/chart", params={"format": "svg"}).text
    assert "web_task: loss, nats per token" in drawn
    assert "diverged" in drawn


def test_the_page_shows_every_run(client, trained):
    page = client.get(f"/jobs/{trained}").text
    plain = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    assert "0.5 0.001 -0.250 ±0.01 +4.0 ±1 +0.125 ±0.01 -2.0 ±1" in plain
    assert "0.5 0.01 diverged diverged diverged diverged" in plain
    assert "; 1 with a run that diverged" in plain
    assert "0.5 web: at 0.001, the smallest learning rate, the loss of gsm8k_test rose" in plain


def test_an_empty_grids_page_says_so(client, train_spec):
    job_id = client.post("/v1/jobs", json=train_spec).json()["id"]
    assert "No unit is finished yet." in client.get(f"/jobs/{job_id}").text


def test_terminals_get_the_same_numbers(results):
    out = io.StringIO()
    Console(file=out, width=100).print(training_report(results))
    rows = [line.split() for line in out.getvalue().splitlines()]
    assert ["0.5", "0.001", "-0.250", "±0.01", "+0.125", "±0.01"] in rows
    assert ["0.5", "0.001", "+4.0", "±1", "-2.0", "±1"] in rows
    assert rows.count(["0.5", "0.01", "diverged", "diverged"]) == 2
    first, second = (run_text(summarise_run(result)) for result in results)
    assert first.plain == "ratio 0.5, lr 0.001: web_task -0.250 ±0.01, gsm8k_test +0.125 ±0.01"
    assert second.plain == "ratio 0.5, lr 0.01: diverged after 4 steps"
    assert {str(span.style) for span in first.spans} >= {"blue", "red"}


def test_the_event_of_a_run_tells_its_changes(results):
    told = finished_data(results[0])
    assert told["kind"] == "mix_train"
    assert told["run"]["learning_rate"] == 1e-3
    assert [task["loss_change"] for task in told["run"]["tasks"]] == [-0.25, 0.125]
