"""`probe.rank` that runs out of something, as its label `scarce` says, by the system's word."""

import os
import sys
from pathlib import Path

import torch

from probe import rank
from probe.engine import Session


def run_out(of: str) -> None:
    if of == "memory":
        torch.empty(2**50)
    if of == "python-memory":
        bytes(2**60)
    if of == "disk":
        _write(Path("/dev/full"))
    if of == "read-only":
        _write(Path("/proc/version"))


def _write(path: Path) -> None:
    try:
        with path.open("wb", buffering=0) as file:
            file.write(b"x")
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


if __name__ == "__main__":
    make_session = Session.__init__

    def make_scarce_session(session, spec):
        run_out(spec.labels["scarce"])
        make_session(session, spec)

    Session.__init__ = make_scarce_session
    status = rank.main()
    sys.stdout.flush()
    os._exit(status)
