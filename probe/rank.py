"""The process that measures: `python -m probe.rank`.

With `torchrun --nproc-per-node N -m probe.rank --spec FILE` the model is sharded over N ranks.

With `--socket` it is fed units by a worker over a unix socket, as JSON lines, and lives no longer
than that worker. With `--spec` it measures a whole job by itself and prints the same events on
stdout. Logs go to stderr.

    worker -> rank: job {spec} | unit {unit, eta_init} | stop
    rank -> worker: ready {pid, device} | progress {unit_id, data} | result {unit_id, result}
                    | error {unit_id, code, message, retryable, traceback}
"""

import argparse
import ctypes
import datetime as dt
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from probe.errors import ConfigError, ParallelismError, ProbeError
from probe.plan import expand_units
from probe.result import Unit, UnitResult, eta_init_hint
from probe.spec_load import load_spec, parse_spec

if TYPE_CHECKING:
    from probe.engine import Session

_log = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1
_ORPHAN_POLL_S = 1.0
_COLLECTIVE_TIMEOUT = dt.timedelta(minutes=10)  # a rank may read a checkpoint while others wait

Send = Callable[[dict[str, Any]], None]


def die_with_parent(parent: int) -> None:
    """End this process when its parent does, however the parent ends.

    Linux sends SIGKILL itself; that signal is lost where the parent was gone before it was asked
    for, and other systems have none, so a thread also watches for a new parent.

    Args:
        parent: Process id of the parent at the start.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_ORPHAN_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _world_size() -> int:
    """How many ranks torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def refuse_several_ranks() -> None:
    """Fail where torchrun started more than one rank, which a worker does not feed.

    Raises:
        ParallelismError: WORLD_SIZE is above 1.
    """
    world_size = _world_size()
    if world_size > 1:
        raise ParallelismError(
            f"WORLD_SIZE is {world_size}, but a worker feeds one rank per job. For a sharded "
            "model run torchrun -m probe.rank --spec FILE."
        )


@contextmanager
def joined_ranks() -> Iterator[int]:
    """This process's rank among those torchrun started, in their process group; 0 when alone."""
    if _world_size() == 1:
        yield 0
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=_COLLECTIVE_TIMEOUT)
    yield dist.get_rank()
    dist.barrier()  # after an error there is none: this rank leaves, torchrun ends the others


def error_event(error: BaseException, unit_id: str | None) -> dict[str, Any]:
    """Any exception as an `error` message; what is not ours has the code `internal_error`."""
    ours = isinstance(error, ProbeError)
    return {
        "type": "error",
        "unit_id": unit_id,
        "code": error.code if isinstance(error, ProbeError) else "internal_error",
        "message": str(error) if ours else f"{type(error).__name__}: {error}",
        "retryable": error.retryable if isinstance(error, ProbeError) else False,
        "traceback": "".join(traceback.format_exception(error)),
    }


class Measurer:
    """Runs units on one resident session and reports every event through `send`."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._session: Session | None = None

    def start_job(self, raw: Any) -> bool:
        """A new job: earlier model, tokenizer and batches are let go. False after an error."""
        self._session = None
        try:
            from probe.engine import Session

            self._session = Session(parse_spec(raw))
        except Exception as error:
            self._send(error_event(error, None))
            return False
        return True

    def measure(self, raw: Any, eta_init: dict[str, float] | None) -> dict[str, Any] | None:
        """One unit: progress, then its result or its error. Returns the result sent, if any."""
        unit_id = raw.get("unit_id") if isinstance(raw, dict) else None
        try:
            if self._session is None:
                raise ConfigError("a unit came before its job was accepted")
            unit = Unit.model_validate(raw)
            result = self._session.measure(
                unit,
                eta_init=eta_init,
                on_progress=lambda data: self._send(
                    {"type": "progress", "unit_id": unit_id, "data": data}
                ),
            )
        except (BrokenPipeError, ConnectionError):
            raise  # nobody is listening any more
        except Exception as error:
            _log.exception("unit %s failed", unit_id, extra={"event": "unit.failed"})
            self._send(error_event(error, unit_id))
            return None
        event = {"type": "result", "unit_id": unit_id, "result": result.model_dump(mode="json")}
        self._send(event)
        return event


def ready_event() -> dict[str, Any]:
    """What a rank says first: its process id and device."""
    from probe.engine import choose_device
    from probe.provenance import device_name

    return {"type": "ready", "pid": os.getpid(), "device": device_name(choose_device("auto"))}


def serve_socket(path: str) -> int:
    """Measure what a worker sends until it says stop or closes the socket. Returns 0."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(path)
        lines = connection.makefile("r", encoding="utf-8")

        def send(message: dict[str, Any]) -> None:
            connection.sendall((json.dumps(message) + "\n").encode())

        try:
            refuse_several_ranks()
            send(ready_event())
        except ProbeError as error:
            send(error_event(error, None))
            return 1
        return _serve(lines, send)


