"""The first two checkpoints of a `Series`, written again in the other local formats."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from probe.checkpoints.olmo_core import olmo_core_name

STEPS = (4, 12)


def tensors_of(directory: Path) -> tuple[dict, dict]:
    return load_file(directory / "model.safetensors"), load_file(
        directory / "optimizer.safetensors"
    )


def dcp_save(state: dict, directory: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process, on purpose
        dcp.save(state, checkpoint_id=directory, no_dist=True)


def write_dcp(series, root: Path) -> dict[str, Any]:
    """Returns the `checkpoints` of a spec that names them."""
    for step in STEPS:
        weights, state = tensors_of(series.directory / f"step-{step}")
        flat = {f"optim.state.{key}": value for key, value in state.items()}
        dcp_save({f"model.{k}": v for k, v in weights.items()} | flat, root / f"step-{step}")
    config = str(series.directory / "step-4")
    return {"source": "local", "path": str(root / "step-*"), "config": config}


def write_olmo_core(series, root: Path) -> dict[str, Any]:
    """Its config.json is the run's, not a Hugging Face one; names differ throughout."""
    hf = json.loads((series.directory / "step-4" / "config.json").read_text())
    norm = {"name": "rms", "eps": hf["rms_norm_eps"], "bias": False}
    attention = {
        "n_heads": hf["num_attention_heads"],
        "n_kv_heads": hf["num_key_value_heads"],
        "rope": {"theta": hf["rope_parameters"]["rope_theta"]},
        "qk_norm": norm,
    }
    block = {
        "name": "reordered_norm",
        "sequence_mixer": attention,
        "layer_norm": norm,
        "feed_forward": {"hidden_size": hf["intermediate_size"]},
    }
    model = {
        "d_model": hf["hidden_size"],
        "vocab_size": hf["vocab_size"],
        "n_layers": hf["num_hidden_layers"],
        "block": block,
        "lm_head": {"layer_norm": norm},
    }
    run = {"model": model, "train_module": {"max_sequence_length": 64}}
    for step in STEPS:
        weights, state = tensors_of(series.directory / f"step-{step}")
        stored = {f"model.{olmo_core_name(name)}": value for name, value in weights.items()}
        for key, value in state.items():
            name, _, kind = key.rpartition(".")
            stored[f"optim.state.{olmo_core_name(name)}.{kind}"] = value
        dcp_save(stored, root / f"step{step}" / "model_and_optim")
        (root / f"step{step}" / "config.json").write_text(json.dumps(run))
    return {"source": "local", "path": str(root / "step*")}


def write_trainer(series, root: Path) -> dict[str, Any]:
    """The moments in optimizer.pt, keyed by number."""
    for step in STEPS:
        source, target = series.directory / f"step-{step}", root / f"checkpoint-{step}"
        target.mkdir()
        for file in ("config.json", "model.safetensors"):
            shutil.copy(source / file, target)
        state = load_file(source / "optimizer.safetensors")
        names = sorted({key.rpartition(".")[0] for key in state})
        order = list(AutoModelForCausalLM.from_pretrained(source).state_dict())
        assert sorted(order) == names
        groups = [[n for n in order if "norm" not in n], [n for n in order if "norm" in n]]
        numbered = {
            index: {kind: state[f"{name}.{kind}"] for kind in ("exp_avg", "exp_avg_sq", "step")}
            for index, name in enumerate(groups[0] + groups[1])
        }
        cut = len(groups[0])
        ranges = (range(cut), range(cut, len(order)))
        content = {"state": numbered, "param_groups": [{"params": list(r)} for r in ranges]}
        torch.save(content, target / "optimizer.pt")
        (target / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return {"source": "local", "path": str(root / "checkpoint-*")}
