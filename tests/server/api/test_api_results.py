"""Results and charts in every format a client may ask for."""

import csv
import io
import xml.etree.ElementTree as ET

import pyarrow.parquet as pq
import pytest

from probe.tables import COLUMNS

TYPES = {
    "json": "application/json",
    "csv": "text/csv",
    "parquet": "application/vnd.apache.parquet",
    "vega": "application/vnd.vegalite.v6+json",
    "svg": "image/svg+xml",
    "png": "image/png",
}


@pytest.fixture
def measured(store, submitted, make_unit_result):
    """A job with two of three units finished."""
    for index, step in enumerate([100, 200]):
        store.record_unit(submitted, make_unit_result(index, step))
    return submitted


def test_json_holds_the_units_in_order(client, measured):
    answer = client.get(f"/v1/jobs/{measured}/results").json()
    assert (answer["object"], answer["job_id"], answer["status"]) == ("list", measured, "queued")
    assert [r["unit"]["checkpoint"]["step"] for r in answer["data"]] == [100, 200]
    assert answer["data"][0]["measurements"][0]["lambda_c"] == pytest.approx(20)  # 2 / 0.1


@pytest.mark.parametrize("by", ["format", "accept"])
def test_csv_and_parquet_hold_one_row_per_measurement(client, measured, by):
    def get(name):
        url = f"/v1/jobs/{measured}/results"
        if by == "format":
            return client.get(url, params={"format": name})
        return client.get(url, headers={"Accept": TYPES[name]})

    answer = get("csv")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [(row["step"], row["loss_batch"]) for row in rows] == [
        ("100", "update"), ("100", "held_out"), ("200", "update"), ("200", "held_out"),
    ]  # fmt: skip
    assert answer.headers["content-type"].startswith("text/csv")
    assert f"{measured}.csv" in answer.headers["content-disposition"]
    answer = get("parquet")
    assert answer.headers["content-type"] == TYPES["parquet"]
    table = pq.read_table(io.BytesIO(answer.content))
    assert (table.num_rows, table.column_names) == (4, list(COLUMNS))


def test_results_of_a_job_without_any_are_empty_not_an_error(client, submitted):
    assert client.get(f"/v1/jobs/{submitted}/results").json()["data"] == []
    lines = client.get(f"/v1/jobs/{submitted}/results?format=csv").text.splitlines()
    assert len(lines) == 1


def test_the_chart_as_vega_svg_and_png(client, measured):
    url = f"/v1/jobs/{measured}/chart"
    vega = client.get(url)
    assert vega.headers["content-type"] == TYPES["vega"]
    assert "vega-lite/v6" in vega.json()["$schema"]
    svg = client.get(url, headers={"Accept": "image/svg+xml"})
    assert ET.fromstring(svg.text).tag.endswith("svg")
    png = client.get(url, params={"format": "png"}, headers={"Accept": "image/svg+xml"})
    assert png.content.startswith(b"\x89PNG")
    assert png.headers["content-type"] == TYPES["png"]


def test_a_chart_is_drawn_anew_after_each_unit_and_only_then(
    client, store, measured, make_unit_result
):
    url = f"/v1/jobs/{measured}/chart?format=svg"
    first = client.get(url)
    same = client.get(url, headers={"If-None-Match": first.headers["etag"]})
    assert (same.status_code, same.content) == (304, b"")
    store.record_unit(measured, make_unit_result(2, 300))
    newer = client.get(url, headers={"If-None-Match": first.headers["etag"]})
    assert newer.status_code == 200
    assert newer.text != first.text


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("image/png", "png"),
        ("image/*", "svg"),
        ("image/*;q=0.5, image/png", "png"),
        ("image/svg+xml;q=0.1, image/png;q=0.2, */*;q=0", "png"),
        ("text/html, */*;q=0.8", "vega"),
        ("application/json", "vega"),
        ("application/vnd.vegalite.v5+json", "vega"),
        ("", "vega"),
    ],
)
def test_accept_chooses(client, measured, accept, chosen):
    answer = client.get(f"/v1/jobs/{measured}/chart", headers={"Accept": accept})
    assert answer.headers["content-type"] == TYPES[chosen]
    assert answer.headers["vary"] == "Accept"


def test_an_unknown_format_names_the_parameter(client, measured):
    answer = client.get(f"/v1/jobs/{measured}/results?format=xlsx")
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "query.format")
