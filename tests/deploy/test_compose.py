"""docker-compose.yml: by the real `docker compose config`, and by what we want of it."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy import compose, dockerfile, names
from tests.deploy.programs import program

ROOT = Path(__file__).resolve().parents[2]
FILLED = {
    "POSTGRES_PASSWORD": "p@ss:w/rd%",
    "PROBE_API_KEYS": "an-admin-key",
    "PROBE_CHECKPOINTS": "/srv/checkpoints",
    "COMPOSE_PROFILES": "gpu",
    "HF_TOKEN": "hf_token",
    "PROBE_WEBHOOK_SECRET": "what-signs-webhooks",
}
OURS = {"server", "cpu-worker", "gpu-worker", "metrics-key"}
EVERY = {*OURS, "postgres", "prometheus"}


def config(environment: dict[str, str], tmp_path: Path, *options: str) -> Any:
    """`docker compose config` with nothing from this machine's environment."""
    env_file = tmp_path / "env"
    env_file.write_text("".join(f"{name}={value}\n" for name, value in environment.items()))
    command = [program("docker-compose"), "--env-file", str(env_file), "config", *options]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={"HOME": str(tmp_path)}, timeout=60
    )


@pytest.fixture
def services() -> dict[str, dict[str, Any]]:
    return compose.services(FILLED)


def test_what_compose_reads_is_what_these_tests_read(tmp_path: Path) -> None:
    done = config(FILLED, tmp_path, "--format", "json")
    assert (done.returncode, done.stderr) == (0, "")
    real = json.loads(done.stdout)["services"]
    ours = compose.services(FILLED)
    assert set(real) == set(ours) == EVERY
    for name, service in ours.items():
        for part in ("environment", "command", "image", "read_only", "cap_drop", "profiles"):
            # compose writes a literal $ as $$, so that what it prints can be read again
            found = json.loads(json.dumps(real[name].get(part)).replace("$$", "$"))
            if part == "environment" and found:  # null: not set anywhere, so not set
                found = {key: value for key, value in found.items() if value is not None}
            assert found == service.get(part), (name, part)
        check = real[name].get("healthcheck", {})
        assert check.get("test") == service.get("healthcheck", {}).get("test"), name


def test_any_password_can_stand_in_single_quotes(tmp_path: Path) -> None:
    """As deploy/env.example says."""
    given = FILLED | {"POSTGRES_PASSWORD": "'a$b #c\\d\"e'"}
    done = config(given, tmp_path, "--format", "json")
    found = json.loads(done.stdout)["services"]["server"]["environment"]["PGPASSWORD"]
    assert found.replace("$$", "$") == 'a$b #c\\d"e'


def test_only_the_gpu_worker_is_left_out_without_its_profile(tmp_path: Path) -> None:
    done = config(FILLED | {"COMPOSE_PROFILES": ""}, tmp_path, "--services")
    assert set(done.stdout.split()) == EVERY - {"gpu-worker"}


def test_secrets_and_the_checkpoints_have_no_default() -> None:
    assert set(compose.required()) == {"POSTGRES_PASSWORD", "PROBE_API_KEYS", "PROBE_CHECKPOINTS"}


@pytest.mark.parametrize("name", sorted(compose.required()))
@pytest.mark.parametrize("how", ["unset", "empty"])
def test_nothing_starts_without(name: str, how: str, tmp_path: Path) -> None:
    given = FILLED | {name: ""}
    if how == "unset":
        del given[name]
    with pytest.raises(compose.UnsetError, match=name):
        compose.services(given)
    done = config(given, tmp_path, "--quiet")
    assert done.returncode != 0
    assert f"required variable {name} is missing a value" in done.stderr
    assert compose.required()[name] in done.stderr


def test_the_example_names_every_variable_and_fills_in_no_secret() -> None:
    text = (ROOT / "deploy" / "env.example").read_text()
    offered = compose.read_env(text)
    commented = re.findall(r"^# (\w+)=$", text, re.MULTILINE)
    known = {*offered, *commented}
    assert compose.variables() <= known
    assert known <= compose.variables() | {"COMPOSE_PROFILES"}
    assert {name: offered[name] for name in compose.required()} == dict.fromkeys(
        compose.required(), ""
    )


def test_settings_are_called_as_the_program_calls_them(services: dict[str, dict[str, Any]]) -> None:
    for name in OURS:
        assert not names.unknown(set(services[name]["environment"])), name
    for target in ("server", "worker"):
        assert not names.unknown(set(dockerfile.environment(target)))


def test_secrets_are_handed_to_those_who_need_them(services: dict[str, dict[str, Any]]) -> None:
    secrets = ("p@ss:w/rd%", "an-admin-key", "hf_token", "what-signs-webhooks")
    holders: dict[str, set[str]] = {secret: set() for secret in secrets}
    for name, service in services.items():
        for secret in holders:
            if secret in json.dumps(service.get("environment", {})):
                holders[secret].add(name)
            rest = {key: value for key, value in service.items() if key != "environment"}
            assert secret not in json.dumps(rest), f"{name}: a secret outside its environment"
    assert holders["p@ss:w/rd%"] == {*OURS, "postgres"}
    assert holders["an-admin-key"] == holders["what-signs-webhooks"] == {"server"}
    assert "prometheus" not in holders["hf_token"]


