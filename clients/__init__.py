"""What talks to a Sharpness Probe server: the Python client and the `probe` command.

Nothing here imports torch; measurements run in child processes or on the server.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clients.errors import ApiError as ApiError
    from clients.errors import ServerUnavailableError as ServerUnavailableError
    from clients.http import ProbeClient as ProbeClient

_HOME = {
    "ApiError": "clients.errors",
    "ProbeClient": "clients.http",
    "ServerUnavailableError": "clients.errors",
}
__all__ = ["ApiError", "ProbeClient", "ServerUnavailableError"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'clients' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
