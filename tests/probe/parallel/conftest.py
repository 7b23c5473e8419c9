"""One launch of ranks per back-end and size, for all tests of this directory."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from sharded_cases import prepare, run_ranks


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return prepare(tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="session")
def run_gang(prepared: SimpleNamespace) -> Callable[[str, int], SimpleNamespace]:
    """What the ranks of a back-end found, and the truths of one process."""
    ran: dict[tuple[str, int], SimpleNamespace] = {}

    def run(backend: str, size: int) -> SimpleNamespace:
        if (backend, size) not in ran:
            script = Path(__file__).with_name(f"{backend}_ranks.py")
            ranks = run_ranks(script, prepared.root, size)
            ran[backend, size] = SimpleNamespace(ranks=ranks, truths=prepared.truths)
        return ran[backend, size]

    return run
