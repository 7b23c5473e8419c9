"""The process that measures: `python -m probe.rank`, one of several where torchrun starts them.

With `--socket` it is fed units by a worker over a unix socket or TCP, as JSON lines, and lives no
longer than that worker; each rank of a gang has a connection of its own and gets every message.
With `--spec` it measures a whole job by itself and prints the same events on stdout. Logs go to
stderr. Rank 0 speaks for all; of the others only `ready` and errors are heard.

    worker -> rank: job {spec} | unit {unit, eta_init, next} | stop
    rank -> worker: ready {pid, device, rank} | progress {unit_id, data} | result {unit_id, result}
                    | error {unit_id, code, message, retryable, traceback, rank}
"""

import argparse
import ctypes
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from probe.errors import ConfigError, ProbeError
from probe.failures import known_failure
from probe.json_log import JOB_ID, JsonFormatter, log_as_json, log_fields
from probe.kinds import JobSpec
from probe.parallel.join import (
    has_joined,
    join_ranks,
    lost_contact_explained,
    rank_number,
    use_own_gpu,
    wait_for_all,
    world_size,
)
from probe.placement import backend_for
from probe.plan import expand_units
from probe.prefetch import Prefetcher
from probe.result import Unit
from probe.spec import AdamW
from probe.spec_continual import ContinualLearningSpec
from probe.spec_load import load_spec, parse_spec
from probe.unit_results import next_eta_init, parse_result
from probe.worker_link import connect_to_worker

if TYPE_CHECKING:
    from probe.continual.session import ContinualSession
    from probe.engine import Session
    from probe.mix_engine import MixSession
    from probe.mix_train import MixTrainSession

_log = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1
_ORPHAN_POLL_S = 1.0
COLLECTIVE_TIMEOUT_S = 600.0  # a rank may read a checkpoint while the others wait

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


def error_event(error: BaseException, unit_id: str | None) -> dict[str, Any]:
    """Any exception as an `error` message; what nobody foresaw has the code `internal_error`."""
    known = known_failure(error)
    return {
        "type": "error",
        "unit_id": unit_id,
        "code": "internal_error" if known is None else known.code,
        "message": f"{type(error).__name__}: {error}" if known is None else str(known),
        "retryable": False if known is None else known.retryable,
        "traceback": "".join(traceback.format_exception(error)),
        "rank": rank_number(),
    }


class Measurer:
    """Runs units on one resident session and reports every event through `send`.

    Args:
        send: Takes every event of this rank.
        collective_timeout_s: Longest wait for other ranks in one exchange.
    """

    def __init__(self, send: Send, *, collective_timeout_s: float = COLLECTIVE_TIMEOUT_S) -> None:
        self._send = send
        self._collective_timeout_s = collective_timeout_s
        self._session: Session | MixSession | MixTrainSession | ContinualSession | None = None
        self._prefetcher: Prefetcher | None = None  # one on every machine

    def start_job(self, raw: Any) -> bool:
        """A new job: earlier model, tokenizer and batches are let go. False after an error."""
        self._session = None
        try:
            from probe.sessions import open_session

            spec = parse_spec(raw)
            self._meet(spec)
            self._session = open_session(spec)
            self._prefetcher = _prefetcher_for(spec)
        except Exception as error:
            self._send(error_event(error, None))
            return False
        return True

    def _meet(self, spec: JobSpec) -> None:
        """Find the other ranks, where the kind of job knows any."""
        if not isinstance(spec, ContinualLearningSpec):
            backend = backend_for(spec.parallel, world_size())
            join_ranks(backend, spec.model.device, self._collective_timeout_s)
        elif world_size() > 1:
            raise ConfigError(
                f"a continual_learning job runs in one process, but {world_size()} were started. "
                "Start it as `python -m probe.rank --spec FILE`."
            )

    def measure(
        self, raw: Any, eta_init: dict[str, float] | None, upcoming: Any = None
    ) -> dict[str, Any] | None:
        """One unit: progress, then its result or its error. Returns the result sent, if any.

        Args:
            raw: The unit.
            eta_init: First guess per loss batch or task.
            upcoming: The unit after it, whose checkpoint is fetched once this one's is here.
        """
        unit_id = raw.get("unit_id") if isinstance(raw, dict) else None

        def on_progress(data: dict[str, Any]) -> None:
            self._send({"type": "progress", "unit_id": unit_id, "data": data})
            if upcoming is not None and self._prefetcher is not None and data["phase"] != "load":
                self._prefetcher.begin(Unit.model_validate(upcoming).checkpoint_ref)

        try:
            if self._session is None:
                raise ConfigError("a unit came before its job was accepted")
            unit = Unit.model_validate(raw)
            with lost_contact_explained(), log_fields(unit_id=unit_id):
                result = self._session.measure(unit, eta_init=eta_init, on_progress=on_progress)
        except (BrokenPipeError, ConnectionError):
            raise  # nobody is listening any more
        except Exception as error:
            about = {"event": "unit.failed", "unit_id": unit_id}
            _log.exception("unit %s failed", unit_id, extra=about)
            self._send(error_event(error, unit_id))
            return None
        event = {"type": "result", "unit_id": unit_id, "result": result.model_dump(mode="json")}
        self._send(event)
        return event


