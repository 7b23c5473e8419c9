"""Revisions of a hub repository, and what its errors mean for us (torch-free)."""

import difflib
import fnmatch
import re
from collections.abc import Sequence

from probe.errors import CheckpointError, CheckpointUnavailableError
from probe.transport import is_transport_failure


def matching_revisions(repo: str, patterns: Sequence[str]) -> list[str]:
    """The revisions that full names and patterns name, each once, in the order found.

    Args:
        repo: Hub repository id.
        patterns: Full names, taken as they are, or patterns with `*` and `?`.

    Raises:
        CheckpointError: A pattern matches no branch or tag; the nearest names are listed.
        CheckpointUnavailableError: There is a pattern, and the hub cannot be reached.

    Cost: one request when there is a pattern, none otherwise.
    """
    existing: list[str] | None = None
    found: dict[str, None] = {}
    for pattern in patterns:
        if not re.search(r"[*?]", pattern):
            found[pattern] = None
            continue
        if existing is None:
            existing = list_revisions(repo)
        # fnmatch does not backtrack, whatever the pattern; its [...] is not part of ours.
        literal = pattern.replace("[", "[[]")
        matches = [name for name in existing if fnmatch.fnmatchcase(name, literal)]
        if not matches:
            near = difflib.get_close_matches(pattern, existing, n=5, cutoff=0.0)
            raise CheckpointError(
                f"{repo}: no branch or tag matches {pattern!r}; it has {len(existing)}, the "
                f"nearest are {', '.join(near) or 'none'}"
            )
        found.update(dict.fromkeys(matches))
    return list(found)


def list_revisions(repo: str) -> list[str]:
    """Branches and tags of a hub repository.

    Raises:
        CheckpointError: No such repository, or no access to it.
        CheckpointUnavailableError: The hub cannot be reached now.
    """
    from huggingface_hub import HfApi  # seconds to import, and local series do not need it

    try:
        refs = HfApi().list_repo_refs(repo)
    except Exception as error:
        raise hub_error(
            error, f"{repo}: listing its revisions needs the hub (full names do not)"
        ) from error
    return [ref.name for ref in [*refs.branches, *refs.tags]]


def hub_error(error: Exception, what: str) -> CheckpointError:
    """The error of ours that says whether trying again can help.

    Args:
        error: What huggingface_hub or the network below it raised.
        what: What was being done, with the repository.

    Returns:
        CheckpointUnavailableError for the network and a busy hub, CheckpointError for a
        repository or revision that does not exist or may not be read.
    """
    from huggingface_hub.errors import GatedRepoError

    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    message = f"{what}: {first}"
    if isinstance(error, GatedRepoError):
        return CheckpointError(f"{message}. Accept its terms on the hub and log in (hf auth login)")
    if is_transport_failure(error):
        return CheckpointUnavailableError(message)
    return CheckpointError(message)
