"""What the server and the worker write to stderr, as text and as JSON."""

import json
import logging
import os
import subprocess
import sys

import pytest

from server.redaction import RedactingFormatter
from server.settings import Settings

SECRET = "hunter2-hunter2"
CODE = """
import logging
from server.log_format import set_up_logging
from server.settings import Settings
set_up_logging(Settings(), worker="w1")
logging.getLogger("server").warning('key "%s" and password=abcdef"x', "hunter2-hunter2",
    extra={"job_id": "job_1", "note": "hunter2-hunter2"})
logging.getLogger("dbos").error("from the queue")
logging.getLogger("uvicorn.error").info("from the web server")
raise RuntimeError("hunter2-hunter2")
"""


def run(tmp_path, **settings):
    env = {f"PROBE_{name}": value for name, value in settings.items()}
    env |= {"PROBE_API_KEYS": SECRET, "PROBE_DATA_DIR": str(tmp_path), "PATH": os.environ["PATH"]}
    ran = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=env)
    assert ran.returncode == 1
    assert SECRET not in ran.stderr
    return ran.stderr.splitlines()


def test_json_has_an_object_per_line_without_secrets(tmp_path):
    ours, queue, web, uncaught = [json.loads(line) for line in run(tmp_path, LOG_FORMAT="json")]
    assert ours["message"] == 'key "[secret]" and password=[secret]"x'
    assert (ours["job_id"], ours["worker"], ours["note"]) == ("job_1", "w1", "[secret]")
    assert (ours["level"], ours["logger"]) == ("WARNING", "server")
    assert (queue["logger"], web["logger"]) == ("dbos", "uvicorn.error")
    assert uncaught["message"] == "RuntimeError: [secret]"
    assert "[secret]" in uncaught["exception"]


def test_text_is_the_default(tmp_path):
    lines = run(tmp_path)
    assert "WARNING server key" in lines[0]
    assert lines[-1] == "RuntimeError: [secret]"


def test_the_level_counts_for_both(tmp_path):
    for format in ("text", "json"):
        lines = run(tmp_path, LOG_FORMAT=format, LOG_LEVEL="ERROR")
        assert not any("password" in line or "web server" in line for line in lines)


def test_another_format_is_refused():
    with pytest.raises(ValueError, match="log_format"):
        Settings(log_format="xml")


def test_a_record_cannot_look_like_two_nor_steer_a_terminal():
    formatter = RedactingFormatter(logging.Formatter("%(levelname)s %(message)s"))
    said = "job a\nINFO all is well\r\x1b[2J\u2028INFO so it is"
    record = logging.LogRecord("x", logging.WARNING, "x.py", 1, said, (), None)
    lines = formatter.format(record).splitlines()
    assert lines[0] == "WARNING job a"
    assert [line[:8] for line in lines[1:]] == ["    INFO"]
    assert not set("".join(lines)) & set("\r\x1b\u2028")
