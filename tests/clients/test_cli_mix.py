"""A mix scan on the command line: submitted, watched, its tables, files and charts."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from rich.console import Console

from clients.cli.mix_tables import report, unit_text
from probe.mix_summary import summarise_unit
from probe.result_mix import MixUnitResult
from server.job_views import finished_data
from server.wire import ResultList


@pytest.fixture
def job_file(tmp_path: Path, mix_spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "scan.yaml"
    file.write_text(yaml.safe_dump(mix_spec))
    return file


@pytest.fixture
def scanned(probe: Any, wire: Any, make_mix_result: Any) -> str:
    """A scan that has succeeded on the fake server."""
    result = make_mix_result()
    probe.server.jobs = [wire.job("job_01mix", "succeeded", kind="mix_scan", num_units=1)]
    probe.server.results = [result.model_dump(mode="json")]
    data = finished_data(result)
    probe.server.events = [
        wire.event(1, "job.running"),
        wire.event(2, "unit.started", unit_id=data["unit_id"], index=0),
        wire.event(3, "unit.finished", **data),
        wire.event(4, "job.succeeded"),
    ]
    return "job_01mix"


def rows_of(text: str) -> list[list[str]]:
    return [" ".join(line.split()).split(" ") for line in text.splitlines()]


def check_table(text: str) -> None:
    """The numbers of `CURVES`: lambda_c = 2 / eta_c; of 1 and 2 the mean is 1.5 ± 0.5."""
    rows = rows_of(text)
    assert ["web", "web_task", "gsm8k_test"] in rows
    assert ["0", "20", "±0", "2.5", "±0"] in rows
    assert ["0.5", "*", "5", "±0", "10", "±0"] in rows
    assert ["1", "1.5", "±0.5", "not", "descended"] in rows
    flat = " ".join(text.split())
    assert "sweet spot: 0.5 web (90 % of bootstraps: 0.5 to 0.5); gsm8k_test objects first" in flat
    assert "web_task and gsm8k_test cross at 0.375, lambda_c 7.071" in flat


def test_results_as_a_table(probe: Any, scanned: str) -> None:
    done = probe("results", scanned)
    assert done.exit_code == 3  # a task is not descended at ratio 1
    check_table(done.stdout)


def test_watch_ends_with_the_table_and_tells_the_unit(probe: Any, scanned: str) -> None:
    done = probe("watch", scanned)
    assert done.exit_code == 3
    check_table(done.stdout)
    assert "1/1 step-300 sweet spot 0.5, lambda_c 10 (gsm8k_test)" in " ".join(done.stderr.split())
    assert "10 of 12 with an answer" in done.stderr


def test_results_as_json_hold_the_scans(
    probe: Any, scanned: str, make_mix_result: Any, tmp_path: Path
) -> None:
    listed = ResultList.of(scanned, "succeeded", [make_mix_result()])
    answer = httpx.Response(200, content=listed.model_dump_json())
    probe.server.routes["GET", f"/v1/jobs/{scanned}/results"] = lambda _: answer
    printed = json.loads(probe("results", scanned, "--json").stdout)
    assert printed["scans"][0]["sweet_spot"]["ratio"] == 0.5
    assert printed["data"][0]["kind"] == "mix_scan"
    out = tmp_path / "r.json"
    assert probe("results", scanned, "--format", "json", "--out", str(out)).exit_code == 3
    assert json.loads(out.read_text()) == printed
    chart = tmp_path / "c.svg"
    assert probe("plot", str(out), "--out", str(chart)).exit_code == 0
    assert "sweet spot 0.5" in chart.read_text()
    with probe.server.client() as client:
        found = client.results(scanned)
    assert isinstance(found.data[0], MixUnitResult)
    assert found == listed


def test_show_names_the_kind(probe: Any, scanned: str) -> None:
    assert ["kind", "mix_scan"] in rows_of(probe("show", scanned).stdout)


def test_submit_makes_every_data_file_absolute(probe: Any, job_file: Path) -> None:
    assert probe("submit", str(job_file)).exit_code == 0
    sent = json.loads(probe.server.requests[0].content)
    base = str(job_file.parent)
    assert [s["paths"] for s in sent["mixture"]["sources"]] == [
        [f"{base}/web.jsonl"], [f"{base}/gsm8k.jsonl"],
    ]  # fmt: skip
    assert [t["data"]["paths"] for t in sent["eval_tasks"]] == [
        [f"{base}/web.jsonl"], [f"{base}/gsm8k.jsonl"],
    ]  # fmt: skip


def test_a_wrong_field_is_bad_input(probe: Any, job_file: Path) -> None:
    done = probe("run", str(job_file), "--set", "mixture.ratios={start: 0, stops: 1}", "--plan")
    assert done.exit_code == 2
    assert "mixture.ratios.stops: unknown key; did you mean 'stop'?" in done.stderr


def printed(results: list[MixUnitResult], width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(report(results, width=width))
    return out.getvalue()


@pytest.mark.parametrize("width", [40, 80, 120])
def test_many_tasks_fit_the_terminal(make_mix_result: Any, width: int) -> None:
    tasks = [f"task_{index:02d}" for index in range(12)]
    curves = {task: {0.0: ["not_a_descent_direction"] * 2, 1.0: [0.1, 0.2]} for task in tasks}
    text = printed([make_mix_result(curves=curves)], width)
    assert max(len(line) for line in text.splitlines()) <= width
    tables = text.partition("sweet spot")[0]
    for task in tasks:
        assert tables.count(task) == 1  # no name is cut, none is there twice
    assert text.count("15 ±5") == len(tasks)  # lambda_c 20 and 10
    assert text.count("not descended") == len(tasks)


def test_brackets_in_names_are_no_markup(make_mix_result: Any) -> None:
    curves = {"[red]x[/red]": {0.0: [0.1, 0.1], 1.0: [0.2, 0.2]}}
    result = make_mix_result(curves=curves)
    assert "[red]x[/red]" in printed([result], 80)
    single = make_mix_result(curves=curves, ratio=0.0)
    assert unit_text(summarise_unit(single)).plain == "[red]x[/red] 20 ±0"


def test_some_repeats_without_an_answer_are_counted(make_mix_result: Any) -> None:
    curves = {"a": {0.0: [0.1, "no_crossing"], 1.0: ["budget_exhausted", "no_crossing"]}}
    rows = rows_of(printed([make_mix_result(curves=curves)], 80))
    assert ["0", "20", "(1", "of", "2)"] in rows
    assert ["1", "budget", "exhausted,", "no", "crossing"] in rows


def test_csv_is_passed_through(probe: Any, scanned: str) -> None:
    text = "ratio,task\n0.5,web\n"
    url = ("GET", f"/v1/jobs/{scanned}/results")
    usual = probe.server.routes.get(url) or probe.server._usual(*url)

    def answer(request: httpx.Request) -> httpx.Response:
        is_csv = request.headers["accept"] == "text/csv"
        return httpx.Response(200, text=text) if is_csv else usual(request)

    probe.server.routes[url] = answer
    done = probe("results", scanned, "--format", "csv")
    assert list(csv.DictReader(io.StringIO(done.stdout))) == [{"ratio": "0.5", "task": "web"}]
