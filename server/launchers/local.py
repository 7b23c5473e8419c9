"""Launcher `local`: the ranks are on this machine, under torchrun."""

import sys
from collections.abc import Mapping

from probe.launch import TORCHRUN, refuse_several_nodes, thread_environment, torchrun_arguments
from server.launchers.base import GangShape, Launch, filled_in
from server.worker.rank_socket import Endpoint


class LocalLauncher:
    """Starts one process that starts the ranks; they report over a unix socket."""

    listen_host = None
    wait_s = 0.0

    def __init__(
        self, command: tuple[str, ...] = (), *, collective_timeout_s: float = 600.0
    ) -> None:
        """Nothing is started yet.

        Args:
            command: What to start instead of torchrun; `{socket}` and `{ranks}` are filled in.
            collective_timeout_s: Seconds one rank waits for the others in one exchange; for
                torchrun's ranks.
        """
        self._command = tuple(command)
        self._collective_timeout_s = collective_timeout_s

    def launch(
        self, shape: GangShape, endpoint: Endpoint, environment: Mapping[str, str]
    ) -> Launch:
        """See `Launcher.launch`."""
        refuse_several_nodes(shape.num_nodes, "launcher local")
        command = self._command or self._torchrun(shape.num_ranks)
        values = {"socket": endpoint.where, "ranks": str(shape.num_ranks)}
        threads = thread_environment(shape.num_ranks, environment)
        return Launch(filled_in(command, values), threads)

    def _torchrun(self, num_ranks: int) -> tuple[str, ...]:
        timeout = f"{self._collective_timeout_s:g}"
        options = ("--socket", "{socket}", "--collective-timeout-s", timeout)
        return (sys.executable, "-m", TORCHRUN, *torchrun_arguments(num_ranks, *options))
