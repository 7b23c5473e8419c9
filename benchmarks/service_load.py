"""The service under load: 100,000 finished jobs in the database, 50 kept-alive clients.

Fills an SQLite and a Postgres database, starts the real server on each (`python -m server.api`, one
process) and beside it a bare FastAPI app that answers from memory with the same JSON, on the same
HTTP server. A load generator, a process of its own, drives both in turn, ours and the bare one in
short rounds, so that other load on the machine meets both alike. Everything shares this machine's
cores, the database too.

Two loads, because they say different things. `open`: 50 clients that together ask so many times a
second, at random moments, whether or not answers have come: what users see. `closed`: 50 clients
that ask again at once: the server is saturated, so the times are 50 over its throughput, of any
server; here the ratio to the bare app counts. Jobs are drawn at random over the whole table,
cursors too; a list has 50 jobs.

    python benchmarks/service_load.py [--quick] [--database sqlite|postgres|both] [--soak-s 600]

Ends with RESULT lines; exits 1 when one is short of its target. The embedded Postgres runs with
fsync on and 256 MB of shared buffers.
"""

import argparse
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the tests' Postgres, from the wheel

from service.fill import NUM_UNITS, TEAMS, fill, write_series  # noqa: E402
from service.load import get, post  # noqa: E402

from server import queue  # noqa: E402
from server.store import SqlStore  # noqa: E402
from tests.server import postgres  # noqa: E402

CLIENTS = 50
P99_MS = 50.0
SUBMITS_PER_S = 150.0
HERE = Path(__file__).parent / "service"
Row = tuple[str, float, float, str, bool]  # name, value, baseline, target, ok


