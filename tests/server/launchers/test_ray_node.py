"""What an actor does on its node, without Ray: starts ranks, tells what becomes of them."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from server.launchers.ray_agent import NodeLog
from server.launchers.ray_node import NodeFacts, NodePlan, RankNode
from server.worker.processes import marked_processes

FAR_S = 30.0


def plan(*command: str, num_ranks: int = 2, **changed) -> NodePlan:
    values = {
        "first_rank": 2,
        "num_ranks": num_ranks,
        "world_size": 4,
        "node": 1,
        "master": NodeFacts("head", "192.0.2.1", 7000),
        "command": command,
        "environment": {},
        "mark": f"{uuid.uuid4().hex}.",
        "token": "the token",
    }
    return NodePlan(**(values | changed))


@pytest.fixture
def node():
    node = RankNode()
    yield node
    node.end()


def python(program: str) -> tuple[str, ...]:
    return ("{python}", "-c", f"import os, sys, time; {program}")


def reports(node: RankNode) -> tuple[str, dict[int, int]]:
    """Everything until no rank runs: output and exits."""
    output, exits = b"", {}
    deadline = time.monotonic() + FAR_S
    while time.monotonic() < deadline:
        report = node.report(0.5)
        output += report.output
        exits |= report.exits
        if not report.num_running:
            return output.decode(), exits
    raise AssertionError(f"ranks still run: {output!r}")


def test_output_comes_before_the_end_and_ends_are_told_by_rank(node):
    node.start(plan(*python("r = os.environ['RANK']; os.write(2, (r * 3).encode()); exit(int(r))")))
    output, exits = reports(node)
    assert sorted(output) == sorted("222333")
    assert exits == {2: 2, 3: 3}


def test_a_rank_that_prints_more_than_a_pipe_holds_is_read_to_its_end(node):
    node.start(plan(*python("sys.stdout.write('x' * 3_000_000)"), num_ranks=1))
    output, exits = reports(node)
    assert (len(output), exits) == (3_000_000, {2: 0})


def test_a_killed_rank_is_told_by_its_signal(node):
    node.start(plan(*python("os.kill(os.getpid(), 9)"), num_ranks=1))
    assert reports(node)[1] == {2: -9}


def test_the_node_s_variables_win_but_for_threads(node, monkeypatch, tmp_path):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # as Ray sets it
    given = {"NCCL_SOCKET_IFNAME": "eth0", "HF_HOME": "/shared", "OMP_NUM_THREADS": "3"}
    names = ("NCCL_SOCKET_IFNAME", "HF_HOME", "OMP_NUM_THREADS", "RANK", "MASTER_PORT")
    show = python(f"print(*[os.environ[n] for n in {names}], os.getcwd())")
    node.start(plan(*show, num_ranks=1, environment=given, directory=str(tmp_path)))
    assert reports(node)[0].split() == ["ib0", "/shared", "3", "2", "7000", str(tmp_path)]


@pytest.mark.parametrize(("num_ranks", "expected"), [(1, None), (2, max(1, os.cpu_count() // 2))])
def test_cores_are_shared_among_the_ranks_of_a_node(node, monkeypatch, num_ranks, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # Ray's, for five CPUs
    # In one write: the ranks share a pipe.
    show = python("os.write(1, f\"{os.environ.get('OMP_NUM_THREADS')} \".encode())")
    node.start(plan(*show, num_ranks=num_ranks, directory="/not/there"))
    assert set(reports(node)[0].split()) == {str(expected)}


def test_the_end_reaches_what_ranks_have_started(node):
    child = "subprocess.Popen(['sleep', '600'], start_new_session=True); time.sleep(600)"
    begun = plan(*python(f"import subprocess; {child}"))
    node.start(begun)
    while len(marked_processes(begun.mark)) < 4:
        node.report(0.05)
    node.end()
    assert marked_processes(begun.mark) == []


ACTOR = """
import json, os, sys, time
from server.launchers.ray_node import NodeFacts, NodePlan, RankNode
node = RankNode()
master = NodeFacts("head", "192.0.2.1", 7000)
node.start(NodePlan(0, 2, 2, 0, master, ("sleep", "600"), {}, sys.argv[1], "the token"))
print("started", flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: PR_SET_PDEATHSIG")
def test_ranks_end_with_their_actor_though_they_watch_for_nothing():
    mark = f"{uuid.uuid4().hex}."
    actor = subprocess.Popen(
        [sys.executable, "-c", ACTOR, mark], stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]
    )
    with actor:
        assert actor.stdout.readline() == b"started\n"
        deadline = time.monotonic() + FAR_S
        while len(marked_processes(mark)) != 2:  # one that becomes its command shows none for a bit
            assert time.monotonic() < deadline
        actor.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + FAR_S
    while marked_processes(mark):
        assert time.monotonic() < deadline


def test_a_node_that_never_started_ranks_ends_nobody_s(node, monkeypatch):
    monkeypatch.setattr("server.launchers.ray_node.kill_marked", lambda mark: pytest.fail(mark))
    node.end()


def test_lines_are_whole_and_marked_with_their_node():
    written: list[str] = []
    log = NodeLog(1, 2, written.append)
    log.add(b"one\ntw", is_last=False)
    assert written == ["[node 1] one\n"]
    log.add(b"o\n\xff", is_last=False)
    log.add(b"", is_last=True)
    assert written[1:] == ["[node 1] two\n", "[node 1] \ufffd\n"]
    alone: list[str] = []
    NodeLog(0, 1, alone.append).add(b"one\n", is_last=True)
    assert alone == ["one\n"]
