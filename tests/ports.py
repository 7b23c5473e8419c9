"""Ports of this machine for programs that must be told one before they start."""

import socket


class Ports:
    """Ports nobody else is given until they are let go; whoever is told one may listen there."""

    def __init__(self) -> None:
        self._held: list[socket.socket] = []

    def take(self) -> int:
        """A free port."""
        held = socket.socket()
        self._held.append(held)
        # Bound, not listening: a server, which reuses addresses, may bind it too, and the system
        # gives it to no program that asks for any port.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port

    def close(self) -> None:
        """Let them go."""
        for held in self._held:
            held.close()
