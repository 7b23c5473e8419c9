"""A mix scan over HTTP: planned, queued, listed, read in every format, shown, fenced in."""

import csv
import io
import xml.etree.ElementTree as ET

import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient

from probe.kinds import KINDS
from probe.tables_mix import MIX_COLUMNS
from server.api.app import create_app
from server.settings import Settings


@pytest.fixture
def scan_spec(mix_spec, workspace):
    """A scan of one of the workspace's checkpoints, its data there too."""
    mix_spec["checkpoints"]["path"] = str(workspace / "runs" / "step-300")
    for source in mix_spec["mixture"]["sources"]:
        source["paths"] = [str(workspace / "text.jsonl")]
    for task in mix_spec["eval_tasks"]:
        task["data"]["paths"] = [str(workspace / "text.jsonl")]
    return mix_spec


@pytest.fixture
def scanned(client, store, scan_spec, make_mix_result):
    """Id of a scan with its unit finished."""
    job_id = client.post("/v1/jobs", json=scan_spec).json()["id"]
    assert store.record_unit(job_id, make_mix_result())
    return job_id


def test_a_scan_is_planned_and_queues_nothing(client, scan_spec):
    plan = client.post("/v1/jobs:plan", json=scan_spec).json()
    assert plan["kind"] == "mix_scan"
    assert [unit["unit_id"] for unit in plan["units"]] == ["0000-step-300"]
    exact = scan_spec | {"mixture": scan_spec["mixture"] | {"gradients": "exact"}}
    units = client.post("/v1/jobs:plan", json=exact).json()["units"]
    assert [unit["ratio"] for unit in units] == [0.0, 0.5, 1.0]
    assert client.get("/v1/jobs").json()["data"] == []


def test_a_wrong_scan_is_refused_with_its_field(client, scan_spec):
    scan_spec["mixture"]["ratios"] = {"start": 0, "stops": 1}
    answer = client.post("/v1/jobs", json=scan_spec)
    assert answer.status_code == 422
    assert [e["field"] for e in answer.json()["errors"]] == ["mixture.ratios.stops"]


def test_jobs_are_filtered_by_kind(client, spec, scanned):
    series = client.post("/v1/jobs", json=spec).json()["id"]

    def ids(kind):
        return [job["id"] for job in client.get("/v1/jobs", params={"kind": kind}).json()["data"]]

    assert ids("mix_scan") == [scanned]
    assert ids("checkpoint_series") == [series]
    assert client.get("/v1/jobs?kind=mix").status_code == 422


def test_json_holds_the_searches_and_what_they_come_to(client, scanned, make_mix_result):
    answer = client.get(f"/v1/jobs/{scanned}/results").json()
    assert answer["data"] == [make_mix_result().model_dump(mode="json")]
    (scan,) = answer["scans"]
    assert len(scan["points"]) == 3 * 2
    # Of the curves in tests/conftest.py: worked out there.
    assert (scan["sweet_spot"]["ratio"], scan["sweet_spot"]["task"]) == (0.5, "gsm8k_test")
    assert scan["sweet_spot"]["eta_c"] == 0.2
    (crossing,) = scan["crossings"]
    assert crossing["ratio"] == pytest.approx(0.375)
    assert crossing["lambda_c"] == pytest.approx(2 / (0.1 * 4**0.75))
    assert crossing["tasks"] == ["web_task", "gsm8k_test"]


def test_results_of_a_series_have_no_scans(client, store, submitted, make_unit_result):
    store.record_unit(submitted, make_unit_result())
    assert client.get(f"/v1/jobs/{submitted}/results").json()["scans"] == []


def test_csv_and_parquet_hold_one_row_per_search(client, scanned):
    url = f"/v1/jobs/{scanned}/results"
    rows = list(csv.DictReader(io.StringIO(client.get(url, params={"format": "csv"}).text)))
    assert list(rows[0]) == list(MIX_COLUMNS)
    assert len(rows) == 2 * 3 * 2
    not_descended = [r for r in rows if r["outcome"] == "not_a_descent_direction"]
    assert {(r["ratio"], r["task"], r["lambda_c"]) for r in not_descended} == {
        ("1.0", "gsm8k_test", "")
    }
    table = pq.read_table(io.BytesIO(client.get(url, params={"format": "parquet"}).content))
    assert (table.num_rows, table.column_names) == (12, list(MIX_COLUMNS))
    assert table.column("lambda_c").to_pylist()[0] == pytest.approx(2 / 0.1)


def test_a_scan_without_results_has_the_columns_of_a_scan(client, scan_spec):
    job_id = client.post("/v1/jobs", json=scan_spec).json()["id"]
    url = f"/v1/jobs/{job_id}/results"
    answer = client.get(url).json()
    assert (answer["data"], answer["scans"]) == ([], [])
    assert client.get(url, params={"format": "csv"}).text.strip() == ",".join(MIX_COLUMNS)
    table = pq.read_table(io.BytesIO(client.get(url, params={"format": "parquet"}).content))
    assert (table.num_rows, table.column_names) == (0, list(MIX_COLUMNS))


