"""One gang of ranks: a child process tree that measures the units of one job.

The worker starts it, hands it the job's spec and then one unit at a time over a unix socket, as
JSON lines, and ends it. Model and data stay in the ranks' memory between units. Whatever goes
wrong in here ends the gang and nothing else.
"""

import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from probe.errors import UnitCrashedError
from probe.result import Unit, UnitResult
from server.worker import tether
from server.worker.processes import MARK, kill_marked

OnProgress = Callable[[dict[str, Any]], Awaitable[None]]

# One rank; `--standalone` picks a free port, so that gangs do not meet.
TORCHRUN = (
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"),
    *("-m", "probe.rank", "--socket", "{socket}"),
)
WORKER_MARK = uuid.uuid4().hex  # of every gang this worker process starts
_LINE_LIMIT = 256 * 2**20  # bytes of one message: a result with very many repeats
_SOCKET_PATH_LIMIT = 100  # bytes; the kernel's limit is 107
_TAIL_BYTES = 2000
_EXIT_S = 5.0
_SECRETS = ("PROBE_API_KEYS", "PROBE_DATABASE_URL")


class UnitFailedError(Exception):
    """A unit did not get a result. `retryable` says if another try can help."""

    def __init__(self, code: str, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retryable = retryable


class Gang:
    """A running gang. Every method belongs to the event loop that called `start`."""

    def __init__(
        self,
        *,
        log_path: Path,
        command: Sequence[str] = (),
        start_s: float = 300.0,
        no_progress_s: float = 1800.0,
    ) -> None:
        """Nothing is started yet.

        Args:
            log_path: Standard output and error of all ranks are added to it.
            command: What to start; `{socket}` is filled in. Empty: torchrun with one rank.
            start_s: Seconds until the ranks must have reported.
            no_progress_s: Seconds a unit may pass without any message.
        """
        self.device = ""
        self._command = tuple(command) or TORCHRUN
        self._log_path = log_path
        self._start_s = start_s
        self._no_progress_s = no_progress_s
        self._mark = f"{WORKER_MARK}.{uuid.uuid4().hex}"
        self._directory: Path | None = None
        self._server: asyncio.Server | None = None
        self._agent: asyncio.subprocess.Process | None = None
        self._exited: asyncio.Task[int] | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def start(self, spec: dict[str, Any]) -> None:
        """Start the ranks, wait until they report, and give them the job's spec.

        Raises:
            UnitFailedError: They ended or did not report in time.
        """
        self._directory = _socket_directory()
        path = self._directory / "s"
        connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if connected.done():
                writer.close()
                return
            self._reader, self._writer = reader, writer
            connected.set_result(None)

        self._server = await asyncio.start_unix_server(accept, path, limit=_LINE_LIMIT)
        await self._spawn(path)
        assert self._exited is not None
        try:
            async with asyncio.timeout(self._start_s):
                await _first(connected, self._exited)
                ready = await self._receive(self._start_s) if connected.done() else None
        except TimeoutError:
            late = f"the ranks did not report within {self._start_s:g} s"
            raise await self._crashed(late) from None
        if ready is None or ready["type"] != "ready":
            raise await self._crashed("the ranks ended before they reported")
        self.device = str(ready.get("device", ""))
        await self._send({"type": "job", "spec": spec})

    async def _spawn(self, path: Path) -> None:
        command = [part.replace("{socket}", str(path)) for part in self._command]
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        with self._log_path.open("ab") as log:
            # A session of its own: Ctrl-C in the terminal is for the worker, which then ends
            # the gang in order. -I -S: the tether itself needs nothing but the interpreter.
            self._agent = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", tether.__file__, str(os.getpid())),
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=_environment() | {MARK: self._mark, "PYTHONUNBUFFERED": "1"},
            )
        self._exited = asyncio.create_task(self._agent.wait())

    async def measure(
        self, unit: Unit, eta_init: dict[str, float] | None, on_progress: OnProgress
    ) -> UnitResult:
        """Measure one unit.

        Raises:
            UnitFailedError: The ranks reported an error, died, fell silent or sent nonsense.
        """
        await self._send({"type": "unit", "unit": unit.model_dump(), "eta_init": eta_init})
        while True:
            try:
                message = await self._receive(self._no_progress_s)
            except TimeoutError:
                raise UnitFailedError(
                    "unit_stalled",
                    f"nothing was heard from the process measuring {unit.unit_id} for "
                    f"{self._no_progress_s:g} s; see {self._log_path}",
                    retryable=True,
                ) from None
            if message["type"] == "error":
                raise _reported(message)
            if message.get("unit_id") != unit.unit_id:
                continue
            if message["type"] == "progress":
                await on_progress(message["data"])
            elif message["type"] == "result":
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
        if self._writer is not None:
            self._writer.transport.abort()
        if self._server is not None:
            self._server.close()
        if self._agent is not None:
            with contextlib.suppress(ProcessLookupError):
                # Without /proc the agent's own shutdown has to reach the ranks.
                self._agent.terminate()
            kill_marked(self._mark)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    async def _send(self, message: dict[str, Any]) -> None:
        assert self._writer is not None
        self._writer.write(json.dumps(message).encode() + b"\n")
        try:
            await self._writer.drain()
        except OSError:
            raise await self._crashed("the ranks closed the connection") from None

    async def _receive(self, timeout_s: float) -> dict[str, Any]:
        """The next message.

        Raises:
            TimeoutError: None came within `timeout_s`.
            UnitFailedError: The ranks are gone, or do not speak the protocol.
        """
        assert self._reader is not None
        assert self._exited is not None
        reading = asyncio.create_task(self._reader.readline())
        try:
            async with asyncio.timeout(timeout_s):
                await _first(reading, self._exited)
            message = json.loads(reading.result()) if reading.done() else {}
        except TimeoutError:
            raise
        except (OSError, ValueError) as error:
            raise await self._crashed(f"the ranks ended without a result ({error})") from error
        finally:
            reading.cancel()
        if "type" not in message:
            raise await self._crashed("the ranks ended without a result")
        return dict(message)

    async def _crashed(self, what: str) -> UnitFailedError:
        """The error for a lost gang, with what its log says last."""
        status = "still running"
        if self._exited is not None:
            # The agent notices a dead rank within a second and then writes which signal it was.
            with contextlib.suppress(TimeoutError):
                code = await asyncio.wait_for(asyncio.shield(self._exited), _EXIT_S)
                status = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        message = f"{what} ({status}); log {self._log_path} ends:\n{_tail(self._log_path)}"
        return UnitFailedError(UnitCrashedError.code, message, retryable=True)


def _environment() -> dict[str, str]:
    """Ours without secrets, for which ranks have no use, and without modules of the directory."""
    return {k: v for k, v in os.environ.items() if k not in _SECRETS} | {"PYTHONSAFEPATH": "1"}


async def _first(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


def _reported(message: dict[str, Any]) -> UnitFailedError:
    return UnitFailedError(
        str(message["code"]), str(message["message"]), retryable=bool(message["retryable"])
    )


def _result(message: dict[str, Any], unit: Unit) -> UnitResult:
    try:
        result = UnitResult.model_validate(message["result"])
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
    with path.open("rb") as log:
        log.seek(0, os.SEEK_END)
        log.seek(max(0, log.tell() - _TAIL_BYTES))
        return log.read().decode(errors="replace").strip() or "(nothing)"


def _socket_directory() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="probe-"))  # readable by this user only
    if len(os.fsencode(directory / "s")) <= _SOCKET_PATH_LIMIT:
        return directory
    directory.rmdir()
    return Path(tempfile.mkdtemp(prefix="probe-", dir="/tmp"))