def _serve(lines: TextIO, send: Send) -> int:
    measurer = Measurer(send)
    try:
        for line in lines:
            message = json.loads(line)
            if message["type"] == "stop":
                break
            if message["type"] == "job":
                measurer.start_job(message["spec"])
            elif message["type"] == "unit":
                measurer.measure(message["unit"], message.get("eta_init"))
            else:
                unknown = ConfigError(f"unknown message type {message['type']!r}")
                send(error_event(unknown, None))
    except (BrokenPipeError, ConnectionError):
        _log.warning("the worker closed the socket", extra={"event": "rank.orphaned"})
    return 0


def run_spec(path: str, out: str | None, stream: TextIO) -> int:
    """Measure a whole job without a server; events as JSON lines.

    Under torchrun every rank calls this with the same job; rank 0 alone reports and writes. There
    the first failed unit ends the run, since the ranks may no longer be at the same point.

    Args:
        path: Job file.
        out: Where the results are written too, one JSON line each; None: nowhere.
        stream: Takes the events: units, ready, progress, result or error, and done at the end.

    Returns:
        0 when every unit has a result, else 1. A failed unit does not stop the ones after it.
    """
    rank = int(os.environ.get("RANK", "0"))

    def send(message: dict[str, Any]) -> None:
        if rank == 0:  # the others log to stderr
            stream.write(json.dumps(message) + "\n")
            stream.flush()

    num_failed = 0
    try:
        spec = load_spec(path)
        units = expand_units(spec)
        send({"type": "units", "units": [unit.model_dump(mode="json") for unit in units]})
        send(ready_event())
        with joined_ranks():
            raw = spec.model_dump(mode="json")
            num_failed = _run_units(raw, units, out if rank == 0 else None, send)
            if num_failed and _world_size() > 1:
                raise ParallelismError(f"rank {rank} stops after a failed unit, and all with it.")
    except ProbeError as error:
        send(error_event(error, None))
        num_failed = 1
    send({"type": "done", "num_failed": num_failed})
    return 1 if num_failed else 0


def _run_units(spec: Any, units: list[Unit], out: str | None, send: Send) -> int:
    """Measure units in order, each starting from the hint of the one before; count the failed."""
    measurer = Measurer(send)
    if not measurer.start_job(spec):
        return len(units)
    num_failed = 0
    eta_init: dict[str, float] | None = None
    for unit in units:
        event = measurer.measure(unit.model_dump(mode="json"), eta_init)
        if event is None:
            num_failed += 1
            if _world_size() > 1:
                break
            continue
        # A unit without an answer leaves the guess of the one before it, as in a queued job.
        eta_init = eta_init_hint(UnitResult.model_validate(event["result"])) or eta_init
        if out is not None:
            with Path(out).open("a", encoding="utf-8") as file:
                file.write(json.dumps(event["result"]) + "\n")
    return num_failed


def main(arguments: list[str] | None = None) -> int:
    """Entry of `python -m probe.rank`."""
    parser = argparse.ArgumentParser(prog="python -m probe.rank", description=__doc__)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--socket", help="unix socket of the worker that feeds units")
    mode.add_argument("--spec", help="job file to measure without a server")
    parser.add_argument("--out", help="with --spec: write results there too, as JSON lines")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(message)s")
    die_with_parent(os.getppid())
    try:
        return _run(options)
    except KeyboardInterrupt:
        return 130  # as a shell reports it; whoever watches has no use for a traceback


def _run(options: argparse.Namespace) -> int:
    if options.socket is not None:
        return serve_socket(options.socket)
    # Libraries print; only events may reach stdout.
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with events:
        return run_spec(options.spec, options.out, events)


if __name__ == "__main__":
    status = main()
    if _world_size() > 1:  # gloo's threads can abort the process while Python shuts down
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
