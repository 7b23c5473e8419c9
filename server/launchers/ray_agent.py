"""The agent of a gang on a Ray cluster: `python -m server.launchers.ray_agent`, for the worker.

A driver of the cluster. It reserves one bundle on each of as many nodes, all or nothing, starts
an actor on each, which starts the node's ranks, prints what they print, and ends when they have
ended or the first of them fails. Actors belong to their driver: killed, it takes all of them along.
"""

import argparse
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from probe.errors import ProbeError, UnitCrashedError
from probe.worker_link import TOKEN, connect_to_worker
from server.errors import PlacementError
from server.launchers.ray_node import NodeFacts, NodePlan, NodeReport, RankNode
from server.worker.processes import MARK

_log = logging.getLogger(__name__)

_REPORT_S = 0.5  # a node that has nothing to say says so as often
_END_S = 2.0
_JOIN_S = 60.0
# What ranks get from the worker, where their node has no value of its own; the rest is the node's.
_FORWARDED = ("PROBE_", "HF_", "NCCL_", "GLOO_", "TORCH_", "OMP_NUM_THREADS")


class RayGang:
    """The ranks of one job on the nodes of a cluster, as many on each."""

    def __init__(self, options: argparse.Namespace, mark: str, token: str) -> None:
        """Nothing is started yet."""
        self._options = options
        self._mark = mark
        self._token = token
        self._group: Any = None
        self._actors: list[Any] = []
        self._facts: list[NodeFacts] = []

    def start(self) -> None:
        """Reserve the nodes and start the ranks.

        Raises:
            PlacementError: The nodes are not free in time.
            UnitCrashedError: A node was lost meanwhile, or its ranks cannot be started.
        """
        bundle = self._bundle()
        self._reserve(bundle)
        self._actors = [self._actor(node, bundle) for node in range(self._options.nodes)]
        self._facts = self._ask([actor.facts.remote() for actor in self._actors])
        plans = [self._plan(node) for node in range(self._options.nodes)]
        self._ask(
            [actor.start.remote(plan) for actor, plan in zip(self._actors, plans, strict=True)]
        )

    def watch(self, write: Callable[[str], None]) -> None:
        """Print what the ranks print, until all of them have ended well.

        Args:
            write: Takes whole lines, each with its end.

        Raises:
            UnitCrashedError: A rank or a node is gone.
        """
        import ray

        logs = [NodeLog(node, len(self._actors), write) for node in range(len(self._actors))]
        asked = {self._ask_report(node): node for node in range(len(self._actors))}
        while asked:
            (reference,), _ = ray.wait(list(asked), num_returns=1)
            node = asked.pop(reference)
            try:
                report: NodeReport = ray.get(reference)
            except ray.exceptions.RayError as error:
                raise UnitCrashedError(self._lost(node, error)) from error
            logs[node].add(report.output, is_last=not report.num_running)
            for rank, status in report.exits.items():
                if status != 0:
                    raise UnitCrashedError(self._ended(rank, node, status))
            if report.num_running:
                asked[self._ask_report(node)] = node

    def end(self) -> None:
        """End every rank and let the nodes go; a node that does not answer ends its ranks alone."""
        import ray

        if not ray.is_initialized():
            return
        ending = [actor.end.remote() for actor in self._actors]
        if ending:
            ray.wait(ending, num_returns=len(ending), timeout=_END_S)
        for actor in self._actors:
            ray.kill(actor)
        if self._group is not None:
            ray.util.remove_placement_group(self._group)
        ray.shutdown()

    def _bundle(self) -> dict[str, float]:
        """What is reserved on each node: a GPU or a CPU for each rank."""
        import ray

        device = self._options.device
        on_gpu = device == "cuda" or (
            device == "auto" and ray.cluster_resources().get("GPU", 0) > 0
        )
        return {"GPU" if on_gpu else "CPU": float(self._options.ranks_per_node)}

    def _reserve(self, bundle: dict[str, float]) -> None:
        import ray

        nodes, wait_s = self._options.nodes, self._options.wait_s
        self._group = ray.util.placement_group([bundle] * nodes, strategy="STRICT_SPREAD")
        if not self._group.wait(wait_s):
            asked = " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())
            raise PlacementError(
                f"the job asks for {nodes} {'nodes' if nodes > 1 else 'node'} with {asked} each, "
                f"which were not free within {wait_s:g} s. The cluster has: {_cluster(bundle)}. "
                "Add nodes, lower parallel.nodes or parallel.ranks, or raise PROBE_RAY_WAIT_S."
            )

    def _actor(self, node: int, bundle: dict[str, float]) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        options = {
            "num_cpus": bundle.get("CPU", 0),
            "num_gpus": bundle.get("GPU", 0),
            "max_restarts": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, node),
        }
        return ray.remote(RankNode).options(**options).remote()

    def _ask(self, references: Sequence[Any]) -> list[Any]:
        """The answers of all nodes, in their order."""
        import ray

        answers = []
        for node, reference in enumerate(references):
            try:
                answers.append(ray.get(reference))
            except ray.exceptions.RayError as error:
                raise UnitCrashedError(self._lost(node, error)) from error
        return answers

    def _ask_report(self, node: int) -> Any:
        return self._actors[node].report.remote(_REPORT_S)

    def _plan(self, node: int) -> NodePlan:
        options = self._options
        return NodePlan(
            first_rank=node * options.ranks_per_node,
            num_ranks=options.ranks_per_node,
            world_size=options.nodes * options.ranks_per_node,
            node=node,
            master=self._facts[0],
            command=tuple(options.command),
            environment={k: v for k, v in os.environ.items() if k.startswith(_FORWARDED)},
            mark=f"{self._mark}.node{node}.",
            token=self._token,
            directory=os.getcwd(),
        )

    def _name(self, node: int) -> str:
        return f"node {node}" + (f", {self._facts[node]}" if self._facts else "")

    def _lost(self, node: int, error: Exception) -> str:
        # Only the end of a log is told. Ray's words are long, and it prints a thousand characters
        # more of its own accord, before this or after: so ours, which matter most, come last.
        return f"Ray: {error}\n{self._name(node)}, is lost or cannot start its ranks"

    def _ended(self, rank: int, node: int, status: int) -> str:
        how = _signal_name(-status) if status < 0 else f"ended with exit status {status}"
        return f"rank {rank} on {self._name(node)}, {how}"