def test_the_chart_is_one_of_ratios(client, scanned):
    url = f"/v1/jobs/{scanned}/chart"
    vega = client.get(url).json()
    assert "share of web in the training mix" in str(vega)
    svg = client.get(url, params={"format": "svg"}).text
    assert ET.fromstring(svg).tag.endswith("svg")
    assert "sweet spot 0.5" in svg
    assert client.get(url, params={"format": "png"}).content.startswith(b"\x89PNG")


def test_the_finished_event_tells_the_sweet_spot(store, scanned):
    (event,) = [e for e in store.events_after(scanned, 0) if e.type == "unit.finished"]
    assert event.data["scan"]["sweet_spot"]["ratio"] == 0.5
    assert event.data["scan"]["num_searches"] == 12
    assert event.data["scan"]["outcomes"] == {"converged": 10, "not_a_descent_direction": 2}
    assert "measurements" not in str(event.data)


def test_a_unit_of_one_ratio_tells_its_tasks(client, store, scan_spec, make_mix_result):
    scan_spec["mixture"]["gradients"] = "exact"
    job_id = client.post("/v1/jobs", json=scan_spec).json()["id"]
    for index, ratio in enumerate([0.0, 0.5]):
        store.record_unit(job_id, make_mix_result(index, ratio=ratio))
    first, _ = [e.data["scan"] for e in store.events_after(job_id, 0) if e.type == "unit.finished"]
    assert first["ratio"] == 0.0
    assert [(p["task"], p["lambda_c_mean"]) for p in first["points"]] == [
        ("web_task", pytest.approx(20.0)),
        ("gsm8k_test", pytest.approx(2.5)),
    ]
    # The ratios so far are one scan of one checkpoint.
    (scan,) = client.get(f"/v1/jobs/{job_id}/results").json()["scans"]
    assert sorted({p["ratio"] for p in scan["points"]}) == [0.0, 0.5]


def test_the_job_page_shows_ratios_tasks_and_the_sweet_spot(client, scanned):
    page = client.get(f"/jobs/{scanned}").text
    assert "sweet spot: 0.5 web" in page
    assert "web_task and gsm8k_test cross at 0.375, lambda_c 7.071" in page
    assert "not descended" in page
    assert "1 of 1 units" in page
    assert page.count('class="best"') == 1
    assert 'alt="Relative critical sharpness of each task' in page


def test_the_names_of_tasks_are_text(client, store, scan_spec, make_mix_result):
    attack = "<script>alert('x')</script>"
    job_id = client.post("/v1/jobs", json=scan_spec).json()["id"]
    curves = {attack: {0.0: [0.1], 1.0: ["no_crossing"]}}
    store.record_unit(job_id, make_mix_result(curves=curves))
    page = client.get(f"/jobs/{job_id}").text
    assert attack not in page
    assert "&lt;script&gt;alert" in page


def test_the_description_holds_every_kind_told_apart_by_its_name(client):
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    mapping = schemas["JobSpec"]["discriminator"]
    assert mapping["propertyName"] == "kind"
    assert sorted(mapping["mapping"]) == sorted(KINDS)
    for reference in mapping["mapping"].values():
        assert reference.removeprefix("#/components/schemas/") in schemas
    forms = schemas["Mixture"]["properties"]["ratios"]["oneOf"]
    assert [form.get("type", "object") for form in forms] == ["array", "object"]


@pytest.mark.parametrize(
    ("part", "field"),
    [
        ("source", "mixture.sources.1.paths.0"),
        ("task", "eval_tasks.0.data.paths.0"),
    ],
)
def test_data_outside_the_roots_is_refused(store, scan_spec, workspace, tmp_path, part, field):
    roots = [workspace / "runs", workspace / "text.jsonl"]
    settings = Settings(data_dir=tmp_path / "data", roots=roots)
    with TestClient(create_app(settings, store), "http://127.0.0.1") as fenced:
        assert fenced.post("/v1/jobs:plan", json=scan_spec).status_code == 200
        if part == "source":
            scan_spec["mixture"]["sources"][1]["paths"] = ["/etc/passwd"]
        else:
            scan_spec["eval_tasks"][0]["data"]["paths"] = ["/etc/passwd"]
        for url in ("/v1/jobs", "/v1/jobs:plan"):
            answer = fenced.post(url, json=scan_spec)
            assert answer.status_code == 422
            assert answer.json()["code"] == "path_not_allowed"
            assert [e["field"] for e in answer.json()["errors"]] == [field]
