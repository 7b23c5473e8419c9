"""The part of a gang on one node of a Ray cluster: it starts the node's ranks and watches them.

`server.launchers.ray_agent` makes it an actor. The ranks are children of the actor's process and
end with it, whichever way it ends: Ray ends actors whose driver is gone, and the kernel then ends
the ranks. Imports Ray for the node's address only.
"""

import os
import select
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from probe.launch import thread_environment
from probe.worker_link import TOKEN
from server.launchers.base import filled_in
from server.worker import tether
from server.worker.processes import MARK, kill_marked

_READ_BYTES = 2**16
_MOST_BYTES = 2**20  # of one report


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What the agent has to know of a node before the ranks start."""

    hostname: str
    address: str
    free_port: int

    def __str__(self) -> str:
        """For messages."""
        return f"{self.hostname} ({self.address})"


@dataclass(frozen=True, slots=True)
class NodePlan:
    """The ranks of one node."""

    first_rank: int
    num_ranks: int  # on this node
    world_size: int  # on all nodes
    node: int
    master: NodeFacts
    command: tuple[str, ...]  # `{python}` is filled in on the node
    environment: dict[str, str]  # a value of the node's own wins
    mark: str
    token: str = field(repr=False)
    directory: str = "/"

    def variables(self, local_rank: int) -> dict[str, str]:
        """What torch.distributed and `probe.rank` read, as torchrun names them."""
        return {
            "RANK": str(self.first_rank + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.num_ranks),
            "GROUP_RANK": str(self.node),
            "MASTER_ADDR": self.master.address,
            "MASTER_PORT": str(self.master.free_port),
            MARK: self.mark,
            TOKEN: self.token,
            "PYTHONUNBUFFERED": "1",
            "PYTHONSAFEPATH": "1",
        }


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What a node has to say: what its ranks printed, and how those that ended did."""

    output: bytes
    exits: dict[int, int]  # rank -> exit status, or minus the signal, as subprocess has it
    num_running: int


class RankNode:
    """The ranks of one node. One call at a time, from the thread that made it."""

    def __init__(self) -> None:
        """Nothing is started yet."""
        self._ranks: dict[int, subprocess.Popen[bytes]] = {}
        self._output = -1  # read end of the pipe that all ranks print to
        self._mark = ""

    def facts(self) -> NodeFacts:
        """Name and address of this node, and a port nothing listens on now."""
        import ray

        address = str(ray.util.get_node_ip_address())
        with socket.create_server((address, 0)) as server:
            port = int(server.getsockname()[1])
        return NodeFacts(socket.gethostname(), address, port)

    def start(self, plan: NodePlan) -> None:
        """Start the ranks.

        Raises:
            OSError: They cannot be started.
        """
        self._mark = plan.mark
        self._output, theirs = os.pipe()
        os.set_blocking(self._output, False)
        inherited = {**plan.environment, **os.environ}
        # Ray gives each of its processes the threads it was asked for as CPUs; ranks share cores.
        inherited.pop("OMP_NUM_THREADS", None)
        inherited |= thread_environment(plan.num_ranks, plan.environment)
        inherited |= _given(plan.environment, "OMP_NUM_THREADS")
        command = filled_in(plan.command, {"python": sys.executable})
        leash = (sys.executable, "-I", "-S", tether.__file__, str(os.getpid()))
        try:
            for local_rank in range(plan.num_ranks):
                self._ranks[plan.first_rank + local_rank] = subprocess.Popen(
                    [*leash, *command],
                    stdin=subprocess.DEVNULL,
                    stdout=theirs,
                    stderr=theirs,
                    env=inherited | plan.variables(local_rank),
                    cwd=plan.directory if Path(plan.directory).is_dir() else None,
                )
        finally:
            os.close(theirs)

    def report(self, wait_s: float) -> NodeReport:
        """What the ranks printed and which ended since the last report.

        Args:
            wait_s: Longest wait for something to report.
        """
        deadline = time.monotonic() + wait_s
        exits: dict[int, int] = {}
        output = b""
        while not output and not exits:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            select.select([self._output] if self._output >= 0 else [], [], [], min(left_s, 0.1))
            exits = self._ended()  # before the output, which then holds its last words
            output = self._printed()
        return NodeReport(output, exits, len(self._ranks))

    def end(self) -> None:
        """Kill what is left of the ranks and of everything they started."""
        if self._mark:  # an empty one is everybody's
            kill_marked(self._mark)
        for process in self._ranks.values():
            process.kill()
            process.wait()
        self._ranks.clear()

    def _ended(self) -> dict[int, int]:
        exits = {rank: process.poll() for rank, process in self._ranks.items()}
        found = {rank: status for rank, status in exits.items() if status is not None}
        for rank in found:
            del self._ranks[rank]
        return found

    def _printed(self) -> bytes:
        printed = bytearray()
        while self._output >= 0 and len(printed) < _MOST_BYTES:
            try:
                part = os.read(self._output, _READ_BYTES)
            except BlockingIOError:
                break
            if not part:  # nobody is left who could print
                os.close(self._output)
                self._output = -1
            printed += part
        return bytes(printed)


def _given(environment: dict[str, str], name: str) -> dict[str, str]:
    return {name: environment[name]} if name in environment else {}
