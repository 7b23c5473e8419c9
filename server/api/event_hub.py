"""One look at the database for all open event streams, however many there are.

A task looks every fraction of a second which of the watched jobs have new events, reads those once
and makes them ready to send once; the streams take them from there. What a stream has missed it
reads by itself: before it came, or because its reader is slower than the events kept here.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from sse_starlette import ServerSentEvent

from server.api.reading import read
from server.store import Store
from server.wire import TERMINAL, Event

logger = logging.getLogger(__name__)

_KEPT = 1000  # events of one job
_PAUSE_AFTER_ERROR_S = 1.0


class _Ready:
    """One event as it is sent."""

    __slots__ = ("closes", "content", "id")

    def __init__(self, event: Event) -> None:
        sent = ServerSentEvent(
            id=str(event.id), event=event.type, data=event.model_dump_json(), sep="\r\n"
        )
        self.id, self.content = event.id, sent.encode()
        self.closes = event.type.removeprefix("job.") in TERMINAL


class _Feed:
    """The newest events of one watched job."""

    def __init__(self) -> None:
        self.num_streams = 0
        self.last: int | None = None  # id of the newest event known; None before the first look
        self.gone = False  # the job was removed
        self.closed = False  # nothing follows what is known
        self.news = asyncio.Event()
        self._kept: deque[_Ready] = deque(maxlen=_KEPT)

    def after(self, seen: int) -> list[_Ready] | None:
        """Every event after the one seen; None if that is for the database to say."""
        if self.last is None or (seen < self.last and not self._reaches(seen)):
            return None
        return [event for event in self._kept if event.id > seen] if seen < self.last else []

    def _reaches(self, seen: int) -> bool:
        return bool(self._kept) and self._kept[0].id <= seen + 1

    def add(self, last: int, events: list[Event]) -> None:
        if self.last == last:
            return
        ready = [_Ready(event) for event in events]
        self._kept.extend(ready)
        self.closed = any(event.closes for event in ready)
        self.last = self._kept[-1].id if events else last
        self.tell()

    def tell(self) -> None:
        # Whoever waits holds this one; whoever comes next waits for the next.
        self.news.set()
        self.news = asyncio.Event()


class EventHub:
    """Event streams of one app. Everything in here belongs to the event loop that watches."""

    def __init__(self, store: Store, poll_s: float) -> None:
        """Nothing is read before somebody watches.

        Args:
            store: Where events come from.
            poll_s: How often it is looked for news, while anybody watches.
        """
        self._store = store
        self._poll_s = poll_s
        self._feeds: dict[str, _Feed] = {}
        self._looking: asyncio.Task[None] | None = None

    async def stream(self, job_id: str, seen: int, first: list[Event]) -> AsyncIterator[bytes]:
        """Every event after the one seen, each once, until the job's last one.

        Args:
            job_id: Of the job.
            seen: Id of the last event the reader has.
            first: Those after it that have been read already.
        """
        pending = [_Ready(event) for event in first]
        with self._watching(job_id) as feed:
            while not feed.gone:
                for event in pending:
                    yield event.content
                    seen = event.id
                    if event.closes:
                        return
                news, closed = feed.news, feed.closed  # before looking, so that none is missed
                kept = feed.after(seen)
                if kept is None:
                    events = await read(self._store.events_after, job_id, seen)
                    pending = [_Ready(event) for event in events]
                else:
                    pending = kept
                if not pending:
                    if closed:  # the reader named an id that the job never came to
                        return
                    await news.wait()

    @contextmanager
    def _watching(self, job_id: str) -> Iterator[_Feed]:
        looking = self._looking
        if looking is None or looking.get_loop() is not asyncio.get_running_loop():
            self._feeds.clear()
            self._looking = looking = asyncio.create_task(self._look())
        feed = self._feeds.setdefault(job_id, _Feed())
        feed.num_streams += 1
        try:
            yield feed
        finally:
            feed.num_streams -= 1
            if feed.num_streams == 0 and self._feeds.get(job_id) is feed:
                del self._feeds[job_id]
            if not self._feeds and self._looking is looking:
                looking.cancel()
                self._looking = None

    async def _look(self) -> None:
        while True:
            pause = self._poll_s
            known = {job_id: feed.last for job_id, feed in self._feeds.items()}
            try:
                found = await read(self._store.news, known)
            except Exception:
                # The streams stay open, and silent but for their heartbeats.
                logger.exception("event streams wait for the database")
                pause = max(pause, _PAUSE_AFTER_ERROR_S)
            else:
                for job_id in known.keys() & self._feeds.keys():
                    feed = self._feeds[job_id]
                    if feed.last != known[job_id]:
                        continue  # closed and opened again meanwhile
                    if job_id in found:
                        feed.add(*found[job_id])
                    else:
                        feed.gone = True
                        feed.tell()
            await asyncio.sleep(pause)
