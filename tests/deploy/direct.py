"""Runs the services of docker-compose.yml as plain processes: same argv, same environment.

Only what a container would be given is replaced: host names by this machine and ports of its own,
directories by temporary ones. Nothing of this machine's environment is passed on but the way to
`python`, `sh` and the programs of Postgres.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.deploy import compose
from tests.ports import Ports
from tests.server import postgres

DEADLINE_S = 150.0  # far above what anything here needs on an idle machine
PASSWORD = "p@ss:w/rd%&+ ü"  # what an address could not hold without being escaped
ADMIN_KEY = "the-first-admin-key-of-this-test"


class PostgresOverTcp(postgres.Postgres):
    """As the official image sets it up: a user, a password, a database, reached over TCP."""

    def __init__(self, environment: dict[str, str], port: int) -> None:
        self.port = port
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(postgres._SETTINGS, "listen_addresses", "127.0.0.1")
            patch.setitem(postgres._SETTINGS, "port", str(self.port))
            patch.setenv("PGPORT", str(self.port))
            super().__init__()
            user, database = environment["POSTGRES_USER"], environment["POSTGRES_DB"]
            self.execute(f"CREATE ROLE {user} LOGIN PASSWORD '{environment['POSTGRES_PASSWORD']}'")
            self.execute(f"CREATE DATABASE {database} OWNER {user}")
            rules = self._data / "pg_hba.conf"
            rules.write_text("host all all 127.0.0.1/32 scram-sha-256\nlocal all all trust\n")
            self.execute("SELECT pg_reload_conf()")

    def execute_in(self, database: str, statement: str) -> None:
        """Run a statement in one of its databases."""
        where = {"host": str(self.directory), "port": self.port, "user": "postgres"}
        with psycopg.connect(dbname=database, **where) as connection:
            connection.execute(statement)

    @property
    def programs(self) -> Path:
        return self._programs


class Services:
    """What stands in docker-compose.yml, startable one by one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ports = Ports()
        self.port = self.ports.take()
        given = {
            "POSTGRES_PASSWORD": PASSWORD,
            "PROBE_API_KEYS": ADMIN_KEY,
            "PROBE_CHECKPOINTS": str(directory / "checkpoints"),
        }
        self.services = compose.services(given)
        self.postgres = PostgresOverTcp(self.services["postgres"]["environment"], self.ports.take())
        self.metrics_ports = {name: self.ports.take() for name in ("cpu-worker", "gpu-worker")}
        self.started: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("data", "cache", "checkpoints", "metrics-key"):
            (directory / name).mkdir()

    def here(self, text: str, name: str) -> str:
        """A word of the file as it must read on this machine."""
        places = {
            "@postgres:5432/": f"@127.0.0.1:{self.postgres.port}/",
            "/var/lib/probe": f"{self.directory}/data",
            "/var/cache/probe": f"{self.directory}/cache",
            "/run/metrics-key": f"{self.directory}/metrics-key",
            "/checkpoints": f"{self.directory}/checkpoints",
            "8765": str(self.port),
            "9465": str(self.metrics_ports.get(name, 0)),
        }
        for there, here in places.items():
            text = text.replace(there, here)
        return text

    def environment(self, name: str) -> dict[str, str]:
        found = self.services[name].get("environment", {})
        path = [Path(sys.executable).parent, self.postgres.programs, "/usr/bin", "/bin"]
        given = {key: self.here(str(value), name) for key, value in found.items()}
        added = {"PATH": os.pathsep.join(map(str, path)), "HOME": str(self.directory / "cache")}
        return given | added | {"OMP_NUM_THREADS": "1"}  # the last for the sake of this machine

    def start(self, name: str) -> subprocess.Popen[bytes]:
        with self.log(name).open("wb") as log:
            process = subprocess.Popen(
                [self.here(word, name) for word in self.services[name]["command"]],
                env=self.environment(name),
                cwd=self.directory / "data",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.started[name] = process
        return process

    def log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def check(self, name: str, **changed: str) -> "subprocess.CompletedProcess[str]":
        """Run its health check once, as a container engine would."""
        how, *words = self.services[name]["healthcheck"]["test"]
        assert how == "CMD"
        return subprocess.run(
            [self.here(word, name) for word in words],
            env=self.environment(name) | changed,
            cwd=self.directory / "data",
            capture_output=True,
            text=True,
            timeout=60,
        )

    def until(self, name: str, condition: Callable[[], Any]) -> Any:
        """Poll until the condition holds; fails when the service ends or it takes too long."""
        deadline = time.monotonic() + DEADLINE_S
        while not (found := condition()):
            process = self.started[name]
            assert process.poll() is None, self.log(name).read_text()
            assert time.monotonic() < deadline, self.log(name).read_text()
            time.sleep(0.05)
        return found

    def stop(self, name: str) -> int:
        """As a container engine stops it: SIGTERM, and its grace period."""
        grace_s = float(self.services[name]["stop_grace_period"].removesuffix("s"))
        process = self.started[name]
        process.send_signal(signal.SIGTERM)
        return process.wait(grace_s)

    def close(self) -> None:
        for process in self.started.values():
            if process.poll() is None:
                process.kill()
                process.wait()
        self.postgres.stop()
        self.ports.close()
