"""One revision of a hub repository as a `Source`: fetched once, then a local directory."""

import logging
from dataclasses import dataclass
from pathlib import Path

from probe.checkpoints.fetch import WEIGHTS, fetch
from probe.checkpoints.hub_cache import hold_revision, trim_hub_cache
from probe.checkpoints.huggingface import HuggingFaceSource
from probe.checkpoints.layout import read_layout
from probe.checkpoints.published import PublishedSource
from probe.disk_cache import Lock
from probe.errors import CheckpointError
from probe.result import CheckpointRef

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FetchedRevision:
    """A revision in the Hugging Face cache; not trimmed from it while this object lives."""

    directory: Path
    lock: Lock | None

    @property
    def has_own_moments(self) -> bool:
        """Whether the revision itself holds an optimizer state."""
        return read_layout(self.directory).has_moments


def open_source(ref: CheckpointRef) -> HuggingFaceSource:
    """Fetch `ref.location` at `ref.revision` into the Hugging Face cache and open it.

    Where its optimizer state may be published elsewhere, that is fetched when first asked for.

    Raises:
        CheckpointError: No such repository or revision, no access, or nothing usable in it.
        CheckpointUnavailableError: The hub cannot be reached and the revision is not cached.

    Cost: the download, where the revision is not cached.
    """
    fetched = fetch_revision(ref)
    published = ref.moments_url is not None and not fetched.has_own_moments
    kind = PublishedSource if published else HuggingFaceSource
    source = kind(ref, fetched.directory)
    source.keep = fetched
    return source


def fetch_revision(ref: CheckpointRef) -> FetchedRevision:
    """The files of a revision, from the cache or the hub; other revisions may make room.

    Raises:
        CheckpointError: As `open_source`.
        CheckpointUnavailableError: As `open_source`.
    """
    if ref.revision is None:
        raise CheckpointError(f"{ref.location}: a hub checkpoint needs a revision, for one `main`")
    logger.info(
        "fetching %s at %s",
        ref.location,
        ref.revision,
        extra={"event": "checkpoint_fetch", "step": ref.step},
    )
    directory = fetch(ref.location, ref.revision, WEIGHTS)
    lock = hold_revision(directory)
    trim_hub_cache()
    return FetchedRevision(directory, lock)
