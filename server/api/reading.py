"""Short reads of the database in few threads, for the routes that are asked most.

The forty threads that all routes share take the interpreter from each other and from the event
loop when many clients ask at once: the same reads take several times as long. Here what is asked
while every thread is busy waits, and is then read at one go: one change of threads, and for
`read_together` one query, answer many requests. What waits long gets more threads. A database that
hangs holds up these threads only.
"""

import asyncio
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
K = TypeVar("K")

_THREADS = 2  # the event loop, these and the database share the cores of a small machine
_MOST_THREADS = 6  # while reads take long: others need not wait for them
_LONG_S = 0.1
_CALLS_AT_ONCE = 2  # more of them would all wait for the last one
_KEYS_AT_ONCE = 64


async def read(call: Callable[P, R], *args: P.args, **kw: P.kwargs) -> R:
    """What the call returns, made in one of these threads."""
    answer: R = await _reader.ask(partial(call, *args, **kw), None)
    return answer


async def read_together(call: Callable[[Sequence[K]], Mapping[K, R]], key: K) -> R | None:
    """What the call finds for a key; one call for the keys of several requests."""
    answer: R | None = await _reader.ask(call, key)
    return answer


@dataclass(slots=True)
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
        else:
            self.future.set_exception(self.error)


class _Reader:
    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_MOST_THREADS, "read")
        self._lock = threading.Lock()
        self._waiting: deque[_Asked] = deque()
        self._num_busy = 0

    async def ask(self, call: Callable[..., Any], key: Any) -> Any:
        loop = asyncio.get_running_loop()
        asked = _Asked(loop, loop.create_future(), call, key)
        with self._lock:
            self._waiting.append(asked)
            waits_long = asked.at - self._waiting[0].at > _LONG_S
            has_thread = self._num_busy < (_MOST_THREADS if waits_long else _THREADS)
            self._num_busy += has_thread
        if has_thread:
            self._threads.submit(self._work)
        return await asked.future

    def _work(self) -> None:
        while True:
            with self._lock:
                taken = self._take()
                if not taken:
                    self._num_busy -= 1
                    return
            if taken[0].key is None:
                _answer_each(taken)
            else:
                _answer_together(taken)
            _tell(taken)

    def _take(self) -> list[_Asked]:
        """The longest waiting: those that one call answers, or a few others."""
        if not self._waiting:
            return []
        first = self._waiting[0]
        is_one_call = first.key is not None
        share = -(-len(self._waiting) // _THREADS)  # the rest is for the other threads
        most = _KEYS_AT_ONCE if is_one_call else min(_CALLS_AT_ONCE, share)
        taken: list[_Asked] = []
        while self._waiting and len(taken) < most:
            asked = self._waiting[0]
            if (asked.key is not None) != is_one_call or (is_one_call and asked.call != first.call):
                break
            taken.append(self._waiting.popleft())
        return taken


def _answer_each(taken: list[_Asked]) -> None:
    for asked in taken:
        try:
            asked.result = asked.call()
        except BaseException as error:
            asked.error = error


def _answer_together(taken: list[_Asked]) -> None:
    try:
        found = taken[0].call(list({asked.key for asked in taken}))
        for asked in taken:
            asked.result = found.get(asked.key)
    except BaseException as error:
        for asked in taken:
            asked.error = error


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
