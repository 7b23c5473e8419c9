"""The worker process: name lock, DBOS, heartbeats, signals, orderly end."""

import datetime as dt
import fcntl
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from dbos import DBOS, error

from server import queue
from server.errors import WorkerNameTakenError
from server.settings import Settings
from server.store import SqlStore
from server.wire import WorkerView
from server.worker.gang import WORKER_MARK, UnitFailedError
from server.worker.job_runner import JobRunner
from server.worker.orphans import adopt_orphans, lock_path
from server.worker.processes import kill_marked

logger = logging.getLogger(__name__)

_LOCK_S = 1.0  # another worker may hold a dead one's lock for the moment it takes its jobs over


def run_worker(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT.

    Jobs under way go on when a worker of this name starts again, or in another worker of the
    same data directory.

    Raises:
        WorkerNameTakenError: A worker of that name runs on this data directory.
        StoreVersionError: The database is newer than this program.
    """
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    with _name_lock(settings):
        _Worker(settings).run()


class _Worker:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stopping = threading.Event()
        self._started_at = dt.datetime.now(dt.UTC)
        self._store = SqlStore(settings.database_url, worker_stale_s=settings.worker_stale_s)
        self._runner = JobRunner(self._store, settings, self._stopping)

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._launch()
        try:
            while not self._stopping.is_set():
                self._beat(alive=True)
                self._adopt()
                self._stopping.wait(self._settings.heartbeat_s)
        finally:
            self._stopping.set()
            DBOS.destroy()  # cancels what runs; each unit under way ends its own gang
            kill_marked(WORKER_MARK)
            self._beat(alive=False)
            self._store.close()
        logger.info("worker %s has stopped", self._settings.worker_name)

    def _launch(self) -> None:
        settings = self._settings
        logging.getLogger("dbos").addFilter(_without_expected_ends)
        queue.quiet_logging()
        DBOS(
            config=queue.worker_config(
                self._store.engine, settings.database_url, settings.worker_name
            )
        )
        DBOS.listen_queues(list(settings.queues))
        self._runner.register()
        DBOS.launch()
        slots = {"gpu": 1, "cpu": settings.cpu_slots}
        for name in settings.queues:
            DBOS.register_queue(
                name,
                worker_concurrency=slots[name],
                polling_interval_sec=settings.queue_poll_s,
                on_conflict="always_update",
            )
        logger.info(
            "worker %s takes jobs from %s", settings.worker_name, " and ".join(settings.queues)
        )

    def _beat(self, *, alive: bool) -> None:
        now = dt.datetime.now(dt.UTC)
        view = WorkerView(
            name=self._settings.worker_name,
            hostname=socket.gethostname(),
            pid=os.getpid(),
            queues=list(self._settings.queues),
            device=self._runner.device or _device(),
            started_at=self._started_at,
            last_heartbeat=now,
            alive=alive,
            current_job_ids=self._runner.job_ids if alive else [],
        )
        try:
            self._store.beat(view)
            self._store.settle_all()
        except Exception:
            logger.exception("no heartbeat written, the next one may succeed")

    def _adopt(self) -> None:
        settings = self._settings
        try:
            adopt_orphans(self._store.engine, settings.data_dir, settings.worker_name)
        except Exception:
            logger.exception("jobs of dead workers not looked for, the next try may succeed")

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._stopping.is_set():  # asked twice: at once, the gangs die with us
            kill_marked(WORKER_MARK)
            os._exit(128 + number)
        self._stopping.set()


@contextmanager
def _name_lock(settings: Settings) -> Iterator[None]:
    path = lock_path(settings.data_dir, settings.worker_name)
    with path.open("a+") as lock:
        deadline = time.monotonic() + _LOCK_S
        while not (locked := _try_lock(lock)) and time.monotonic() < deadline:
            time.sleep(0.02)
        if not locked:
            lock.seek(0)
            raise WorkerNameTakenError(
                f"a worker named {settings.worker_name!r} already runs here "
                f"(process {lock.read().strip() or 'unknown'}): use --name to start another one"
            )
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _device() -> str:
    """What the ranks will find, told without importing torch."""
    num_gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if num_gpus:
        return f"cuda ({num_gpus})"
    return f"cpu ({os.cpu_count()} cores)"


def _without_expected_ends(record: logging.LogRecord) -> bool:
    """Drop what DBOS says of a failed unit, a cancelled job, a stop: ordinary, and told by us."""
    raised = record.exc_info[1] if record.exc_info else None
    if isinstance(raised, UnitFailedError | error.DBOSAwaitedWorkflowCancelledError):
        return False
    message = record.getMessage()
    return "cancelled during execution" not in message and "task cancelled" not in message
