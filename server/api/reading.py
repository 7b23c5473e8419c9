"""Short reads of the database in few threads, for the routes that are asked most.

The forty threads that all routes share take the interpreter from each other and from the event
loop when many clients ask at once: the same reads take several times as long. A database that
hangs holds up these threads only.
"""

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

import anyio.to_thread

P = ParamSpec("P")
R = TypeVar("R")

_THREADS = 4  # more than the cores of a small machine: some wait for the database
_limiter = anyio.CapacityLimiter(_THREADS)


async def read(call: Callable[P, R], *args: P.args, **kw: P.kwargs) -> R:
    """What the call returns, made in one of these threads."""
    return await anyio.to_thread.run_sync(partial(call, *args, **kw), limiter=_limiter)
