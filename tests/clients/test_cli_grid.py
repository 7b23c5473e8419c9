"""`probe plot GRID --scan SCAN`: a scan drawn over a training grid, and what does not belong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from clients.cli.main import app
from probe.kinds import KINDS
from probe.result import CheckpointRef, Unit
from probe.result_train import MixTrainUnitResult, TaskChange
from probe.spec_load import parse_spec, resolved
from server.wire import ResultList

# Median eta_c of `CURVES` by ratio and task; 0: not descended.
ETA_C = {
    "web_task": {(0.0, 0.1), (0.5, 0.4), (1.0, 1.5)},
    "gsm8k_test": {(0.0, 0.8), (0.5, 0.2), (1.0, 0.0)},
}
SWEET_SPOT = (0.5, 0.2)


@pytest.fixture
def make_run(mix_spec: dict[str, Any], make_mix_result: Any) -> Callable[..., MixTrainUnitResult]:
    """Builds the one run of a training grid on the sources, tasks and checkpoint of the scan."""
    raw = {key: value for key, value in mix_spec.items() if key != "measurement"} | {
        "kind": "mix_train",
        "mixture": {"sources": mix_spec["mixture"]["sources"]},
        "train": {"ratios": [0.5], "learning_rates": [0.2], "steps": 3},
    }

    def make(location: str = "runs/a/step-300", **changes: Any) -> MixTrainUnitResult:
        return MixTrainUnitResult(
            unit=Unit(
                index=0,
                unit_id="0000-step-300-ratio-0.5-lr-0.2",
                checkpoint=CheckpointRef(source="local", location=location, step=300),
                ratio=0.5,
                learning_rate=0.2,
            ),
            spec=resolved(parse_spec(raw | changes)),
            ratio=0.5,
            learning_rate=0.2,
            shares=[0.5, 0.5],
            outcome="finished",
            num_steps=3,
            train_losses=[3.0, 2.9, 2.8],
            first_batch_sha256="d" * 64,
            tasks=[change(name) for name in ETA_C],
            num_forward_passes=8,
            num_backward_passes=3,
            duration_s=1.0,
            memory_bytes=1 << 20,
            provenance=make_mix_result().provenance,
        )

    return make


def change(task: str) -> TaskChange:
    return TaskChange(
        task=task,
        loss_start=3.0,
        loss_end=2.75,
        loss_change=-0.25,
        loss_change_standard_error=0.01,
        accuracy_kind="token",
        accuracy_count=64,
        accuracy_chance=None,
        accuracy_start=0.25,
        accuracy_end=0.5,
        accuracy_change=0.25,
        accuracy_change_standard_error=0.01,
        loss_batch_sha256="c" * 64,
    )


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes results as a file in the current directory; gives its name."""
    monkeypatch.chdir(tmp_path)

    def written(name: str, *results: Any) -> str:
        Path(name).write_text(ResultList.of("local", "succeeded", list(results)).model_dump_json())
        return name

    return written


def drawn(vega: str) -> dict[str, set[tuple[float, float]]]:
    """(ratio, eta_c) of what is drawn over the heat maps, by what it is."""
    rows = [row for rows in json.loads(vega)["datasets"].values() for row in rows if "what" in row]
    kinds = {row["what"] for row in rows}
    return {
        kind: {(row["ratio"], row["eta_c"]) for row in rows if row["what"] == kind}
        for kind in kinds
    }


def check_drawn(vega: str) -> None:
    found = drawn(vega)
    assert set.union(*ETA_C.values()) <= found["eta_c"]
    assert found["sweet spot"] == {SWEET_SPOT}


def test_a_scan_is_drawn_over_a_grid(
    probe: Any, write: Any, make_run: Any, make_mix_result: Any
) -> None:
    grid, scan = write("grid.json", make_run()), write("scan.json", make_mix_result())
    done = probe("plot", grid, "--scan", scan, "--json")
    assert done.exit_code == 0, done.stderr
    check_drawn(done.stdout)
    assert drawn(probe("plot", grid, "--json").stdout) == {}
    assert probe("plot", grid, "--scan", scan, "--out", "both.svg").stdout == "both.svg\n"
    assert "from the scan:" in Path("both.svg").read_text()
    assert probe.server.requests == []


def test_both_may_be_jobs(
    probe: Any, wire: Any, make_run: Any, make_mix_result: Any, tmp_path: Path
) -> None:
    jobs = {"job_01grid": make_run(), "job_01scan": make_mix_result()}
    probe.server.jobs = [wire.job(job_id, "succeeded") for job_id in jobs]
    for job_id, result in jobs.items():
        text = ResultList.of(job_id, "succeeded", [result]).model_dump_json()
        url = ("GET", f"/v1/jobs/{job_id}/results")
        probe.server.routes[url] = lambda _, text=text: httpx.Response(200, content=text)
    check_drawn(probe("plot", "job_01grid", "--scan", "job_01scan", "--json").stdout)
    check_drawn(probe("plot", "1grid", "--scan", "1scan", "--json").stdout)


def test_relative_paths_mean_the_current_directory(
    probe: Any, write: Any, make_run: Any, mix_spec: dict[str, Any], make_mix_result: Any
) -> None:
    """One was measured here, the other by a server, which was told absolute paths."""
    here = str(Path.cwd())
    sources = [
        source | {"paths": [f"{here}/{path}" for path in source["paths"]]}
        for source in mix_spec["mixture"]["sources"]
    ]
    run = make_run(f"{here}/runs/a/step-300", mixture={"sources": sources})
    scan = write("scan.json", make_mix_result())
    check_drawn(probe("plot", write("grid.json", run), "--scan", scan, "--json").stdout)


