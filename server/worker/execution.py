"""One execution of a job in this process: its plan, its gang, and whether the job is still ours."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field

from probe.result import Plan
from server.errors import JobTakenError
from server.worker.gang import Gang


@dataclass
class Execution:
    """Made in the event loop that everything but `leave` belongs to."""

    job_id: str
    token: str
    """DBOS's for this execution; what is written about the job names it."""
    gang: Gang | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    _plan: Plan | None = None
    _left: asyncio.Event = field(default_factory=asyncio.Event)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    @property
    def plan(self) -> Plan:
        """The job's units and spec."""
        assert self._plan is not None
        return self._plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self._plan = plan

    def leave(self) -> None:
        """Give the job up: its ranks end now, its next step finds out why. From any thread."""
        with suppress(RuntimeError):  # the loop has been closed, and all its gangs with it
            self._loop.call_soon_threadsafe(self._leave)

    def _leave(self) -> None:
        self._left.set()
        self.kill_gang()

    def require_here(self) -> None:
        """Raise JobTakenError if the job has been given up."""
        if self._left.is_set():
            raise JobTakenError(f"{self.job_id} is no longer this worker's")

    async def sleep(self, wait_s: float) -> None:
        """Wait that long; raises JobTakenError as soon as the job has been given up."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._left.wait(), wait_s)
        self.require_here()

    async def end_gang(self) -> None:
        """End the gang in order, its work being done."""
        if self.gang is not None:
            await self.gang.stop()

    def kill_gang(self) -> None:
        """End the gang at once, if there is one."""
        gang, self.gang = self.gang, None
        if gang is not None:
            gang.kill()
