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


def write_olmo_unsharded(series, root: Path) -> dict[str, Any]:
    """OLMo's own files: query, key and value are one tensor there, up and gate another."""
    hf = json.loads((series.directory / "step-4" / "config.json").read_text())
    layers = range(hf["num_hidden_layers"])
    model = {
        "d_model": hf["hidden_size"],
        "n_heads": hf["num_attention_heads"],
        "n_kv_heads": hf["num_key_value_heads"],
        "n_layers": hf["num_hidden_layers"],
        "mlp_hidden_size": 2 * hf["intermediate_size"],
        "vocab_size": hf["vocab_size"],
        "max_sequence_length": 64,
        "weight_tying": False,
        "rope_theta": hf["rope_parameters"]["rope_theta"],
        "layer_norm_eps": hf["rms_norm_eps"],
        "layer_norm_type": "rms",
        "block_type": "sequential",
        "activation_type": "swiglu",
        **dict.fromkeys(("rope", "attention_layer_norm", "norm_after"), True),
        **dict.fromkeys(("layer_norm_with_affine",), True),
        "include_bias": False,
    }
    for step in STEPS:
        target = root / f"step{step}-unsharded"
        target.mkdir()
        weights, state = tensors_of(series.directory / f"step-{step}")
        torch.save(olmo_tensors(weights, layers), target / "model.pt")
        moments = {
            kind: olmo_tensors({name: state[f"{name}.{kind}"] for name in weights}, layers)
            for kind in ("exp_avg", "exp_avg_sq")
        }
        states = {
            name: {kind: moments[kind][name] for kind in moments} | {"step": torch.tensor(step)}
            for name in moments["exp_avg"]
        }
        torch.save({"state": states, "param_groups": []}, target / "optim.pt")
        (target / "config.yaml").write_text(json.dumps({"model": model}))  # JSON is YAML
    return {"source": "local", "path": str(root / "step*-unsharded")}


def olmo_tensors(tensors: dict, layers: range) -> dict[str, torch.Tensor]:
    outer = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
    found = {f"transformer.{t}.weight": tensors[f"{o}.weight"] for t, o in outer.items()}
    inner = {
        "att_proj": [f"self_attn.{part}_proj" for part in "qkv"],
        "attn_out": ["self_attn.o_proj"],
        "q_norm": ["self_attn.q_norm"],
        "k_norm": ["self_attn.k_norm"],
        "attn_norm": ["post_attention_layernorm"],
        "ff_proj": ["mlp.up_proj", "mlp.gate_proj"],
        "ff_out": ["mlp.down_proj"],
        "ff_norm": ["post_feedforward_layernorm"],
    }
    for layer in layers:
        for theirs, ours in inner.items():
            parts = [tensors[f"model.layers.{layer}.{name}.weight"] for name in ours]
            found[f"transformer.blocks.{layer}.{theirs}.weight"] = torch.cat(parts)
    return found


def write_deepspeed(series, root: Path, world: int = 3) -> dict[str, Any]:
    """ZeRO-3 of three ranks: every tensor cut evenly, its last part padded, all in one group."""
    shutil.copy(series.directory / "step-4" / "config.json", root)
    for step in STEPS:
        target = root / f"global_step{step}"
        target.mkdir()
        weights, state = tensors_of(series.directory / f"step-{step}")
        kinds = {"weight": weights} | {
            kind: {name: state[f"{name}.{kind}"] for name in weights}
            for kind in ("exp_avg", "exp_avg_sq")
        }
        for rank in range(world):
            flats = {}
            for kind, tensors in kinds.items():
                parts = []
                for tensor in tensors.values():
                    padded = torch.nn.functional.pad(tensor.flatten(), (0, -tensor.numel() % world))
                    parts.append(padded.chunk(world)[rank])
                flats[kind] = torch.cat(parts)
            moments = {kind: flats[kind] for kind in ("exp_avg", "exp_avg_sq")}
            optimizer = {
                "partition_count": world,
                "fp32_flat_groups": [flats["weight"]],
                "optimizer_state_dict": {"state": {0: moments | {"step": step}}},
            }
            shapes = [{name: tensor.shape for name, tensor in weights.items()}]
            model = {"param_shapes": shapes, "global_steps": step, "dp_world_size": world}
            name = f"zero_pp_rank_{rank}_mp_rank_00"
            torch.save({"optimizer_state_dict": optimizer}, target / f"{name}_optim_states.pt")
            torch.save(model, target / f"{name}_model_states.pt")
    return {"source": "local", "path": str(root / "global_step*")}
