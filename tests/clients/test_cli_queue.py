"""What the command line says of the queue: priority, limits, webhooks, places, workers."""

import datetime as dt
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from clients.cli.conventions import InputError
from clients.cli.durations import seconds
from probe.spec_load import parse_spec


@pytest.fixture
def job_file(tmp_path: Path, wire: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(wire.spec))
    return file


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("90s", 90), ("15m", 900), ("2h", 7200), ("1.5d", 129600), ("2 w", 1209600)],
)
def test_durations(text: str, expected: float) -> None:
    assert seconds(text, "--time-limit") == expected


@pytest.mark.parametrize("text", ["", "h", "-1h", "2y", "1e3", "nan", "1h30m"])
def test_what_is_no_duration_is_refused_by_the_options_name(text: str) -> None:
    with pytest.raises(InputError, match="--older-than needs a number with"):
        seconds(text, "--older-than")


def test_submit_sends_priority_limit_and_webhook(probe: Any, job_file: Path) -> None:
    words = ["--priority", "7", "--time-limit", "2h", "--webhook", "https://hooks.test/a?b"]
    assert probe("submit", str(job_file), *words).exit_code == 0
    sent = json.loads(probe.server.requests[0].content)
    assert (sent["priority"], sent["time_limit_s"]) == (7, 7200)
    assert sent["webhook"] == "https://hooks.test/a?b"


def test_a_files_own_webhook_priority_and_limit_are_sent(
    probe: Any, wire: Any, job_file: Path
) -> None:
    own = {"priority": 300, "time_limit_s": 60.0, "webhook": "https://hooks.test/own"}
    job_file.write_text(yaml.safe_dump(wire.spec | own))
    probe("submit", str(job_file))
    sent = json.loads(probe.server.requests[0].content)
    assert {key: sent[key] for key in own} == own
    probe("submit", str(job_file), "--priority", "2")
    assert json.loads(probe.server.requests[1].content)["priority"] == 2


def test_the_client_sends_a_models_webhook(fake_server: Any, wire: Any) -> None:
    with fake_server.client() as client:
        client.submit(parse_spec(wire.spec | {"webhook": "https://hooks.test/x"}))
        client.submit(parse_spec(wire.spec))
    first, second = (json.loads(request.content) for request in fake_server.requests)
    assert first["webhook"] == "https://hooks.test/x"
    assert "webhook" not in second


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--priority", "0"], "priority"),
        (["--priority", "10001"], "priority"),
        (["--time-limit", "soon"], "--time-limit needs a number with s, m, h, d or w"),
        (["--time-limit", "0s"], "time_limit_s"),
        (["--webhook", "ftp://hooks.test"], "webhook"),
    ],
)
def test_wrong_values_are_bad_input(
    probe: Any, job_file: Path, words: list[str], message: str
) -> None:
    done = probe("submit", str(job_file), *words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    assert probe.server.requests == []


def test_show_and_list_tell_the_place_in_the_queue(probe: Any, wire: Any) -> None:
    start = dt.datetime(2026, 1, 2, 4, 5, tzinfo=dt.UTC)
    probe.server.jobs = [
        wire.job(
            "job_01aa",
            queue="gpu",
            priority=200,
            queue_position=3,
            estimated_start=start.isoformat(),
            time_limit_s=7200,
            submitted_by="anna",
        ),
        wire.job("job_01bb", "running", queue="cpu", worker="box-7"),
    ]
    shown = probe("show", "job_01aa").stdout
    about = start.astimezone().strftime("%Y-%m-%d %H:%M %Z")
    assert f"gpu, priority 200, place 3, starts about {about}" in shown
    assert "2 h 0 min" in shown
    assert "anna" in shown
    running = probe("show", "job_01bb").stdout
    assert "box-7" in running
    assert "priority" not in running
    assert "queued #3" in probe("list").stdout


def test_list_asks_for_one_queue(probe: Any) -> None:
    probe("list", "--queue", "cpu")
    assert probe.server.requests[0].url.params["queue"] == "cpu"
    done = probe("list", "--queue", "tpu")
    assert done.exit_code == 2
    assert len(probe.server.requests) == 1


def worker_json(name: str, **changes: Any) -> dict[str, Any]:
    now = dt.datetime.now(dt.UTC)
    return {
        "name": name,
        "hostname": "box",
        "pid": 7,
        "queues": ["gpu", "cpu"],
        "slots": {"gpu": 1, "cpu": 4},
        "device": "cuda (2)",
        "started_at": now.isoformat(),
        "last_heartbeat": (now - dt.timedelta(hours=2, minutes=5)).isoformat(),
        "alive": True,
        "current_job_ids": ["job_01abcdef", "job_01uvwxyz"],
        **changes,
    }


def test_workers_as_a_table_and_as_json(probe: Any) -> None:
    data = [
        worker_json("box-0"),
        worker_json("[red]old", alive=False, slots={}, current_job_ids=[]),
    ]
    answer = {"object": "list", "data": data}
    probe.server.routes["GET", "/v1/workers"] = lambda _: httpx.Response(200, json=answer)
    first, second = probe("workers").stdout.splitlines()[2:4]
    assert first.split() == [
        *("box-0", "box", "alive", "gpu", "x1,", "cpu", "x4"),
        *("cuda", "(2)", "abcdef,", "uvwxyz", "2", "h", "ago"),
    ]
    assert second.split()[:3] == ["[red]old", "box", "gone"]
    assert "gpu, cpu" in second
    assert [w["name"] for w in json.loads(probe("workers", "--json").stdout)["data"]] == [
        "box-0",
        "[red]old",
    ]


def test_no_worker_is_said_on_stderr(probe: Any) -> None:
    empty = {"object": "list", "data": []}
    probe.server.routes["GET", "/v1/workers"] = lambda _: httpx.Response(200, json=empty)
    done = probe("workers")
    assert (done.exit_code, done.stdout) == (0, "")
    assert "probe worker" in done.stderr
