"""`--preset` of run and submit: merged before `--set`, named when unknown."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

PRESETS = {"quick": {"measurement": {"repeats": 2, "eta_max": 9.0}, "labels": {"size": "quick"}}}


@pytest.fixture
def job_file(tmp_path: Path, wire: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    directory = tmp_path / "runs" / "step-100"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(8)
    )
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({**wire.spec, "presets": PRESETS}))
    return file


def test_submit_sends_the_merged_job_without_the_section(probe: Any, job_file: Path) -> None:
    done = probe("submit", str(job_file), "--preset", "quick", "--set", "measurement.repeats=7")
    assert (done.exit_code, done.stderr) == (0, "")
    sent = json.loads(probe.server.requests[0].content)
    assert "presets" not in sent
    assert sent["measurement"]["repeats"] == 7  # --set comes last, wherever it stands
    assert sent["measurement"]["eta_max"] == 9.0
    assert sent["labels"] == {"size": "quick"}


def test_run_plan_shows_the_merged_job(probe: Any, job_file: Path) -> None:
    words = ("run", str(job_file), "--plan", "--json")
    whole = json.loads(probe(*words).stdout)
    quick = json.loads(probe(*words, "--preset", "quick").stdout)
    assert whole["spec"]["measurement"]["repeats"] == 1
    assert quick["spec"]["measurement"]["repeats"] == 2
    assert quick["spec_sha256"] != whole["spec_sha256"]
    assert "presets" not in quick["spec"]


@pytest.mark.parametrize("command", ["run", "submit"])
def test_an_unknown_preset_is_bad_input(probe: Any, job_file: Path, command: str) -> None:
    done = probe(command, str(job_file), "--preset", "slow")
    assert done.exit_code == 2
    assert "has no preset 'slow'; choose from: quick" in done.stderr
    assert probe.server.requests == []
