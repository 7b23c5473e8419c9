"""How a worker starts the ranks of a job: a file and a line here for each way.

Nothing in here imports torch or Ray before a gang of that kind starts.
"""

from typing import TYPE_CHECKING

from server.launchers.base import GangShape, Launch, Launcher
from server.launchers.local import LocalLauncher
from server.launchers.ray import RayLauncher

if TYPE_CHECKING:
    from server.settings import Settings

__all__ = ["GangShape", "Launch", "Launcher", "LocalLauncher", "RayLauncher", "launcher_for"]


def launcher_for(settings: "Settings") -> Launcher:
    """The launcher that `PROBE_LAUNCHER` names."""
    if settings.launcher == "ray":
        return RayLauncher(
            address=settings.ray_address,
            listen_host=settings.ray_listen_host,
            wait_s=settings.ray_wait_s,
            command=settings.rank_command,
            collective_timeout_s=settings.collective_timeout_s,
        )
    return LocalLauncher(settings.rank_command, collective_timeout_s=settings.collective_timeout_s)
