"""Commands of docs/deploy that can be run here are run; of the others, the options are known."""

import re
import shlex
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import yaml

from server.store import SqlStore
from tests.deploy import dockerfile
from tests.deploy.programs import program
from tests.server.postgres import Postgres, missing

ROOT = Path(__file__).resolve().parents[2]
DIRECTORY = ROOT / "docs" / "deploy"
PAGES = sorted(DIRECTORY.glob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def lines(page: Path, language: str = "bash") -> list[str]:
    """Every line of the page's blocks in this language."""
    found = [text for name, text in BLOCK.findall(page.read_text()) if name == language]
    return [line.partition("  #")[0].strip() for text in found for line in text.splitlines()]


def commands(word: str) -> list[tuple[str, str]]:
    return [
        (page.name, line) for page in PAGES for line in lines(page) if line.split(" ")[0] == word
    ]


def test_the_index_leads_to_every_page() -> None:
    index = (DIRECTORY / "index.md").read_text()
    assert set(re.findall(r"\]\(([\w-]+\.md)\)", index)) == {p.name for p in PAGES} - {"index.md"}


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    what = missing()
    if what is not None:
        pytest.skip(f"a Postgres needs {what}")
    found = Postgres()
    yield found
    found.stop()


def connect(postgres: Postgres, database: str) -> "psycopg.Connection[tuple[str]]":
    return psycopg.connect(host=str(postgres.directory), user="probe", dbname=database)


@pytest.mark.postgres
def test_a_database_is_made_dumped_and_restored_as_the_page_says(
    postgres: Postgres, tmp_path: Path
) -> None:
    page = DIRECTORY / "postgres.md"
    for statement in lines(page, "sql"):
        postgres.execute(statement)
    url = f"postgresql+psycopg://probe@/probe?host={postgres.directory}"
    SqlStore(url).close()  # makes the tables, as the page says the user may
    query = "INSERT INTO workers (name, last_heartbeat, stopped, view) VALUES ('w', 1, true, '{}')"
    with connect(postgres, "probe") as connection:
        connection.execute(query)
    tools = {"pg_dump", "createdb", "pg_restore"}
    found = [line for line in lines(page) if line.split(" ")[0] in tools]
    assert [line.split(" ")[0] for line in found] == ["pg_dump", "createdb", "pg_restore"]
    for line in found:
        name, *options = shlex.split(line.replace("postgres.example.org", str(postgres.directory)))
        subprocess.run([postgres._programs / name, *options], check=True, cwd=tmp_path)
    with connect(postgres, "probe_restored") as connection:
        assert connection.execute("SELECT name FROM workers").fetchall() == [("w",)]
    restored = SqlStore(url.replace("/probe?", "/probe_restored?"))
    try:
        restored.ready()
    finally:
        restored.close()


def test_the_embedded_database_is_copied_while_it_is_used(tmp_path: Path) -> None:
    (line,) = [line for line in lines(DIRECTORY / "gpu-box.md") if "VACUUM INTO" in line]
    store = SqlStore(f"sqlite:///{tmp_path / 'probe.db'}")
    line = line.replace("/var/lib/sharpness-probe", str(tmp_path))
    python, *arguments = shlex.split(line)
    assert python == "python3"
    subprocess.run([sys.executable, *arguments], check=True, cwd=tmp_path)
    store.close()
    with sqlite3.connect(tmp_path / "probe-backup.db") as copy:
        tables = {name for (name,) in copy.execute("SELECT name FROM sqlite_master")}
    assert {"jobs", "unit_results", "workflow_status"} <= tables


@pytest.mark.parametrize(("page", "line"), commands("docker"))
def test_compose_knows_what_it_is_told(page: str, line: str) -> None:
    if not line.startswith("docker compose "):
        assert line.startswith("docker build ")
        return
    _, _, name, *words = shlex.split(line)
    help_text = subprocess.run(
        [program("docker-compose"), name, "--help"], capture_output=True, text=True, check=True
    ).stdout
    # after the service's name come the words of a command inside its container
    own = (
        words[: 1 + next(i for i, w in enumerate(words) if w[0] != "-")]
        if name == "exec"
        else words
    )
    for option in (word.split("=")[0] for word in own if word.startswith("-")):
        assert re.search(rf"{option}\b", help_text), f"{page}: {name} has no {option}"
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert {word for word in own if not word.startswith("-")} <= set(services)


@pytest.mark.parametrize(("page", "line"), commands("docker"))
def test_targets_that_are_built_exist(page: str, line: str) -> None:
    for target in re.findall(r"--target (\S+)", line):
        assert f" AS {target}\n" in (ROOT / "Dockerfile").read_text()


def test_kubectl_makes_the_secrets_of_the_template(tmp_path: Path) -> None:
    (tmp_path / "password.txt").write_text("p")
    (tmp_path / "key.txt").write_text("k")
    made = {}
    for _, line in commands("kubectl"):
        if " create secret " in line:
            command = [program("kubectl"), *shlex.split(line)[1:], "--dry-run=client", "-o", "yaml"]
            done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
            secret = yaml.safe_load(done.stdout)
            made[secret["metadata"]["name"]] = set(secret["data"])
    template = (ROOT / "deploy" / "kubernetes" / "secret.example.yaml").read_text()
    wanted = {s["metadata"]["name"]: set(s["stringData"]) for s in yaml.safe_load_all(template)}
    assert made == wanted


def test_the_page_on_images_knows_what_is_in_them() -> None:
    page = (DIRECTORY / "containers.md").read_text()
    arguments = dict(
        text.split("=", 1)
        for word, text in dockerfile.stages()["worker-packages"].instructions
        if word == "ARG"
    )
    assert f"extras `{arguments['EXTRAS']}`" in page
    assert f"`--build-arg CUDA={arguments['CUDA']}` (the default)" in page
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    table = set(re.findall(r"`([\w-]+)`", "".join(re.findall(r"^\| `.*? \|", page, re.MULTILINE))))
    assert table == {*services, "server", "worker"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_extras_and_files_that_are_named_exist(page: Path) -> None:
    known = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    )
    text = page.read_text()
    for extras in re.findall(r"(?:sharpness-probe|'\.)\[([\w,]+)\]", text):
        assert set(extras.split(",")) <= known
    for name in re.findall(r"\b(?:deploy|configs)/[\w./@-]*\w", text):
        assert (ROOT / name).exists(), f"{page.name} names {name}"