def _prefetcher_for(spec: JobSpec) -> Prefetcher | None:
    """What fetches the next unit's checkpoint: on one rank per machine, where there is any."""
    if isinstance(spec, ContinualLearningSpec) or os.environ.get("LOCAL_RANK", "0") != "0":
        return None
    optimizer = spec.optimizer
    wanted = isinstance(optimizer, AdamW) and optimizer.moments != "warmup"
    return Prefetcher(wants_moments=wanted)


def ready_event() -> dict[str, Any]:
    """What a rank says first: its process id, device and number."""
    from probe.engine import choose_device
    from probe.provenance import device_name

    use_own_gpu()
    device = device_name(choose_device("auto"))
    return {"type": "ready", "pid": os.getpid(), "device": device, "rank": rank_number()}


def _of_this_rank(send: Send) -> Send:
    """`send` as it is on rank 0; on the others for errors only."""

    def send_own(message: dict[str, Any]) -> None:
        if rank_number() == 0 or message["type"] == "error":
            send(message)

    return send_own


def serve_socket(where: str, collective_timeout_s: float = COLLECTIVE_TIMEOUT_S) -> int:
    """Measure what a worker sends until it says stop or closes the socket. Returns 0.

    Between units every rank waits on its own connection, not on the others: a gang may be idle
    for longer than an exchange between ranks may take.

    Args:
        where: As `probe.worker_link.connect_to_worker`.
        collective_timeout_s: Longest wait for other ranks in one exchange.
    """
    with connect_to_worker(where) as connection:
        lines = connection.makefile("r", encoding="utf-8")

        def send(message: dict[str, Any]) -> None:
            connection.sendall((json.dumps(message) + "\n").encode())

        send(ready_event())
        return _serve(lines, _of_this_rank(send), collective_timeout_s)


def _serve(lines: TextIO, send: Send, collective_timeout_s: float) -> int:
    measurer = Measurer(send, collective_timeout_s=collective_timeout_s)
    try:
        for line in lines:
            message = json.loads(line)
            if message["type"] == "stop":
                break
            if message["type"] == "job":
                measurer.start_job(message["spec"])
            elif message["type"] == "unit":
                measurer.measure(message["unit"], message.get("eta_init"), message.get("next"))
            else:
                unknown = ConfigError(f"unknown message type {message['type']!r}")
                send(error_event(unknown, None))
    except (BrokenPipeError, ConnectionError):
        _log.warning("the worker closed the socket", extra={"event": "rank.orphaned"})
    return 0


