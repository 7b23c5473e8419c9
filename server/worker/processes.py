"""Find and end every process of a gang, whoever its parent is by now.

A gang is known by a mark in its environment, which children and grandchildren inherit. Process
groups do not serve: torchrun gives each rank a session of its own, and a killed agent leaves
its ranks to init.
"""

import os
import signal
import time
from pathlib import Path

MARK = "PROBE_GANG"
_PROC = Path("/proc")


def marked_processes(mark: str) -> list[int]:
    """Living processes of this user whose `PROBE_GANG` starts with `mark`; zombies left out.

    Empty where there is no /proc. Cost: one small read per process of the machine.
    """
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in _PROC.glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:  # ended meanwhile, or another user's
            continue
        if any(variable.startswith(wanted) for variable in environment.split(b"\0")):
            found.append(int(entry.name))
    return [pid for pid in found if pid != os.getpid()]


def kill_marked(mark: str, *, wait_s: float = 0.5) -> list[int]:
    """SIGKILL every process that carries the mark, again until none is left.

    Returns:
        What still lives after `wait_s`: processes stuck in the kernel.
    """
    deadline = time.monotonic() + wait_s
    while left := marked_processes(mark):
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > deadline:
            return left
        time.sleep(0.005)
    return []
