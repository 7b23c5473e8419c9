"""Job ids: sortable by age, too random to be guessed."""

import secrets
import threading
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u
_lock = threading.Lock()
_last_ms = 0


def new_job_id() -> str:
    """`job_` and 26 characters: 48 bits of milliseconds, then 80 random bits.

    Ids made by one process sort in the order they were made, also within a millisecond.
    """
    global _last_ms
    with _lock:
        _last_ms = max(_last_ms + 1, time.time_ns() // 1_000_000)
        number = (_last_ms << 80) | secrets.randbits(80)
    return "job_" + "".join(_ALPHABET[(number >> shift) & 31] for shift in range(125, -1, -5))