def run_spec(
    path: str,
    out: str | None,
    stream: TextIO,
    collective_timeout_s: float = COLLECTIVE_TIMEOUT_S,
) -> int:
    """Measure a whole job without a server; events as JSON lines.

    Under torchrun every rank calls this with the same job. Rank 0 reports and writes, the others
    report their errors; the first failed unit ends the run, since the ranks may no longer be at
    the same point.

    Args:
        path: Job file.
        out: Where the results are written too, one JSON line each; None: nowhere.
        stream: Takes the events: units, ready, progress, result or error, and done at the end.
        collective_timeout_s: Longest wait for other ranks in one exchange.

    Returns:
        0 when every unit has a result, else 1. A failed unit of a single rank does not stop the
        ones after it.
    """

    def write(message: dict[str, Any]) -> None:
        stream.write(json.dumps(message) + "\n")
        stream.flush()

    send = _of_this_rank(write)
    num_failed = 0
    try:
        spec = load_spec(path)
        units = expand_units(spec)
        send({"type": "units", "units": [unit.model_dump(mode="json") for unit in units]})
        send(ready_event())
        measurer = Measurer(send, collective_timeout_s=collective_timeout_s)
        accepted = measurer.start_job(spec.model_dump(mode="json"))
        own_out = out if rank_number() == 0 else None
        num_failed = _run_units(measurer, units, own_out) if accepted else len(units)
        if num_failed == 0:
            wait_for_all()
    except ProbeError as error:
        send(error_event(error, None))
        num_failed = 1
    send({"type": "done", "num_failed": num_failed})
    return 1 if num_failed else 0


def _run_units(measurer: Measurer, units: list[Unit], out: str | None) -> int:
    """Measure units in order, each starting from the hint of the one before; count the failed."""
    num_failed = 0
    eta_init: dict[str, float] | None = None
    for unit, upcoming in zip(units, [*units[1:], None], strict=True):
        event = measurer.measure(unit.model_dump(mode="json"), eta_init, upcoming)
        if event is None:
            num_failed += 1
            if world_size() > 1:
                break
            continue
        # A unit without an answer leaves the guess of the one before it, as in a queued job.
        eta_init = next_eta_init(parse_result(event["result"])) or eta_init
        if out is not None:
            with Path(out).open("a", encoding="utf-8") as file:
                file.write(json.dumps(event["result"]) + "\n")
    return num_failed


def main(arguments: list[str] | None = None) -> int:
    """Entry of `python -m probe.rank`."""
    parser = argparse.ArgumentParser(prog="python -m probe.rank", description=__doc__)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--socket", help="of the worker that feeds units: path or tcp://HOST:PORT")
    mode.add_argument("--spec", help="job file to measure without a server")
    parser.add_argument("--out", help="with --spec: write results there too, as JSON lines")
    parser.add_argument(
        "--collective-timeout-s",
        type=float,
        default=COLLECTIVE_TIMEOUT_S,
        help="longest wait for other ranks in one exchange (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    _set_up_logging()
    die_with_parent(os.getppid())
    try:
        return _run(options)
    except KeyboardInterrupt:
        return 130  # as a shell reports it; whoever watches has no use for a traceback


def _set_up_logging() -> None:
    """As the worker logs; its settings are in the environment."""
    if os.environ.get("PROBE_LOG_FORMAT") != "json":
        form = "%(levelname)s %(message)s"
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=form)
        return
    fields: dict[str, Any] = {"rank": int(os.environ.get("RANK", "0"))}
    if JOB_ID in os.environ:
        fields["job_id"] = os.environ[JOB_ID]
    log_as_json(JsonFormatter(**fields))


def _run(options: argparse.Namespace) -> int:
    if options.socket is not None:
        return serve_socket(options.socket, options.collective_timeout_s)
    # Libraries print; only events may reach stdout.
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with events:
        return run_spec(options.spec, options.out, events, options.collective_timeout_s)


if __name__ == "__main__":
    status = main()
    if has_joined():  # gloo's threads can abort the process while Python shuts down
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
