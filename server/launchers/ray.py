"""Launcher `ray`: the ranks are on the nodes of a Ray cluster, as many on each.

The agent is a driver of that cluster (`server.launchers.ray_agent`), so a Ray that hangs or
crashes takes one gang with it and never the worker. Ray is imported there and nowhere else.
"""

import importlib.util
import socket
import sys
from collections.abc import Mapping

from probe.errors import ConfigError
from probe.worker_link import TOKEN
from server.launchers.base import GangShape, Launch, filled_in
from server.worker.rank_socket import Endpoint

_AGENT = "server.launchers.ray_agent"
_ANYWHERE = "198.51.100.1"  # reserved for documentation; nothing is sent to it


class RayLauncher:
    """Starts one driver of the cluster; its ranks report over TCP."""

    def __init__(
        self,
        *,
        address: str = "auto",
        listen_host: str | None = None,
        wait_s: float = 300.0,
        command: tuple[str, ...] = (),
        collective_timeout_s: float = 600.0,
    ) -> None:
        """Nothing is started yet.

        Args:
            address: HOST:PORT of the head of the cluster; `auto`: that of this machine.
            listen_host: Address of this machine that nodes reach; None: it is found.
            wait_s: Seconds a gang may wait for its nodes.
            command: Of one rank, instead of `python -m probe.rank`; `{socket}`, `{ranks}` and
                `{python}` (the node's interpreter) are filled in.
            collective_timeout_s: Seconds one rank waits for the others in one exchange.
        """
        self.wait_s = wait_s
        self._address = address
        self._listen_host = listen_host
        timeout = f"{collective_timeout_s:g}"
        self._command = tuple(command) or (
            *("{python}", "-m", "probe.rank", "--socket", "{socket}"),
            *("--collective-timeout-s", timeout),
        )

    @property
    def listen_host(self) -> str | None:
        """The address set, or that of the way from here to the cluster's head."""
        return self._listen_host or _own_address(self._address.rpartition(":")[0])

    def launch(
        self, shape: GangShape, endpoint: Endpoint, environment: Mapping[str, str]
    ) -> Launch:
        """See `Launcher.launch`."""
        if importlib.util.find_spec("ray") is None:
            raise ConfigError(
                "PROBE_LAUNCHER is ray, but Ray is not installed here: "
                "pip install 'sharpness-probe[ray]', on every node, or use launcher local"
            )
        options = {
            "--address": self._address,
            "--wait-s": f"{self.wait_s:g}",
            "--nodes": str(shape.num_nodes),
            "--ranks-per-node": str(shape.num_ranks // shape.num_nodes),
            "--device": shape.device,
            "--socket": endpoint.where,
        }
        words = [word for option in options.items() for word in option]
        values = {"socket": endpoint.where, "ranks": str(shape.num_ranks)}
        rank = filled_in(self._command, values)
        command = (sys.executable, "-m", _AGENT, *words, "--", *rank)
        return Launch(command, {TOKEN: endpoint.token})


def _own_address(head: str) -> str:
    """The address from which packets to the head leave; without a head, those to anywhere."""
    # Connecting a datagram socket sends nothing; it only looks the way up.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((head or _ANYWHERE, 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
