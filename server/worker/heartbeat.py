"""The worker's heartbeat: a thread that renews the lease and watches whose jobs are whose.

A thread of its own, because nothing that takes long may delay it. Each beat also reads which
jobs the database says are ours, and compares that with what runs here, in both directions.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from server.errors import WorkerNameTakenError
from server.wire import WorkerView
from server.worker.lease import Lease

logger = logging.getLogger(__name__)

STUCK_S = 5.0  # a job just claimed has that long to begin


class Runner(Protocol):
    """What a heartbeat asks of the job runner. Called from the heartbeat's thread."""

    def tokens(self) -> dict[str, str]:
        """The token of every job that runs here."""

    def active_ids(self) -> set[str]:
        """Jobs that are begun, run, or ended but not yet so recorded, in this process."""

    def leave(self, tokens: Mapping[str, str]) -> None:
        """Give up these jobs, if they still run under these tokens."""


def longest_gap_s(worker_stale_s: float) -> float:
    """The longest time between two beats of ours that is no sign of an outage.

    Beats are at most a quarter of a lease apart (see settings). A silence of others that an outage
    explains is then at least half a lease longer than their usual one, and so is ours.
    """
    return worker_stale_s / 2


class Steadiness:
    """How long the beats have succeeded without a gap, on this machine's and the database's clock.

    After an outage every worker's lease looks run out; one that has itself been without an
    answer, or asleep, must not judge by it before the others had time to show that they live.
    """

    def __init__(self, worker_stale_s: float) -> None:
        """No beat has succeeded yet."""
        self._longest_gap_s = longest_gap_s(worker_stale_s)
        self._worker_stale_s = worker_stale_s
        self._since: tuple[float, float] | None = None
        self._last = (0.0, 0.0)

    def succeeded(self, machine_s: float, database_s: float) -> None:
        """A beat was written at these two times."""
        now = (machine_s, database_s)
        gaps = [after - before for before, after in zip(self._last, now, strict=True)]
        if self._since is None or not all(0 <= gap <= self._longest_gap_s for gap in gaps):
            self._since = now
        self._last = now

    def failed(self) -> None:
        """A beat was not written."""
        self._since = None

    @property
    def is_steady(self) -> bool:
        """Whether it has lasted for longer than a lease."""
        since, last = self._since, self._last
        if since is None:
            return False
        return all(b - a > self._worker_stale_s for a, b in zip(since, last, strict=True))


class Heartbeat(threading.Thread):
    """Beats until it is stopped or the name is lost."""

    def __init__(
        self,
        lease: Lease,
        runner: Runner,
        view: Callable[[], WorkerView],
        *,
        heartbeat_s: float,
        worker_stale_s: float,
        on_lost: Callable[[WorkerNameTakenError], None],
        on_stuck: Callable[[list[str]], None],
    ) -> None:
        """Not started yet.

        Args:
            lease: Held by this process.
            runner: What runs here.
            view: What is shown of this worker.
            heartbeat_s: Time between beats.
            worker_stale_s: How long a lease lasts.
            on_lost: Told once, when another process has taken the name.
            on_stuck: Told of jobs that are ours and of which nothing runs here.
        """
        super().__init__(name="heartbeat", daemon=True)
        self.steadiness = Steadiness(worker_stale_s)
        self._lease = lease
        self._runner = runner
        self._view = view
        self._heartbeat_s = heartbeat_s
        self._on_lost = on_lost
        self._on_stuck = on_stuck
        self._stopping = threading.Event()
        self.beaten_at: float | None = None  # by time.monotonic; None before the first
        self._idle_since: dict[tuple[str, str], float] = {}

    def run(self) -> None:
        """Beat at once, then after every interval."""
        while True:
            try:
                self.beat()
            except WorkerNameTakenError as error:
                self._on_lost(error)
                return
            except Exception:
                self.steadiness.failed()
                logger.exception("no heartbeat written, the next one may succeed")
            if self._stopping.wait(self._heartbeat_s):
                return

    def stop(self) -> None:
        """End the thread; does not wait for a database that does not answer."""
        self._stopping.set()
        self.join(self._heartbeat_s)

    def beat(self) -> None:
        """Renew the lease once, and act on what the database says of our jobs."""
        running = self._runner.tokens()
        begun = self._runner.active_ids()
        now_ms, ours = self._lease.renew(self._view())
        self.beaten_at = time.monotonic()
        self.steadiness.succeeded(self.beaten_at, now_ms / 1000)
        # Cancelled, or taken over while we were stopped.
        self._runner.leave({job: token for job, token in running.items() if ours.get(job) != token})
        self._watch(ours, begun | self._runner.active_ids())

    def _watch(self, ours: Mapping[str, str], active: set[str]) -> None:
        """Find what is ours and does not run: DBOS lost it, and nobody would ever take it up."""
        now = time.monotonic()
        idle = {(job, token) for job, token in ours.items() if job not in active}
        self._idle_since = {key: self._idle_since.get(key, now) for key in idle}
        stuck = [job for (job, _), since in self._idle_since.items() if now - since > STUCK_S]
        if stuck:
            self._on_stuck(sorted(stuck))
