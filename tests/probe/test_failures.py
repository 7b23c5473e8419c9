"""What the system's refusals become: the code and whether another try can help."""

import errno
import os
from pathlib import Path

import pytest
import torch

from probe.errors import CheckpointError, CheckpointUnavailableError, ParallelismError
from probe.failures import known_failure


def system_error(number: int) -> OSError:
    return OSError(number, os.strerror(number), "/somewhere/file")


@pytest.mark.parametrize(
    ("number", "code", "retryable"),
    [
        (errno.ENOSPC, "disk_full", True),
        (errno.EDQUOT, "disk_full", True),
        (errno.EROFS, "storage_error", False),
        (errno.EACCES, "storage_error", False),
        (errno.EIO, "storage_error", False),
        (errno.ENOMEM, "out_of_memory", False),
    ],
)
def test_the_system_s_refusals_have_names(number, code, retryable):
    found = known_failure(system_error(number))
    assert (found.code, found.retryable) == (code, retryable)
    assert os.strerror(number) in str(found)


def test_a_full_disk_is_one_by_the_system_s_own_word():
    full = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115 - closed below
    with full, pytest.raises(OSError, match="No space left") as caught:
        full.write(b"x")
    assert known_failure(caught.value).code == "disk_full"


def test_the_place_is_named():
    assert "/somewhere/file" in str(known_failure(system_error(errno.ENOSPC)))


def test_too_much_memory_asked_of_torch_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    found = known_failure(caught.value)
    assert (found.code, found.retryable) == ("out_of_memory", False)
    assert known_failure(torch.OutOfMemoryError("CUDA out of memory")).code == "out_of_memory"
    assert known_failure(MemoryError()).code == "out_of_memory"


def test_our_own_errors_stay_what_they_are():
    error = ParallelismError("rank 1 is gone")
    assert known_failure(error) is error


def test_a_cause_inside_a_library_s_error_is_found():
    with pytest.raises(ValueError, match="serialise") as caught:
        raise ValueError("cannot serialise") from system_error(errno.ENOSPC)
    assert known_failure(caught.value).code == "disk_full"


@pytest.mark.parametrize(
    ("ours", "code"),
    [(CheckpointError, "disk_full"), (CheckpointUnavailableError, "checkpoint_unavailable")],
)
def test_a_full_disk_behind_an_error_of_ours_makes_it_worth_another_try(ours, code):
    with pytest.raises(ours) as caught:
        raise ours("w.gguf.gz: cannot be unpacked") from system_error(errno.ENOSPC)
    found = known_failure(caught.value)
    assert (found.code, found.retryable) == (code, True)
    assert str(found) == "w.gguf.gz: cannot be unpacked"


@pytest.mark.parametrize("error", [ValueError("no"), KeyError("k"), OSError(errno.ENOENT, "no")])
def test_what_nobody_foresaw_has_no_name(error):
    assert known_failure(error) is None


def test_a_chain_that_bites_its_tail_ends():
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert known_failure(first) is None
