"""One JSON object per record, whatever the record holds."""

import json
import logging
import os
import subprocess
import sys
import threading

import pytest

from probe.json_log import JOB_ID, JsonFormatter, log_fields


def formatted(formatter=None, **record):
    attributes = {"name": "a.b", "levelname": "INFO", "msg": "says %s", "args": ("this",)}
    made = logging.makeLogRecord(attributes | {"created": 0.25} | record)
    line = (formatter or JsonFormatter()).format(made)
    assert "\n" not in line
    return json.loads(line)


def test_a_record_has_these_keys_and_no_others():
    assert formatted() == {
        "time": "1970-01-01T00:00:00.250+00:00",
        "level": "INFO",
        "logger": "a.b",
        "message": "says this",
    }


def test_what_is_given_with_a_record_stands_in_it():
    found = formatted(event="unit.failed", job_id="job_1", step=7, eta=0.5, path=os, lines="a\nb")
    assert (found["event"], found["job_id"], found["step"], found["eta"]) == (
        *("unit.failed", "job_1"),
        *(7, 0.5),
    )
    assert found["lines"] == "a\nb"
    assert "module 'os'" in found["path"]


def test_a_number_that_json_lacks_is_a_text():
    assert formatted(loss=float("nan"))["loss"] == "nan"
    assert formatted(loss=float("inf"))["loss"] == "inf"


def test_an_exception_is_one_value():
    try:
        raise ValueError("no such step")
    except ValueError:
        found = formatted(exc_info=sys.exc_info())
    assert found["exception"].startswith("Traceback")
    assert found["exception"].endswith("ValueError: no such step")


def test_the_nearest_field_wins_and_none_replaces_what_a_record_has():
    formatter = JsonFormatter(worker="w", job_id="constant", level="no")
    with log_fields(job_id="job_1", unit_id="a"), log_fields(unit_id="b"):
        found = formatted(formatter)
        assert (found["worker"], found["job_id"], found["unit_id"]) == ("w", "job_1", "b")
        assert found["level"] == "INFO"
        assert formatted(formatter, unit_id="c")["unit_id"] == "c"
    assert formatted(formatter)["job_id"] == "constant"
    assert "unit_id" not in formatted(formatter)


def test_fields_of_one_thread_are_not_in_another_s_records():
    found = []
    with log_fields(job_id="job_1"):
        thread = threading.Thread(target=lambda: found.append(formatted()))
        thread.start()
        thread.join()
    assert "job_id" not in found[0]


CODE = """
import logging, sys, threading, warnings
from probe.json_log import JsonFormatter, log_as_json
logging.basicConfig()  # as a library might have
log_as_json(JsonFormatter(rank=3))
warnings.warn("careful")
logging.getLogger("x").info("hello", extra={"event": "e"})
thread = threading.Thread(target=lambda: 1 / 0)
thread.start(); thread.join()
raise RuntimeError("the end")
"""


def test_every_line_of_a_process_is_a_record():
    ran = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    lines = [json.loads(line) for line in ran.stderr.splitlines()]
    assert [line["rank"] for line in lines] == [3] * 4
    assert "careful" in lines[0]["message"]
    assert lines[1]["event"] == "e"
    assert "ZeroDivisionError" in lines[2]["exception"]
    assert (lines[3]["event"], lines[3]["message"]) == ("uncaught", "RuntimeError: the end")


@pytest.mark.slow
def test_a_rank_names_its_job_and_itself(tmp_path):
    env = {"PROBE_LOG_FORMAT": "json", JOB_ID: "job_1", "RANK": "1"}
    code = (
        "import logging; from probe.rank import Measurer, _set_up_logging; _set_up_logging(); "
        "Measurer(lambda message: None).measure({'unit_id': 'u', 'index': 0}, None)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env
    )
    found = json.loads(ran.stderr.splitlines()[-1])
    assert (found["job_id"], found["rank"], found["unit_id"]) == ("job_1", 1, "u")
    assert found["event"] == "unit.failed"
    assert "ConfigError" in found["exception"]