class Server:
    """A child process that answers on a port of this machine."""

    def __init__(self, command: list[str], port: int, path: str, **popen: Any) -> None:
        self.port = port
        feed = popen.pop("feed", None)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE if feed else subprocess.DEVNULL, **popen
        )
        if feed:
            assert self.process.stdin is not None
            self.process.stdin.write(feed)
            self.process.stdin.close()
        deadline = time.monotonic() + 60
        while True:
            try:
                self.read(path)
                return
            except OSError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    self.stop()
                    raise
                time.sleep(0.05)

    def read(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return answer.read()

    def rss_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def cpu_s(self) -> float:
        """CPU seconds of the process so far: other load on the machine hardly moves them."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(") ", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def service(database_url: str, directory: Path) -> Iterator[Server]:
    """The real server; its limits, which are per client, do not count here."""
    port = free_port()
    limits = {"RATE_LIMIT_PER_S": "1000000", "RATE_LIMIT_BURST": "1000000"}
    env = {f"PROBE_{name}": value for name, value in limits.items()} | {
        "PROBE_DATABASE_URL": database_url,
        "PROBE_DATA_DIR": str(directory),
        "PROBE_LOG_LEVEL": "WARNING",
    }
    command = [sys.executable, "-m", "server.api", "--port", str(port)]
    server = Server(command, port, "/readyz", env=os.environ | env, cwd=ROOT)
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def bare(ours: Server, job_id: str) -> Iterator[Server]:
    port = free_port()
    feed = ours.read(f"/v1/jobs/{job_id}") + b"\n" + ours.read("/v1/jobs?limit=50") + b"\n"
    command = [sys.executable, str(HERE / "bare.py"), str(port)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    server = Server(command, port, "/v1/jobs/x", feed=feed, env=env)
    try:
        yield server
    finally:
        server.stop()


def generate(server: Server, **asked: Any) -> dict[str, Any]:
    """Run the load generator against a server, to its end."""
    if "requests" in asked:
        asked["requests"] = [request.decode("latin-1") for request in asked["requests"]]
    done = subprocess.run(
        [sys.executable, str(HERE / "load.py")],
        input=json.dumps({"what": "drive", "host": "127.0.0.1", "port": server.port} | asked),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"the load generator failed:\n{done.stderr}")
    return json.loads(done.stdout)


def percentile(sorted_ms: list[float], share: float) -> float:
    return sorted_ms[min(len(sorted_ms) - 1, int(share * len(sorted_ms)))]


def requests_by_name(ids: list[str]) -> dict[str, list[bytes]]:
    """What is measured: show, and lists without and with filters, from anywhere in the table."""
    draw = random.Random(11)
    some = [draw.choice(ids) for _ in range(4000)]
    deep = [f"/v1/jobs?limit=50&after={job_id}" for job_id in some]
    filters = ["status=failed", "status=succeeded", "kind=checkpoint_series"]
    filters += [f"label=team={team}" for team in TEAMS]
    filters += ["status=cancelled&label=team=scaling", "status=running", "status=queued"]
    return {
        "show": [get(f"/v1/jobs/{job_id}") for job_id in some],
        "list": [get("/v1/jobs?limit=50") for _ in some],
        "list_deep": [get(path) for path in deep],
        "list_filtered": [
            get(f"{path}&{filters[turn % len(filters)]}") for turn, path in enumerate(deep)
        ],
    }


def reads(ours: Server, beside: Server, ids: list[str], database: str, options: Any) -> list[Row]:
    """Times of show and list under both loads, in rounds that take turns with the bare app."""
    rows: list[Row] = []
    for name, asked in requests_by_name(ids).items():
        open_rate = options.show_rate if name == "show" else options.list_rate
        for load, rate in (("open", open_rate), ("closed", None)):
            found: dict[str, list[dict[str, Any]]] = {"ours": [], "bare": []}
            for turn in range(options.rounds):
                mixed = asked[turn * 500 :] + asked[: turn * 500]
                for which, server in (("ours", ours), ("bare", beside)):
                    before = server.cpu_s()
                    done = generate(
                        server,
                        requests=mixed,
                        num_clients=CLIENTS,
                        duration_s=options.round_s,
                        rate_per_s=rate,
                    )
                    assert set(done["statuses"]) == {"200"}, done["statuses"]
                    done["server_cpu_ms"] = 1000 * (server.cpu_s() - before) / done["num_requests"]
                    found[which].append(done)
            rows.append(_read_row(f"{name}_{load}_p99_ms_{database}", found, load, rate))
    return rows


def _read_row(
    name: str, found: dict[str, list[dict[str, Any]]], load: str, rate: float | None
) -> Row:
    ms = {which: sorted(v for done in runs for v in done["ms"]) for which, runs in found.items()}
    per_s = {which: sum(d["per_s"] for d in runs) / len(runs) for which, runs in found.items()}
    cpu = sum(d["cpu_s"] for d in found["ours"]) / sum(d["elapsed_s"] for d in found["ours"])
    p99 = {which: percentile(values, 0.99) for which, values in ms.items()}
    own = {w: sum(d["server_cpu_ms"] for d in runs) / len(runs) for w, runs in found.items()}
    print(
        f"{name}: ours p50 {percentile(ms['ours'], 0.5):.2f}, p99 {p99['ours']:.2f}, most "
        f"{ms['ours'][-1]:.1f} ms, {per_s['ours']:.0f}/s; bare p50 "
        f"{percentile(ms['bare'], 0.5):.2f}, p99 {p99['bare']:.2f} ms, {per_s['bare']:.0f}/s; "
        f"{'at once' if rate is None else f'{rate:g}/s'}; CPU of the server per request "
        f"{own['ours']:.2f}, bare {own['bare']:.2f} ms; generator {cpu:.2f} of a core"
    )
    return name, p99["ours"], p99["bare"], f"{P99_MS:g}", p99["ours"] < P99_MS


def submits(ours: Server, spec: dict[str, Any], database: str, options: Any) -> list[Row]:
    """Real specs, the plan of each made by the server; 8 clients that send again at once."""
    bodies = [json.dumps(spec | {"name": f"load {number}"}).encode() for number in range(500)]
    done = generate(
        ours,
        requests=[post("/v1/jobs", body) for body in bodies],
        num_clients=8,
        duration_s=options.submit_s,
        rate_per_s=None,
    )
    assert set(done["statuses"]) == {"202"}, done["statuses"]
    print(
        f"submit_{database}: {done['num_requests']} jobs in {done['elapsed_s']:.1f} s, p50 "
        f"{percentile(done['ms'], 0.5):.1f}, p99 {percentile(done['ms'], 0.99):.1f} ms"
    )
    ok = done["per_s"] >= SUBMITS_PER_S
    return [(f"submit_per_s_{database}", done["per_s"], SUBMITS_PER_S, f"{SUBMITS_PER_S:g}", ok)]


def watchers(
    ours: Server, database_url: str, spec: dict[str, Any], database: str, options: Any
) -> list[Row]:
    """Streams on live jobs whose events are written meanwhile, as a worker writes them."""
    num_jobs, num_events = 10, options.events_per_job
    store = SqlStore(database_url)
    ids = []
    for _ in range(num_jobs):
        request = urllib.request.Request(
            f"http://127.0.0.1:{ours.port}/v1/jobs",
            json.dumps(spec).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            ids.append(json.load(answer)["id"])
    paths = [f"/v1/jobs/{ids[n % num_jobs]}/events" for n in range(options.watchers)]
    asked = {"what": "watch", "host": "127.0.0.1", "port": ours.port, "paths": paths}
    watching = subprocess.Popen(
        [sys.executable, str(HERE / "load.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watching.stdin is not None
    assert watching.stderr is not None
    watching.stdin.write(json.dumps(asked | {"deadline_s": 180}))
    watching.stdin.close()
    watching.stderr.readline()  # all of them are connected
    for turn in range(num_events):
        for job_id in ids:
            store.append_event(job_id, "unit.progress", {"unit_id": "0", "index": 0, "done": turn})
        time.sleep(0.02)  # about 300 events a second in all
    for job_id in ids:
        _end(store, job_id)
    store.close()
    watching.stdin = None  # closed already; communicate would flush it
    done = json.loads(watching.communicate()[0])
    expected = list(range(1, num_events + 3))  # after job.queued, before the job's end
    exact = sum(stream["ids"] == expected for stream in done["streams"])
    num_received = sum(len(stream["ids"]) for stream in done["streams"])
    print(
        f"watchers_{database}: {exact} of {len(paths)} got {len(expected)} events once each and "
        f"in order, {num_received} in all; from the event's time to its arrival p50 "
        f"{percentile(done['ms'], 0.5):.0f}, p99 {percentile(done['ms'], 0.99):.0f} ms"
    )
    name = f"watchers_exactly_once_{database}"
    return [(name, exact, len(paths), f"{len(paths)}", exact == len(paths))]


def _end(store: SqlStore, job_id: str) -> None:
    workflows = queue.workflow_status_table(store.engine)
    statement = workflows.update().where(workflows.c.workflow_uuid == job_id)
    with store.engine.begin() as connection:
        connection.execute(statement.values(status="SUCCESS", completed_at=0))


def soak(
    ours: Server, ids: list[str], spec: dict[str, Any], database: str, options: Any
) -> list[Row]:
    """Resident memory under show, list, submit and metrics, for minutes."""
    draw = random.Random(13)
    asked = []
    for turn in range(5000):
        job_id = draw.choice(ids)
        paths = (f"/v1/jobs/{job_id}", f"/v1/jobs?limit=50&after={job_id}", "/metrics")
        kinds = [get(paths[0])] * 3 + [get(paths[1])] + [get(f"{paths[0]}/results")]
        kinds.append(post("/v1/jobs", json.dumps(spec).encode()) if turn % 10 == 0 else kinds[0])
        asked.append(get(paths[2]) if turn % 100 == 0 else draw.choice(kinds))
    samples: list[tuple[float, float]] = []
    begin, stop = time.monotonic(), threading.Event()

    def sample() -> None:
        while not stop.wait(1.0):
            samples.append((time.monotonic() - begin, ours.rss_mib()))

    sampler = threading.Thread(target=sample)
    sampler.start()
    done = generate(
        ours,
        requests=asked,
        num_clients=CLIENTS,
        duration_s=options.soak_s,
        rate_per_s=options.soak_rate,
    )
    stop.set()
    sampler.join()
    assert set(done["statuses"]) <= {"200", "202"}, done["statuses"]
    # After a fifth of the time caches are full and every code path has been taken.
    settled = [mib for at, mib in samples if at >= options.soak_s / 5]
    every = samples[:: max(1, len(samples) // 10)]
    print("resident MiB: " + ", ".join(f"{mib:.0f} at {at:.0f} s" for at, mib in every))
    part = max(1, len(settled) // 10)
    early, late = sum(settled[:part]) / part, sum(settled[-part:]) / part
    per_request = (late - early) * 2**20 / (done["num_requests"] * 0.8)
    print(
        f"soak_{database}: {done['num_requests']} requests in {done['elapsed_s']:.0f} s; resident "
        f"{samples[0][1]:.1f} MiB at first, {early:.1f} after a fifth, {late:.1f} at the end, "
        f"{per_request:.0f} bytes per request; p99 {percentile(done['ms'], 0.99):.1f} ms"
    )
    return [(f"soak_rss_mib_{database}", late, early, "ratio<=1.05", late <= 1.05 * early)]


def measure(database_url: str, database: str, directory: Path, options: Any) -> list[Row]:
    spec = write_series(directory / "series")
    begin = time.monotonic()
    ids = fill(database_url, spec, options.jobs)
    print(
        f"{database}: {len(ids)} finished jobs of {NUM_UNITS} units in "
        f"{time.monotonic() - begin:.0f} s"
    )
    rows: list[Row] = []
    with service(database_url, directory) as ours, bare(ours, ids[0]) as beside:
        if "reads" in options.parts:
            rows += reads(ours, beside, ids, database, options)
        if "watchers" in options.parts:
            rows += watchers(ours, database_url, spec, database, options)
        if "submit" in options.parts:
            rows += submits(ours, spec, database, options)
        if "soak" in options.parts:
            rows += soak(ours, ids, spec, database, options)
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2,000 jobs, short rounds")
    parser.add_argument("--database", choices=("sqlite", "postgres", "both"), default="both")
    parser.add_argument("--jobs", type=int, help="finished jobs in the table (default: 100000)")
    parser.add_argument("--soak-s", type=float, help="seconds of the soak (default: 600)")
    parser.add_argument("--rounds", type=int, help="of each load on each app (default: 5)")
    parser.add_argument("--parts", default="reads,watchers,submit,soak", help="only these")
    options = parser.parse_args()
    quick = options.quick
    options.jobs = options.jobs or (2_000 if quick else 100_000)
    options.soak_s = options.soak_s or (8.0 if quick else 600.0)
    options.rounds, options.round_s = options.rounds or (2 if quick else 5), 1.0 if quick else 6.0
    options.submit_s = 3.0 if quick else 30.0
    options.watchers, options.events_per_job = 200, 20 if quick else 100
    options.show_rate, options.list_rate, options.soak_rate = 200.0, 50.0, 100.0
    options.parts = options.parts.split(",")
    return options


def main() -> int:
    options = parse()
    sys.stdout.reconfigure(line_buffering=True)
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}, {CLIENTS} clients")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="probe-load-") as made:
        directory = Path(made)
        if options.database in ("sqlite", "both"):
            (directory / "sqlite").mkdir()
            url = f"sqlite:///{directory / 'sqlite' / 'probe.db'}"
            rows += measure(url, "sqlite", directory / "sqlite", options)
        if options.database in ("postgres", "both"):
            # The tests' settings would spare it the disk.
            postgres._SETTINGS.update(
                fsync="on", full_page_writes="on", synchronous_commit="on", shared_buffers="256MB"
            )
            server = postgres.Postgres()
            try:
                (directory / "postgres").mkdir()
                url = server.url(server.new_database())
                rows += measure(url, "postgres", directory / "postgres", options)
            finally:
                server.stop()
    for name, value, baseline, target, ok in rows:
        print(
            f"RESULT {name} value={value:.2f} baseline={baseline:.2f} "
            f"ratio={value / baseline:.2f} target={target} {'ok' if ok else 'short'}"
        )
    return 0 if all(row[-1] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
