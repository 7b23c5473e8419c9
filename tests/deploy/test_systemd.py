"""The units for one machine: by systemd's own checker where it is, and against the program."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy import names
from tests.deploy.programs import program

DIRECTORY = Path(__file__).resolve().parents[2] / "deploy" / "systemd"
UNITS = {"probe-server.service": "server.api", "probe-worker@.service": "server.worker"}
INTERPRETER = "/opt/sharpness-probe/bin/python"


def lines(unit: str, key: str) -> list[str]:
    """Values of every line with this key, in order."""
    found = (DIRECTORY / unit).read_text().splitlines()
    return [line.partition("=")[2] for line in found if line.startswith(f"{key}=")]


def environment(unit: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for line in lines(unit, "Environment") for pair in line.split())


def test_every_unit_is_looked_at() -> None:
    assert {path.name for path in DIRECTORY.iterdir()} == {*UNITS, "settings.env"}


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_accepts_the_unit(unit: str, tmp_path: Path) -> None:
    here = tmp_path / unit.replace("@", "@gpu")
    here.write_text((DIRECTORY / unit).read_text().replace(INTERPRETER, sys.executable))
    done = subprocess.run(
        [program("systemd-analyze"), "verify", "--man=no", str(here)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    complaints = [line for line in done.stderr.splitlines() if here.name in line]
    assert (done.returncode, complaints) == (0, [])


@pytest.mark.parametrize(("unit", "module"), UNITS.items())
def test_a_unit_starts_the_program_as_a_user_of_its_own(unit: str, module: str) -> None:
    assert lines(unit, "ExecStart") == [f"{INTERPRETER} -m {module}"]
    assert lines(unit, "User") == lines(unit, "Group") == ["probe"]
    assert lines(unit, "RestartPreventExitStatus") == ["2"]  # what both say to bad settings
    assert lines(unit, "NoNewPrivileges") == ["yes"]
    assert lines(unit, "CapabilityBoundingSet") == [""]
    assert lines(unit, "ProtectSystem") == ["strict"]


@pytest.mark.parametrize("unit", UNITS)
def test_settings_are_called_as_the_program_calls_them(unit: str) -> None:
    offered = (DIRECTORY / "settings.env").read_text().replace("# PROBE_", "PROBE_").splitlines()
    given = {line.split("=")[0] for line in offered if "=" in line}
    assert not names.unknown(given | set(environment(unit)))


@pytest.mark.parametrize("unit", UNITS)
def test_what_is_written_lies_where_writing_is_allowed(unit: str) -> None:
    allowed = [f"/var/lib/{name}" for name in lines(unit, "StateDirectory")]
    allowed += [f"/var/cache/{name}" for name in lines(unit, "CacheDirectory")]
    for name in ("PROBE_DATA_DIR", "PROBE_CACHE_DIR", "HOME", "HF_HOME"):
        where = Path(environment(unit)[name])
        assert any(where.is_relative_to(directory) for directory in allowed), name


def test_a_worker_sees_the_gpus() -> None:
    for closing in ("PrivateDevices", "ProtectClock", "DeviceAllow", "DevicePolicy"):
        assert lines("probe-worker@.service", closing) == []
    assert lines("probe-worker@.service", "KillMode") == ["mixed"]
    own = environment("probe-worker@.service")
    assert (own["PROBE_QUEUES"], own["PROBE_WORKER_NAME"]) == ("%i", "%H-%i")


def test_the_keys_are_the_servers_alone() -> None:
    assert "-/etc/sharpness-probe/server.env" in lines("probe-server.service", "EnvironmentFile")
    assert lines("probe-worker@.service", "EnvironmentFile") == [
        "/etc/sharpness-probe/settings.env"
    ]
    assert "API_KEYS=" not in (DIRECTORY / "settings.env").read_text()
