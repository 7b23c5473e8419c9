"""One revision of a hub repository as a `Source`: fetched once, then a local directory."""

import logging
from pathlib import Path

from huggingface_hub import snapshot_download

from probe.checkpoints.huggingface import HuggingFaceSource
from probe.checkpoints.revisions import hub_error
from probe.errors import CheckpointError
from probe.result import CheckpointRef

logger = logging.getLogger(__name__)

# Pickles and code are never even downloaded; `original/` and `consolidated*` repeat the weights.
WANTED = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", "*.jinja"]
UNWANTED = ["*/*", "consolidated*"]


def open_source(ref: CheckpointRef) -> HuggingFaceSource:
    """Fetch `ref.location` at `ref.revision` into the Hugging Face cache and open it.

    Raises:
        CheckpointError: No such repository or revision, no access, or nothing usable in it.
        CheckpointUnavailableError: The hub cannot be reached and the revision is not cached.

    Cost: the download, where the revision is not cached.
    """
    if ref.revision is None:
        raise CheckpointError(f"{ref.location}: a hub checkpoint needs a revision, for one `main`")
    what = f"{ref.location} at {ref.revision}"
    logger.info("fetching %s", what, extra={"event": "checkpoint_fetch", "step": ref.step})
    try:
        directory = snapshot_download(
            ref.location,
            revision=ref.revision,
            allow_patterns=WANTED,
            ignore_patterns=UNWANTED,
        )
    except Exception as error:  # each layer below raises its own
        raise hub_error(error, what) from error
    return HuggingFaceSource(ref, Path(directory))