def test_a_scan_of_several_checkpoints_lends_the_one_that_was_trained(
    probe: Any, write: Any, make_run: Any, make_mix_result: Any
) -> None:
    other = make_mix_result(1, 600, curves={task: {0.0: [7.0]} for task in ETA_C})
    scan = write("scan.json", make_mix_result(), other)
    found = probe("plot", write("grid.json", make_run()), "--scan", scan, "--json").stdout
    check_drawn(found)
    assert (0.0, 7.0) not in drawn(found)["eta_c"]


def refused(probe: Any, grid: str, scan: str) -> str:
    done = probe("plot", grid, "--scan", scan, "--out", "both.svg")
    assert (done.exit_code, done.stdout) == (2, "")
    assert not Path("both.svg").exists()
    return str(done.stderr)


def test_each_must_be_of_its_kind(
    probe: Any, write: Any, make_run: Any, make_mix_result: Any, make_unit_result: Any
) -> None:
    grid, scan = write("grid.json", make_run()), write("scan.json", make_mix_result())
    series, none = write("series.json", make_unit_result()), write("none.json")
    for wrong, kind in ((scan, "mix_scan"), (series, "checkpoint_series")):
        assert refused(probe, wrong, scan) == (
            f"error: {wrong} holds results of kind {kind}; a scan is drawn over kind mix_train\n"
        )
    for wrong, kind in ((grid, "mix_train"), (series, "checkpoint_series")):
        assert refused(probe, grid, wrong) == (
            f"error: {wrong} holds results of kind {kind}; --scan takes kind mix_scan\n"
        )
    assert refused(probe, none, scan) == "error: none.json has no results yet\n"
    assert refused(probe, grid, none) == "error: none.json has no results yet\n"
    assert "cannot read absent.json" in refused(probe, grid, "absent.json")


def test_a_scan_of_another_checkpoint_is_refused(
    probe: Any, write: Any, make_run: Any, make_mix_result: Any
) -> None:
    scan = write("scan.json", make_mix_result(step=600))
    assert refused(probe, write("grid.json", make_run()), scan) == (
        "error: grid.json trains from step 300 of runs/a/step-300, scan.json scans step 600 of "
        "runs/a/step-600: give a scan of a checkpoint that the grid trains from\n"
    )


def renamed(sources: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [sources[0], sources[1] | {"name": name}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            lambda spec: {"mixture": {"sources": renamed(spec["mixture"]["sources"], "code")}},
            "sources web, code against web, gsm8k",
        ),
        (
            lambda spec: {"mixture": {"sources": spec["mixture"]["sources"], "varied": "gsm8k"}},
            "source web has varied False against True",
        ),
        (
            lambda spec: {
                "mixture": {
                    "sources": [
                        spec["mixture"]["sources"][0] | {"paths": ["/else/web.jsonl"]},
                        spec["mixture"]["sources"][1],
                    ]
                }
            },
            "source web has paths ['/else/web.jsonl'] against ['",
        ),
        (
            lambda spec: {
                "eval_tasks": [
                    {"data": task["data"] | {"name": f"my_{task['data']['name']}"}, "sequences": 8}
                    for task in spec["eval_tasks"]
                ]
            },
            "tasks my_web_task, my_gsm8k_test against web_task, gsm8k_test, none in common",
        ),
        (
            lambda spec: {
                "eval_tasks": [
                    {"data": task["data"] | {"format": {"type": "text"}}, "sequences": 8}
                    for task in spec["eval_tasks"]
                ]
            },
            "task gsm8k_test has format {'type': 'text', 'field': 'text'} against {'type': 'quest",
        ),
    ],
)
def test_a_scan_of_another_mixture_or_other_tasks_is_refused(
    probe: Any,
    write: Any,
    make_run: Any,
    make_mix_result: Any,
    mix_spec: dict[str, Any],
    changes: Any,
    message: str,
) -> None:
    grid = write("grid.json", make_run(**changes(mix_spec)))
    said = refused(probe, grid, write("scan.json", make_mix_result()))
    assert said.startswith(f"error: grid.json and scan.json do not belong together: {message}")
    assert "Measure both with the same mixture.sources and eval_tasks" in said


def test_proportions_of_the_other_sources_count_and_lone_shares_do_not(
    probe: Any, write: Any, make_run: Any, make_mix_result: Any, mix_spec: dict[str, Any]
) -> None:
    web, gsm8k = mix_spec["mixture"]["sources"]
    wiki = {"type": "files", "name": "wiki", "paths": ["wiki.jsonl"]}
    # Beside the varied one there is one source, which has all of the rest whatever its share.
    run = make_run(mixture={"sources": [web | {"share": 2.0}, gsm8k | {"share": 5.0}]})
    scan = write("scan.json", make_mix_result())
    check_drawn(probe("plot", write("grid.json", run), "--scan", scan, "--json").stdout)
    three = make_mix_result()
    spec = three.spec | {"mixture": three.spec["mixture"] | {"sources": [web, gsm8k, wiki]}}
    scan = write("scan.json", three.model_copy(update={"spec": spec}))
    doubled = [web, gsm8k | {"share": 2.0}, wiki | {"share": 2.0}]
    grid = write("grid.json", make_run(mixture={"sources": doubled}))
    check_drawn(probe("plot", grid, "--scan", scan, "--json").stdout)
    unequal = [web, gsm8k | {"share": 3.0}, wiki]
    grid = write("grid.json", make_run(mixture={"sources": unequal}))
    assert "source gsm8k has share 0.75 against 0.5" in refused(probe, grid, scan)


def test_help_names_every_kind_to_list(probe: Any) -> None:
    import typer

    (option,) = [
        parameter
        for parameter in typer.main.get_command(app).commands["list"].params  # type: ignore[attr-defined]
        if parameter.name == "kind"
    ]
    assert all(kind in option.help for kind in KINDS)
