"""What a worker does where something is used up: disk, permission, memory, the database's room."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from probe.plan import make_plan
from probe.spec_load import parse_spec
from server.worker import oom_killer
from tests.server.jobs.conftest import Lab

EXPECTED_ETA_C = [2.0, 4.0, 8.0]
SCARCE_RANK = Path(__file__).with_name("scarce_rank.py")


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """On SQLite only: none of this depends on the database."""
    lab = Lab(tmp_path, f"sqlite:///{tmp_path / 'data' / 'probe.db'}")
    yield lab
    lab.close()


def eta_c(lab: Lab, job_id: str) -> list[float | None]:
    return [result.measurements[0].eta_c for result in lab.store.unit_results(job_id)]


def assert_worker_still_works(lab: Lab) -> None:
    job_id = lab.submit()
    lab.until_status(job_id, "succeeded", "failed")
    assert eta_c(lab, job_id) == EXPECTED_ETA_C
    assert lab.workers[0].poll() is None


@pytest.fixture
def small_disk(request, tmp_path: Path):
    """A file system of 4 MiB, in memory, with room for as many files as its parameter says."""
    directory = tmp_path / "small"
    directory.mkdir()
    mounting = subprocess.run(
        [
            "mount",
            "-t",
            "tmpfs",
            "-o",
            f"size=4m,nr_inodes={request.param}",
            "tmpfs",
            str(directory),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounting.returncode != 0:
        pytest.skip(f"a small disk needs the right to mount: {mounting.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(directory: Path) -> Path:
    """Take up all room; removing the file gives it back."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file:
        for block in (1 << 16, 1 << 10, 1):
            try:
                while file.write(bytes(block)) == block:
                    pass
            except OSError:
                continue
    return filler


@pytest.mark.parametrize("small_disk", [2], indirect=True)  # itself, and the filler
def test_a_full_disk_under_the_log_is_named_and_the_unit_waits_for_room(lab, small_disk):
    (lab.data_dir / "logs").symlink_to(small_disk)
    filler = fill(small_disk)
    job_id = lab.submit()
    lab.start_worker(unit_max_attempts=100)
    retried = lab.until(
        lambda: [e for e in lab.store.events_after(job_id, 0) if e.type == "unit.retrying"],
        "the unit to be tried again",
    )
    assert retried[0].data["code"] == "disk_full"
    assert "no room is left on the disk" in retried[0].data["message"]
    filler.unlink()
    assert lab.until_status(job_id, "succeeded", "failed").status == "succeeded"
    assert eta_c(lab, job_id) == EXPECTED_ETA_C


@pytest.mark.parametrize("small_disk", [100], indirect=True)
def test_a_full_disk_under_the_database_loses_nothing(tmp_path, small_disk):
    lab = Lab(small_disk, f"sqlite:///{small_disk / 'data' / 'probe.db'}")
    try:
        job_id = lab.submit({1: ["hold"]})
        lab.start_worker()
        lab.until_started(job_id, 1)
        filler = fill(small_disk)
        lab.release(job_id)
        lab.until(lambda: "trying again" in lab.output(), "the worker to find the disk full")
        filler.unlink()
        assert lab.until_status(job_id, "succeeded", "failed").status == "succeeded"
        assert eta_c(lab, job_id) == EXPECTED_ETA_C
        assert "[SQL" not in lab.output()  # the rows that did not fit are not for the log
    finally:
        lab.close()


def test_a_directory_that_cannot_be_written_is_named(lab):
    logs = lab.data_dir / "logs"
    logs.write_text("not a directory")
    job_id = lab.submit()
    lab.start_worker()
    view = lab.until_status(job_id, "succeeded", "failed")
    assert (view.status, view.error.code) == ("failed", "storage_error")
    assert str(logs) in view.error.message
    assert view.error.unit_id == "0000-step-0"
    logs.unlink()
    assert_worker_still_works(lab)


@pytest.mark.parametrize(
    ("act", "code", "said"),
    [
        ("memory", "out_of_memory", "out of memory"),
        ("python-memory", "out_of_memory", "out of memory"),
        ("disk", "disk_full", "no room is left on the disk at /dev/full"),
        ("read-only", "storage_error", "cannot use a file or directory at /proc/"),
    ],
)
def test_what_a_rank_runs_out_of_is_the_unit_s_error(lab, series_spec, act, code, said):
    plan = make_plan(parse_spec(series_spec | {"labels": {"scarce": act}}))
    job_id = lab.store.create_job(plan=plan, idempotency_key=None, body_sha256="0")[0].id
    command = [sys.executable, str(SCARCE_RANK), "--socket", "{socket}"]
    lab.start_worker(rank_command=json.dumps(command), unit_max_attempts=2)
    view = lab.until_status(job_id, "succeeded", "failed")
    assert (view.status, view.error.code) == ("failed", code)
    assert said in view.error.message
    retried = lab.event_types(job_id).count("unit.retrying")
    assert retried == (1 if code == "disk_full" else 0)
    assert lab.workers[0].poll() is None
    lab.until(lambda: not lab.children(), "the ranks to be gone")


def test_the_kernel_s_kills_for_memory_are_told(tmp_path, monkeypatch):
    counters = tmp_path / "vmstat"
    monkeypatch.setattr(oom_killer, "COUNTERS", counters)
    assert oom_killer.num_kills() == 0  # a system that does not count
    counters.write_text("pgfault 7\noom_kill 3\nother 1\n")
    assert oom_killer.num_kills() == 3
    assert oom_killer.remark(3) == ""
    assert "for lack of memory" in oom_killer.remark(2)
    counters.write_text("pgfault 7\n")
    assert oom_killer.num_kills() == 0
