"""Become a command that cannot outlive its parent: `python tether.py PARENT_PID COMMAND ...`.

Linux sends SIGKILL to the command when the thread that started it ends, even by kill -9 (an agent
of torchrun can hang in its own SIGTERM handler; its ranks watch for its end themselves). This
is done here, after the fork, because code run between fork and exec in a threaded parent can
deadlock. Elsewhere than on Linux the ranks notice by themselves: their socket closes.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Arm the signal, make sure the parent is still there, and exec."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the signal was armed
        sys.exit(1)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"cannot start {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
