"""What a launcher is: the way from "so many ranks on so many machines" to one child process.

Whatever it starts, the worker holds a single process, the gang's agent: when that is killed, with
whatever signal, every rank must end within seconds. What the agent prints is the gang's log.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from server.worker.rank_socket import Endpoint


@dataclass(frozen=True, slots=True)
class GangShape:
    """Which processes a job gets."""

    num_ranks: int = 1
    num_nodes: int = 1  # machines, with as many ranks on each
    device: str = "auto"  # model.device of the spec

    @classmethod
    def of(cls, spec: Mapping[str, Any], num_ranks: int) -> Self:
        """The shape of a job whose number of ranks is known.

        Args:
            spec: Resolved, of any kind; what stands there of nodes and device counts.
            num_ranks: On all nodes together.
        """
        nodes = (spec.get("parallel") or {}).get("nodes", 1)
        return cls(num_ranks, nodes, str((spec.get("model") or {}).get("device", "auto")))


@dataclass(frozen=True, slots=True)
class Launch:
    """The agent of one gang: its command, and variables it gets beside the worker's own."""

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


class Launcher(Protocol):
    """One way to start gangs. Holds settings only; gangs of several jobs share it."""

    @property
    def listen_host(self) -> str | None:
        """Address of this machine that the ranks report to; None: all of them are on it."""

    @property
    def wait_s(self) -> float:
        """Seconds a gang may wait for machines before its start begins."""

    def launch(
        self, shape: GangShape, endpoint: Endpoint, environment: Mapping[str, str]
    ) -> Launch:
        """What to start for one gang.

        Args:
            shape: Of the gang.
            endpoint: Where its ranks report.
            environment: Variables the agent will have from the worker.

        Raises:
            ConfigError: This launcher cannot start such a gang.
        """


def filled_in(command: tuple[str, ...], values: Mapping[str, str]) -> tuple[str, ...]:
    """The command with `{name}` replaced by its value, for every name of `values`."""
    filled = []
    for part in command:
        for name, value in values.items():
            part = part.replace("{" + name + "}", value)
        filled.append(part)
    return tuple(filled)
