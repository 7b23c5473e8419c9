"""Rows hold every measurement once, and survive CSV and Parquet unchanged."""

import csv
import io

import pyarrow.parquet as pq
import pytest

from probe.tables import COLUMNS, series_rows, summary_rows, to_csv, to_parquet


def test_one_row_per_measurement_in_order(make_unit_result):
    results = [
        make_unit_result(0, 100, {"update": [0.1, 0.2], "held_out": [0.02, "no_crossing"]}),
        make_unit_result(1, 200),
    ]
    rows = series_rows(results)
    assert [(r["step"], r["loss_batch"], r["repeat"]) for r in rows] == [
        (100, "update", 0),
        (100, "update", 1),
        (100, "held_out", 0),
        (100, "held_out", 1),
        (200, "update", 0),
        (200, "held_out", 0),
    ]
    assert rows[2]["lambda_c"] == pytest.approx(100)  # 2 / 0.02
    assert rows[3]["outcome"] == "no_crossing"
    assert rows[3]["lambda_c"] is rows[3]["eta_upper"] is None
    assert rows[0]["stability_threshold"] == pytest.approx(200)  # 2 / 0.01
    assert all(list(row) == list(COLUMNS) for row in rows)


def test_csv_keeps_every_digit_and_leaves_unknowns_empty(make_unit_result):
    rows = series_rows([make_unit_result(0, None, {"update": [1 / 3, "budget_exhausted"]})])
    read = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert float(read[0]["eta_c"]) == 1 / 3
    assert read[0]["step"] == read[1]["lambda_c"] == ""
    assert read[1]["outcome"] == "budget_exhausted"
    assert float(read[0]["slope"]) == -0.5  # numbers are never quoted with an apostrophe


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_csv_text_cannot_become_a_formula(start):
    written = to_csv([{"name": f"{start}cmd|' /C calc'!A0", "value": -1.0}])
    cell, value = list(csv.reader(io.StringIO(written, newline="")))[1]
    assert cell.startswith("'" + start)
    assert value == "-1.0"


def test_csv_without_rows_still_has_its_header():
    assert to_csv([]).splitlines() == [",".join(COLUMNS)]


def test_parquet_round_trip_with_types_for_empty_columns(make_unit_result):
    rows = series_rows([make_unit_result(0, None, {"update": ["no_crossing"]}, learning_rate=None)])
    table = pq.read_table(io.BytesIO(to_parquet(rows)))
    assert table.to_pylist() == rows
    assert str(table.schema.field("lambda_c").type) == "double"
    assert str(table.schema.field("step").type) == "int64"
    assert pq.read_table(io.BytesIO(to_parquet([]))).schema == table.schema


def test_summary_rows_name_what_has_no_answer(make_unit_result):
    (row,) = summary_rows([make_unit_result(0, 50, {"update": [0.1, 0.2, "no_crossing"]})])
    assert row["label"] == "step 50"
    assert row["lambda_c_mean"] == pytest.approx(15)  # (20 + 10) / 2
    assert row["lambda_c_standard_error"] == pytest.approx(5)  # sqrt(50) / sqrt(2)
    assert (row["num_converged"], row["num_repeats"]) == (2, 3)
    assert row["no_answer"] == {"no_crossing": 1}
    assert "no_crossing: 1" in to_csv([row])
