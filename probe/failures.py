"""What an exception that is not ours comes to: a full disk, a closed directory, too little memory.

Torch-free, because the worker that starts the ranks asks too.
"""

import errno

from probe.errors import DiskFullError, OutOfMemoryError, ProbeError, StorageError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_CLOSED = frozenset(
    {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.EIO}
)


def known_failure(error: BaseException) -> ProbeError | None:
    """The error of ours that says what happened, or None for what only its traceback explains.

    Causes are looked at too, outermost first: a library's error often hides the system's. An error
    of ours keeps its words, but a full disk behind it makes it one that another try can help.
    """
    found = [named for cause in _chain(error) if (named := _named(cause)) is not None]
    if not found:
        return None
    if not found[0].retryable and any(isinstance(one, DiskFullError) for one in found):
        return DiskFullError(str(found[0]))
    return found[0]


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return chain


def _named(error: BaseException) -> ProbeError | None:
    if isinstance(error, ProbeError):
        return error
    if _is_out_of_memory(error):
        first = str(error).strip().splitlines()[:1]
        return OutOfMemoryError(
            f"out of memory: {first[0] if first else type(error).__name__}. Use smaller batches, "
            "bfloat16, fewer ranks on this machine, or a larger one"
        )
    if not isinstance(error, OSError):
        return None
    place = f" at {error.filename}" if error.filename else ""
    if error.errno in _FULL:
        return DiskFullError(
            f"no room is left on the disk{place} ({error.strerror}): free some; the unit is tried "
            "again by itself for a while, and what is recorded stays"
        )
    if error.errno in _CLOSED:
        return StorageError(
            f"cannot use a file or directory{place} ({error.strerror}): check that it is there, "
            "and that the user the worker runs as may read and write it"
        )
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    is_torch = type(error).__module__.partition(".")[0] == "torch"
    if is_torch and type(error).__name__ == "OutOfMemoryError":
        return True
    # torch's CPU allocator raises a bare RuntimeError
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
