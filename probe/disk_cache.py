"""What we downloaded or unpacked ourselves, kept within a limit (torch-free).

Entries are directories `<cache>/<kind>/<key>/`. A process that uses one holds a shared lock on a
file beside them, which the system releases however that process ends; whoever makes room takes
only entries that nobody holds, the one used longest ago first. `PROBE_CACHE_LIMIT` (`500GB`) sets
the limit of these entries; without it nothing is ever removed. The cache of huggingface_hub
belongs to other programs too and is left alone unless `PROBE_HUB_CACHE_LIMIT` is set.
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from probe.assets import asset_directory
from probe.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

LIMIT = "PROBE_CACHE_LIMIT"
HUB_LIMIT = "PROBE_HUB_CACHE_LIMIT"
KINDS = ("optimizer-states", "gguf")
_LOCKS = "locks"
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", re.IGNORECASE)
_POWER = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str) -> int:
    """Bytes of `500GB`, `20 GiB`, `1.5T` or a plain number; G is 10^9, Gi is 2^30.

    Raises:
        ConfigError: It is none of these.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is no size; write bytes, or for example 500GB or 20GiB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** _POWER[match[2].upper()])


def limit_from(variable: str) -> int | None:
    """The size an environment variable sets; None where it is not set or empty.

    Raises:
        ConfigError: It is no size.
    """
    text = os.environ.get(variable, "").strip()
    if not text:
        return None
    try:
        return parse_size(text)
    except ConfigError as error:
        raise ConfigError(f"{variable}: {error}") from error


class Lock:
    """A lock of this process; the system releases it when the process ends, however it ends."""

    def __init__(self, descriptor: int) -> None:
        """Made by `hold` and `hold_name`; let go of when this object is."""
        self.close = weakref.finalize(self, os.close, descriptor)


class Entry(Lock):
    """One directory of the cache; not removed while this object lives."""

    def __init__(self, directory: Path, descriptor: int) -> None:
        """Made by `hold`."""
        super().__init__(descriptor)
        self.directory = directory


def hold(kind: str, key: str) -> Entry:
    """The entry for `key`, made where there is none, marked as used now and as in use.

    Args:
        kind: One of `KINDS`.
        key: Whatever tells its content apart: a URL, a path with size and time of change.

    Raises:
        CheckpointError: The cache cannot be written.

    Cost: waits only while another process removes this very entry.
    """
    assert kind in KINDS, kind
    name = _hashed(key)
    directory = asset_directory() / kind / name
    try:
        lock = _open_lock(f"{kind}.{name}")
        fcntl.flock(lock, fcntl.LOCK_SH)
        os.utime(lock)
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be kept: {error.strerror or error}") from error
    return Entry(directory, lock)


def hold_name(name: str) -> Lock:
    """Mark something that lies elsewhere as used now and in use.

    Raises:
        CheckpointError: The cache, where the mark is kept, cannot be written.
    """
    descriptor = _named_lock(name)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    os.utime(descriptor)
    return Lock(descriptor)


def take_name(name: str) -> Lock | None:
    """Keep everybody from beginning to use something; None where somebody uses it."""
    descriptor = _named_lock(name)
    if try_lock(descriptor):
        return Lock(descriptor)
    os.close(descriptor)
    return None


def last_hold(name: str) -> float | None:
    """When something was last held, in seconds since the epoch; None: never."""
    path = asset_directory() / _LOCKS / f"one.{_hashed(name)}"
    return path.stat().st_mtime if path.exists() else None


@contextmanager
def only_one(name: str) -> Iterator[None]:
    """Run a block in one process and thread at a time; others wait for it.

    Args:
        name: What the block is about.

    Raises:
        CheckpointError: The cache cannot be written.
    """
    lock = _named_lock(name)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def make_room(num_bytes: int) -> None:
    """Remove entries nobody uses until `num_bytes` more fit; nothing where there is no limit.

    Args:
        num_bytes: What is about to be written. Downloads that begin at the same moment do not
            know of each other, so together they can go beyond the limit until the next call.

    Raises:
        CheckpointError: They do not fit beside what is in use.
        ConfigError: The limit is no size.
    """
    limit = limit_from(LIMIT)
    if limit is None:
        return
    with only_one("room in the cache"):
        entries = sorted(_entries(), key=lambda entry: entry.used_at)
        total = sum(entry.num_bytes for entry in entries)
        for entry in entries:
            if total + num_bytes <= limit:
                return
            if _removed(entry):
                total -= entry.num_bytes
    if total + num_bytes > limit:
        raise CheckpointError(
            f"{asset_directory()}: {num_bytes} bytes more do not fit into {LIMIT}={limit}: "
            f"{total} bytes there are in use. Raise the limit"
        )


@dataclass(frozen=True)
class _Found:
    kind: str
    directory: Path
    num_bytes: int
    used_at: float


def _entries() -> Iterator[_Found]:
    for kind in KINDS:
        for directory in (asset_directory() / kind).glob("*"):
            lock = asset_directory() / _LOCKS / f"{kind}.{directory.name}"
            used = lock if lock.exists() else directory
            yield _Found(kind, directory, _size(directory), used.stat().st_mtime)


def _size(directory: Path) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:  # a download that was renamed this moment
                continue
    return total


def _removed(entry: _Found) -> bool:
    lock = _open_lock(f"{entry.kind}.{entry.directory.name}")
    try:
        if not try_lock(lock):
            return False
        shutil.rmtree(entry.directory)
    except OSError as error:
        logger.warning("%s: cannot be removed: %s", entry.directory, error)
        return False
    finally:
        os.close(lock)
    logger.info("removed %s from the cache", entry.directory, extra={"event": "cache_removed"})
    return True


def try_lock(lock: int) -> bool:
    """Take an exclusive lock if nobody holds any."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _hashed(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:24]


def _named_lock(name: str) -> int:
    try:
        return _open_lock(f"one.{_hashed(name)}")
    except OSError as error:
        raise CheckpointError(
            f"{asset_directory()}: cannot be written: {error.strerror or error}"
        ) from error


def _open_lock(name: str) -> int:
    """Lock files are never removed: a lock on a removed file would hold nothing."""
    folder = asset_directory() / _LOCKS
    folder.mkdir(parents=True, exist_ok=True)
    return os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
