"""Finds the checkers that come as wheels with the extra `dev`, or stand on the machine."""

import shutil
import sys
from pathlib import Path

import pytest


def program(name: str) -> str:
    """Its path; skips the test, naming it, where it is missing."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found
