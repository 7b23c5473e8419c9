"""One revision of a hub repository as a `Source`: fetched once, then a local directory."""

import logging

from probe.checkpoints.fetch import WEIGHTS, fetch
from probe.checkpoints.huggingface import HuggingFaceSource
from probe.checkpoints.published import PublishedSource
from probe.errors import CheckpointError
from probe.result import CheckpointRef

logger = logging.getLogger(__name__)


def open_source(ref: CheckpointRef) -> HuggingFaceSource:
    """Fetch `ref.location` at `ref.revision` into the Hugging Face cache and open it.

    Where its optimizer state may be published elsewhere, that is fetched when first asked for.

    Raises:
        CheckpointError: No such repository or revision, no access, or nothing usable in it.
        CheckpointUnavailableError: The hub cannot be reached and the revision is not cached.

    Cost: the download, where the revision is not cached.
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
    source = HuggingFaceSource(ref, directory)
    if ref.moments_url is None or source.has_moments:
        return source
    return PublishedSource(ref, directory)
