"""Every service of docker-compose.yml, run directly against a real Postgres over TCP."""

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.deploy.direct import ADMIN_KEY, DEADLINE_S, PASSWORD, Services
from tests.deploy.programs import program
from tests.server.postgres import missing

pytestmark = [pytest.mark.postgres, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
WORKERS = ("cpu-worker", "gpu-worker")


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    what = missing()
    if what is not None:
        pytest.skip(f"a Postgres needs {what}")
    found = Services(tmp_path_factory.mktemp("compose"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def before(services: Services) -> dict[str, Any]:
    """What the health checks say while only Postgres is there."""
    return {name: services.check(name) for name in ("server", *WORKERS)}


@pytest.fixture(scope="module")
def running(services: Services, before: dict[str, Any]) -> Services:
    """Server and workers, started in the order in which they wait for each other."""
    for together in (("server",), WORKERS):
        for name in together:
            services.start(name)
        for name in together:
            services.until(name, lambda name=name: services.check(name).returncode == 0)
    return services


def get(address: str) -> httpx.Response:
    """As a program without a key asks."""
    return httpx.get(address, timeout=30, trust_env=False)


@pytest.fixture
def client(running: Services) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    address = f"http://127.0.0.1:{running.port}"
    with httpx.Client(base_url=address, headers=headers, timeout=30, trust_env=False) as client:
        yield client


def test_postgres_is_well_once_it_answers(services: Services) -> None:
    assert services.check("postgres", PGPORT=str(services.postgres.port)).returncode == 0
    assert services.check("postgres", PGPORT="1").returncode == 2  # pg_isready: no response


def test_what_does_not_run_is_not_well(before: dict[str, Any]) -> None:
    assert {name: done.returncode for name, done in before.items()} == dict.fromkeys(before, 1)
    assert "does not answer" in before["server"].stderr
    for done in before.values():
        assert PASSWORD not in done.stderr


def test_what_runs_is_well(running: Services) -> None:
    for name in ("server", *WORKERS):
        done = running.check(name)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_worker_of_another_name_is_not_well(running: Services) -> None:
    done = running.check("cpu-worker", PROBE_WORKER_NAME="cpu-1")
    assert done.returncode == 1
    assert "cpu-1" in done.stderr


def test_a_silent_worker_is_not_well(running: Services) -> None:
    """One whose last heartbeat, at the beginning of 1970, is older than the minute allowed."""
    running.postgres.execute_in(
        "probe",
        "INSERT INTO workers (name, last_heartbeat, stopped, view) "
        "SELECT 'silent', 0, false, view FROM workers LIMIT 1",
    )
    done = running.check("cpu-worker", PROBE_WORKER_NAME="silent")
    running.postgres.execute_in("probe", "DELETE FROM workers WHERE name = 'silent'")
    assert done.returncode == 1
    assert re.search(r"'silent' has been silent for \d{10} s, allowed are 60 s", done.stderr)


def test_the_first_key_opens_the_server_and_none_does_not(client: httpx.Client) -> None:
    workers = client.get("/v1/workers").json()["data"]
    assert {(w["name"], tuple(w["queues"]), w["alive"]) for w in workers} == {
        ("cpu-0", ("cpu",), True),
        ("gpu-0", ("gpu",), True),
    }
    assert get(f"{client.base_url}/v1/workers").status_code == 401


def test_jobs_see_the_mounted_checkpoints_and_nothing_else(
    client: httpx.Client, running: Services
) -> None:
    (running.directory / "secret.gguf").write_bytes(b"")
    outside = client.post(
        "/v1/checkpoints", json={"source": "gguf", "path": str(running.directory / "secret.gguf")}
    )
    assert (outside.status_code, outside.json()["code"]) == (422, "path_not_allowed")


def test_a_job_goes_through_the_worker_of_its_queue(
    client: httpx.Client, running: Services, continual_spec: dict[str, Any]
) -> None:
    continual_spec["model"]["device"] = "cpu"
    continual_spec["stream"] |= {"num_tasks": 1, "epochs": 1}
    for part in ("methods", "controls", "seeds"):
        continual_spec[part] = continual_spec[part][:1]
    job = client.post("/v1/jobs", json=continual_spec).raise_for_status().json()

    def ended() -> dict[str, Any] | None:
        found: dict[str, Any] = client.get(f"/v1/jobs/{job['id']}").json()
        return found if found["status"] not in ("queued", "running") else None

    assert running.until("cpu-worker", ended)["status"] == "succeeded"
    (result,) = client.get(f"/v1/jobs/{job['id']}/results").json()["data"]
    assert result["runs"][0]["tasks"][0]["outcome"] == "finished"


def test_prometheus_gets_a_key_of_its_own_that_may_read(
    client: httpx.Client, running: Services, continual_spec: dict[str, Any]
) -> None:
    file = running.directory / "metrics-key" / "key"
    keys = []
    for _ in range(2):  # the second time it finds its work done
        assert running.start("metrics-key").wait(DEADLINE_S) == 0, running.log(
            "metrics-key"
        ).read_text()
        keys.append(file.read_text())
    assert keys[0] == keys[1]
    assert file.stat().st_mode & 0o004  # Prometheus is another user
    config = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())
    scrape = config["scrape_configs"][0]
    assert running.here(scrape["authorization"]["credentials_file"], "prometheus") == str(file)
    # Prometheus drops the white space at the end of the file
    client.headers["Authorization"] = f"{scrape['authorization']['type']} {keys[0].strip()}"
    assert "\nprobe_jobs{" in client.get("/metrics").raise_for_status().text
    assert client.post("/v1/jobs", json=continual_spec).status_code == 403


@pytest.mark.parametrize("name", WORKERS)
def test_workers_tell_prometheus_about_themselves(running: Services, name: str) -> None:
    address = f"http://127.0.0.1:{running.metrics_ports[name]}/metrics"
    text = get(address).raise_for_status().text
    own = running.services[name]["environment"]["PROBE_WORKER_NAME"]
    assert f'probe_worker_jobs{{worker="{own}"}} 0.0' in text  # the job has ended


def test_prometheus_itself_is_well_and_scrapes_all_of_them(
    running: Services, tmp_path: Path
) -> None:
    """Its command, configuration and health check; only places and ports are this machine's."""
    assert (running.directory / "metrics-key" / "key").exists()  # made by the test above
    port = running.ports.take()
    config = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())
    config["global"]["scrape_interval"] = "1s"
    server, workers = config["scrape_configs"]
    key_file = server["authorization"]["credentials_file"]
    server["authorization"]["credentials_file"] = running.here(key_file, "prometheus")
    server["static_configs"] = [{"targets": [f"127.0.0.1:{running.port}"]}]
    assert set(workers.pop("dns_sd_configs")[0]["names"]) == set(WORKERS)
    here = [f"127.0.0.1:{running.metrics_ports[name]}" for name in WORKERS]
    workers["static_configs"] = [{"targets": here}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    service = running.services["prometheus"]
    words = [word.replace("/etc/prometheus", str(tmp_path)) for word in service["command"]]
    words = [word.replace("=/prometheus", f"={tmp_path / 'data'}") for word in words]
    command = [program("prometheus"), *words, f"--web.listen-address=127.0.0.1:{port}"]
    with running.log("prometheus").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path)
    running.started["prometheus"] = process
    check = [program("promtool"), *service["healthcheck"]["test"][2:]]
    check = [word.replace("9090", str(port)) for word in check]

    def is_well() -> bool:
        done = subprocess.run(check, capture_output=True, text=True)
        if "expected command" not in done.stderr:
            return done.returncode == 0
        # Before 2.44 promtool has no such check; this is what the newer one asks.
        try:
            return get(f"http://127.0.0.1:{port}/-/healthy").is_success
        except httpx.ConnectError:
            return False

    running.until("prometheus", is_well)

    def ask(path: str) -> Any:
        address = f"http://127.0.0.1:{port}/api/v1/{path}"
        return get(address).raise_for_status().json()["data"]

    def all_are_up() -> bool:
        targets = ask("targets")["activeTargets"]
        return len(targets) == 3 and all(target["health"] == "up" for target in targets)

    running.until("prometheus", all_are_up)
    found = running.until("prometheus", lambda: ask("query?query=probe_jobs")["result"])
    assert {("cpu", "succeeded"), ("gpu", "queued")} <= {
        (one["metric"]["queue"], one["metric"]["status"]) for one in found
    }
    jobs, names = ("probe-server", "probe-worker"), ("cpu-0", "gpu-0")

    def both_tell_of_every_worker() -> bool:  # a target is up a moment before its samples are there
        told = [one["metric"] for one in ask("query?query=probe_worker_jobs")["result"]]
        by = sorted((one["job"], one["worker"]) for one in told)
        return by == [(job, name) for job in jobs for name in names]

    running.until("prometheus", both_tell_of_every_worker)
    process.terminate()
    assert process.wait(30) == 0


@pytest.mark.parametrize("name", ["server", *WORKERS])
def test_logs_are_one_json_object_per_line(running: Services, name: str) -> None:
    lines = running.log(name).read_text().splitlines()
    assert lines
    assert all(isinstance(json.loads(line), dict) for line in lines)


def test_services_stop_when_asked_and_say_so(running: Services) -> None:
    """Last: everything is down after it."""
    orderly = {"server": -signal.SIGTERM}  # uvicorn shuts down, then ends by the signal it got
    for name in (*WORKERS, "server"):
        assert running.stop(name) == orderly.get(name, 0), running.log(name).read_text()
        assert running.check(name).returncode == 1
    assert "Application shutdown complete" in running.log("server").read_text()
    assert "has stopped" in running.check("cpu-worker").stderr
    for name in ("server", *WORKERS):
        text = running.log(name).read_text()
        assert PASSWORD not in text
        assert ADMIN_KEY not in text
