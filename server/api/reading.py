"""Short reads of the database in few threads, for the routes that are asked most.

The forty threads that all routes share take the interpreter from each other and from the event
loop when many clients ask at once: the same reads take several times as long. Here what is asked
while both threads are busy waits for one of them, and `read_together` answers with one query all
who wait for the same call. Where that takes long there are more threads. A database that hangs
holds up these threads only.
"""

import asyncio
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ParamSpec, TypeVar

from sqlalchemy.exc import SQLAlchemyError

P = ParamSpec("P")
R = TypeVar("R")
K = TypeVar("K")

_THREADS = 2  # the event loop, these and the database share the cores of a small machine
_MOST_THREADS = 6  # while reads take long: others need not wait for them
_LONG_S = 0.1
_KEYS_AT_ONCE = 64


async def read(call: Callable[P, R], *args: P.args, **kw: P.kwargs) -> R:
    """What the call returns, made in one of these threads."""
    answer: R = await _reader.ask(partial(call, *args, **kw), None)
    return answer


async def read_together(call: Callable[[Sequence[K]], Mapping[K, R]], key: K) -> R | None:
    """What the call finds for a key; one call for the keys of several requests."""
    answer: R | None = await _reader.ask(call, key)
    return answer


@dataclass(slots=True, eq=False)
class _Asked:
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    call: Callable[..., Any]
    key: Any  # None: not together with others
    at: float = field(default_factory=time.monotonic)
    result: Any = None
    error: BaseException | None = None

    def tell(self) -> None:
        if self.future.done():  # nobody waits any more
            return
        if self.error is None:
            self.future.set_result(self.result)
        elif isinstance(self.error, StopIteration):  # which no future takes
            self.future.set_exception(RuntimeError(f"a read ended with {self.error!r}"))
        else:
            self.future.set_exception(self.error)


class _Reader:
    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_MOST_THREADS, "read")
        self._lock = threading.Lock()
        self._waiting: deque[_Asked] = deque()
        self._num_busy = 0
        self._looks_soon: asyncio.AbstractEventLoop | None = None  # whether anybody waits long

    async def ask(self, call: Callable[..., Any], key: Any) -> Any:
        loop = asyncio.get_running_loop()
        asked = _Asked(loop, loop.create_future(), call, key)
        self._waiting.append(asked)
        try:
            self._start_thread(_THREADS)
        except BaseException:
            with suppress(ValueError):  # a thread has taken it meanwhile
                self._waiting.remove(asked)
            raise
        self._look_later(loop)
        return await asked.future

    def _start_thread(self, most: int) -> None:
        with self._lock:
            if self._num_busy >= most:
                return
            self._num_busy += 1
        try:
            self._threads.submit(self._work)
        except BaseException:  # the machine has no thread left
            with self._lock:
                self._num_busy -= 1
                if self._num_busy:  # another takes it
                    return
            raise

    def _look_later(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._looks_soon is not loop:  # one look at a time; that of a loop that ended is none
            self._looks_soon = loop
            loop.call_later(_LONG_S, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._looks_soon = None
        with self._lock:
            waits_from = self._waiting[0].at if self._waiting else None
        if waits_from is None:
            return
        self._look_later(loop)
        if time.monotonic() - waits_from > _LONG_S:
            self._start_thread(_MOST_THREADS)

    def _work(self) -> None:
        while True:
            with self._lock:
                taken = self._take()
                if not taken:
                    self._num_busy -= 1
                    return
            _answer(taken)
            _tell(taken)

    def _take(self) -> list[_Asked]:
        """Whoever waits longest, with those that the same call answers; nobody who has left."""
        taken: list[_Asked] = []
        while self._waiting and len(taken) < _KEYS_AT_ONCE:
            asked = self._waiting[0]
            if taken and (asked.key is None or asked.call != taken[0].call):
                break
            self._waiting.popleft()
            if not asked.future.cancelled():
                taken.append(asked)
            if taken and taken[0].key is None:
                break
        return taken


def _answer(taken: list[_Asked]) -> None:
    first = taken[0]
    try:
        if first.key is None:
            first.result = first.call()
            return
        found = first.call(list({asked.key for asked in taken}))
        for asked in taken:
            asked.result = found.get(asked.key)
    except BaseException as error:
        if len(taken) == 1 or isinstance(error, SQLAlchemyError):
            for asked in taken:
                asked.error = error
            return
        for asked in taken:  # whose key it was gets the error, nobody else
            _answer([asked])


def _tell(taken: list[_Asked]) -> None:
    by_loop: defaultdict[asyncio.AbstractEventLoop, list[_Asked]] = defaultdict(list)
    for asked in taken:
        by_loop[asked.loop].append(asked)
    for loop, answered in by_loop.items():
        try:
            loop.call_soon_threadsafe(_tell_all, answered)
        except RuntimeError:  # the loop is closed
            continue


def _tell_all(answered: list[_Asked]) -> None:
    for asked in answered:
        asked.tell()


_reader = _Reader()
