"""The manifests: by Kubernetes' own schemas, by kustomize where it is, and against each other."""

import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from fastapi.routing import APIRoute

from probe.disk_cache import HUB_LIMIT, LIMIT, parse_size
from server.api import operations
from server.settings import Settings
from tests.deploy import dockerfile, names
from tests.deploy.programs import program

DIRECTORY = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"
FILES = sorted(set(DIRECTORY.glob("*.yaml")) - {DIRECTORY / "kustomization.yaml"})
# The oldest that still got fixes when this was written, and the newest the checker knows.
VERSIONS = ["1.33", "1.37"]
CUSTOM = {"ServiceMonitor"}  # of the Prometheus operator; Kubernetes has no schema of it
PATHS = {route.path for route in operations.router.routes if isinstance(route, APIRoute)}


def documents(*names: str) -> list[dict[str, Any]]:
    """The objects of these files, or of all."""
    files = [DIRECTORY / name for name in names] or FILES
    return [found for file in files for found in yaml.safe_load_all(file.read_text())]


def named(kind: str) -> dict[str, dict[str, Any]]:
    return {d["metadata"]["name"]: d for d in documents() if d["kind"] == kind}


WORKLOADS = named("Deployment") | named("StatefulSet")


def pod(name: str) -> dict[str, Any]:
    found: dict[str, Any] = WORKLOADS[name]["spec"]["template"]["spec"]
    return found


def environment(name: str) -> dict[str, str]:
    """What its container is given, with a stand-in for each secret and for the pod's name."""
    (container,) = pod(name)["containers"]
    found: dict[str, str] = {}
    for source in container["envFrom"]:
        if "configMapRef" in source:
            found |= named("ConfigMap")[source["configMapRef"]["name"]]["data"]
        else:
            found |= named("Secret")[source["secretRef"]["name"]]["stringData"]
    for variable in container.get("env", ()):
        found[variable["name"]] = variable.get("value", "the-pod")
    secrets = {
        "PROBE_DATABASE_URL": "postgresql://probe@postgres.example.org:5432/probe",
        "PROBE_API_KEYS": "a-key",
    }
    return found | {key: value for key, value in secrets.items() if key in found}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_manifests_keep_to_the_schemas(file: Path, version: str) -> None:
    for document in documents(file.name):
        if document["kind"] not in CUSTOM:
            kubernetes_validate.validate(document, version, strict=True)


def test_kustomize_takes_every_file_but_the_template() -> None:
    listed = yaml.safe_load((DIRECTORY / "kustomization.yaml").read_text())["resources"]
    optional = {"secret.example.yaml", "servicemonitor.yaml"}
    assert set(listed) == {file.name for file in FILES} - optional


