"""`probe doctor`: what this machine can do, each line with what is missing and how to get it.

torch and everything that imports it is asked in a child process, so a broken installation is
reported instead of breaking the command.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from clients.cli.conventions import (
    FAILED,
    MEASURED,
    JsonOption,
    ServerOption,
    add_command,
    connect,
    print_json,
    stdout_console,
)
from clients.cli.tables import byte_size

_CHILD_S = 120.0
_LOW_DISK_BYTES = 2 << 30
_LOW_MEMORY_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    name: str
    state: Literal["ok", "absent", "wrong"]  # absent: optional and not there; wrong: must be fixed
    detail: str


# Asked one by one in a child each: an import that aborts the process takes only itself along.
_TORCH = """
import json, torch
devices = []
for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
    p = torch.cuda.get_device_properties(i)
    devices.append({"name": p.name, "bytes": p.total_memory, "capability": f"{p.major}.{p.minor}"})
print(json.dumps({"version": torch.__version__, "threads": torch.get_num_threads(),
                  "cuda": torch.version.cuda, "devices": devices}))
"""
_VERSION = """
import importlib, importlib.metadata, json
importlib.import_module({module!r})
print(json.dumps({{"version": importlib.metadata.version({package!r})}}))
"""


def doctor(
    server: ServerOption = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="PROBE_DATA_DIR",
            help="Default: ~/.local/share/sharpness-probe.",
            show_default=False,
        ),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Report what this machine can do; end with 1 where something must be put right."""
    from clients.cli.up import data_directory

    directory = data_directory(data_dir)
    findings = [_python(), _processor(), _memory(), *_torch_findings()]
    findings += [
        _package("transformers", "transformers", needed=True),
        _package("flash-attn", "flash_attn", needed=False, otherwise="sdpa is used"),
        _package("deepspeed", "deepspeed", needed=False, otherwise="not needed on one device"),
        _disk(directory),
        _database(directory),
        _server(server),
    ]
    if json_output:
        print_json([asdict(finding) for finding in findings])
    else:
        _print(findings)
    raise typer.Exit(FAILED if any(f.state == "wrong" for f in findings) else MEASURED)


def _print(findings: list[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "absent": "dim", "wrong": "red"}
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        state = Text(finding.state, style=styles[finding.state])
        table.add_row(state, Text(finding.name, style="bold"), Text(finding.detail))
    stdout_console().print(table)


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} ({sys.executable})")


def _processor() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding("cores", "ok", f"{usable} usable of {os.cpu_count()}, {platform.machine()}")


def _memory() -> Finding:
    """Memory now available; where a control group limits it, what is left of that limit."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        total, free = (int(fields[k].split()[0]) * 1024 for k in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return Finding("memory", "absent", "not known on this system")
    limit = Path("/sys/fs/cgroup/memory.max")
    used = Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        total = min(total, int(text))
        free = min(free, total - int(used.read_text()))
    detail = f"{byte_size(free)} available of {byte_size(total)}"
    if free < _LOW_MEMORY_BYTES:
        detail += "; enough for small models only"
    return Finding("memory", "ok", detail)


def _torch_findings() -> list[Finding]:
    answer = _ask(_TORCH)
    if isinstance(answer, str):
        return [Finding("torch", "wrong", answer)]
    torch = Finding("torch", "ok", f"{answer['version']}, {answer['threads']} threads")
    devices = answer["devices"]
    if not isinstance(devices, list) or not devices:
        why = "no device is visible" if answer["cuda"] else "this torch is built without CUDA"
        return [torch, Finding("cuda", "absent", f"{why}; jobs run on the processor")]
    return [torch] + [
        Finding(
            f"cuda:{index}",
            "ok",
            f"{device['name']}, {byte_size(device['bytes'])}, capability {device['capability']}",
        )
        for index, device in enumerate(devices)
    ]


def _package(package: str, module: str, *, needed: bool, otherwise: str = "") -> Finding:
    """Whether a package is there and really imports: a wheel for another torch does not."""
    from importlib.util import find_spec

    if find_spec(module) is None:
        state: Literal["absent", "wrong"] = "wrong" if needed else "absent"
        return Finding(package, state, f"not installed{'; ' if otherwise else ''}{otherwise}")
    answer = _ask(_VERSION.format(module=module, package=package))
    if isinstance(answer, str):
        return Finding(package, "wrong", f"is installed but does not import: {answer}")
    return Finding(package, "ok", str(answer["version"]))


def _ask(program: str) -> "dict[str, object] | str":
    """The JSON that a short program prints in a child; or in one line why it does not."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=_CHILD_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {_CHILD_S:.0f} s"
    try:
        found: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        reason = done.stderr.strip().splitlines()[-1:] or [f"ended with {done.returncode}"]
        return reason[0]
    return found


def _disk(directory: Path) -> Finding:
    place = directory
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        return Finding("disk", "wrong", f"{place} cannot be written; choose another --data-dir")
    free = shutil.disk_usage(place).free
    state: Literal["ok", "wrong"] = "ok" if free >= _LOW_DISK_BYTES else "wrong"
    return Finding("disk", state, f"{byte_size(free)} free for {directory}")


def _database(directory: Path) -> Finding:
    """Whether the database answers; one that is not there yet is made on the first start."""
    url = os.environ.get("PROBE_DATABASE_URL") or f"sqlite:///{directory / 'probe.db'}"
    file = Path(url.removeprefix("sqlite:///"))
    if url.startswith("sqlite:") and not file.exists():
        return Finding("database", "absent", f"{file} is made on the first start")
    program = (
        "import json, sys, sqlalchemy\n"
        "engine = sqlalchemy.create_engine(sys.stdin.read())\n"
        "engine.connect().execute(sqlalchemy.text('select 1'))\n"
        "print(json.dumps({'dialect': engine.dialect.name}))\n"
    )
    return _database_answer(program, url)


def _database_answer(program: str, url: str) -> Finding:
    shown = url.rsplit("@", 1)[-1]  # never the password
    try:
        done = subprocess.run(  # the address goes by stdin: arguments can be seen by everybody
            [sys.executable, "-c", program],
            input=url,
            capture_output=True,
            text=True,
            timeout=_CHILD_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Finding("database", "wrong", f"{shown} does not answer")
    if done.returncode == 0:
        return Finding("database", "ok", shown)
    reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
    return Finding("database", "wrong", f"{shown}: {reason[0].replace(url, shown)}")


def _server(server: str | None) -> Finding:
    with connect(server) as client:
        if not client.ready():
            return Finding("server", "absent", f"none at {client.base_url}; `probe up` starts one")
        try:
            alive = sum(worker.alive for worker in client.workers().data)
        except Exception as error:  # reported, whatever it is: this is what doctor is for
            return Finding("server", "wrong", f"{client.base_url}: {error}")
    workers = f"{alive} live worker{'' if alive == 1 else 's'}"
    return Finding("server", "ok", f"{client.base_url}, {workers}")


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    add_command(app, doctor, "probe doctor --json")
