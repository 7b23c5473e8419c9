"""One gang of ranks: a child process tree that measures the units of one job.

A launcher says how it is started. The worker hands it the job's spec and then one unit at a time
over a socket, as JSON lines, and ends it. Every rank has a connection of its own and gets every
command; rank 0 speaks for all, each for its own errors. Model and data stay in the ranks' memory
between units. Whatever goes wrong in here ends the gang and nothing else.
"""

import asyncio
import contextlib
import os
import sys
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from probe.errors import ConfigError, ParallelismError, UnitCrashedError
from probe.failures import known_failure
from probe.json_log import JOB_ID
from probe.result import Unit
from probe.unit_results import AnyUnitResult, parse_result
from server.launchers import GangShape, Launcher, LocalLauncher
from server.redaction import redact
from server.worker import oom_killer, tether
from server.worker.processes import MARK, kill_marked
from server.worker.rank_socket import Endpoint, Heard, RankSocket

OnProgress = Callable[[dict[str, Any]], Awaitable[None]]

WORKER_MARK = uuid.uuid4().hex  # of every gang this worker process starts
_TAIL_LENGTH = 2000
_READ_BYTES = 2**16  # of a log, to find the secrets at its end whole
_EXIT_S = 5.0
_LAST_WORDS_S = 1.0  # after the agent's end, for messages that are still on their way
_VERDICT_S = 5.0  # after "another rank failed", for that rank's own error to arrive
# What ranks have no use for. HF_TOKEN stays: they fetch from the hub.
_SECRETS = frozenset(
    {
        "OTEL_EXPORTER_OTLP_HEADERS",
        "PGPASSWORD",
        "PROBE_API_KEY",
        "PROBE_API_KEYS",
        "PROBE_DATABASE_URL",
        "PROBE_WEBHOOK_SECRET",
    }
)


class UnitFailedError(Exception):
    """A unit did not get a result. `retryable` says if another try can help."""

    def __init__(self, code: str, message: str, *, retryable: bool) -> None:
        self.code = code
        self.message = redact(message)  # it may hold the end of a log; events and answers show it
        super().__init__(self.message)
        self.retryable = retryable


