"""The worker process: its name, DBOS, what it does for all workers, signals, orderly end."""

import datetime as dt
import logging
import os
import signal
import socket
import sys
import time
import uuid
from pathlib import Path
from types import FrameType

from dbos import DBOS, error

from server import queue
from server.errors import JobTakenError, WorkerNameTakenError, WorkerStuckError
from server.settings import Settings
from server.store import SqlStore
from server.wire import WorkerView
from server.worker.gang import WORKER_MARK, UnitFailedError
from server.worker.gpu_memory import GpuMemory
from server.worker.heartbeat import Heartbeat
from server.worker.job_runner import JobRunner
from server.worker.lease import Lease
from server.worker.name_lock import NameLock, hold_name
from server.worker.orphans import adopt_by_lease, adopt_orphans
from server.worker.processes import kill_marked
from server.worker.slots import slots_of, take_jobs
from server.worker.stop_request import StopRequest

logger = logging.getLogger(__name__)

_RESTARTS = (
    "PROBE_WORKER_RESTARTS"  # "number:time of the first", handed to the process that follows
)
_MAX_RESTARTS = 3
_RESTARTS_WITHIN_S = 3600.0


def run_worker(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT.

    Jobs under way go on when a worker of this name starts again, or in another worker of the
    same database. A worker whose queue has lost a job starts itself again, as a new process in
    place of this one.

    Raises:
        WorkerNameTakenError: A worker of that name runs, or has taken over.
        WorkerStuckError: Starting itself again did not help.
        StoreVersionError: The database is newer than this program.
    """
    restarts = os.environ.pop(_RESTARTS, "")
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    with hold_name(settings) as lock:
        stuck = _Worker(settings, lock).run()
    if stuck:
        environment = os.environ | {_RESTARTS: _counted(restarts, stuck)}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


class _Worker:
    def __init__(self, settings: Settings, lock: NameLock) -> None:
        self._settings = settings
        self._lock = lock
        self._stopping = StopRequest()
        self._started_at = dt.datetime.now(dt.UTC)
        self._lost: WorkerNameTakenError | None = None
        self._stuck: list[str] = []
        self._store = SqlStore(settings.database_url, worker_stale_s=settings.worker_stale_s)
        self._runner = JobRunner(self._store, settings, self._stopping)
        self._gpu_memory = GpuMemory()
        self._metrics = self._runner.observation.metrics
        self._lease = Lease(
            self._store.engine, settings.worker_name, str(uuid.uuid4()), settings.worker_stale_s
        )
        self._heartbeat = Heartbeat(
            self._lease,
            self._runner,
            self._view,
            heartbeat_s=settings.heartbeat_s,
            worker_stale_s=settings.worker_stale_s,
            on_lost=self._on_lost,
            on_stuck=self._on_stuck,
        )

    def run(self) -> list[str]:
        """Work until asked to stop; jobs that only a new start can bring back, usually none."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        try:
            self._take_name()
            self._metrics.show(self._view, lambda: self._heartbeat.beaten_at)
            self._metrics.serve(self._settings)
            self._launch()
            self._heartbeat.start()
            while not self._stopping.is_made:
                self._keep_house()
                self._stopping.wait(self._settings.heartbeat_s)
        finally:
            self._end()
        if self._lost is not None:
            raise self._lost
        logger.info("worker %s has stopped", self._settings.worker_name)
        return self._stuck

    def _take_name(self) -> None:
        # Written before and after: a process that dies between the two leaves proof for both.
        self._lock.write(self._lease.instance, *self._lock.ended)
        self._lease.take(self._view(), self._lock.ended)
        self._lock.write(self._lease.instance)

    def _launch(self) -> None:
        settings = self._settings
        logging.getLogger("dbos").addFilter(_without_expected_ends)
        queue.quiet_logging()
        dbos = DBOS(
            config=queue.worker_config(
                self._store.engine, settings.database_url, settings.worker_name
            )
        )
        DBOS.listen_queues(list(settings.queues))
        self._runner.register()
        DBOS.launch()
        take_jobs(dbos, settings)
        logger.info(
            "worker %s takes jobs from %s", settings.worker_name, " and ".join(settings.queues)
        )

    def _end(self) -> None:
        self._stopping.make()
        DBOS.destroy()  # cancels what runs; each unit under way ends its own gang
        kill_marked(WORKER_MARK)
        self._metrics.stop()
        self._gpu_memory.stop()
        if self._heartbeat.is_alive():
            self._heartbeat.stop()
        try:
            self._lease.release(self._view(alive=False))
        except Exception:
            logger.exception("the end was not written: others see it when the lease has run out")
        self._store.close()

    def _view(self, *, alive: bool = True) -> WorkerView:
        return WorkerView(
            name=self._settings.worker_name,
            hostname=socket.gethostname(),
            pid=os.getpid(),
            queues=list(self._settings.queues),
            slots=slots_of(self._settings),
            device=self._runner.device or _device(),
            started_at=self._started_at,
            last_heartbeat=dt.datetime.now(dt.UTC),
            alive=alive,
            current_job_ids=self._runner.job_ids if alive else [],
            gpus=self._gpu_memory.latest,
        )

    def _keep_house(self) -> None:
        """What any worker does for all: closing events, jobs of the dead."""
        settings, engine = self._settings, self._store.engine
        try:
            self._store.settle_all()
            adopt_orphans(engine, settings.data_dir, settings.worker_name)
            adopt_by_lease(
                engine,
                settings.worker_name,
                worker_stale_s=settings.worker_stale_s,
                guess=self._heartbeat.steadiness.is_steady,
            )
        except Exception:
            logger.exception("jobs of dead workers not looked for, the next try may succeed")

    def _on_lost(self, error: WorkerNameTakenError) -> None:
        # Its ranks first: the holder of the name may be starting the same jobs right now.
        self._lost = error
        self._stopping.make()
        kill_marked(WORKER_MARK)

    def _on_stuck(self, job_ids: list[str]) -> None:
        if self._stopping.is_made:  # then nothing begins
            return
        logger.error(
            "the queue gave %s to this worker and never began it: starting again",
            ", ".join(job_ids),
            extra={"event": "worker.stuck"},
        )
        self._stuck = job_ids
        self._stopping.make()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._stopping.is_made:  # asked twice: at once, the gangs die with us
            kill_marked(WORKER_MARK)
            os._exit(128 + number)
        self._stopping.make()


def _counted(restarts: str, stuck: list[str]) -> str:
    """One start more, in the form of `PROBE_WORKER_RESTARTS`.

    Raises:
        WorkerStuckError: There were too many lately.
    """
    number, _, first = restarts.partition(":")
    if not first or time.time() - float(first) > _RESTARTS_WITHIN_S:
        return f"1:{time.time():.0f}"
    if int(number) >= _MAX_RESTARTS:
        raise WorkerStuckError(
            f"the queue gave {', '.join(stuck)} to this worker and never began it, also after "
            f"{number} starts within an hour: see the log above for errors of the queue, then "
            "start the worker by hand, or cancel the job"
        )
    return f"{int(number) + 1}:{first}"


def _device() -> str:
    """What the ranks will find, told without importing torch."""
    num_gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if num_gpus:
        return f"cuda ({num_gpus})"
    return f"cpu ({os.cpu_count()} cores)"


def _without_expected_ends(record: logging.LogRecord) -> bool:
    """Drop what DBOS says of a failed unit, a cancelled or taken job, a stop: told by us."""
    raised = record.exc_info[1] if record.exc_info else None
    if isinstance(
        raised,
        UnitFailedError
        | JobTakenError
        | error.DBOSAwaitedWorkflowCancelledError
        | error.DBOSNonExistentWorkflowError,  # cancelled and at once removed
    ):
        return False
    message = record.getMessage()
    return "cancelled during execution" not in message and "task cancelled" not in message
