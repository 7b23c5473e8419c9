"""optim.safetensors as OLMo writes it, from moments by Hugging Face names.

Keys are base64 of a pickled (path of keys, whether the value is pickled); query, key and value are
rows of one tensor, and so are up and gate.
"""

import base64
import pickle
from collections.abc import Mapping

import torch
from safetensors.torch import save

OUTER = {
    "transformer.wte.weight": ["model.embed_tokens.weight"],
    "transformer.ln_f.weight": ["model.norm.weight"],
    "transformer.ff_out.weight": ["lm_head.weight"],
}
INNER = {
    "att_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "ff_proj": ["mlp.up_proj", "mlp.gate_proj"],
    "attn_out": ["self_attn.o_proj"],
    "ff_out": ["mlp.down_proj"],
    "q_norm": ["self_attn.q_norm"],
    "k_norm": ["self_attn.k_norm"],
    "attn_norm": ["post_attention_layernorm"],
    "ff_norm": ["post_feedforward_layernorm"],
}


def olmo_parts(num_layers: int) -> dict[str, list[str]]:
    """OLMo's name -> the parameters stored in it, in order."""
    parts = dict(OUTER)
    for n in range(num_layers):
        for theirs, ours in INNER.items():
            parts[f"transformer.blocks.{n}.{theirs}.weight"] = [
                f"model.layers.{n}.{name}.weight" for name in ours
            ]
    return parts


def optim_safetensors(states: Mapping[str, Mapping[str, torch.Tensor]], num_layers: int) -> bytes:
    """The file's content; `states` has exp_avg, exp_avg_sq and step of every parameter."""
    tensors = {}
    for stored, parts in olmo_parts(num_layers).items():
        found = [states[part] for part in parts]
        for kind in ("exp_avg", "exp_avg_sq"):
            tensors[_key("state", stored, kind)] = torch.cat([s[kind] for s in found])
        tensors[_key("state", stored, "step")] = found[0]["step"].clone().reshape(())
    return save(tensors)


def _key(*path: str) -> str:
    return base64.urlsafe_b64encode(pickle.dumps((path, False))).decode()
