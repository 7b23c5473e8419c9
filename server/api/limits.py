"""How much one caller may ask at once: token buckets and counts of open streams, in memory.

Each server process counts for itself. What is kept is bounded, however many addresses ask.
"""

import functools
import ipaddress
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable

_MOST_CALLERS = 10_000


class Buckets:
    """A token bucket per caller: `burst` requests at once, `rate` a second over time."""

    def __init__(
        self,
        rate: float,
        burst: int,
        *,
        most: int = _MOST_CALLERS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Every caller begins with a full bucket.

        Args:
            rate: Tokens a second.
            burst: Tokens a full bucket holds.
            most: Callers remembered; the one not seen for longest is forgotten first, who would
                be full again soonest.
            clock: Seconds, monotonic.
        """
        self._rate, self._burst, self._most, self._clock = rate, float(burst), most, clock
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str) -> float:
        """0 where there was a token, which is now gone; else the seconds until there is one."""
        now = self._clock()
        level = self._level(caller, now)
        wait = 0.0 if level >= 1 else (1 - level) / self._rate
        self._levels[caller] = (level - 1 if level >= 1 else level, now)
        self._levels.move_to_end(caller)
        if len(self._levels) > self._most:
            self._levels.popitem(last=False)
        return wait

    def wait_s(self, caller: str) -> float:
        """Seconds until the caller has a token; 0 now. Takes none."""
        level = self._level(caller, self._clock())
        return 0.0 if level >= 1 else (1 - level) / self._rate

    def _level(self, caller: str, now: float) -> float:
        level, then = self._levels.get(caller, (self._burst, now))
        return min(self._burst, level + (now - then) * self._rate)

    def __len__(self) -> int:
        """Callers remembered."""
        return len(self._levels)


class Slots:
    """How many of something each caller has open."""

    def __init__(self, most: int) -> None:
        """Nobody has any open."""
        self._most = most
        self._open: Counter[str] = Counter()

    def take(self, caller: str) -> bool:
        """Whether there was room for one more; `give_back` it when it is closed."""
        if self._open[caller] >= self._most:
            return False
        self._open[caller] += 1
        return True

    def give_back(self, caller: str) -> None:
        """One is closed."""
        self._open[caller] -= 1
        if self._open[caller] <= 0:
            del self._open[caller]

    def __len__(self) -> int:
        """Callers that have any open."""
        return sum(1 for number in self._open.values() if number)


def retry_after(wait_s: float) -> str:
    """Seconds for a Retry-After header: whole, at least one."""
    return str(max(1, math.ceil(wait_s)))


@functools.lru_cache(maxsize=_MOST_CALLERS)
def network_of(address: str) -> str:
    """The address as it counts for limits: an IPv6 host owns a whole /64, so that counts as one."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
