"""The agent of a gang where there is no cluster to join: the worker hears why, and soon."""

import argparse
import asyncio
import importlib.util
import os
import socket
import sys
import uuid
from collections.abc import Iterator

import pytest

from probe.worker_link import TOKEN
from server.launchers import ray_agent
from server.launchers.ray_node import NodeFacts
from server.worker import gang
from server.worker.processes import MARK
from server.worker.rank_socket import Heard, RankSocket

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="needs Ray: pip install -e '.[ray]'"
    ),
]
FAR_S = 60.0
AGENT = "from server.launchers import ray_agent; ray_agent._JOIN_S = 2; exit(ray_agent.main())"


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never says anything, as a head that hangs does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


async def heard_of_agent(address: str) -> tuple[Heard, int]:
    """What a worker hears of an agent that is to join a cluster, and how the agent ends."""
    ranks = RankSocket("127.0.0.1")
    endpoint = await ranks.listen()
    options = ("--address", address, "--wait-s", "1", "--nodes", "1", "--ranks-per-node", "1")
    where = ("--device", "cpu", "--socket", endpoint.where, "--", "true")
    own = {TOKEN: endpoint.token, MARK: uuid.uuid4().hex}
    agent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", AGENT, *options, *where),
        env=os.environ | own,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(FAR_S):
            return await ranks.receive(), await agent.wait()
    finally:
        if agent.returncode is None:
            agent.kill()
            await agent.wait()
        ranks.close()


def test_which_node_is_lost_is_told_however_much_ray_says(tmp_path):
    agent = ray_agent.RayGang(argparse.Namespace(), mark="", token="")
    agent._facts = [NodeFacts(f"host{node}", f"10.0.0.{node}", 1) for node in range(2)]
    log = tmp_path / "job.log"
    of_ray = f"(raylet) A worker died. {'Some common causes. ' * 60}\n"  # as long as Ray's is
    log.write_text(f"ERROR {agent._lost(1, OSError('no such file. ' * 1000))}\n{of_ray}")
    told = gang._tail(log)
    assert "\nnode 1, host1 (10.0.0.1), is lost or cannot start its ranks\n" in told
    assert "no such file." in told


def test_a_head_that_does_not_listen_is_told_at_once():
    heard, status = asyncio.run(heard_of_agent("127.0.0.1:1"))
    assert (heard.kind, heard.rank, status) == ("error", None, 1)
    assert (heard.message["code"], heard.message["retryable"]) == ("placement_error", True)
    assert "no Ray cluster at '127.0.0.1:1': [Errno 111]" in heard.message["message"]
    assert "PROBE_RAY_ADDRESS" in heard.message["message"]


def test_a_head_that_never_answers_is_given_up(silent_port):
    heard, status = asyncio.run(heard_of_agent(f"127.0.0.1:{silent_port}"))
    assert (heard.kind, heard.rank, status) == ("error", None, 1)
    assert heard.message["code"] == "placement_error"
    assert "did not answer" in heard.message["message"]
