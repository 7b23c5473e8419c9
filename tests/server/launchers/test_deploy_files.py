"""The SLURM scripts run, with SLURM's and Ray's programs replaced by ones that note their words;
what the Ray page says of commands and settings is so.
"""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from server.settings import Settings

ROOT = Path(__file__).resolve().parents[3]
SLURM = ROOT / "deploy" / "slurm"
PAGE = (ROOT / "docs" / "deploy" / "ray.md").read_text()
SLURM_PAGE = (ROOT / "docs" / "deploy" / "slurm.md").read_text()
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)
NEEDED = {"PROBE_DATABASE_URL": "sqlite:////nowhere/probe.db", "PROBE_ROOTS": "/checkpoints"}

# Notes its words, and settings of ours. `ray start --block` does not return, as the true one; the
# worker is there until every step is, which run in the background.
STUB = """#!/usr/bin/env python3
import json, os, sys, time
name = os.path.basename(sys.argv[0])
ours = {k: v for k, v in os.environ.items() if k.startswith("PROBE_")}
with open(os.environ["NOTES"], "a") as notes:
    notes.write(json.dumps([name, sys.argv[1:], ours]) + "\\n")
if name == "scontrol":
    print("node1\\nnode2")
elif name == "ray" and sys.argv[1] == "status":
    sys.exit(0 if '"--head"' in open(os.environ["NOTES"]).read() else 1)
elif name == "srun":
    words = sys.argv[1:]
    os.execvp("ray", words[words.index("ray"):])
elif name == "ray":
    time.sleep(600)
elif os.environ.get("STEPS"):
    deadline = time.monotonic() + 30
    while open(os.environ["NOTES"]).read().count('["srun"') < int(os.environ["STEPS"]):
        if time.monotonic() > deadline:
            sys.exit("steps are missing")
"""


@pytest.fixture
def run(tmp_path):
    """Runs a script with stubs, in a session of its own that is ended afterwards; the notes."""
    for name in ("scontrol", "srun", "ray", "probe"):
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(STUB.replace("/usr/bin/env python3", sys.executable))
        stub.chmod(0o755)
    notes = tmp_path / "notes"

    def run(script: str, environment: dict[str, str]) -> tuple[int, list, str]:
        own = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "NOTES": str(notes)}
        with (tmp_path / "error").open("w+") as error:
            process = subprocess.Popen(
                ["bash", str(SLURM / script)],
                env=own | {"TMPDIR": str(tmp_path)} | environment,
                stdout=error,
                stderr=error,
                start_new_session=True,
            )
            try:
                status = process.wait(60)
            finally:  # SLURM ends the steps of a job whose script has ended
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            error.seek(0)
            said = (
                [json.loads(line) for line in notes.read_text().splitlines()]
                if (notes.exists())
                else []
            )
            return status, said, error.read()

    return run


@pytest.mark.parametrize("script", ["worker.sbatch", "ray.sbatch"])
@pytest.mark.parametrize("missing", sorted(NEEDED))
def test_a_script_without_a_setting_names_it_and_starts_nothing(run, script, missing):
    given = {name: value for name, value in NEEDED.items() if name != missing}
    status, said, error = run(script, given | {"SLURM_JOB_ID": "7"})
    assert status != 0
    assert f"{missing}: set it where you call sbatch" in error
    assert said == []


@pytest.mark.parametrize(
    ("numbers", "name"),
    [
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}, "slurm-7-2"),
        ({"SLURM_JOB_ID": "9"}, "slurm-9-0"),
    ],
)
def test_a_worker_is_named_after_its_job(run, tmp_path, numbers, name):
    status, [(program, words, settings)], _ = run("worker.sbatch", NEEDED | numbers)
    assert (status, program, words) == (0, "probe", ["worker", "--queues", "gpu"])
    assert settings["PROBE_WORKER_NAME"] == name
    assert settings["PROBE_DATA_DIR"] == str(tmp_path / f"probe-{name}")
    Settings(worker_name=name, data_dir=tmp_path)  # a name that is taken


@pytest.mark.parametrize("num_nodes", [1, 2, 3])
def test_a_cluster_is_started_head_first_and_then_the_worker(run, num_nodes):
    numbers = {
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NUM_NODES": str(num_nodes),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_ON_NODE": "64",
        "PROBE_QUEUES": "cpu",
        "STEPS": "2" if num_nodes > 1 else "1",
    }
    status, said, error = run("ray.sbatch", NEEDED | numbers)
    assert status == 0, error
    steps = [words for program, words, _ in said if program == "srun"]
    start = "ray start --block --disable-usage-stats --num-cpus=64"
    head = f"--nodes=1 --ntasks=1 --nodelist=node1 {start} --head --port=22345"
    assert " ".join(steps[0]) == f"{head} --include-dashboard=false"
    others = [f"--nodes={num_nodes - 1}", f"--ntasks={num_nodes - 1}", "--exclude=node1"]
    expected = [*others, *start.split(), "--address=node1:22345"]
    assert steps[1:] == ([expected] if num_nodes > 1 else [])
    [(words, settings)] = [(w, s) for program, w, s in said if program == "probe"]
    assert words == ["worker", "--queues", "cpu"]
    assert settings["PROBE_LAUNCHER"] == "ray"
    assert settings["PROBE_RAY_ADDRESS"] == "node1:22345"
    Settings(launcher="ray", ray_address=settings["PROBE_RAY_ADDRESS"])


def test_sbatch_options_are_before_the_first_command():
    for script in SLURM.glob("*.sbatch"):
        lines = script.read_text().splitlines()
        commands = [n for n, line in enumerate(lines) if line and not line.startswith("#")]
        options = [n for n, line in enumerate(lines) if line.startswith("#SBATCH")]
        assert options
        assert max(options) < min(commands)


def ray_commands() -> list[list[str]]:
    script = (SLURM / "ray.sbatch").read_text()
    lines = [line for text in BLOCK.findall(PAGE) for line in text.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if line.startswith("ray ")]
    start = re.search(r"start=\(ray (.*)\)", script).group(1).replace('"$SLURM_CPUS_ON_NODE"', "8")
    for rest in ("--head --port=6379 --include-dashboard=false", "--address=node1:6379"):
        assert rest.split("=")[0] in script
        words.append(["ray", *shlex.split(start), *rest.split()])
    return words


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install ray")
def test_ray_knows_the_commands_and_options_that_are_shown():
    found = ray_commands()
    assert {words[1] for words in found} == {"start", "status", "get-auth-token"}
    program = """
import json, sys
from ray.scripts.scripts import cli
for _, name, *words in json.load(sys.stdin):
    cli.commands[name].make_context(name, words)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(found), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_page_s_settings_and_defaults_are_those_of_the_program():
    rows = re.findall(r"^\| `PROBE_(\w+)` \| ([^|]*) \|", PAGE, re.MULTILINE)
    assert {"RAY_ADDRESS", "RAY_WAIT_S", "LAUNCHER"} <= {name for name, _ in rows}
    for name, shown in rows:
        default = Settings.model_fields[name.lower()].default
        plain = shown.strip().strip("`")
        assert (
            plain in ("", "found")
            if default in (None, ())
            else plain == (f"{default:g}" if isinstance(default, float) else default)
        )


def test_the_slurm_page_calls_scripts_that_are_there():
    named = set(re.findall(r"deploy/slurm/[\w.]+", SLURM_PAGE))
    assert named == {f"deploy/slurm/{script.name}" for script in SLURM.iterdir()}


def test_this_machine_s_name_is_an_address_ray_may_be_told():
    Settings(ray_address=f"{socket.gethostname()}:6379")
