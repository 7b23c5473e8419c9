"""A request to stop that may be made from a signal handler."""

import asyncio
import queue
import time
from contextlib import suppress

_POLL_S = 0.02


class StopRequest:
    """As `threading.Event`, whose `set` can wait for ever when a signal interrupts its `wait`.

    A handler runs in the main thread between any two steps of what that thread is doing, also
    while it holds the event's own lock. `SimpleQueue.put` is made for that; the rest is one
    assignment.
    """

    def __init__(self) -> None:
        """Nobody has asked."""
        self.is_made = False
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()

    def make(self) -> None:
        """Ask; from any thread or signal handler, any number of times."""
        self.is_made = True
        self._wake.put(None)

    def wait(self, timeout_s: float) -> bool:
        """Wait in the main thread until somebody asks, or so long; whether somebody has."""
        if not self.is_made:
            with suppress(queue.Empty):
                self._wake.get(timeout=timeout_s)
        return self.is_made

    async def made_within(self, timeout_s: float) -> bool:
        """The same in an event loop."""
        deadline = time.monotonic() + timeout_s
        while not self.is_made and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
        return self.is_made
