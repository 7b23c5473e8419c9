"""The dependency group `server`: part of the project's dependencies, and enough for the server."""

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[2]
ENGINE = {"torch", "transformers", "accelerate", "datasets", "gguf", "safetensors", "tokenizers"}


def requirements(lines: list[str]) -> dict[str, Requirement]:
    return {Requirement(line).name: Requirement(line) for line in lines}


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_group_repeats_the_bounds_of_the_dependencies(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["postgres"], *extras["otel"]]
    everything = requirements(lines)
    for name, requirement in requirements(pyproject["dependency-groups"]["server"]).items():
        assert requirement == everything[name], f"{name} differs from the project's bounds"


def test_the_group_holds_everything_but_the_engine(pyproject: dict[str, Any]) -> None:
    """A new dependency belongs to the engine or to the server; it has to be said which."""
    everything = requirements(pyproject["project"]["dependencies"])
    group = requirements(pyproject["dependency-groups"]["server"])
    assert set(everything) - set(group) == ENGINE
    assert not ENGINE & set(group)


@pytest.fixture
def jobs(
    tmp_path: Path,
    series_spec: dict[str, Any],
    mix_spec: dict[str, Any],
    continual_spec: dict[str, Any],
    make_unit_result: Callable[..., Any],
    make_mix_result: Callable[..., Any],
    make_continual_results: Callable[..., list[Any]],
) -> list[dict[str, Any]]:
    """One job of each kind over files that are there, with results."""
    for step in (100, 300):
        directory = tmp_path / "runs" / f"step-{step}"
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
        save_file({"w": np.zeros((2, 2), np.float32)}, str(directory / "model.safetensors"))
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "hello"}\n')
    np.savez(tmp_path / "images.npz", x=np.zeros((200, 8, 8), np.uint8), y=np.arange(200) % 10)
    series_spec["checkpoints"]["path"] = str(tmp_path / "runs" / "step-*")
    series_spec["batches"]["sources"][0]["paths"] = [str(text)]
    mix_spec["checkpoints"]["path"] = str(tmp_path / "runs" / "step-300")
    mixed = [*mix_spec["mixture"]["sources"], *(task["data"] for task in mix_spec["eval_tasks"])]
    for source in mixed:
        source["paths"] = [str(text)]
    continual = make_continual_results()
    continual_spec["stream"]["data"] = {
        **{"type": "npz", "path": str(tmp_path / "images.npz")},
        **{"images": "x", "labels": "y"},
    }
    results = [[make_unit_result(0, 100), make_unit_result(1, 300)], [make_mix_result()], continual]
    return [
        {"spec": spec, "results": [result.model_dump(mode="json") for result in found]}
        for spec, found in zip((series_spec, mix_spec, continual_spec), results, strict=True)
    ]


def test_the_server_needs_no_other_package(jobs: list[dict[str, Any]], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("server_alone.py")), str(tmp_path / "data")],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    blocked = answers.pop("out of reach")
    assert {"torch", "transformers", "datasets", "safetensors", "pytest"} <= set(blocked)
    refused = {
        what: found
        for what, found in answers.items()
        if (found if isinstance(found, int) else found[0]) != 200
    }
    assert not refused, done.stderr
    assert answers["checkpoint_series plan"] == [200, 2]
    assert answers["mix_scan plan"] == [200, 1]
    assert answers["continual_learning plan"] == [200, len(jobs[2]["results"])]
