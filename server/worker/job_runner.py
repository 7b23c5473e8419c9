"""What a worker does with a job: the DBOS workflow, its one step per unit, retries, progress.

The workflow's input is the ordered list of units, so a replay after a crash takes the same
steps. A unit's result is recorded in our table before DBOS hears that the step is done; a step
that runs again finds it there. Numbers never depend on interruptions: the first guess of a
search comes from the recorded result of the unit before, never from a process's memory.

A job can be taken from here while it runs: cancelled, or given to another worker because this
one was silent for too long. Its execution then ends without another word (see `server.fence`).
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from dbos import DBOS
from sqlalchemy.exc import DBAPIError, OperationalError

from probe.errors import ProbeError
from probe.model_size import model_size
from probe.placement import fixed_num_ranks, place
from probe.result import Plan, Unit
from probe.spec import ParallelOptions
from probe.spec_continual import ContinualLearningSpec
from probe.spec_load import parse_spec
from probe.unit_results import AnyUnitResult, next_eta_init
from server import queue, tracing
from server.fence import execution_token
from server.launchers import GangShape, launcher_for
from server.settings import Settings
from server.store import SqlStore
from server.wire import EventType, JobError
from server.worker import time_limit
from server.worker.execution import Execution
from server.worker.gang import Gang, OnProgress, UnitFailedError
from server.worker.observation import Observation
from server.worker.reach import refuse_what_is_out_of_reach
from server.worker.stop_request import StopRequest

logger = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")

_PROGRESS_INTERVAL_S = 0.25  # at most four progress events a second, and every change of phase
_DATABASE_RETRY_S = 1.0
_STOP_GRACE_S = 1.0


class JobRunner:
    """Runs the jobs this worker has claimed. All of it lives in DBOS's event loop."""

    def __init__(self, store: SqlStore, settings: Settings, stopping: StopRequest) -> None:
        """Nothing runs yet.

        Args:
            store: Where plans come from and results go.
            settings: Retries, deadlines, directories.
            stopping: Made when the worker is to end. What fails from then on has not failed.
        """
        self.device = ""
        self.observation = Observation(settings.worker_name)
        self._store = store
        self._settings = settings
        self._stopping = stopping
        self._executions: dict[str, Execution] = {}

    @property
    def job_ids(self) -> list[str]:
        """Jobs being run now."""
        return sorted(self._executions)

    def tokens(self) -> dict[str, str]:
        """The token of every job being run now. From any thread, as the next two."""
        return {execution.job_id: execution.token for execution in self._copy()}

    def active_ids(self) -> set[str]:
        """Jobs that are begun, run, or ended but not yet so recorded, in this process."""
        return queue.active_ids() | set(self.tokens())

    def leave(self, tokens: Mapping[str, str]) -> None:
        """Give up these jobs at once, if they still run under these tokens."""
        for execution in self._copy():
            if tokens.get(execution.job_id) == execution.token:
                execution.leave()

    def _copy(self) -> list[Execution]:
        return list(self._executions.copy().values())

    def register(self) -> None:
        """Make the workflow known to DBOS; once per process, before its launch."""

        @DBOS.step(name="unit", preemptible=True)
        async def unit(job_id: str, index: int) -> str:
            return await self.run_unit(job_id, index)

        @DBOS.workflow(
            name=queue.WORKFLOW_NAME, max_recovery_attempts=self._settings.max_dispatches
        )
        async def probe(job_id: str, unit_ids: list[str]) -> int:
            execution = await self._enter(job_id, execution_token(job_id))
            try:
                with self.observation.job(job_id, await self._traceparent(job_id)):
                    await self._begin(execution)
                    for index in range(len(unit_ids)):
                        await unit(job_id, index)
                    await execution.end_gang()
            finally:
                execution.kill_gang()
                del self._executions[job_id]
                execution.ended.set()
                logger.info("%s ends here", job_id, extra={"event": "job.left", "job_id": job_id})
            return len(unit_ids)

    async def _enter(self, job_id: str, token: str) -> Execution:
        """An execution of its own for the job, after any earlier one in this process has ended.

        A job can be taken from here and come back before we know: the heartbeat was late.
        """
        while (earlier := self._executions.get(job_id)) is not None:
            earlier.leave()
            await earlier.ended.wait()
        execution = self._executions[job_id] = Execution(job_id, token)
        return execution

    async def run_unit(self, job_id: str, index: int) -> str:
        """Measure and record one unit, unless its result is there; returns its id.

        Tries again, after a growing wait, what another try can help.

        Raises:
            UnitFailedError: It cannot help, or the tries are used up.
            JobTakenError: The job is no longer ours.
        """
        execution = self._executions[job_id]
        unit = execution.plan.units[index]
        if await self._database(self._store.unit_result, job_id, index) is not None:
            return unit.unit_id
        with self.observation.unit(job_id, execution.plan, unit) as seen:
            result = await self._measured_in_time(execution, unit)
            if await self._database(self._store.record_unit, job_id, result, execution.token):
                seen.finished(result)
        return unit.unit_id

    async def _traceparent(self, job_id: str) -> str | None:
        return await self._database(self._store.traceparent, job_id) if tracing.is_on() else None

    async def _measured_in_time(self, execution: Execution, unit: Unit) -> AnyUnitResult:
        job_id = execution.job_id
        limit_s = time_limit.limit_of(execution.plan)
        passed_s = 0.0 if limit_s is None else await self._database(self._passed_s, job_id)
        try:
            async with time_limit.within(limit_s, passed_s):
                return await self._measured(execution, unit)
        except UnitFailedError as failure:
            if failure.code == time_limit.TIME_LIMIT_EXCEEDED:
                await self._failed(execution, unit, 1, failure)
            raise

    def _passed_s(self, job_id: str) -> float:
        return time_limit.seconds_since_start(self._store.engine, job_id)

    async def _measured(self, execution: Execution, unit: Unit) -> AnyUnitResult:
        """The unit's result, after as many tries as it takes or gets."""
        eta_init = await self._eta_init(execution.job_id, unit.index)
        attempt = 1
        while True:
            try:
                return await self._attempt(execution, unit, eta_init, attempt)
            except UnitFailedError as failure:
                await self._failed(execution, unit, attempt, failure)
                attempt += 1

    async def _begin(self, execution: Execution) -> None:
        job_id = execution.job_id
        plan = await self._database(self._store.get_plan, job_id)
        assert plan is not None, f"{job_id} is queued without a job"
        execution.plan = plan
        name = self._settings.worker_name
        await self._database(self._store.mark_running, job_id, name, execution.token)
        logger.info("%s begins", job_id, extra={"event": "job.running", "job_id": job_id})

    async def _eta_init(self, job_id: str, index: int) -> dict[str, float] | None:
        """First guesses from the nearest unit before this one that has an answer."""
        for earlier in reversed(range(index)):
            result = await self._database(self._store.unit_result, job_id, earlier)
            hint = None if result is None else next_eta_init(result)
            if hint is not None:
                return hint
        return None

    async def _attempt(
        self, execution: Execution, unit: Unit, eta_init: dict[str, float] | None, attempt: int
    ) -> AnyUnitResult:
        about = {"unit_id": unit.unit_id, "index": unit.index}
        reach = (execution.plan, unit, self._settings)
        try:
            await asyncio.to_thread(refuse_what_is_out_of_reach, *reach)
            gang = execution.gang or await self._start_gang(execution)
            started = about | {"attempt": attempt, "device": gang.device}
            await self._tell(execution, "unit.started", started)
            following = execution.plan.units[unit.index + 1 : unit.index + 2]
            upcoming = following[0] if following else None
            await asyncio.to_thread(refuse_what_is_out_of_reach, *reach)  # a start takes seconds
            return await gang.measure(unit, eta_init, self._throttled(execution, about), upcoming)
        except BaseException:
            # Also when cancelled. After any error the next try gets fresh processes: an
            # out-of-memory or a CUDA fault leaves more behind than can be cleaned up.
            execution.kill_gang()
            raise

    async def _failed(
        self, execution: Execution, unit: Unit, attempt: int, failure: UnitFailedError
    ) -> None:
        """Note a failed try and wait for the next one, or raise the failure."""
        # Whoever stops a machine ends every process at once, the ranks perhaps before us: then
        # the unit did not fail, it was interrupted. The shutdown cancels the endless wait; the
        # job goes on at the next start.
        execution.require_here()
        if await self._stopping.made_within(_STOP_GRACE_S):
            await asyncio.Event().wait()
        self.observation.metrics.unit_failed(failure.code)
        job_id = execution.job_id
        error = JobError(code=failure.code, message=failure.message, unit_id=unit.unit_id)
        await self._database(self._store.record_error, job_id, error, execution.token)
        last = not failure.retryable or attempt >= self._settings.unit_max_attempts
        logger.warning(
            "%s: try %d of unit %s failed%s: %s",
            *(job_id, attempt, unit.unit_id, ", the job fails" if last else "", failure.message),
            extra={"event": "job.failed" if last else "unit.retrying", "job_id": job_id},
        )
        if last:
            raise failure
        settings = self._settings
        wait_s = settings.unit_retry_interval_s * settings.unit_retry_backoff ** (attempt - 1)
        data = error.model_dump() | {"index": unit.index, "attempt": attempt, "wait_s": wait_s}
        await self._tell(execution, "unit.retrying", data)
        await execution.sleep(wait_s)

    def _throttled(self, execution: Execution, about: dict[str, Any]) -> OnProgress:
        phase, due = None, 0.0

        async def on_progress(progress: dict[str, Any]) -> None:
            nonlocal phase, due
            now = time.monotonic()
            if progress.get("phase") == phase and now < due:
                return
            phase, due = progress.get("phase"), now + _PROGRESS_INTERVAL_S
            await self._tell(execution, "unit.progress", about | progress)

        return on_progress

    async def _tell(self, execution: Execution, type: EventType, data: dict[str, Any]) -> None:
        append = self._store.append_event
        await self._database(append, execution.job_id, type, data, execution.token)

    async def _start_gang(self, execution: Execution) -> Gang:
        settings = self._settings
        plan = execution.plan
        num_ranks = await asyncio.to_thread(_num_ranks, plan)
        gang = Gang(
            log_path=settings.data_dir / "logs" / f"{execution.job_id}.log",
            launcher=launcher_for(settings),
            shape=GangShape.of(plan.spec, num_ranks),
            start_s=settings.gang_start_s,
            no_progress_s=settings.unit_no_progress_s,
        )
        execution.gang = gang
        execution.require_here()
        await gang.start(plan.spec)
        self.device = gang.device
        return gang

    async def _database(self, call: Callable[P, R], *args: P.args, **kw: P.kwargs) -> R:
        """Run a call of the store in a thread; wait out a database that does not answer.

        Every such call may run twice without harm, so a lost answer is simply asked for again.
        """
        while True:
            try:
                return await asyncio.to_thread(call, *args, **kw)
            except DBAPIError as error:
                if not (isinstance(error, OperationalError) or error.connection_invalidated):
                    raise
                logger.warning("the database does not answer, trying again: %s", error.orig)
                await asyncio.sleep(_DATABASE_RETRY_S)


def _num_ranks(plan: Plan) -> int:
    """Processes the job gets on this machine: as many as its spec says, else as place() finds.

    Raises:
        UnitFailedError: The spec was stored by a program that knew other fields.
    """
    if plan.kind == "continual_learning":  # its runs are one batched model
        return 1
    parallel = ParallelOptions.model_validate(plan.spec.get("parallel") or {})
    fixed = fixed_num_ranks(parallel)
    if fixed is not None:
        return fixed
    try:
        spec = parse_spec(plan.spec)
        assert not isinstance(spec, ContinualLearningSpec)
        return place(spec, model_size(plan.units[0].checkpoint_ref)).num_ranks
    except ProbeError as error:
        raise UnitFailedError(error.code, str(error), retryable=error.retryable) from error
