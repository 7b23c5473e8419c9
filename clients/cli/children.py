"""Child processes that never outlive the command that started them.

Each child leads its own process group, so Ctrl-C reaches only us and we end them in order; on
Linux the kernel ends them too when we are killed outright (PR_SET_PDEATHSIG).
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1
_TAIL_BYTES = 8192
# `python -m` puts the current directory first on the path, so a user's own `queue.py` there would
# be run in place of Python's. Grandchildren inherit it.
SAFE_PATH = {"PYTHONSAFEPATH": "1"}

if sys.platform == "linux":
    # Looked up before any fork: dlopen in a forked child of a threaded program can deadlock.
    _PRCTL: Callable[..., int] | None = ctypes.CDLL(None, use_errno=True).prctl
else:
    _PRCTL = None


def _tie_to_parent(parent_pid: int) -> None:
    """Runs in the child before exec: ask for SIGTERM when the parent dies."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the call above took effect
        os._exit(1)


def start_child(
    module: str,
    arguments: Sequence[str] = (),
    *,
    environment: Mapping[str, str] | None = None,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
) -> "subprocess.Popen[bytes]":
    """`python -m module` in a process group of its own, tied to this process's life.

    Call it from the main thread: the kernel's "parent" is the thread that forks.
    """
    parent_pid = os.getpid()
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env={**os.environ, **SAFE_PATH, **(environment or {})},
        process_group=0,
        preexec_fn=lambda: _tie_to_parent(parent_pid),
    )


def stop_children(children: Sequence["subprocess.Popen[bytes]"], *, grace_s: float = 15.0) -> None:
    """End all children: SIGTERM to each, then SIGKILL to the groups of those that stay.

    A second Ctrl-C while waiting goes straight to SIGKILL. The groups are killed in any case,
    so that nothing a child has started stays behind either.
    """
    for child in children:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            child.wait(max(0.05, deadline - time.monotonic()))
    for child in children:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def log_tail(path: Path, *, lines: int = 20) -> str:
    """The last lines of a log; empty where there is none."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            text = stream.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