class Gang:
    """A running gang. Every method belongs to the event loop that called `start`."""

    def __init__(
        self,
        *,
        log_path: Path,
        launcher: Launcher | None = None,
        shape: GangShape | None = None,
        start_s: float = 300.0,
        no_progress_s: float = 1800.0,
    ) -> None:
        """Nothing is started yet.

        Args:
            log_path: Standard output and error of all ranks are added to it.
            launcher: How the ranks are started; None: by torchrun, here.
            shape: Which ranks; None: one.
            start_s: Seconds until the ranks must have reported, beside the launcher's `wait_s`.
            no_progress_s: Seconds a unit may pass without any message.
        """
        self.device = ""
        self._shape = shape or GangShape()
        self.num_ranks = self._shape.num_ranks
        self._launcher = launcher or LocalLauncher()
        self._log_path = log_path
        self._start_s = start_s + self._launcher.wait_s
        self._no_progress_s = no_progress_s
        self._mark = f"{WORKER_MARK}.{uuid.uuid4().hex}"
        self._socket = RankSocket(self._launcher.listen_host)
        self._agent: asyncio.subprocess.Process | None = None
        self._exited: asyncio.Task[int] | None = None
        self._kills_before = oom_killer.num_kills()

    async def start(self, spec: dict[str, Any]) -> None:
        """Start the ranks, wait until all have reported, and give them the job's spec.

        Raises:
            UnitFailedError: They ended, failed or did not report in time.
        """
        endpoint = await self._listen()
        try:
            await self._spawn(endpoint)
        except OSError as error:  # the log, or the process: no room, not permitted, no memory
            raise _not_started(error) from error
        ready: set[int | None] = set()
        try:
            async with asyncio.timeout(self._start_s):
                while len(ready) < self.num_ranks:
                    heard = await self._hear()
                    if heard.message is None or heard.kind != "ready":
                        raise await self._failure(heard, "before all ranks reported")
                    ready.add(heard.rank)
                    if heard.rank == 0:
                        self.device = str(heard.message.get("device", ""))
        except TimeoutError:
            late = f"{len(ready)} of {self.num_ranks} ranks reported within {self._start_s:g} s"
            raise await self._crashed(late) from None
        await self._send({"type": "job", "spec": spec})

    async def _listen(self) -> Endpoint:
        try:
            return await self._socket.listen()
        except OSError as error:
            if known_failure(error) is not None:  # of the directory of the socket
                raise _not_started(error) from error
            raise UnitFailedError(
                ConfigError.code, f"cannot listen for ranks: {error}", retryable=False
            ) from error

    async def _spawn(self, endpoint: Endpoint) -> None:
        environment = _environment()
        try:
            launch = self._launcher.launch(self._shape, endpoint, environment)
        except ConfigError as error:
            raise UnitFailedError(error.code, str(error), retryable=error.retryable) from error
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        with self._log_path.open("ab") as log:
            # A session of its own: Ctrl-C in the terminal is for the worker, which then ends
            # the gang in order. -I -S: the tether itself needs nothing but the interpreter.
            self._agent = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", tether.__file__, str(os.getpid())),
                *launch.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=environment
                | dict(launch.environment)
                # The log is named after the job.
                | {MARK: self._mark, JOB_ID: self._log_path.stem, "PYTHONUNBUFFERED": "1"},
            )
        self._exited = asyncio.create_task(self._agent.wait())

    async def measure(
        self,
        unit: Unit,
        eta_init: dict[str, float] | None,
        on_progress: OnProgress,
        upcoming: Unit | None = None,
    ) -> AnyUnitResult:
        """Measure one unit; the checkpoint of the upcoming one is fetched meanwhile.

        Raises:
            UnitFailedError: The ranks reported an error, died, fell silent or sent nonsense.
        """
        following = None if upcoming is None else upcoming.model_dump()
        asked = {"type": "unit", "unit": unit.model_dump(), "eta_init": eta_init, "next": following}
        await self._send(asked)
        while True:
            try:
                async with asyncio.timeout(self._no_progress_s):
                    heard = await self._hear()
            except TimeoutError:
                raise UnitFailedError(
                    "unit_stalled",
                    f"nothing was heard from the process measuring {unit.unit_id} for "
                    f"{self._no_progress_s:g} s; see {self._log_path}",
                    retryable=True,
                ) from None
            message = heard.message
            if message is None or heard.kind == "error":
                raise await self._failure(heard, "without a result")
            if message.get("unit_id") != unit.unit_id:
                continue
            if heard.kind == "progress":
                await on_progress(message["data"])
            elif heard.kind == "result":
                return _result(message, unit)

    async def stop(self) -> None:
        """End a gang whose work is done: ask, wait some seconds, then kill what is left."""
        if self._exited is not None and not self._exited.done():
            with contextlib.suppress(OSError, TimeoutError, UnitFailedError):
                await self._send({"type": "stop"})
                await asyncio.wait_for(asyncio.shield(self._exited), _EXIT_S)
        self.kill()

    def kill(self) -> None:
        """End the gang now. Does not wait for the event loop, so a cancel cannot cut it short."""
        self._socket.close()
        if self._agent is not None:
            with contextlib.suppress(ProcessLookupError):
                # Without /proc the agent's own shutdown has to reach the ranks.
                self._agent.terminate()
            kill_marked(self._mark)

    async def _send(self, message: dict[str, Any]) -> None:
        try:
            await self._socket.send(message)
        except OSError:
            raise await self._crashed("the ranks closed the connection") from None

    async def _hear(self) -> Heard:
        """The next message of a rank, or its end; the agent's end where no rank says more."""
        assert self._exited is not None
        hearing = asyncio.create_task(self._socket.receive())
        try:
            await asyncio.wait((hearing, self._exited), return_when=asyncio.FIRST_COMPLETED)
            if not hearing.done():  # what the ranks said last is still on its way
                await asyncio.wait((hearing,), timeout=_LAST_WORDS_S)
            return hearing.result() if hearing.done() else Heard(None, None)
        finally:
            hearing.cancel()

    async def _failure(self, first: Heard, when: str) -> UnitFailedError:
        """What a gang failed of: the first reason that is not another rank's failure.

        A rank that ended without a word is a reason of its own. Ranks that only noticed wait for
        it; where all have only noticed (a time-out), the first one's error counts.
        """
        chosen, seen = first, {first.rank}
        try:
            async with asyncio.timeout(_VERDICT_S):
                while not _is_own_reason(chosen) and len(seen) < self.num_ranks:
                    following = await self._hear()
                    if following.kind not in ("error", "end") or following.rank in seen:
                        continue
                    seen.add(following.rank)
                    chosen = following if _is_own_reason(following) else chosen
        except TimeoutError:
            pass  # the others hang
        if chosen.message is not None:
            return self._reported(chosen.message)
        which = "the ranks" if self.num_ranks == 1 or chosen.rank is None else f"rank {chosen.rank}"
        detail = f" ({chosen.ending})" if chosen.ending else ""
        return await self._crashed(f"{which} ended {when}{detail}")

    def _reported(self, message: dict[str, Any]) -> UnitFailedError:
        number = message.get("rank", 0)
        rank = f"rank {number}: " if self.num_ranks > 1 and number is not None else ""
        return UnitFailedError(
            str(message["code"]),
            f"{rank}{message['message']}",
            retryable=bool(message["retryable"]),
        )

    async def _crashed(self, what: str) -> UnitFailedError:
        """The error for a lost gang, with what its log says last."""
        status = "still running"
        if self._exited is not None:
            # The agent notices a dead rank within a second and then writes which signal it was.
            with contextlib.suppress(TimeoutError):
                code = await asyncio.wait_for(asyncio.shield(self._exited), _EXIT_S)
                status = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        status += oom_killer.remark(self._kills_before)
        message = f"{what} ({status}); log {self._log_path} ends:\n{_tail(self._log_path)}"
        return UnitFailedError(UnitCrashedError.code, message, retryable=True)


