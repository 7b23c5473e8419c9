"""Choose the format of an answer: `?format=` first, then the Accept header."""

import re
from collections.abc import Mapping

from server.api.problems import ProblemError


def choose_format(
    format: str | None, accept: str | None, offered: Mapping[str, tuple[str, ...]]
) -> str:
    """The key of `offered` to answer with.

    Args:
        format: The query parameter, already known to be one of the keys, or None.
        accept: The Accept header, or None.
        offered: Format -> media types it goes by, the default format first.

    Raises:
        ProblemError: 406 when none is acceptable.
    """
    if format is not None:
        return format
    if accept is None or not accept.strip():
        return next(iter(offered))
    ranges = [_media_range(part) for part in accept.split(",")]
    best: tuple[float, int] | None = None
    chosen = ""
    for name, media_types in offered.items():
        quality = max(_quality(media_type, ranges) for media_type in media_types)
        if quality[0] > 0 and (best is None or quality > best):
            best, chosen = quality, name
    if best is None:
        choices = ", ".join(types[0] for types in offered.values())
        raise ProblemError(
            406, "not_acceptable", f"this can be had as {choices}; Accept asks for {accept[:200]!r}"
        )
    return chosen


def _media_range(text: str) -> tuple[str, float]:
    media_type, *parameters = (part.strip().lower() for part in text.split(";"))
    for parameter in parameters:
        if match := re.fullmatch(r"q\s*=\s*([01](?:\.\d{0,3})?)", parameter):
            return media_type, float(match[1])
    return media_type, 1.0


def _quality(media_type: str, ranges: list[tuple[str, float]]) -> tuple[float, int]:
    """(q, specificity) of the most specific range that holds the type; (0, 0) if none does."""
    best = (0, 0.0)  # specificity, q
    for pattern, q in ranges:
        specificity = 0
        if pattern == media_type:
            specificity = 3
        elif pattern == media_type.partition("/")[0] + "/*":
            specificity = 2
        elif pattern == "*/*":
            specificity = 1
        best = max(best, (specificity, q)) if specificity else best
    return best[1], best[0]
