"""The Dockerfile, as far as it can be checked where no container engine runs."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.deploy import dockerfile
from tests.deploy.programs import program

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ["server", "worker"]
PACKAGES = ("probe", "server", "clients")


def test_the_linter_has_nothing_to_say() -> None:
    done = subprocess.run(
        [program("hadolint"), "--no-color", "Dockerfile"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_a_fixed_user_under_an_init(target: str) -> None:
    image = dockerfile.image(target)
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", image.last("USER") or "")
    uid, gid = (image.last("USER") or "").split(":")
    made = " ".join(text for word, text in image.instructions if word == "RUN")
    assert f"--uid {uid}" in made
    assert f"--gid {gid}" in made
    assert image.last("ENTRYPOINT") == '["/usr/bin/tini", "--"]'


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_keeps_data_and_cache_in_volumes(target: str) -> None:
    volumes = {"/var/lib/probe", "/var/cache/probe"}
    assert set(re.findall(r'"([^"]+)"', dockerfile.image(target).last("VOLUME") or "")) == volumes
    environment = dockerfile.environment(target)
    assert environment["PYTHONUNBUFFERED"] == "1"
    for name in ("PROBE_DATA_DIR", "PROBE_CACHE_DIR", "HF_HOME", "HOME"):
        assert any(Path(environment[name]).is_relative_to(volume) for volume in volumes)


@pytest.mark.parametrize("target", TARGETS)
def test_commands_and_health_checks_start_modules_that_exist(target: str) -> None:
    module = {"server": "server.api", "worker": "server.worker"}[target]
    assert dockerfile.command(target) == ["python", "-m", module]
    assert dockerfile.health_check(target) == ["python", "-m", module, "--check"]
    assert (ROOT / module.replace(".", "/") / "__main__.py").is_file()


def test_no_secret_is_asked_for_while_building() -> None:
    for stage in dockerfile.stages().values():
        for word, argument in stage.instructions:
            if word in ("ARG", "ENV"):
                assert not re.search(r"(?i)key|token|secret|passw", argument), argument


def test_the_server_has_no_torch_and_the_worker_has_it_for_cuda() -> None:
    stages = dockerfile.stages()
    runs = {
        name: " ".join(text for word, text in stage.instructions if word == "RUN")
        for name, stage in stages.items()
    }
    copied = {
        target: re.findall(
            r"--from=([\w-]+)", " ".join(text for _, text in stages[target].instructions)
        )
        for target in TARGETS
    }
    assert copied["server"] == ["server-packages"]
    assert "--group server" in runs["server-packages"]
    assert "torch" not in runs["server-packages"]
    assert copied["worker"] == ["worker-packages"]
    assert re.search(r"ARG CUDA=cu\d+\n", (ROOT / "Dockerfile").read_text())
    for name in ("server-packages", "worker-packages"):
        installs = re.findall(r"pip install (.*?)(?:&&|$)", runs[name])
        assert installs
        assert all("-c constraints.txt" in install for install in installs)


def test_what_is_installed_is_declared() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = dict(stage_args("worker-packages"))["EXTRAS"].split(",")
    assert (
        {"deepspeed", "postgres"}
        <= set(extras)
        <= set(pyproject["project"]["optional-dependencies"])
    )
    assert "server" in pyproject["dependency-groups"]
    # the worker's torch is the one of constraints.txt, built for the CUDA asked for
    pins = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert len(pins) == 1


def stage_args(stage: str) -> list[tuple[str, str]]:
    found = dockerfile.stages()[stage].instructions
    return [tuple(text.split("=", 1)) for word, text in found if word == "ARG"]  # type: ignore[misc]


def test_everything_that_is_copied_is_there_and_reaches_the_build() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert next(line for line in lines if line and not line.startswith("#")) == "*"
    let_in = {line[1:] for line in lines if line.startswith("!")}
    copied = set()
    for stage in dockerfile.stages().values():
        for word, argument in stage.instructions:
            if word == "COPY" and "--from" not in argument:
                copied |= set(argument.split()[:-1])
    assert copied == let_in
    for name in copied:
        assert (ROOT / name).exists(), name


def test_the_wheel_holds_every_file_of_the_packages(tmp_path: Path) -> None:
    """Pages, templates and migrations too: an image has nothing but the wheel."""
    source = tmp_path / "source"
    source.mkdir()
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    done = subprocess.run(
        [*command, "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    files = {
        str(path.relative_to(ROOT))
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if name.split("/")[0] in PACKAGES}
    assert files == inside