def test_kubectl_builds_it() -> None:
    command = [program("kubectl"), "kustomize", str(DIRECTORY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    assert {d["metadata"]["name"] for d in built} >= set(WORKLOADS)
    for document in built:
        if document["kind"] != "Namespace":
            assert document["metadata"]["namespace"] == "sharpness-probe"
        assert document["kind"] != "Secret"


def test_no_secret_is_in_a_manifest() -> None:
    for secret in named("Secret").values():
        assert set(secret["stringData"].values()) == {""}


@pytest.mark.parametrize("name", WORKLOADS)
def test_pods_keep_to_the_restricted_standard(name: str) -> None:
    """pod-security.kubernetes.io/enforce: restricted, which the namespace asks for."""
    (namespace,) = named("Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    spec = pod(name)
    (container,) = spec["containers"]
    uid, gid = map(int, (dockerfile.image("server").last("USER") or "").split(":"))
    security = spec["securityContext"]
    assert (security["runAsNonRoot"], security["runAsUser"], security["runAsGroup"]) == (
        True,
        uid,
        gid,
    )
    assert security["fsGroup"] == gid  # volumes are written as this user
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for forbidden in ("hostNetwork", "hostPID", "hostIPC"):
        assert forbidden not in spec
    assert all("hostPath" not in volume for volume in spec["volumes"])
    # A service called probe would else set PROBE_PORT to tcp://..., which is no port.
    assert spec["enableServiceLinks"] is False
    assert spec["automountServiceAccountToken"] is False


@pytest.mark.parametrize("name", WORKLOADS)
def test_what_is_mounted_is_there_and_where_the_image_writes(name: str) -> None:
    (container,) = pod(name)["containers"]
    claims = WORKLOADS[name]["spec"].get("volumeClaimTemplates", ())
    volumes = {v["name"] for v in pod(name)["volumes"]} | {c["metadata"]["name"] for c in claims}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} == volumes
    image = dockerfile.environment("server")
    assert {image["PROBE_DATA_DIR"], image["HOME"], "/tmp"} <= set(mounts)
    assert mounts[image["PROBE_ROOTS"]]["readOnly"] is True
    wanted = {
        v["persistentVolumeClaim"]["claimName"]
        for v in pod(name)["volumes"]
        if "persistentVolumeClaim" in v
    }
    assert wanted <= set(named("PersistentVolumeClaim"))


@pytest.mark.parametrize("name", WORKLOADS)
def test_settings_are_valid_and_called_as_the_program_calls_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = "server" if name == "probe-server" else "worker"
    given = dockerfile.environment(target) | environment(name)
    assert not names.unknown(set(given))
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    settings = Settings()
    assert settings.roots == [Path("/checkpoints")]
    assert bool(settings.api_keys) == (target == "server")
    if target == "worker":
        assert settings.worker_name == "the-pod"


def test_selectors_find_their_pods() -> None:
    labels = {name: w["spec"]["template"]["metadata"]["labels"] for name, w in WORKLOADS.items()}

    def found(selector: dict[str, str]) -> set[str]:
        return {name for name, own in labels.items() if selector.items() <= own.items()}

    workers = {"probe-gpu-worker", "probe-cpu-worker"}
    for name, workload in WORKLOADS.items():
        assert found(workload["spec"]["selector"]["matchLabels"]) == {name}
    services = {name: found(s["spec"]["selector"]) for name, s in named("Service").items()}
    assert services == {"probe-server": {"probe-server"}, "probe-workers": workers}
    policies = {
        name: found(policy["spec"]["podSelector"].get("matchLabels", {}))
        for name, policy in named("NetworkPolicy").items()
    }
    every = set(WORKLOADS)
    assert policies == {
        "deny-all": every,
        "egress": every,
        "server-http": {"probe-server"},
        "worker-metrics": workers,
    }
    for name in workers:
        assert WORKLOADS[name]["spec"]["serviceName"] == "probe-workers"


def test_ports_are_named_alike_everywhere() -> None:
    ports = {
        name: {p["name"]: p["containerPort"] for p in pod(name)["containers"][0]["ports"]}
        for name in WORKLOADS
    }
    assert ports["probe-server"] == {"http": int(dockerfile.environment("server")["PROBE_PORT"])}
    for name in ("probe-gpu-worker", "probe-cpu-worker"):
        assert ports[name] == {"metrics": int(environment(name)["PROBE_WORKER_METRICS_PORT"])}
        assert environment(name)["PROBE_WORKER_METRICS_HOST"] == "0.0.0.0"  # scraped from outside
    offered = {
        name: {port["name"]: port["targetPort"] for port in service["spec"]["ports"]}
        for name, service in named("Service").items()
    }
    assert offered == {"probe-server": {"http": "http"}, "probe-workers": {"metrics": "metrics"}}
    for monitor in named("ServiceMonitor").values():
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["port"] in offered[monitor["metadata"]["name"]]


def test_probes_ask_for_what_the_program_answers() -> None:
    (server,) = pod("probe-server")["containers"]
    asked = {
        name: server[f"{name}Probe"]["httpGet"]["path"]
        for name in ("startup", "liveness", "readiness")
    }
    assert asked == {"startup": "/healthz", "liveness": "/healthz", "readiness": "/readyz"}
    assert set(asked.values()) <= PATHS
    for name in ("probe-gpu-worker", "probe-cpu-worker"):
        (worker,) = pod(name)["containers"]
        assert worker["readinessProbe"]["exec"]["command"] == dockerfile.health_check("worker")
        assert "livenessProbe" not in worker


def test_queues_and_gpus_go_together() -> None:
    for name, workload in named("StatefulSet").items():
        (container,) = workload["spec"]["template"]["spec"]["containers"]
        assert name == f"probe-{environment(name)['PROBE_QUEUES']}-worker"
        has_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert has_gpu == (environment(name)["PROBE_QUEUES"] == "gpu")
        assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("name", named("StatefulSet"))
def test_downloads_fit_their_volume(name: str) -> None:
    claims = {
        c["metadata"]["name"]: c["spec"] for c in WORKLOADS[name]["spec"]["volumeClaimTemplates"]
    }
    room = parse_size(claims["cache"]["resources"]["requests"]["storage"])
    limits = [parse_size(environment(name)[which]) for which in (LIMIT, HUB_LIMIT)]
    assert 0.5 * room < sum(limits) < room
