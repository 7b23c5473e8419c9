"""submit, list, show, watch, cancel, results, plot: output, exit codes, messages."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml


@pytest.fixture
def job_file(tmp_path: Path, wire: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(wire.spec))
    return file


def test_submit_prints_the_id_and_nothing_else(probe: Any, job_file: Path) -> None:
    done = probe("submit", str(job_file))
    assert (done.exit_code, done.stdout, done.stderr) == (0, "job_01new\n", "")


def test_submit_sends_overrides_labels_and_the_key(probe: Any, job_file: Path) -> None:
    words = ["--set", "measurement.repeats=3", "--set", "model.dtype=bfloat16"]
    words += ["--label", "project=demo", "--idempotency-key", "k1", "--json"]
    done = probe("submit", str(job_file), *words)
    request = probe.server.requests[0]
    sent = json.loads(request.content)
    assert sent["measurement"]["repeats"] == 3
    assert sent["model"]["dtype"] == "bfloat16"
    assert sent["labels"] == {"project": "demo"}
    assert request.headers["idempotency-key"] == "k1"
    assert json.loads(done.stdout)["id"] == "job_01new"


def test_submit_makes_local_paths_absolute(probe: Any, job_file: Path) -> None:
    (job_file.parent / "tok").mkdir()
    probe("submit", str(job_file), "--set", "model.tokenizer=tok")
    probe("submit", str(job_file), "--set", "model.tokenizer=allenai/OLMo-2-0425-1B")
    here, hub = (json.loads(r.content) for r in probe.server.requests)
    base = str(job_file.parent)
    assert here["checkpoints"]["path"] == f"{base}/runs/step-*"
    assert here["batches"]["sources"][0]["paths"] == [f"{base}/web.txt"]
    assert here["model"]["tokenizer"] == f"{base}/tok"
    assert hub["model"]["tokenizer"] == "allenai/OLMo-2-0425-1B"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "measurement.repeat=3"], "did you mean 'repeats'"),
        (["--set", "batches.sequence_length=banana"], "batches.sequence_length"),
        (["--label", "project"], "--label needs key=value"),
        (["--sett", "a=b"], "No such option: --sett"),
    ],
)
def test_bad_input_is_code_2_and_one_message(
    probe: Any, job_file: Path, words: list[str], message: str
) -> None:
    done = probe("submit", str(job_file), *words)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert probe.server.requests == []


def test_what_the_server_refuses_is_shown_with_its_fields(
    probe: Any, job_file: Path, wire: Any
) -> None:
    errors = [{"field": "checkpoints.path", "message": "is outside PROBE_ROOTS"}]
    probe.server.routes["POST", "/v1/jobs"] = lambda _: wire.problem(
        422, "config_error", "the spec is wrong", errors
    )
    done = probe("submit", str(job_file))
    assert done.exit_code == 2
    assert done.stderr == "error: the spec is wrong\n  checkpoints.path: is outside PROBE_ROOTS\n"


def test_no_server_is_code_1_and_says_probe_up(probe: Any) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("Connection refused", request=request)

    probe.server.routes["GET", "/v1/jobs"] = refuse
    done = probe("list")
    assert done.exit_code == 1
    assert "probe up" in done.stderr
    assert done.stdout == ""


def test_debug_adds_the_traceback(probe: Any) -> None:
    done = probe("run", "nowhere.yaml", "--debug")
    assert done.exit_code == 2
    assert "Traceback" in done.stderr


def test_a_defect_is_reported_as_one(probe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr("clients.cli.tables.jobs_table", broken)
    probe.server.jobs = []
    monkeypatch.setattr("clients.cli.jobs.connect", broken)
    done = probe("list")
    assert done.exit_code == 1
    assert "unexpected KeyError" in done.stderr


def test_list_table_and_json(probe: Any, wire: Any) -> None:
    labels = {"project": "demo"}
    probe.server.jobs = [
        wire.job("job_01aa", "running", num_units_finished=1),
        wire.job("job_01bb", "succeeded", num_units_without_answer=1, labels=labels),
    ]
    table = probe("list").stdout
    assert "job_01aa" in table
    assert "1/2" in table
    done = probe("list", "--json", "--status", "running", "--label", "project=demo")
    listed = json.loads(done.stdout)
    assert [job["id"] for job in listed["data"]] == ["job_01aa", "job_01bb"]
    assert listed["has_more"] is False
    query = probe.server.requests[-1].url.params
    assert query["status"] == "running"
    assert query.get_list("label") == ["project=demo"]


def test_list_says_when_there_is_more(probe: Any, wire: Any) -> None:
    probe.server.jobs = [wire.job(f"job_{i}") for i in range(3)]
    done = probe("list", "--limit", "2", "--json")
    assert len(json.loads(done.stdout)["data"]) == 2
    assert json.loads(done.stdout)["has_more"] is True
    assert "there are more" in probe("list", "--limit", "2").stderr


def test_an_id_may_be_given_by_its_end(probe: Any, wire: Any) -> None:
    probe.server.jobs = [wire.job("job_01aa77"), wire.job("job_01bb77"), wire.job("job_01cc")]
    assert json.loads(probe("show", "cc", "--json").stdout)["id"] == "job_01cc"
    several = probe("show", "77")
    assert several.exit_code == 2
    assert "job_01aa77, job_01bb77" in several.stderr
    assert probe("show", "zz").exit_code == 2


def test_show_names_the_error(probe: Any, wire: Any) -> None:
    error = {"code": "checkpoint_error", "message": "no [weights] here", "unit_id": "0001-step-5"}
    probe.server.jobs = [wire.job("job_01aa", "failed", error=error)]
    shown = probe("show", "job_01aa", "--spec").stdout
    assert "checkpoint_error: no [weights] here (unit 0001-step-5)" in shown
    assert "sequence_length: 16" in shown


def test_cancel_and_cancel_too_late(probe: Any, wire: Any) -> None:
    probe.server.jobs = [wire.job("job_01aa", "running"), wire.job("job_01bb", "succeeded")]
    done = probe("cancel", "job_01aa", "--json")
    assert (done.exit_code, json.loads(done.stdout)["status"]) == (0, "cancelled")
    late = probe("cancel", "job_01bb")
    assert late.exit_code == 1
    assert "nothing to cancel" in late.stderr


def watched(probe: Any, wire: Any, status: str, lambdas: list[float | None]) -> None:
    events = [wire.event(1, "job.queued"), wire.event(2, "job.running")]
    for index, value in enumerate(lambdas):
        about = {"unit_id": f"{index:04d}-step-{index * 100}", "index": index}
        events += [
            wire.event(len(events) + 1, "unit.started", **about),
            wire.event(
                len(events) + 2,
                "unit.finished",
                **about,
                num_forward_passes=4,
                stability_threshold=2000.0,
                summaries=[wire.summary(value)],
            ),
        ]
    failure = {"code": "checkpoint_error", "message": "no weights"} if status == "failed" else {}
    events.append(wire.event(len(events) + 1, f"job.{status}", **failure))
    probe.server.events = events
    probe.server.jobs = [wire.job("job_01aa", status, num_units=len(lambdas))]
    probe.server.results = [wire.result(i, value) for i, value in enumerate(lambdas)]


@pytest.mark.parametrize(
    ("status", "lambdas", "code"),
    [
        ("succeeded", [800.0, 900.0], 0),
        ("succeeded", [800.0, None], 3),
        ("failed", [800.0], 1),
        ("cancelled", [800.0], 1),
    ],
)
def test_watch_ends_as_the_job_did(
    probe: Any, wire: Any, status: str, lambdas: list[float | None], code: int
) -> None:
    watched(probe, wire, status, lambdas)
    done = probe("watch", "job_01aa")
    assert done.exit_code == code
    assert "lambda_c" in done.stdout  # the table
    assert "1/2  step-0" in done.stderr or "1/1  step-0" in done.stderr
    assert status in done.stderr
    if status == "failed":
        assert "checkpoint_error: no weights" in done.stderr
    if None in lambdas:
        assert "no crossing" in done.stdout


def test_watch_says_when_a_job_runs_again(probe: Any, wire: Any) -> None:
    watched(probe, wire, "succeeded", [800.0])
    again = wire.event(2, "job.running")
    events = [*probe.server.events[:2], again, *probe.server.events[2:]]
    probe.server.events = [event | {"id": i} for i, event in enumerate(events, start=1)]
    lines = probe("watch", "job_01aa").stderr.splitlines()
    assert lines[:3] == ["queued", "running", "running again: its worker was started anew"]


def test_names_are_not_read_as_markup(probe: Any, wire: Any) -> None:
    probe.server.jobs = [wire.job("job_01aa", name="[red]a[/red]", labels={"k": "[b]"})]
    assert "[red]a[/red]" in probe("list").stdout
    shown = probe("show", "job_01aa").stdout
    assert "[red]a[/red]" in shown
    assert "k=[b]" in shown


@pytest.mark.parametrize("columns", ["40", "60", "79"])
def test_a_narrow_table_of_jobs_keeps_the_whole_id(
    probe: Any, wire: Any, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    job_id = "job_01m80fx6xxbnkhmdxxvax8bry8"
    probe.server.jobs = [wire.job(job_id, "succeeded", num_units_without_answer=1)]
    lines = probe("list").stdout.splitlines()
    assert max(map(len, lines)) <= int(columns)
    assert "".join(line.split(" ")[0] for line in lines[2:]) == job_id
    assert "succeeded" in lines[2]


def test_a_table_of_jobs_fits_80_columns(
    probe: Any, wire: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    job_id = "job_" + "0" * 26
    probe.server.jobs = [wire.job(job_id, "cancelled", name="n" * 60, num_units_without_answer=1)]
    rows = probe("list").stdout.splitlines()
    assert len(rows) == 3
    assert job_id in rows[2]
    assert max(map(len, rows)) <= 80


def test_watch_json_is_the_events(probe: Any, wire: Any) -> None:
    watched(probe, wire, "succeeded", [800.0])
    done = probe("watch", "job_01aa", "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [e["id"] for e in events] == [1, 2, 3, 4, 5]
    assert done.stderr == ""


def test_submit_watch_json_is_one_object(probe: Any, wire: Any, job_file: Path) -> None:
    watched(probe, wire, "succeeded", [None])
    probe.server.routes["POST", "/v1/jobs"] = lambda _: httpx.Response(
        202, json=wire.job("job_01aa")
    )
    done = probe("submit", str(job_file), "--watch", "--json")
    assert json.loads(done.stdout)["status"] == "succeeded"
    assert done.exit_code == 3


def test_results_in_every_format(probe: Any, wire: Any, tmp_path: Path) -> None:
    watched(probe, wire, "succeeded", [800.0, None])
    usual = probe.server.routes

    def results(request: httpx.Request) -> httpx.Response:
        if request.headers["accept"] == "text/csv":
            return httpx.Response(200, text="step,lambda_c\r\n0,800.0\r\n")
        if "parquet" in request.headers["accept"]:
            return httpx.Response(200, content=b"PAR1")
        page = {"job_id": "job_01aa", "status": "succeeded", "data": probe.server.results}
        return httpx.Response(200, json=page)

    usual["GET", "/v1/jobs/job_01aa/results"] = results
    table = probe("results", "job_01aa")
    assert table.exit_code == 3
    assert "800" in table.stdout
    assert "none" in table.stdout
    assert json.loads(probe("results", "job_01aa", "--json").stdout)["job_id"] == "job_01aa"
    csv = probe("results", "job_01aa", "--format", "csv")
    assert csv.stdout_bytes == b"step,lambda_c\r\n0,800.0\r\n"
    assert probe("results", "job_01aa", "--format", "parquet").exit_code == 2
    out = tmp_path / "r.parquet"
    probe("results", "job_01aa", "--format", "parquet", "--out", str(out))
    assert out.read_bytes() == b"PAR1"
    unwritable = probe("results", "job_01aa", "--out", str(tmp_path / "no" / "r.txt"))
    assert unwritable.exit_code == 2
    assert "cannot write" in unwritable.stderr


def test_plot_from_the_server_and_from_a_file(probe: Any, wire: Any, tmp_path: Path) -> None:
    watched(probe, wire, "succeeded", [800.0, 900.0])
    probe.server.routes["GET", "/v1/jobs/job_01aa/chart"] = lambda r: httpx.Response(
        200, text=r.headers["accept"]
    )
    out = tmp_path / "c.svg"
    done = probe("plot", "job_01aa", "--out", str(out))
    assert (done.exit_code, out.read_text()) == (0, "image/svg+xml")
    assert probe("plot", "job_01aa", "--out", str(tmp_path / "c.pdf")).exit_code == 2
    saved = tmp_path / "results.json"
    probe("results", "job_01aa", "--format", "json", "--out", str(saved))
    vega = probe("plot", str(saved), "--json")
    assert "vega-lite" in json.loads(vega.stdout)["$schema"]
    saved.write_text('{"data": [{}]}')
    assert probe("plot", str(saved), "--json").exit_code == 2
    assert probe("plot", str(tmp_path / "absent.json")).exit_code == 2
