"""Fetch a hub revision into the Hugging Face cache: no pickles, no code, no second copies."""

from pathlib import Path

from huggingface_hub import snapshot_download

from probe.checkpoints.revisions import hub_error

TOKENIZER = ["*.json", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", "*.jinja"]
WEIGHTS = [*TOKENIZER, "*.safetensors"]
UNWANTED = ["*/*", "consolidated*"]  # subfolders and Mistral's second copy of the weights


def fetch(repo: str, revision: str | None, patterns: list[str]) -> Path:
    """The local directory of a revision, downloaded unless cached.

    Args:
        repo: Hub repository id.
        revision: Branch, tag or commit; None: the default branch.
        patterns: Which files of the top folder.

    Raises:
        CheckpointError: No such repository or revision, or no access.
        CheckpointUnavailableError: The hub cannot be reached and the revision is not cached.
    """
    what = repo if revision is None else f"{repo} at {revision}"
    try:
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=patterns, ignore_patterns=UNWANTED
            )
        )
    except Exception as error:  # each layer below raises its own
        raise hub_error(error, what) from error
