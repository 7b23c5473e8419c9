"""How a rank reaches the worker that feeds it: a unix socket here, TCP from another machine.

Over TCP everybody on the network can knock, so what a rank says first is the token of its gang,
which it has from its environment and which never stands on a command line. Torch-free.
"""

import os
import socket
import sys

from probe.errors import ConfigError, ParallelismError

TOKEN = "PROBE_GANG_TOKEN"
TOKEN_BYTES = 64  # hexadecimal digits of 256 random bits; a newline follows
_TCP = "tcp://"
_CONNECT_S = 30.0
# A machine that vanishes closes nothing; the kernel asks after 30 s and gives up a minute later.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}


def tcp_address(host: str, port: int) -> str:
    """What `connect_to_worker` takes for a worker that listens on TCP."""
    return f"{_TCP}[{host}]:{port}" if ":" in host else f"{_TCP}{host}:{port}"


def connect_to_worker(where: str, token: str | None = None) -> socket.socket:
    """A connection that the worker accepts as one of its gang's.

    Args:
        where: Path of a unix socket, or `tcp://HOST:PORT`.
        token: For TCP; None: `PROBE_GANG_TOKEN` is taken out of the environment, so that
            programs this process starts do not get it.

    Raises:
        ConfigError: There is no token, or the address is none.
        ParallelismError: Nobody answers there.
    """
    if not where.startswith(_TCP):
        return _connect_here(where)
    if token is None:
        token = os.environ.pop(TOKEN, "")
    host, _, port = where.removeprefix(_TCP).rpartition(":")
    if not token or not host or not port.isdecimal():
        missing = f"{TOKEN} is not set" if host and port.isdecimal() else "expected tcp://HOST:PORT"
        raise ConfigError(f"cannot report to a worker at {where}: {missing}")
    try:
        return _connect_there((host.strip("[]"), int(port)), token)
    except OSError as error:
        raise ParallelismError(
            f"{socket.gethostname()} cannot reach the worker at {where}: {error}. The worker's "
            "PROBE_RAY_LISTEN_HOST must be an address of it that every node reaches."
        ) from error


def _connect_here(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection


def _connect_there(address: tuple[str, int], token: str) -> socket.socket:
    connection = socket.create_connection(address, _CONNECT_S)
    try:
        connection.settimeout(None)
        keep_alive(connection)
        connection.sendall(token.encode() + b"\n")
    except OSError:
        connection.close()
        raise
    return connection


def keep_alive(connection: socket.socket) -> None:
    """Have the kernel find out within 90 s that the other machine is gone; send at once."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if sys.platform == "linux":
        for option, value in _KEEP_ALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
