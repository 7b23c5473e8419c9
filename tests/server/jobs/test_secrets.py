"""Recognisable secrets go through every failure at hand and must come out of none of them."""

import json
import logging
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from server import redaction
from server.log_format import RedactedJsonFormatter
from server.redaction import RedactingFormatter, learn, learn_settings, redact
from server.settings import Settings
from server.worker import gang
from tests.server.conftest import on_sqlite_only

LEAKY_RANK = Path(__file__).with_name("leaky_rank.py")
SECRETS = {
    "PROBE_API_KEYS": "canary-key-one,canary/key+two",
    "PROBE_WEBHOOK_SECRET": "canary-webhook-secret",
    "HF_TOKEN": "hf_canarycanarycanarycanary",
    "PROBE_API_KEY": "canary-of-the-client",
}
CANARY = "canary"


@pytest.fixture(autouse=True)
def nothing_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_values", frozenset())
    monkeypatch.setattr(redaction, "_known", redaction.re.compile(r"(?!)"))


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("key spk_abcdefghijkl_" + "Canary-_7" * 5, "Canary-_7"),
        ("token hf_" + "Canary7" * 5 + ".", "Canary7"),
        ("postgresql+psycopg://probe:canary%40x@db:5432/p", "canary"),
        ("could not connect to 'postgres://u:canary@h/d'", "canary"),
        ("Authorization: Bearer canarycanary", "canary"),
        ("{'authorization': 'bearer canary.canary'}", "canary"),
        ("Proxy-Authorization: Basic Y2FuYXJ5Y2FuYXJ5", "Y2FuYXJ5"),
        ("host=db user=probe password=canary dbname=p", "canary"),
    ],
)
def test_secrets_are_known_by_their_form(text, secret):
    assert secret in text
    assert secret not in redact(text)
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    "text",
    ["", "job_01m81eqwxf0krhtjj53vpgy30e succeeded", "https://example.org:8443/a@b", "see a:b@c",
     "the bearer of news", "basic training", "bearer certificates", "password: wrong",
     "10:30 user@host", "spk_ab_x"],
)  # fmt: skip
def test_other_text_is_left_alone(text):
    assert redact(text) == text


@pytest.mark.parametrize("value", ['quo"te\\back\n', "per%cent+pl us/x", "\u00fcml\u00e4ut-key"])
def test_values_are_found_however_they_are_written(value):
    from urllib.parse import quote, quote_plus

    learn([value, "short"])
    for written in (value, json.dumps(value), repr(value), quote(value), quote_plus(value)):
        shown = redact(f"before {written} after")
        assert shown.startswith("before ")
        assert shown.endswith(" after")
        assert "[secret]" in shown
        assert value.strip()[:6] not in shown
    assert redact("a short word") == "a short word"  # five letters could be any word


def test_longer_values_go_before_those_they_begin_with():
    learn(["canary", "canary-and-more"])
    assert redact("canary-and-more") == "[secret]"


def test_settings_and_environment_are_learned(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-of-aws")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-alarm")
    learn_settings(
        Settings(
            api_keys=[SecretStr("canary-key")],
            webhook_secret=SecretStr("canary-webhook-secret"),
            database_url="postgresql://probe:canary%40db@h/p",
        )
    )
    text = "canary-of-aws canary-key canary-webhook-secret canary@db canary%40db"
    assert CANARY not in redact(text)
    assert redact("false-alarm") == "false-alarm"


@pytest.mark.parametrize(
    "formatter", [RedactingFormatter(logging.Formatter("%(message)s")), RedactedJsonFormatter()]
)
def test_log_lines_and_tracebacks_are_redacted(formatter):
    learn(["canary\"with'quotes"])
    try:
        raise ValueError("in the error: canary\"with'quotes")
    except ValueError:
        record = logging.LogRecord(
            "x", logging.ERROR, "f", 1, "in %s", ("canary\"with'quotes",), sys.exc_info()
        )
    record.event = "canary\"with'quotes"
    line = formatter.format(record)
    assert "in the error" in line
    assert CANARY not in line


def test_a_secret_that_the_end_of_a_log_begins_in_is_not_half_told(tmp_path):
    log = tmp_path / "log"
    told = "-" * (gang._TAIL_LENGTH - 20)
    log.write_text(f"{'x' * 3000} hf_{CANARY * 6}{told}")
    found = gang._tail(log)
    assert found.endswith(told)
    assert CANARY not in found


