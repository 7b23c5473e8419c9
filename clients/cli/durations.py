"""Lengths of time as people write them: 90, 90s, 15m, 2h, 1.5d, 2w."""

import re

from clients.cli.conventions import InputError

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def seconds(text: str, option: str) -> float:
    """The duration in seconds.

    Args:
        text: A number, and s, m, h, d or w behind it; seconds without.
        option: Where it stood, for the message.

    Raises:
        InputError: It is no such thing.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([smhdw]?)", text.strip())
    if match is None:
        raise InputError(
            f"{option} needs a number with s, m, h, d or w, such as 90s or 2h, got {text!r}"
        )
    return float(match[1]) * _SECONDS[match[2]]
