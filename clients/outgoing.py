"""What requests are made of: specs as plain values, ids as parts of a path."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel


def plain(value: BaseModel | Mapping[str, Any]) -> Any:
    """A spec as plain values, with the webhook that its dumps leave out."""
    if not isinstance(value, BaseModel):
        return dict(value)
    webhook = getattr(value, "webhook", None)  # left out of every dump, as it may be a secret
    return value.model_dump(mode="json") | ({} if webhook is None else {"webhook": webhook})


def quoted(job_id: str) -> str:
    """The id as one path segment; an empty one must not turn into the list of jobs."""
    return quote(job_id, safe="") or "%20"
