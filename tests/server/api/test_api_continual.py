"""Continual learning over HTTP: planned, fenced in, recorded, read in every format, shown."""

import csv
import io
import re

import pytest
from fastapi.testclient import TestClient

from probe.plan import make_plan
from probe.spec_load import parse_spec
from probe.tables_continual import CONTINUAL_COLUMNS
from server import queue
from server.api.app import create_app
from server.job_views import finished_data
from server.settings import Settings
from server.wire import ResultList
from server.worker.job_runner import _num_ranks


def diverging(run, task):
    """Seed 1 of L2 / vanilla diverges in task 3; all else 0.1 x (task + 1)."""
    is_gone = (run.method, run.control, run.seed) == ("L2", "vanilla", 1) and task > 2
    return None if is_gone else 0.1 * (task + 1)


@pytest.fixture
def results(make_continual_results):
    return make_continual_results(accuracy=diverging)


@pytest.fixture
def learned(client, store, continual_spec, results):
    """Id of a job with all three units recorded."""
    job_id = client.post("/v1/jobs", json=continual_spec).json()["id"]
    assert all(store.record_unit(job_id, result) for result in results)
    assert not store.record_unit(job_id, results[0])  # once
    return job_id


def test_a_stream_is_planned_for_the_cpu_and_one_rank(client, continual_spec):
    plan = client.post("/v1/jobs:plan", json=continual_spec).json()
    assert [unit["unit_id"] for unit in plan["units"]] == [
        "0000-group-0-tasks-0-1", "0001-group-0-tasks-2-3", "0002-group-0-tasks-4-4",
    ]  # fmt: skip
    assert plan["units"][0]["checkpoint"] is None
    assert plan["num_backward_passes"] == 8 * 5 * 12
    assert queue.queue_for(plan["spec"]) == "cpu"
    continual_spec["model"]["device"] = "auto"
    plan = client.post("/v1/jobs:plan", json=continual_spec).json()
    assert queue.queue_for(plan["spec"]) == "gpu"


def test_a_worker_starts_one_rank_for_it(continual_spec):
    continual_spec["model"]["device"] = "cuda"  # however many there are
    assert _num_ranks(make_plan(parse_spec(continual_spec))) == 1


def test_a_wrong_stream_is_refused_with_its_fields(client, continual_spec):
    continual_spec["stream"]["data"] = {"type": "npz"}
    continual_spec["methods"][1]["leak"] = 2
    answer = client.post("/v1/jobs", json=continual_spec)
    assert answer.status_code == 422
    assert [e["field"] for e in answer.json()["errors"]] == ["stream.data.path", "methods.1.leak"]


def test_a_stream_of_too_many_results_is_refused(client, continual_spec):
    continual_spec["stream"]["num_tasks"] = 100_000
    continual_spec["tasks_per_unit"] = 1
    answer = client.post("/v1/jobs:plan", json=continual_spec)
    assert answer.status_code == 422
    assert "800,000 results" in answer.json()["detail"]