def _not_started(error: OSError) -> UnitFailedError:
    known = known_failure(error)
    if known is None:
        message = f"the ranks cannot be started: {error}"
        return UnitFailedError(UnitCrashedError.code, message, retryable=True)
    message = f"the ranks cannot be started: {known}"
    return UnitFailedError(known.code, message, retryable=known.retryable)


def _environment() -> dict[str, str]:
    """Ours without secrets, for which ranks have no use, and without modules of the directory."""
    return {k: v for k, v in os.environ.items() if k not in _SECRETS} | {"PYTHONSAFEPATH": "1"}


def _is_own_reason(heard: Heard) -> bool:
    return heard.message is None or heard.message.get("code") != ParallelismError.code


def _result(message: dict[str, Any], unit: Unit) -> AnyUnitResult:
    try:
        result = parse_result(message["result"])
    except ValidationError as error:
        raise UnitFailedError(
            "invalid_result", f"the result of {unit.unit_id} is malformed: {error}", retryable=False
        ) from error
    if result.unit.index != unit.index:
        raise UnitFailedError(
            "invalid_result",
            f"asked for unit {unit.index}, got a result of unit {result.unit.index}",
            retryable=False,
        )
    return result


def _tail(path: Path) -> str:
    """The end of a log, its secrets taken out before it is cut: half of one looks like none."""
    with path.open("rb") as log:
        log.seek(0, os.SEEK_END)
        begin = max(0, log.tell() - _READ_BYTES)
        log.seek(begin)
        text = log.read().decode(errors="replace")
    if begin > 0:
        text = (text.split(maxsplit=1) or [""])[-1]  # the first word may be half of one
    return redact(text)[-_TAIL_LENGTH:].strip() or "(nothing)"
