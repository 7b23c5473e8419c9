"""The cache of huggingface_hub within a limit, only where `PROBE_HUB_CACHE_LIMIT` sets one.

That cache is shared with every other program of the user, so without the variable nothing in it is
ever removed. With it, whole revisions go, the one used longest ago first; never one that a process
of ours measures or fetches.
"""

import logging
import os
from pathlib import Path

from probe.disk_cache import (
    HUB_LIMIT,
    Lock,
    hold_name,
    last_hold,
    limit_from,
    only_one,
    take_name,
)

logger = logging.getLogger(__name__)


def hold_revision(directory: Path) -> Lock | None:
    """Mark a snapshot directory as used now and in use, for as long as the lock lives.

    None where there is no limit, so that nothing is ever removed.
    """
    return None if limit_from(HUB_LIMIT) is None else hold_name(_name(directory))


def trim_hub_cache() -> None:
    """Remove revisions nobody of us uses until the cache is within its limit, if it has one.

    A revision whose size is not known beforehand comes first and others go afterwards, so the
    cache is larger than its limit for that long.

    Raises:
        ConfigError: The limit is no size.

    Cost: none without a limit; else a scan of the cache's directories.
    """
    limit = limit_from(HUB_LIMIT)
    if limit is None:
        return
    from huggingface_hub import constants, scan_cache_dir  # seconds to import

    cache = constants.HF_HUB_CACHE
    if not os.path.isdir(cache):
        return
    with only_one("room in the hub's cache"):
        found = scan_cache_dir(cache)
        total = found.size_on_disk
        revisions = [revision for repo in found.repos for revision in repo.revisions]
        for revision in sorted(revisions, key=_used_at):
            if total <= limit:
                return
            path = Path(revision.snapshot_path)
            lock = take_name(_name(path))
            if lock is None:
                continue
            removal = scan_cache_dir(cache).delete_revisions(revision.commit_hash)
            total -= removal.expected_freed_size
            removal.execute()
            lock.close()
            logger.info("removed %s from the hub's cache", path, extra={"event": "cache_removed"})
    if total > limit:
        logger.warning("the hub's cache holds %d bytes, all in use; %s=%d", total, HUB_LIMIT, limit)


def _name(directory: Path) -> str:
    return f"hub {os.path.realpath(directory)}"


def _used_at(revision: object) -> float:
    """When a revision was last held by us; before that, when another program last read it."""
    path = Path(revision.snapshot_path)  # type: ignore[attr-defined]
    files = revision.files  # type: ignore[attr-defined]
    read = max((file.blob_last_accessed for file in files), default=0.0)
    return last_hold(_name(path)) or read
