"""Which back-end a job gets."""

import pytest

from probe.errors import ConfigError
from probe.placement import backend_for
from probe.spec import ParallelOptions


@pytest.mark.parametrize(
    ("backend", "ranks", "num_ranks", "expected"),
    [
        ("auto", None, 1, "single"),
        ("auto", None, 3, "fsdp2"),
        ("auto", 1, 1, "single"),
        ("auto", 2, 2, "fsdp2"),
        ("single", None, 1, "single"),
        ("fsdp2", None, 1, "fsdp2"),
        ("fsdp2", 2, 2, "fsdp2"),
        ("deepspeed", 1, 1, "deepspeed"),
        ("deepspeed", None, 4, "deepspeed"),
    ],
)
def test_the_backend_follows_from_the_spec_and_the_ranks(backend, ranks, num_ranks, expected):
    assert backend_for(ParallelOptions(backend=backend, ranks=ranks), num_ranks) == expected


@pytest.mark.parametrize(
    ("backend", "ranks", "num_ranks", "says"),
    [
        ("auto", 2, 1, "parallel.ranks is 2, but 1 was started.*--nproc-per-node 2"),
        ("deepspeed", 1, 2, "parallel.ranks is 1, but 2 were started.*python -m probe.rank"),
        ("single", None, 2, "parallel.backend is single, but 2 were started"),
    ],
)
def test_another_number_of_ranks_is_refused(backend, ranks, num_ranks, says):
    with pytest.raises(ConfigError, match=says):
        backend_for(ParallelOptions(backend=backend, ranks=ranks), num_ranks)
