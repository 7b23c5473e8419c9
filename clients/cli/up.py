"""`probe up`, `serve` and `worker`: run the service on this machine."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clients.cli.children import SAFE_PATH, log_tail, start_child, stop_children
from clients.cli.conventions import (
    CommandError,
    InputError,
    JsonOption,
    add_command,
    print_json_line,
    say,
)

if TYPE_CHECKING:
    from clients.http import ProbeClient

_START_S = 120.0  # the first start imports everything from a cold disk
_POLL_S = 0.1
_RESTARTS, _RESTART_WINDOW_S = 3, 60.0
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@dataclass
class _Service:
    """One kind of child: how to start it, where it logs, and when it had to be started again."""

    name: str
    module: str
    arguments: list[str]
    log: Path
    process: "subprocess.Popen[bytes] | None" = None
    restarts: list[float] = field(default_factory=list)

    def start(self, environment: dict[str, str]) -> None:
        with self.log.open("ab") as log:
            self.process = start_child(
                self.module, self.arguments, environment=environment, stdout=log, stderr=log
            )

    def has_died(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def obituary(self) -> str:
        status = self.process.returncode if self.process is not None else None
        how = f"signal {-status}" if status is not None and status < 0 else f"status {status}"
        tail = log_tail(self.log)
        return f"the {self.name} ended with {how}; the end of {self.log}:\n{tail or '(empty)'}"


class _Stop(Exception):  # noqa: N818 - not an error: SIGTERM asked us to end
    pass


def up(
    host: Annotated[
        str, typer.Option(envvar="PROBE_HOST", help="Address the server listens on.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(envvar="PROBE_PORT", min=0, max=65535, help="0: any free port.")
    ] = 8765,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="PROBE_DATA_DIR",
            help="Database and logs; default: ~/.local/share/sharpness-probe.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Worker processes.")] = 1,
    queues: Annotated[
        str | None, typer.Option(help="Queues they take jobs from; default: gpu,cpu.")
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(min=1, max=256, help="Jobs of queue cpu at once per worker; default: 1."),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Run server and worker on this machine until Ctrl-C.

    Jobs survive the end of the service: they go on when it is up again.
    """
    directory = data_directory(data_dir)
    port = _free_port(host, port)
    environment = {"PROBE_DATA_DIR": str(directory), "PROBE_HOST": host, "PROBE_PORT": str(port)}
    chosen = {"--queues": queues, "--slots": slots}
    options = [word for k, v in chosen.items() if v is not None for word in (k, str(v))]
    services = _services(directory, host, port, workers, options)
    address = f"http://{_reachable(host)}:{port}"
    with _signals_as_exceptions():
        try:
            for service in services:
                service.start(environment)
            _wait_until_ready(services, address)
            _announce(address, directory, services, json_output)
            _supervise(services, environment)
        except (KeyboardInterrupt, _Stop):
            say("stopping")
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # we are stopping already
            stop_children([s.process for s in services if s.process is not None])


def _services(
    directory: Path, host: str, port: int, workers: int, options: list[str]
) -> list[_Service]:
    logs = directory / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to data directory {directory}: {error}") from error
    server = _Service(
        "server", "server.api", ["--host", host, "--port", str(port)], logs / "server.log"
    )
    names = [f"{socket.gethostname()}-{index}" for index in range(workers)]
    return [server] + [
        _Service(
            f"worker {name}",
            "server.worker",
            ["--name", name, *options],
            logs / f"worker-{name}.log",
        )
        for name in names
    ]


def data_directory(chosen: Path | None) -> Path:
    """As `server.settings` decides it, without importing the server's settings."""
    if chosen is None:
        base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
        chosen = Path(base) / "sharpness-probe"
    return chosen.expanduser().absolute()


