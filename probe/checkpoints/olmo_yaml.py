"""The `config.yaml` of an OLMo run, as fields of transformers' Olmo2Config or OlmoConfig.

This is the config of the older code base, `ai2-olmo`; `olmo_config` reads that of OLMo-core. As
there, whatever would change what the model computes is carried over or refused, and no default of
transformers is relied on. Torch-free.
"""

from pathlib import Path
from typing import Any

import yaml

from probe.checkpoints.olmo_config import SAME_FOR_ALL
from probe.errors import CheckpointError

# How a model was initialised, cast or run; not what it computes when nothing is dropped.
_NOT_COMPUTED = frozenset(
    {
        *("init_device", "init_fn", "init_std", "init_cutoff_factor", "emb_init_std"),
        *("scale_emb_init", "flash_attention", "precision", "eos_token_id", "pad_token_id"),
        *("attention_dropout", "residual_dropout", "embedding_dropout", "alibi_bias_max"),
        *("rope_full_precision", "attention_layer_norm_with_affine"),
    }
)
_CARRIED = frozenset(
    {
        *("d_model", "n_heads", "n_kv_heads", "multi_query_attention", "n_layers", "mlp_ratio"),
        *("mlp_hidden_size", "vocab_size", "embedding_size", "weight_tying", "rope_theta"),
        *("max_sequence_length", "layer_norm_eps"),
    }
)
_SHARED = {  # what both generations must have
    "block_type": ("sequential",),
    "activation_type": ("swiglu",),
    "rope": (True,),
    "alibi": (False, None),
    "include_bias": (False,),
    "bias_for_layer_norm": (False, None),
    "embedding_layer_norm": (False, None),
    "scale_logits": (False, None),
    "block_group_size": (1, None),
}
_OLMO2 = _SHARED | {
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "attention_layer_norm": (True,),
    "attention_layer_norm_with_affine": (True, None),
    "norm_after": (True,),
    "clip_qkv": (None,),
}
_OLMO1 = _SHARED | {
    "layer_norm_type": ("default", "low_precision"),  # differ under autocast alone
    "layer_norm_with_affine": (False,),
    "attention_layer_norm": (False, None),
    "norm_after": (False, None),
}


def read_run(path: Path) -> dict[str, Any]:
    """A run's config.yaml.

    Raises:
        CheckpointError: It is unreadable or has no `model`.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise CheckpointError(f"{path}: no `model`; expected the config.yaml of an OLMo run")
    return content


def tokenizer_of(content: dict[str, Any]) -> str | None:
    """What the run calls its tokenizer: a hub id, or a file of OLMo's repository."""
    section = content.get("tokenizer")
    name = section.get("identifier") if isinstance(section, dict) else None
    return name if isinstance(name, str) else None


def olmo_fields(content: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """The model type, `olmo2` or `olmo`, and the keyword arguments of its config.

    Args:
        content: From `read_run`.
        path: For messages.

    Raises:
        CheckpointError: A field is missing, or transformers has no model that computes the same.
    """
    return _Model(content["model"], path).fields()


class _Model:
    def __init__(self, model: dict[str, Any], path: Path) -> None:
        self.model = model
        self.path = path

    def fields(self) -> tuple[str, dict[str, Any]]:
        second = self.model.get("norm_after") is True
        rules = _OLMO2 if second else _OLMO1
        for key, allowed in rules.items():
            if self.model.get(key) not in allowed:
                expected = " or ".join(map(repr, allowed))
                raise self.refused(key, f"{expected} of OLMo-{2 if second else 1}")
        known = _NOT_COMPUTED | _CARRIED | rules.keys() | (set() if second else {"clip_qkv"})
        for key in sorted(self.model.keys() - known):
            if self.model[key]:
                raise self.refused(key, "nothing there")
        found = self.sizes()
        if second:
            return "olmo2", found | {"rms_norm_eps": float(self.number("layer_norm_eps"))}
        epsilon = float(self.model.get("layer_norm_eps") or 1e-5)  # fixed before it was a field
        if epsilon != 1e-5:
            raise self.refused("layer_norm_eps", "1e-05 of OLMo-1")
        clip = self.model.get("clip_qkv")
        return "olmo", found | {"clip_qkv": None if clip is None else self.number("clip_qkv")}

    def sizes(self) -> dict[str, Any]:
        hidden, heads = self.whole("d_model"), self.whole("n_heads")
        if hidden % heads:
            raise self.refused("n_heads", f"a divisor of d_model, {hidden}")
        if self.model.get("mlp_hidden_size") is not None:
            fused = self.whole("mlp_hidden_size")
        else:
            fused = self.whole("mlp_ratio") * hidden
        embeddings = "vocab_size" if self.model.get("embedding_size") is None else "embedding_size"
        tied = self.model.get("weight_tying")
        if type(tied) is not bool:
            raise self.refused("weight_tying", "true or false")
        return {
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": self.key_heads(heads),
            "num_hidden_layers": self.whole("n_layers"),
            "intermediate_size": fused // 2,  # up and gate together
            "vocab_size": self.whole(embeddings),
            "max_position_embeddings": self.whole("max_sequence_length"),
            "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta()},
            **SAME_FOR_ALL,
        }

    def key_heads(self, heads: int) -> int:
        if self.model.get("multi_query_attention") not in (True, False, None):
            raise self.refused("multi_query_attention", "true or false")
        if self.model.get("multi_query_attention"):
            return 1
        if self.model.get("n_kv_heads") is None:
            return heads
        return self.whole("n_kv_heads")

    def rope_theta(self) -> float:
        """10,000 in runs from before it was a field, all of them OLMo-1."""
        if "rope_theta" in self.model or self.model.get("norm_after"):
            return float(self.number("rope_theta"))
        return 10_000.0

    def number(self, key: str) -> Any:
        value = self.model.get(key)
        if isinstance(value, str):  # YAML 1.1 reads 1e-6 as text
            try:
                value = float(value)
            except ValueError:
                raise self.refused(key, "a number above 0") from None
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self.refused(key, "a number above 0")
        return value

    def whole(self, key: str) -> int:
        value = self.number(key)
        if value != int(value):
            raise self.refused(key, "a whole number")
        return int(value)

    def refused(self, key: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: model.{key} is {self.model.get(key)!r:.80}, expected {expected}; models "
            "that transformers' Olmo and Olmo2 do not compute are not read"
        )
