"""What the README and the docs promise: commands exist, code runs and prints what is shown."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from clients.cli.main import app
from probe.shares import source_shares
from probe.spec_load import load_spec
from probe.spec_mix import MixScanSpec

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def commands(word: str) -> list[tuple[str, str]]:
    """(page, line) of every shell line in the docs and job files that starts with `word`."""
    found = []
    for page in PAGES:
        for language, text in BLOCK.findall(page.read_text()):
            if language in ("bash", "sh"):
                found += [(page.name, line) for line in text.splitlines()]
    for file in CONFIGS:
        found += [(file.name, line.lstrip("# ")) for line in file.read_text().splitlines()]
    lines = [(page, line.split("  #")[0].strip()) for page, line in found]
    return sorted({(page, line) for page, line in lines if line.split(" ")[0] == word})


@pytest.mark.parametrize(("page", "line"), commands("make"))
def test_make_targets_exist(page: str, line: str) -> None:
    done = subprocess.run(["make", "-n", *line.split()[1:]], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("page", "line"), commands("probe"))
def test_probe_commands_parse(page: str, line: str) -> None:
    """Every word of a documented command is a command, an option or an argument of today's."""
    command = typer.main.get_command(app)
    words = line.split()[1:]
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]  # type: ignore[attr-defined]
    assert not getattr(command, "commands", {}), f"{page}: {line} names no command"
    with command.make_context(line, words, resilient_parsing=False):
        pass


def test_the_readmes_loop_prints_what_it_shows() -> None:
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    code = next(text for language, text in blocks if language == "python")
    shown = next(text for language, text in blocks if language == "text")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == shown


# DeepSpeed would compile a CPU operator that two CPU ranks can do without.
NOTHING_COMPILED = (
    "import deepspeed\ndeepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False\n"
)


# Gloo's teardown aborts a rank now and then, with and without our code in the loop.
LEAVE = "dist.barrier()\nimport os\n\nos._exit(0)\n"


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["fsdp2", "deepspeed"])
def test_sharded_loops_print_what_the_page_shows(kind: str, tmp_path: Path) -> None:
    blocks = BLOCK.findall((ROOT / "docs" / "training-loop.md").read_text())
    fsdp2, deepspeed = (text for language, text in blocks if language == "python")
    shown = next(text for language, text in blocks if language == "text")
    file = tmp_path / "train.py"
    code = fsdp2 if kind == "fsdp2" else NOTHING_COMPILED + deepspeed
    assert code.endswith("dist.destroy_process_group()\n")
    file.write_text(code.replace("dist.destroy_process_group()\n", LEAVE))
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", str(file)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, **environment},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert printed == shown.splitlines()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is missing"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=str)
def test_files_named_in_backticks_exist(page: Path) -> None:
    for name in re.findall(
        r"`((?:probe|server|clients|configs|tests|benchmarks)/[\w./-]+)`", page.read_text()
    ):
        assert (ROOT / name).exists(), f"{page.name} names {name}, which is missing"


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_job_files_are_valid(file: Path) -> None:
    load_spec(file)


@pytest.mark.parametrize("name", ["olmo2-1b-series.yaml", "olmo2-7b-series.yaml"])
def test_olmo2_jobs_are_planned_offline(name: str, tmp_path: Path) -> None:
    """No network, no model: the plan knows the units, their tokens and the true learning rates."""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    command = [str(Path(sys.executable).with_name("probe")), "run", f"configs/{name}", "--plan"]
    done = subprocess.run(
        [*command, "--json"], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    plan = yaml.safe_load(done.stdout)
    assert len(plan["units"]) == 10
    last = plan["units"][-1]
    peak = {"olmo2-1b-series.yaml": 4e-4, "olmo2-7b-series.yaml": 3e-4}[name]
    assert 0.1 * peak < last["learning_rate"] < 0.5 * peak
    tokens_per_step = {"olmo2-1b-series.yaml": 512 * 4096, "olmo2-7b-series.yaml": 1024 * 4096}[
        name
    ]
    for unit in plan["units"]:
        assert unit["checkpoint"]["num_tokens"] == unit["checkpoint"]["step"] * tokens_per_step


@pytest.mark.parametrize(
    ("name", "num_sources", "num_tasks"),
    [("olmo2-7b-dclm-math.yaml", 2, 4), ("olmo2-7b-dolmino.yaml", 6, 8)],
)
def test_olmo2_mix_scans_are_planned_offline(
    name: str, num_sources: int, num_tasks: int, tmp_path: Path
) -> None:
    """One unit; a gradient per task, then one per source for 20 warm-up steps and 5 repeats."""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    command = [str(Path(sys.executable).with_name("probe")), "run", f"configs/{name}", "--plan"]
    done = subprocess.run(
        [*command, "--json"], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    plan = yaml.safe_load(done.stdout)
    assert [unit["checkpoint"]["step"] for unit in plan["units"]] == [928646]
    assert plan["num_backward_passes"] == num_tasks + 25 * num_sources
    assert plan["num_parameters"] == 7_298_617_344
    assert plan["backend"] == "fsdp2"
    assert plan["memory_bytes_per_rank"] < 141e9


def test_the_dolmino_scan_keeps_the_papers_proportions() -> None:
    """Mix % of arXiv:2601.16979, table 1; DCLM's 47.2 % of the mix is the share that is varied."""
    spec = load_spec(ROOT / "configs" / "olmo2-7b-dolmino.yaml")
    assert isinstance(spec, MixScanSpec)
    percent = {"flan": 16.6, "stackexchange": 2.45, "pes2o": 5.85, "wiki": 7.11, "math": 20.8}
    names = [source.name for source in spec.mixture.sources]
    shares = dict(zip(names, source_shares(spec.mixture, 0.472), strict=True))
    assert spec.mixture.varied == "dclm"
    assert shares.pop("dclm") == 0.472
    assert shares == {n: pytest.approx(p / 100, rel=1e-3) for n, p in percent.items()}