def _free_port(host: str, port: int) -> int:
    """The port, checked to be free; for 0 one that is.

    Raises:
        CommandError: Something listens there already.
        InputError: This machine has no such address.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            found: int = probe.getsockname()[1]
    except socket.gaierror as error:
        raise InputError(f"--host {host}: {error.strerror}") from error
    except PermissionError as error:
        raise InputError(f"port {port} may not be used by this user; choose one >= 1024") from error
    except OSError as error:
        if error.errno != 98 and "in use" not in str(error):
            raise InputError(f"cannot listen on {host}: {error.strerror}") from error
        raise CommandError(_port_in_use(host, port)) from error
    return found


def _port_in_use(host: str, port: int) -> str:
    from clients.http import ProbeClient

    address = f"http://{_reachable(host)}:{port}"
    with ProbeClient(address, timeout_s=2.0) as client:
        if client.ready():
            return f"a server is up at {address} already; use it, or choose another --port"
    return f"port {port} on {host} is in use by another program; choose another with --port"


def _reachable(host: str) -> str:
    """An address to connect to for one to listen on."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)


@contextlib.contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """SIGTERM and SIGHUP end `up` as Ctrl-C does."""

    def stop(signum: int, frame: Any) -> None:
        raise _Stop

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _wait_until_ready(services: list[_Service], address: str) -> None:
    """Return once the server answers and every worker has reported.

    Raises:
        CommandError: A child died, or it took too long.
    """
    from clients.errors import ClientError
    from clients.http import ProbeClient

    deadline = time.monotonic() + _START_S
    pids = {s.process.pid for s in services[1:] if s.process is not None}
    with ProbeClient(address, timeout_s=5.0, retries=0) as client:
        while True:
            for service in services:
                if service.has_died():
                    raise CommandError(service.obituary())
            if client.ready():
                with contextlib.suppress(ClientError):
                    if pids <= _live_workers(client, otherwise=pids):
                        return
            if time.monotonic() > deadline:
                tails = "\n".join(f"{s.log}:\n{log_tail(s.log)}" for s in services)
                raise CommandError(f"not ready after {_START_S:.0f} s\n{tails}")
            time.sleep(_POLL_S)


def _live_workers(client: "ProbeClient", *, otherwise: set[int]) -> set[int]:
    """Process ids of live workers; `otherwise` where the server wants a key we do not have."""
    from clients.errors import UnauthorizedError

    try:
        return {worker.pid for worker in client.workers().data if worker.alive}
    except UnauthorizedError:
        return otherwise


def _announce(address: str, directory: Path, services: list[_Service], json_output: bool) -> None:
    if json_output:
        pids = {s.name: s.process.pid for s in services if s.process is not None}
        print_json_line({"address": address, "data_dir": str(directory), "pids": pids})
        return
    print(f"dashboard  {address}/")
    print(f"API        {address}/docs")
    print(f"data, logs {directory}")
    print("Ctrl-C stops it; jobs go on when it is up again.", flush=True)


def _supervise(services: list[_Service], environment: dict[str, str]) -> None:
    """Start a child again when it dies; give up on one that keeps dying.

    Raises:
        CommandError: One died more than three times within a minute.
    """
    while True:
        for service in services:
            if not service.has_died():
                continue
            now = time.monotonic()
            service.restarts = [t for t in service.restarts if now - t < _RESTART_WINDOW_S]
            if len(service.restarts) >= _RESTARTS:
                raise CommandError(service.obituary())
            service.restarts.append(now)
            status = service.process.returncode if service.process is not None else None
            say(f"the {service.name} ended (status {status}); starting it again")
            if service.process is not None:
                stop_children([service.process], grace_s=0.0)  # what it has left in its group
            service.start(environment)
        time.sleep(_POLL_S)


def serve(context: typer.Context) -> None:
    """Run the HTTP server alone; arguments are passed on to it."""
    become("server.api", context.args)


def worker(context: typer.Context) -> None:
    """Run one worker alone; arguments are passed on to it."""
    become("server.worker", context.args)


def become(module: str, arguments: list[str]) -> None:
    """Replace this process by `python -m module`; signals then reach it directly."""
    sys.stdout.flush()
    command = [sys.executable, "-m", module, *arguments]
    os.execve(sys.executable, command, {**os.environ, **SAFE_PATH})


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    add_command(app, up, "probe up --port 8765 --workers 1", "probe up --queues cpu --slots 4")
    add_command(app, serve, "probe serve --host 127.0.0.1 --port 8765", context_settings=_PASS_ON)
    add_command(app, worker, "probe worker --queues cpu --slots 4", context_settings=_PASS_ON)
