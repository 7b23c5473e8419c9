"""Whole sessions on two ranks, every back-end from every kind of source, against one process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_file import write_gguf
from series_formats import (
    write_dcp,
    write_deepspeed,
    write_olmo_core,
    write_olmo_unsharded,
    write_trainer,
)
from transformers import LlamaConfig, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM

from probe.checkpoints import save_checkpoint
from probe.engine import Session
from probe.errors import ParallelismError
from probe.mix_engine import MixSession
from probe.plan import expand_units
from probe.spec_load import parse_spec

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gguf"),
]

ROOT = Path(__file__).resolve().parents[3]
RANKS = Path(__file__).with_name("session_ranks.py")
TIMEOUT_S = 200
WORLD_SIZE = 2
CASES = {  # name -> back-end, source, changes
    "deepspeed hf": ("deepspeed", "hf", {}),
    "deepspeed hf bf16": ("deepspeed", "hf", {"model__dtype": "bfloat16"}),
    "deepspeed two models": (
        "deepspeed",
        "two models",
        {"optimizer__moments": "warmup", "model__activation_checkpointing": True},
    ),
    "deepspeed dcp": ("deepspeed", "dcp", {}),
    "deepspeed olmo-core": ("deepspeed", "olmo-core", {}),
    "deepspeed of deepspeed": ("deepspeed", "deepspeed", {}),
    "fsdp2 dcp": ("fsdp2", "dcp", {}),
    "fsdp2 olmo-core": ("fsdp2", "olmo-core", {}),
    "fsdp2 trainer": ("fsdp2", "trainer", {}),
    "fsdp2 olmo-unsharded": ("fsdp2", "olmo-unsharded", {}),
    "fsdp2 gguf": ("fsdp2", "gguf", {}),
}
MIXES = {  # name -> back-end, changes of a mix scan
    "fsdp2 shared": ("fsdp2", {}),
    "fsdp2 bf16 buffers": ("fsdp2", {"mixture__buffers": "bfloat16"}),
    "fsdp2 saved moments": ("fsdp2", {"optimizer": {"moments": "checkpoint"}}),
    "fsdp2 exact": ("fsdp2", {"mixture__gradients": "exact", "mixture__ratios": [0.25, 0.75]}),
    "deepspeed shared": ("deepspeed", {}),
}


MODEL = {
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 31,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "tie_word_embeddings": True,
}


def gguf(root: Path) -> dict[str, Any]:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=36,
        intermediate_size=31,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        initializer_range=0.2,
        rms_norm_eps=1e-5,
    )
    write_gguf(root / "llama.gguf", LlamaForCausalLM(config))
    return {"source": "gguf", "path": str(root / "llama.gguf")}


def two_models(series, root: Path) -> dict[str, Any]:
    """A series in which the second checkpoint is of a wider model, so that the first makes room."""
    shutil.copytree(series.directory / "step-4", root / "step-1")
    torch.manual_seed(4)
    config = Olmo2Config(**MODEL)
    save_checkpoint(Olmo2ForCausalLM(config), root / "step-2")
    return {"source": "local", "path": str(root / "step-*")}


@pytest.fixture(scope="module")
def specs(series, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """By case; five sequences by two, so that one rank has a micro-batch more."""
    root = tmp_path_factory.mktemp("formats")
    for name in ("dcp", "two models", "deepspeed", "olmo-core", "olmo-unsharded", "trainer"):
        (root / name).mkdir()
    sources = {
        "hf": {"source": "local", "path": str(series.directory / "step-*")},
        "two models": two_models(series, root / "two models"),
        "dcp": write_dcp(series, root / "dcp"),
        "deepspeed": write_deepspeed(series, root / "deepspeed"),
        "olmo-core": write_olmo_core(series, root / "olmo-core"),
        "olmo-unsharded": write_olmo_unsharded(series, root / "olmo-unsharded"),
        "trainer": write_trainer(series, root / "trainer"),
        "gguf": gguf(root),
    }
    found = {}
    for name, (backend, source, changes) in CASES.items():
        raw = series.spec(checkpoints=sources[source], batches__batch_sequences=5, **changes)
        raw["measurement"] = {"loss_batch": "update", "repeats": 1}
        raw["parallel"] = {"backend": backend}
        raw.setdefault("model", {})["tokenizer"] = str(series.directory / "step-4")
        found[name] = raw
    return found


def measured_by_ranks(root: Path, specs: dict[str, Any], num_ranks: int) -> list[dict[str, Any]]:
    """Results of every rank by case: one launch for all."""
    (root / "specs.json").write_text(json.dumps(list(specs.values())))
    children = [
        subprocess.Popen(
            [sys.executable, str(RANKS), str(root / "specs.json"), str(rank), str(num_ranks)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        outputs = [child.communicate(timeout=TIMEOUT_S) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert [child.returncode for child in children] == [0] * num_ranks, outputs
    assert [printed for printed, _ in outputs] == [""] * num_ranks
    files = [root / f"results-{rank}.json" for rank in range(num_ranks)]
    return [dict(zip(specs, json.loads(f.read_text()), strict=True)) for f in files]


@pytest.fixture(scope="module")
def mixes(raw_scan) -> dict[str, dict[str, Any]]:
    """By case; tasks of six and four sequences, steps of four, by two."""
    return {
        name: raw_scan(**changes, parallel={"backend": backend})
        for name, (backend, changes) in MIXES.items()
    }


@pytest.fixture(scope="module")
def by_rank(specs, mixes, tmp_path_factory) -> list[dict[str, Any]]:
    return measured_by_ranks(tmp_path_factory.mktemp("session"), specs | mixes, WORLD_SIZE)


def timeless(unit: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**measurement, "duration_s": 0} for measurement in unit["measurements"]]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_measure_what_one_process_does(specs, by_rank, case):
    backend, source, _ = CASES[case]
    spec = parse_spec({**specs[case], "parallel": {"backend": "single"}})
    session = Session(spec)
    units = expand_units(spec)[:2]
    assert len(units) == (1 if source == "gguf" else 2)
    for index, unit in enumerate(units):
        truth = session.measure(unit).model_dump(mode="json")
        first, second = (rank[case][index] for rank in by_rank)
        assert first["provenance"]["backend"] == backend
        assert first["provenance"]["num_ranks"] == WORLD_SIZE
        for key in ("dtype", "head_path", "num_parameters", "moments"):
            assert first["provenance"][key] == truth["provenance"][key], key
        assert first["num_forward_passes"] == truth["num_forward_passes"]
        [found], [expected] = (result["measurements"] for result in (first, truth))
        assert timeless(first) == timeless(second)
        assert found["outcome"] == expected["outcome"] == "converged"
        for key in ("loss_at_zero", "loss_resolution", "loss_batch_sha256"):
            assert found[key] == expected[key], key
        # Gradients differ by the order in which micro-batches are added in fp32.
        for key in ("eta_c", "eta_lower", "eta_upper", "slope"):
            assert found[key] == pytest.approx(expected[key], rel=1e-5), key


@pytest.mark.parametrize("case", MIXES)
def test_two_ranks_scan_mixtures_as_one_process_does(mixes, by_rank, case):
    spec = parse_spec({**mixes[case], "parallel": {"backend": "single"}})
    session = MixSession(spec)
    for index, unit in enumerate(expand_units(spec)):
        truth = session.measure(unit).model_dump(mode="json")
        first, second = (rank[case][index] for rank in by_rank)
        assert first["provenance"]["backend"] == MIXES[case][0]
        assert first["provenance"]["num_ranks"] == WORLD_SIZE
        for key in ("moments", "moments_detail"):
            assert first["provenance"][key] == truth["provenance"][key], key
        assert timeless(first) == timeless(second)
        assert first["num_backward_passes"] == truth["num_backward_passes"]
        for found, expected in zip(first["measurements"], truth["measurements"], strict=True):
            same = ("repeat", "ratio", "task", "outcome", "loss_at_zero", "loss_batch_sha256")
            for key in (*same, "update_batch_sha256"):
                assert found[key] == expected[key], key
            # Where gradients nearly cancel, AdamW turns the rounding of their sums into steps.
            assert found["slope"] == pytest.approx(expected["slope"], rel=1e-3)
            for key in ("eta_c", "eta_lower", "eta_upper") if expected["slope"] < 0 else ():
                assert found[key] == pytest.approx(expected[key], rel=1e-3), key


def test_one_rank_measures_exactly_what_one_process_does(specs, tmp_path):
    """Gradients too: nothing is added in another order."""
    cases = {name: specs[name] for name in ("deepspeed hf", "deepspeed hf bf16", "fsdp2 dcp")}
    [rank] = measured_by_ranks(tmp_path, cases, 1)
    for name, raw in cases.items():
        spec = parse_spec({**raw, "parallel": {"backend": "single"}})
        session = Session(spec)
        for found, unit in zip(rank[name], expand_units(spec)[:2], strict=True):
            assert found["provenance"]["backend"] == raw["parallel"]["backend"]
            assert found["provenance"]["num_ranks"] == 1
            assert timeless(found) == timeless(session.measure(unit).model_dump(mode="json"))


@pytest.mark.parametrize("backend", ["fsdp2", "deepspeed"])
def test_a_sharded_back_end_wants_its_ranks_started(specs, backend):
    spec = parse_spec({**specs["deepspeed hf"], "parallel": {"backend": backend}})
    with pytest.raises(ParallelismError, match="torchrun"):
        Session(spec).measure(expand_units(spec)[0])