@pytest.fixture
def fence(store, continual_spec, tmp_path, monkeypatch):
    """Plans a stream on given data with one root, `inside`; the answer's code and fields."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inside").mkdir()
    (tmp_path / "outside").mkdir()
    settings = Settings(data_dir=tmp_path / "data", roots=[tmp_path / "inside"])

    def plan(data):
        continual_spec["stream"]["data"] = data
        with TestClient(create_app(settings, store), "http://127.0.0.1") as fenced:
            answers = [
                fenced.post(url, json=continual_spec) for url in ("/v1/jobs", "/v1/jobs:plan")
            ]
        first, second = (answer.json() for answer in answers)
        assert first.get("code") == second.get("code")
        return second.get("code"), [e["field"] for e in second.get("errors", [])]

    return plan


def test_files_inside_the_roots_are_taken(fence, tmp_path):
    inside = tmp_path / "inside"
    for path in (inside / "there.npz", inside / "deeper" / "missing[1]*.npz"):
        assert fence({"type": "npz", "path": str(path)}) == (None, [])
    assert fence({"type": "idx", "images": "inside/a", "labels": "inside/b"}) == (None, [])


@pytest.mark.parametrize("field", ["images", "labels"])
@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "outside/a",
        "inside/../outside/a",
        "{root}/inside/../outside/a",
        "~/a",
        "~root/a",
        "inside/link/a",
        "inside/li*k/a",
        "inside/one",
        "inside/loop",
    ],
)
def test_what_leads_out_of_the_roots_is_refused(fence, tmp_path, field, path):
    (tmp_path / "outside" / "a").write_bytes(b"\0\0\x08\x03")
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "inside" / "li*k").symlink_to(tmp_path / "outside")
    (tmp_path / "inside" / "one").symlink_to("../outside/a")
    (tmp_path / "inside" / "loop").symlink_to("loop")
    data = {"type": "idx", "images": "inside/a", "labels": "inside/b"}
    data[field] = path.format(root=tmp_path)
    assert fence(data) == ("path_not_allowed", [f"stream.data.{field}"])


@pytest.mark.parametrize("path", ["~/a", "~root/a", "deeper/../../inside/a"])
def test_a_home_is_no_directory_inside(fence, tmp_path, monkeypatch, path):
    """Read from the home when it is opened, though here it looks like a relative path."""
    monkeypatch.chdir(tmp_path / "inside")
    assert fence({"type": "npz", "path": path}) == ("path_not_allowed", ["stream.data.path"])
    assert fence({"type": "npz", "path": "a"}) == (None, [])


def test_an_archive_outside_the_roots_is_refused(fence):
    assert fence({"type": "npz", "path": "/proc/self/environ"}) == (
        "path_not_allowed", ["stream.data.path"],
    )  # fmt: skip


@pytest.mark.parametrize("repo", ["../outside", "outside/a", "inside/.."])
def test_a_directory_that_is_taken_for_a_hub_repository_is_refused(fence, tmp_path, repo):
    (tmp_path / "outside" / "a").mkdir()
    assert fence({"type": "hub", "repo": repo}) == ("path_not_allowed", ["stream.data.repo"])
    assert fence({"type": "hub", "repo": "ylecun/mnist"}) == (None, [])


def test_results_are_read_as_they_were_recorded(client, store, learned, results):
    assert store.unit_results(learned) == results
    listed = ResultList.model_validate(client.get(f"/v1/jobs/{learned}/results").json())
    assert listed.data == results
    assert (listed.scans, listed.trainings) == ([], [])
    assert (listed.continual.num_runs, listed.continual.num_diverged) == (8, 1)
    assert listed.continual.curves[1].accuracy.mean == pytest.approx(0.3)
    job = client.get(f"/v1/jobs/{learned}").json()
    assert (job["kind"], job["num_units_finished"]) == ("continual_learning", 3)
    assert job["num_units_without_answer"] == 2  # tasks 2-3 and 4 hold the run that diverged
    found = client.get("/v1/jobs", params={"kind": "continual_learning"}).json()["data"]
    assert [job["id"] for job in found] == [learned]


def test_other_kinds_have_no_continual_summary(client, submitted):
    assert client.get(f"/v1/jobs/{submitted}/results").json()["continual"] is None


def test_csv_has_a_row_per_run_task_window_and_layer(client, learned):
    text = client.get(f"/v1/jobs/{learned}/results", params={"format": "csv"}).text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0]) == list(CONTINUAL_COLUMNS)
    assert len(rows) == (8 * 5 - 2) * 2 * 4 + 2
    parquet = client.get(f"/v1/jobs/{learned}/results", params={"format": "parquet"}).content
    assert parquet.startswith(b"PAR1")


def test_the_chart_is_that_of_the_kind(client, learned):
    drawn = client.get(f"/v1/jobs/{learned}/chart", params={"format": "svg", "theme": "dark"}).text
    assert "accuracy of the task" in drawn
    assert "step and bound: fc2" in drawn


def test_the_page_shows_a_row_per_method_and_control(client, learned):
    page = client.get(f"/jobs/{learned}").text
    plain = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    assert "3 of 3 units; 2 with a run that diverged" in plain
    assert "forward passes" not in plain
    # Of t and t^2 over 0 to 4 the correlation is 40 / sqrt(10 x 174) = 0.959.
    assert "L2 vanilla 2, 1 diverged 0.100 0.500 0.300 -0.96 - -1.00" in plain
    assert "leaky scheduler 2 0.100 ±0 0.500 ±0 0.300 ±0 -0.96 - -1.00" in plain
    assert "(seed 1 in task 3) and are left out of the means" in plain


def test_an_empty_streams_page_says_so(client, continual_spec):
    job_id = client.post("/v1/jobs", json=continual_spec).json()["id"]
    assert "No unit is finished yet." in client.get(f"/jobs/{job_id}").text


def test_names_are_shown_as_text(client, store, continual_spec, make_continual_results):
    continual_spec["methods"][0]["name"] = "<script>alert(1)</script>"
    job_id = client.post("/v1/jobs", json=continual_spec).json()["id"]
    for result in make_continual_results():
        store.record_unit(job_id, result)
    assert "<script>alert" not in client.get(f"/jobs/{job_id}").text
    assert (
        "<script>alert" not in client.get(f"/v1/jobs/{job_id}/chart", params={"format": "svg"}).text
    )


def test_the_event_of_a_unit_tells_its_accuracies(results):
    told = finished_data(results[1])
    assert (told["kind"], told["step"]) == ("continual_learning", None)
    stretch = told["stretch"]
    assert (stretch["first_task"], stretch["num_tasks"], stretch["num_diverged"]) == (2, 2, 1)
    vanilla = stretch["curves"][1]
    assert (vanilla["method"], vanilla["control"], vanilla["num_runs"]) == ("L2", "vanilla", 1)
    assert vanilla["mean"] == pytest.approx(0.35)
