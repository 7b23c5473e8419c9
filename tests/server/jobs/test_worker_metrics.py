"""A worker's own metrics, and what its heartbeat tells of GPUs."""

import json
import os
import subprocess
import time
import urllib.request

import pytest

from server.worker.gpu_memory import GpuMemory, parse


def test_nvidia_smi_s_table():
    text = "0, NVIDIA H100 80GB HBM3, 1024, 81559\n1, A card, with a comma, 0, 16\n2, M, [N/A], 1\n"
    first, second = parse(text)
    assert (first.index, first.name) == (0, "NVIDIA H100 80GB HBM3")
    assert (first.memory_used_bytes, first.memory_total_bytes) == (2**30, 81559 * 2**20)
    assert (second.name, second.memory_total_bytes) == ("A card, with a comma", 2**24)
    assert parse("") == []
    with pytest.raises(ValueError, match="not enough values"):
        parse("Failed to initialize NVML\n")


def test_what_nvidia_smi_says_is_found_and_forgotten_when_it_fails(tmp_path, monkeypatch):
    answer = tmp_path / "answer"
    answer.write_text("0, fake, 1, 2\n")
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nexec cat {answer}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    memory = GpuMemory(interval_s=0.01)
    try:
        until(lambda: memory.latest)
        assert memory.latest[0].memory_used_bytes == 2**20
        answer.unlink()
        until(lambda: not memory.latest)
    finally:
        memory.stop()


def test_without_nvidia_smi_there_is_no_thread(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    before = subprocess.Popen  # nothing is started
    monkeypatch.setattr(subprocess, "Popen", None)
    assert GpuMemory().latest == []
    monkeypatch.setattr(subprocess, "Popen", before)


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def database_url(tmp_path):
    return f"sqlite:///{tmp_path / 'data' / 'probe.db'}"


def scrape(address):
    with urllib.request.urlopen(address, timeout=30) as answer:
        return answer.read().decode()


@pytest.mark.slow
def test_a_worker_tells_its_units_failures_jobs_and_heartbeat(lab):
    # Port 0 is any free one; the log names it.
    lab.start_worker(worker_metrics_port=0, log_format="json")
    said = lab.until(lambda: "metrics at http" in lab.output() and lab.output(), "the address")
    address = said.split("metrics at ")[1].split('"')[0].split()[0]
    done = lab.submit({1: ["error", "ok"]}, num_units=2)
    lab.until_status(done, "succeeded")
    held = lab.submit({0: ["hold"]}, num_units=1)
    lab.until_started(held, 0)
    text = scrape(address)
    kind = 'kind="checkpoint_series"'
    assert f"probe_worker_unit_seconds_count{{{kind}}} 2.0" in text
    assert f"probe_worker_forward_passes_total{{{kind}}} 8.0" in text
    assert 'probe_worker_unit_failures_total{code="fake_error"} 1.0' in text
    assert 'probe_worker_jobs{worker="w"} 1.0' in text
    assert 'probe_worker_heartbeat_age_seconds{worker="w"}' in text
    assert "job_" not in text
    lab.release(held)
    lab.until_status(held, "succeeded")


@pytest.mark.slow
def test_json_records_of_a_worker_name_job_and_unit(lab):
    worker = lab.start_worker(log_format="json")
    job_id = lab.submit({0: ["error", "ok"]}, num_units=1)
    lab.until_status(job_id, "succeeded")
    worker.terminate()
    worker.wait(60)
    records = [json.loads(line) for line in lab.output().splitlines()]
    assert {record["worker"] for record in records} == {"w"}
    (retry,) = [record for record in records if record.get("event") == "unit.retrying"]
    assert (retry["job_id"], retry["unit_id"], retry["level"]) == (job_id, "0000-step-0", "WARNING")


@pytest.mark.slow
def test_an_address_that_cannot_be_had_is_a_sentence(lab):
    worker = lab.start_worker(worker_metrics_port=0, worker_metrics_host="192.0.2.1")
    assert worker.wait(120) == 1
    assert "PROBE_WORKER_METRICS_PORT: cannot listen on 192.0.2.1:0" in lab.output()
