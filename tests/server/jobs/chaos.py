"""kill -9 at random, at full size: `python -m tests.server.jobs.chaos --jobs 40 --seed 0`.

Three workers (two share a data directory, one is a machine of its own), an HTTP server, and a
client per job that submits it and follows its events. Until every client has seen its job's end:
workers, ranks and the server are killed, workers stopped and woken up, connections to the database
ended. What was killed starts again after a while. The last line of a run counts; exit status 1
unless every count after `units` is 0.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from clients.errors import OverloadedError, ServerUnavailableError
from clients.http import ProbeClient
from server.wire import TERMINAL, Event
from tests.server.jobs.conftest import Lab, make_result, make_unit
from tests.server.postgres import Postgres

NUM_UNITS = 4
WORKERS = {"near-0": "", "near-1": "", "far": "-far"}  # name: machine
SETTINGS = {
    "heartbeat_s": 0.5,
    "worker_stale_s": 4,
    "cpu_slots": 2,
    "max_dispatches": 1000,
    "unit_max_attempts": 100,
    "unit_retry_interval_s": 0.01,
}
LONGEST_RUN_S = 900.0


class Chaos:
    """One run: a laboratory, what is killed in it, and what came of it."""

    def __init__(
        self, lab: Lab, seed: int, postgres: Postgres | None = None, pause_s: float = 1.0
    ) -> None:
        self.lab = lab
        self._pause_s = pause_s
        self.kills: Counter[str] = Counter()
        self._chance = random.Random(seed)
        self._postgres = postgres
        self._workers: dict[str, subprocess.Popen[bytes]] = {}
        self._due: list[tuple[float, Callable[[], None]]] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]

    def run(self, num_jobs: int) -> str:
        """The line that counts."""
        spec = self._make_inputs()
        self._start_server()
        for name in WORKERS:
            self._start_worker(name)
        with ThreadPoolExecutor(num_jobs) as pool:
            clients = [pool.submit(self._follow, spec, number) for number in range(num_jobs)]
            self._kill_until_done(clients)
            followed = [client.result() for client in clients]
        left = self._stop_all()
        kills = " ".join(f"{victim}={n}" for victim, n in sorted(self.kills.items()))
        return f"jobs={num_jobs} kills={sum(self.kills.values())} ({kills}) " + self._count(
            followed, left
        )

    # --- what runs

    def _make_inputs(self) -> dict[str, Any]:
        """Checkpoints and text that the server finds; the fake ranks only look at the labels."""
        directory = self.lab.directory
        header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        for step in range(1, NUM_UNITS + 1):
            checkpoint = directory / "runs" / f"step-{step}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "config.json").write_text('{"model_type": "llama"}')
            size = len(header).to_bytes(8, "little")
            (checkpoint / "model.safetensors").write_bytes(size + header + bytes(4))
        (directory / "text.jsonl").write_text('{"text": "hello"}\n')
        template = make_result(make_unit(0)).model_dump_json()
        (directory / "template.json").write_text(template)
        return {
            "kind": "checkpoint_series",
            "name": "chaos",
            "checkpoints": {"source": "local", "path": str(directory / "runs" / "step-*")},
            "batches": {
                "sources": [
                    {"type": "files", "name": "t", "paths": [str(directory / "text.jsonl")]}
                ],
                "sequence_length": 16,
                "batch_sequences": 1,
                "held_out_sequences": 1,
            },
            "measurement": {"loss_batch": "held_out"},
            "model": {"device": "cpu"},
            "parallel": {"backend": "single"},
        }

    def _start_server(self) -> None:
        environment = {
            "PROBE_DATA_DIR": str(self.lab.data_dir),
            "PROBE_DATABASE_URL": self.lab.database_url,
            "PROBE_PORT": str(self._port),
            "PROBE_RATE_LIMIT_PER_S": "10000",
            "PROBE_RATE_LIMIT_BURST": "10000",
            "PYTHONFAULTHANDLER": "1",
            "PROBE_TEST_RUN": self.lab.mark,
        }
        with (self.lab.directory / "server.out").open("ab") as out:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "server.api"],
                env=os.environ | environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _start_worker(self, name: str) -> None:
        self._workers[name] = self.lab.start_worker(name, machine=WORKERS[name], **SETTINGS)

    def _follow(self, spec: dict[str, Any], number: int) -> tuple[str, list[Event]]:
        """Submit a job and see every event of it, whatever happens to the server meanwhile."""
        labels = {
            "journal": str(self.lab.directory / f"{number}.journal"),
            "template": str(self.lab.directory / "template.json"),
            "pause_s": str(self._pause_s),
        }
        address = f"http://127.0.0.1:{self._port}"
        with ProbeClient(address, reconnect_s=LONGEST_RUN_S) as client:
            while True:
                with suppress(ServerUnavailableError, OverloadedError):
                    key = f"{self.lab.mark}-{number}"
                    job = client.submit(spec | {"labels": labels}, idempotency_key=key)
                    return job.id, list(client.events(job.id))
                time.sleep(0.2)

    # --- what is killed

    def _kill_until_done(self, clients: list[Future[Any]]) -> None:
        deadline = time.monotonic() + LONGEST_RUN_S
        while not all(client.done() for client in clients):
            if time.monotonic() > deadline:
                raise SystemExit(f"not done after {LONGEST_RUN_S:g} s\n{self.lab.output()[-5000:]}")
            time.sleep(self._chance.uniform(0.1, 1.5))
            self._start_what_is_due()
            self._kill_something()
            self._supervise()

    def _supervise(self) -> None:
        """Start again what ended by itself: a name was lost or taken, a start met no database."""
        for name, worker in list(self._workers.items()):
            if worker.poll() == 1:
                self._start_worker(name)
        if (self._server.poll() or 0) > 0:
            self._start_server()

    def _start_what_is_due(self) -> None:
        now = time.monotonic()
        due, self._due = [a for t, a in self._due if t <= now], [d for d in self._due if d[0] > now]
        for action in due:
            action()

    def _later(self, longest_s: float, action: Callable[[], None]) -> None:
        self._due.append((time.monotonic() + self._chance.uniform(0, longest_s), action))

    def _kill_something(self) -> None:
        victims = {"worker": 4, "rank": 6, "server": 2, "stopped": 2}
        if self._postgres is not None:
            victims["connections"] = 3
        victim = self._chance.choices(list(victims), list(victims.values()))[0]
        if getattr(self, f"_kill_{victim}")():
            self.kills[victim] += 1

    def _kill_worker(self) -> bool:
        name = self._chance.choice(list(WORKERS))
        worker = self._workers[name]
        if worker.poll() is not None:
            return False
        self.lab.kill(worker.pid)
        self._later(6, lambda: self._start_worker(name))
        return True

    def _kill_rank(self) -> bool:
        ranks = [pid for pid, line in self.lab.processes().items() if "fake_rank" in line]
        with suppress(ProcessLookupError):
            if ranks:
                os.kill(self._chance.choice(ranks), signal.SIGKILL)
                return True
        return False

    def _kill_server(self) -> bool:
        if self._server.poll() is not None:
            return False
        self._server.kill()
        self._server.wait()
        self._later(2, self._start_server)
        return True

    def _kill_stopped(self) -> bool:
        """Stop a worker for about as long as its lease lasts, then let it go on."""
        worker = self._workers[self._chance.choice(list(WORKERS))]
        if worker.poll() is not None:
            return False
        os.kill(worker.pid, signal.SIGSTOP)

        def wake() -> None:
            if worker.poll() is None:
                os.kill(worker.pid, signal.SIGCONT)

        self._later(2 * SETTINGS["worker_stale_s"], wake)
        return True

    def _kill_connections(self) -> bool:
        assert self._postgres is not None
        database = self.lab.store.engine.url.database
        assert database is not None
        return self._postgres.terminate_connections(database) > 0

    def _stop_all(self) -> int:
        """End everything in order; how many processes are left behind."""
        living = [p for p in (*self.lab.workers, self._server) if p.poll() is None]
        for process in living:
            os.kill(process.pid, signal.SIGCONT)
            process.terminate()
        deadline = time.monotonic() + 60
        while any(process.poll() is None for process in living) and time.monotonic() < deadline:
            time.sleep(0.1)
        left = len(self.lab.processes())
        for process in living:
            if process.poll() is None:
                process.send_signal(signal.SIGABRT)  # it writes down what it was doing
        return left

    # --- what came of it

    def _count(self, followed: list[tuple[str, list[Event]]], left: int) -> str:
        counts = Counter(lost=0, duplicated=0, stuck=0)
        num_units = num_starts = 0
        expected = [2.0 ** (index + 1) for index in range(NUM_UNITS)]
        for number, (job_id, seen) in enumerate(followed):
            job = self.lab.job(job_id)
            results = self.lab.store.unit_results(job_id)
            stored = self.lab.store.events_after(job_id, 0, limit=100_000)
            told = Counter(e.data["index"] for e in stored if e.type == "unit.finished")
            num_units += len(results)
            num_starts += (self.lab.directory / f"{number}.journal").read_text().count("start ")
            counts["stuck"] += job.status not in TERMINAL
            counts["lost"] += job.status != "succeeded"
            counts["lost"] += [r.measurements[0].eta_c for r in results] != expected
            counts["lost"] += [event.id for event in seen] != list(range(1, len(stored) + 1))
            counts["lost"] += set(told) != set(range(NUM_UNITS))
            counts["duplicated"] += sum(told.values()) - len(told)
            counts["duplicated"] += sum(event.type == "job.succeeded" for event in stored) - 1
        counts["lost"] += NUM_UNITS * len(followed) - num_units
        counts["duplicated"] += len(followed) - len({job_id for job_id, _ in followed})
        line = f"units={num_units} unit_starts={num_starts} "
        line += " ".join(f"{name}={number}" for name, number in counts.items())
        return f"{line} left_behind={left}"


def is_clean(line: str) -> bool:
    """Whether nothing went wrong in the run that the line counts."""
    return line.endswith(" lost=0 duplicated=0 stuck=0 left_behind=0")


def run_on(database: str, num_jobs: int, seed: int, directory: Path) -> str:
    """One run on a new database of that kind."""
    postgres = Postgres() if database == "postgres" else None
    try:
        if postgres is None:
            url = f"sqlite:///{directory / 'data' / 'probe.db'}"
        else:
            url = postgres.url(postgres.new_database())
        lab = Lab(directory, url)
        try:
            return Chaos(lab, seed, postgres).run(num_jobs)
        finally:
            lab.close()
    finally:
        if postgres is not None:
            postgres.stop()


def main() -> int:
    """Run on each database asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--database", choices=["sqlite", "postgres", "both"], default="both")
    args = parser.parse_args()
    databases = ["sqlite", "postgres"] if args.database == "both" else [args.database]
    clean = True
    for database in databases:
        directory = Path(tempfile.mkdtemp(prefix=f"probe-chaos-{database}-"))
        started = time.monotonic()
        line = run_on(database, args.jobs, args.seed, directory)
        clean &= is_clean(line)
        took = f"{time.monotonic() - started:.0f} s"
        sys.stdout.write(f"{database} ({took}, {directory}): {line}\n")
        sys.stdout.flush()
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
