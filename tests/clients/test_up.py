"""`probe up` with real processes: it starts, restarts, stops, and leaves nothing behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clients.cli.children import log_tail, start_child, stop_children
from clients.http import ProbeClient

LIMIT_S = 90.0


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {LIMIT_S:.0f} s for {what}"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """A zombie counts as dead: whether it is reaped is up to the machine's init."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


class Up:
    """One `probe up` in a process of its own."""

    def __init__(self, data_dir: Path, *words: str, **environment: str) -> None:
        command = [sys.executable, "-m", "clients.cli.main", "up", "--json", "--port", "0", *words]
        keep = {k: v for k, v in os.environ.items() if not k.startswith("PROBE_")}
        self.process = subprocess.Popen(
            command,
            env=keep | {"PROBE_DATA_DIR": str(data_dir)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ready(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        found: dict[str, Any] = json.loads(line)
        return found


@pytest.fixture
def ups(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def start(*words: str, **environment: str) -> Up:
        started.append(Up(tmp_path / "data", *words, **environment))
        return started[-1]

    yield start
    for up in started:
        up.process.kill()
        up.process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_it_stops_cleanly(ups: Callable[..., Up], signum: signal.Signals) -> None:
    up = ups()
    said = up.ready()
    with ProbeClient(said["address"]) as client:
        assert client.ready()
        assert [worker.alive for worker in client.workers().data] == [True]
    up.process.send_signal(signum)
    _, stderr = up.process.communicate(timeout=LIMIT_S)
    assert (up.process.returncode, stderr) == (0, "stopping\n")
    assert not any(is_alive(pid) for pid in said["pids"].values())


@pytest.mark.slow
def test_a_dead_worker_is_replaced_and_kill_9_leaves_nothing(ups: Callable[..., Up]) -> None:
    up = ups()
    said = up.ready()
    old = next(pid for name, pid in said["pids"].items() if name.startswith("worker"))
    os.kill(old, signal.SIGKILL)

    def live_workers() -> set[int]:
        with ProbeClient(said["address"]) as client:
            return {worker.pid for worker in client.workers().data if worker.alive} - {old}

    wait_for(lambda: bool(live_workers()), "the new worker")
    pids = live_workers() | {said["pids"]["server"]}
    assert all(is_alive(pid) for pid in pids)
    up.process.kill()
    wait_for(lambda: not any(is_alive(pid) for pid in pids), "the children to end")


@pytest.mark.slow
def test_a_child_that_dies_at_the_start_ends_it_with_the_log(ups: Callable[..., Up]) -> None:
    up = ups(PROBE_LOG_LEVEL="NOISY")
    _, stderr = up.process.communicate(timeout=LIMIT_S)
    assert up.process.returncode == 1
    assert "ended with status 2" in stderr
    assert "log_level" in stderr  # from the child's log, which repeats no value: it may be a secret


def test_a_port_in_use_is_said_clearly(ups: Callable[..., Up]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        up = ups("--port", str(port))
        _, stderr = up.process.communicate(timeout=LIMIT_S)
    assert up.process.returncode == 1
    assert f"port {port} on 127.0.0.1 is in use by another program" in stderr


def test_an_address_of_another_machine_is_bad_input(ups: Callable[..., Up]) -> None:
    up = ups("--host", "192.0.2.1")  # TEST-NET-1: nobody has it
    _, stderr = up.process.communicate(timeout=LIMIT_S)
    assert up.process.returncode == 2
    assert "cannot listen on 192.0.2.1" in stderr


STUBBORN = """
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), grandchild.pid, flush=True)
grandchild.wait()
"""


def test_a_stubborn_child_and_its_own_children_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    child = start_child("stubborn", stdout=subprocess.PIPE)
    assert child.stdout is not None
    with child.stdout:
        pids = [int(word) for word in child.stdout.readline().split()]
    assert all(is_alive(pid) for pid in pids)
    stop_children([child], grace_s=0.2)
    wait_for(lambda: not any(is_alive(pid) for pid in pids), "both to end")


def test_a_users_own_module_is_not_run_in_place_of_pythons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit('the wrong queue')")
    monkeypatch.chdir(tmp_path)
    child = start_child("queue")
    assert child.wait(LIMIT_S) == 0


def test_the_tail_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    assert log_tail(log) == ""
    log.write_bytes(b"\xff\n" + b"".join(b"line %d\n" % i for i in range(5000)))
    assert log_tail(log, lines=2) == "line 4998\nline 4999"