def test_a_secret_that_what_is_read_of_a_log_begins_in_is_not_half_told(tmp_path, monkeypatch):
    """Where redaction leaves so little of it that all is told."""
    monkeypatch.setattr(redaction, "_known", re.compile(CANARY * 99))
    lines = f"{CANARY * 99}\n" * (gang._READ_BYTES // 99 // len(CANARY) + 9)
    (tmp_path / "log").write_text(lines + "the end")
    found = gang._tail(tmp_path / "log")
    assert found.endswith("the end")
    assert CANARY not in found


def test_a_log_that_ends_in_nothing_but_space_says_so(tmp_path):
    (tmp_path / "log").write_text("begin" + "\n" * (gang._READ_BYTES + 9))
    assert gang._tail(tmp_path / "log") == "(nothing)"


def test_a_long_word_takes_no_longer_than_its_length():
    """The forms of addresses took its square: hours for this one, and held every thread up."""
    word = "0123456789abcdef" * 30_000
    assert redact(word) == word


@pytest.mark.parametrize(
    "wrong",
    [
        {"PROBE_API_KEYS": '["canary-key'},
        {"PROBE_DATABASE_URL": "mysql://u:canary@h/d"},
        {"PROBE_WEBHOOK_SECRET": "canary"},
    ],
)
def test_refused_settings_do_not_show_what_they_hold(monkeypatch, wrong):
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="validation error") as caught:
        Settings()
    assert CANARY not in str(caught.value) + repr(caught.value)


def test_a_database_that_refuses_us_tells_no_password():
    """Nobody listens on port 1: every program that needs the database says so, and no more."""
    url = "postgresql://probe:canary-password@127.0.0.1:1/canary"
    programs = [
        ["server.api", "--port", "0"],
        ["server.worker"],
        ["server.worker", "--check"],
        ["server.key_command", "list"],
    ]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | SECRETS | {"PROBE_DATABASE_URL": url, "PROBE_LOG_LEVEL": "DEBUG"},
        )
        for words in programs
    ]
    for program in running:
        output, _ = program.communicate(timeout=120)
        assert program.returncode != 0
        assert output
        assert "canary-password" not in output
        assert not any(value in output for value in SECRETS.values())


@on_sqlite_only
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_rank_that_tells_all_tells_nobody(lab, monkeypatch, log_format):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    rank = [sys.executable, str(LEAKY_RANK), "{socket}", str(lab.directory / "failed-once")]
    lab.start_worker(
        rank_command=json.dumps(rank), unit_max_attempts=2, log_format=log_format, log_level="DEBUG"
    )
    job_id = lab.submit(num_units=1)
    job = lab.until_status(job_id, "failed")
    assert job.error.code == "unit_crashed"
    log = (lab.data_dir / "logs" / f"{job_id}.log").read_text()
    told = json.loads(log.splitlines()[0]) if log_format == "text" else {}
    assert "PROBE_WORKER_NAME" in log  # the environment is there
    assert set(SECRETS) & set(told) <= {"HF_TOKEN"}  # which ranks fetch with
    for name in ("PROBE_API_KEYS", "PROBE_WEBHOOK_SECRET", "PROBE_API_KEY", "PROBE_DATABASE_URL"):
        assert SECRETS.get(name, lab.database_url) not in log
    told_of = [event.model_dump_json() for event in lab.store.events_after(job_id, 0)]
    assert any("unit.retrying" in event for event in told_of)
    seen = lab.output() + job.model_dump_json() + "".join(told_of)
    assert "401 for" in seen
    assert CANARY not in seen


@on_sqlite_only
def test_a_server_with_secrets_answers_without_them(lab, monkeypatch):
    """Lists, metrics and refusals from the real program, at its most talkative."""
    environment: dict[str, Any] = SECRETS | {
        "PROBE_DATA_DIR": str(lab.data_dir),
        "PROBE_DATABASE_URL": lab.database_url,
        "PROBE_LOG_LEVEL": "DEBUG",
        "PROBE_LOG_FORMAT": "json",
    }
    with (lab.directory / "server.out").open("wb") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "server.api", "--port", "0"],
            env=os.environ | environment,
            stdout=out,
            stderr=out,
        )
    try:
        log = lab.directory / "server.out"

        def port() -> Any:
            assert server.poll() is None, log.read_text()
            found = redaction.re.search(r"running on http://127\.0\.0\.1:(\d+)", log.read_text())
            return found and found[1]

        address = f"http://127.0.0.1:{lab.until(port, 'the server')}"
        seen = []
        for path, key in [
            *(("/v1/jobs", "canary-key-one"), ("/metrics", "canary/key+two"), ("/readyz", "")),
            *(("/v1/jobs", "canary-wrong-key"), ("/v1/jobs/canary-key-one", "canary-key-one")),
        ]:
            request = urllib.request.Request(address + path)
            request.add_header("Authorization", f"Bearer {key}")
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    seen.append(answer.read().decode())
            except urllib.error.HTTPError as error:
                seen.append(error.read().decode())
        assert "probe_jobs" in seen[1]
        assert "there is no job" in seen[4]
    finally:
        server.terminate()
        server.wait(60)
    assert CANARY not in log.read_text() + "".join(seen)
