"""The lock file of a worker's name: held for as long as the worker lives, however it ends.

A lock that can be had says that its last holder is gone; no clock is asked. That holds on one
machine, or wherever the workers of a data directory are: elsewhere the lease in the database
decides. The file keeps which process instances have held it, so that the lease of one of them is
known to be void.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from server.errors import WorkerNameTakenError
from server.settings import Settings

_WAIT_S = 1.0  # another worker may hold a dead one's lock for the moment it takes its jobs over


def lock_path(data_dir: Path, name: str) -> Path:
    """The file that the worker of this name locks."""
    return data_dir / f"worker-{name}.lock"


class NameLock:
    """A lock that is held. The file: process id, then instances, the holder's own first."""

    def __init__(self, file: IO[str]) -> None:
        """The file is open and locked."""
        self._file = file
        file.seek(0)
        self.ended = file.read().split()[1:]

    def write(self, *instances: str) -> None:
        """Note who holds the lock, and whose leases are still to be replaced."""
        self._file.truncate(0)
        self._file.write(" ".join((str(os.getpid()), *instances)))
        self._file.flush()


@contextmanager
def hold_name(settings: Settings) -> Iterator[NameLock]:
    """Hold the lock of the worker's name while the block runs.

    Raises:
        WorkerNameTakenError: A worker of that name runs on this data directory.
    """
    path = lock_path(settings.data_dir, settings.worker_name)
    with path.open("a+") as file:
        deadline = time.monotonic() + _WAIT_S
        while not (locked := try_lock(file)) and time.monotonic() < deadline:
            time.sleep(0.02)
        if not locked:
            file.seek(0)
            holder = (file.read().split() or ["unknown"])[0]
            raise WorkerNameTakenError(
                f"a worker named {settings.worker_name!r} already runs here "
                f"(process {holder}): use --name to start another one"
            )
        yield NameLock(file)


def try_lock(file: IO[str]) -> bool:
    """Lock the file, unless another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