class NodeLog:
    """The lines of one node, marked with its number where there are several."""

    def __init__(self, node: int, num_nodes: int, write: Callable[[str], None]) -> None:
        """Lines go to `write`."""
        self._prefix = f"[node {node}] " if num_nodes > 1 else ""
        self._write = write
        self._begun = b""

    def add(self, output: bytes, *, is_last: bool) -> None:
        """Write the lines that are whole by now; at the end also what is left of one."""
        *lines, self._begun = (self._begun + output).split(b"\n")
        if is_last and self._begun:
            lines.append(self._begun)
            self._begun = b""
        for line in lines:
            self._write(f"{self._prefix}{line.decode(errors='replace')}\n")


def _signal_name(number: int) -> str:
    return f"was killed by signal {number} ({signal.strsignal(number) or 'unknown'})"


def _cluster(bundle: dict[str, float]) -> str:
    """Every living node with what it has of what was asked for."""
    import ray

    names = list(bundle)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    free = ray.available_resources()
    each = [
        f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}) with "
        + " and ".join(f"{node['Resources'].get(name, 0):g} {name}" for name in names)
        for node in nodes
    ]
    in_all = " and ".join(f"{free.get(name, 0):g} {name}" for name in names)
    return f"{'; '.join(each) or 'no node'}; free in all: {in_all}"


def report_error(error: ProbeError, where: str, token: str) -> None:
    """Tell the worker why no rank will report, as a rank would."""
    event = {
        "type": "error",
        "unit_id": None,
        "rank": None,
        "code": error.code,
        "message": str(error),
        "retryable": error.retryable,
        "traceback": "",
    }
    with connect_to_worker(where, token) as connection:
        connection.sendall(json.dumps(event).encode() + b"\n")


def join_cluster(address: str, give_up: Callable[[PlacementError], None]) -> None:
    """Become a driver of the cluster.

    Args:
        address: HOST:PORT of its head, or `auto`.
        give_up: Called from another thread where Ray has not answered for a minute. It tries for
            much longer, does not heed signals meanwhile, and has to be left by ending the process.

    Raises:
        PlacementError: There is no such cluster, or this machine is not part of it.
    """
    import ray

    advice = "Start one that this machine belongs to (ray start), or set PROBE_RAY_ADDRESS."
    silent = PlacementError(f"the Ray cluster at {address!r} did not answer. {advice}")
    timer = threading.Timer(_JOIN_S, give_up, (silent,))
    timer.daemon = True
    timer.start()
    try:
        if address != "auto":
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), _JOIN_S).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as error:
        raise PlacementError(f"no Ray cluster at {address!r}: {error}. {advice}") from error
    finally:
        timer.cancel()


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 when every rank ended well, else 1."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(message)s")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    token = os.environ.pop(TOKEN, "")

    def report(error: ProbeError) -> None:
        _log.error("%s", error)
        report_error(error, options.socket, token)

    def give_up(error: PlacementError) -> None:
        report(error)
        os._exit(1)

    gang = RayGang(options, os.environ[MARK], token)
    try:
        join_cluster(options.address, give_up)
        gang.start()
        gang.watch(_print)
    except PlacementError as error:
        report(error)
        return 1
    except ProbeError as error:
        _log.error("%s", error)
        return 1
    finally:
        gang.end()
    return 0


def _print(line: str) -> None:
    sys.stderr.write(line)
    sys.stderr.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m server.launchers.ray_agent")
    parser.add_argument("--address", required=True, help="of the cluster's head, or auto")
    parser.add_argument("--wait-s", type=float, required=True, help="for the nodes to be free")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--ranks-per-node", type=int, required=True)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], required=True)
    parser.add_argument("--socket", required=True, help="of the worker, tcp://HOST:PORT")
    parser.add_argument("command", nargs="+", help="of one rank")
    return parser


if __name__ == "__main__":
    sys.exit(main())