@pytest.mark.parametrize("name", sorted(EVERY))
def test_a_service_has_no_more_rights_than_it_needs(
    name: str, services: dict[str, dict[str, Any]]
) -> None:
    service = services[name]
    for forbidden in ("privileged", "network_mode", "pid", "cap_add", "user"):
        assert forbidden not in service
    assert "docker.sock" not in json.dumps(service)
    if name != "postgres":  # its entry point changes owners, then drops to its own user
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    for port in service.get("ports", ()):
        assert port.startswith("127.0.0.1:")
    if name in OURS:
        mounts = [m for m in service["volumes"] if isinstance(m, dict)]
        assert all(mount["read_only"] for mount in mounts)


def test_restarts_and_ends(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        assert service["restart"] == ("no" if name == "metrics-key" else "unless-stopped")
        assert re.fullmatch(r"[\w/-]+:[\w.-]+", service["image"])
        if not service["image"].startswith("sharpness-probe-"):
            assert not service["image"].endswith(":latest"), f"{name}: pin it"


def test_a_service_waits_until_what_it_needs_is_well(services: dict[str, dict[str, Any]]) -> None:
    needs = {
        name: {other: how["condition"] for other, how in service.get("depends_on", {}).items()}
        for name, service in services.items()
    }
    assert needs == {
        "postgres": {},
        "server": {"postgres": "service_healthy"},
        "cpu-worker": {"server": "service_healthy"},
        "gpu-worker": {"server": "service_healthy"},
        "metrics-key": {"server": "service_healthy"},
        "prometheus": {"metrics-key": "service_completed_successfully"},
    }
    for name in EVERY - {"metrics-key"}:
        assert services[name]["healthcheck"]["test"][0] == "CMD"


@pytest.mark.parametrize(
    ("name", "target"), [("server", "server"), ("cpu-worker", "worker"), ("gpu-worker", "worker")]
)
def test_a_service_runs_what_its_image_runs(
    name: str, target: str, services: dict[str, dict[str, Any]]
) -> None:
    service = services[name]
    assert service["build"]["target"] == target
    assert service["command"] == dockerfile.command(target)
    assert service["healthcheck"]["test"][1:] == dockerfile.health_check(target)
    image = dockerfile.environment(target)
    for variable in ("PROBE_DATA_DIR", "PROBE_CACHE_DIR", "PROBE_ROOTS", "HF_HOME"):
        assert service["environment"][variable] == image[variable]


def test_volumes_are_named_and_the_checkpoints_mount_is_the_root(
    services: dict[str, dict[str, Any]],
) -> None:
    for name in OURS - {"metrics-key"}:
        data, cache, checkpoints = services[name]["volumes"]
        assert (data, cache) == ("data:/var/lib/probe", "cache:/var/cache/probe")
        assert checkpoints["target"] == services[name]["environment"]["PROBE_ROOTS"]
        assert checkpoints["source"] == FILLED["PROBE_CHECKPOINTS"]
    loaded = yaml.safe_load(compose.FILE.read_text())
    assert set(loaded["volumes"]) == {"postgres", "data", "cache", "metrics-key", "prometheus"}


def test_the_database_is_reached_by_those_who_use_it(services: dict[str, dict[str, Any]]) -> None:
    loaded = yaml.safe_load(compose.FILE.read_text())
    assert loaded["networks"]["database"] == {"internal": True}
    assert services["postgres"]["networks"] == ["database"]
    assert "ports" not in services["postgres"]
    assert {n for n in EVERY if "database" in services[n].get("networks", ())} == {
        *OURS,
        "postgres",
    }


def test_workers_have_their_own_names_and_queues(services: dict[str, dict[str, Any]]) -> None:
    gpu, cpu = services["gpu-worker"], services["cpu-worker"]
    assert gpu["environment"]["PROBE_WORKER_NAME"] != cpu["environment"]["PROBE_WORKER_NAME"]
    assert (gpu["environment"]["PROBE_QUEUES"], cpu["environment"]["PROBE_QUEUES"]) == (
        "gpu",
        "cpu",
    )
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert "deploy" not in cpu


def test_prometheus_scrapes_services_that_are_there(services: dict[str, dict[str, Any]]) -> None:
    loaded = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())
    server, workers = loaded["scrape_configs"]
    assert server["static_configs"] == [{"targets": ["server:8765"]}]
    assert services["server"]["environment"]["PROBE_PORT"] == "8765"
    (dns,) = workers["dns_sd_configs"]
    assert set(dns["names"]) == {"gpu-worker", "cpu-worker"}
    for name in dns["names"]:
        own = services[name]["environment"]
        assert own["PROBE_WORKER_METRICS_PORT"] == str(dns["port"])
        assert own["PROBE_WORKER_METRICS_HOST"] == "0.0.0.0"  # Prometheus is another container
    # the key that one service writes is the file that the other reads
    assert server["authorization"]["credentials_file"] == "/run/metrics-key/key"
    assert "metrics-key:/run/metrics-key" in services["metrics-key"]["volumes"]
    assert "metrics-key:/run/metrics-key:ro" in services["prometheus"]["volumes"]


def test_promtool_accepts_the_configuration() -> None:
    done = subprocess.run(
        [program("promtool"), "check", "config", "--syntax-only", "deploy/prometheus.yml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
