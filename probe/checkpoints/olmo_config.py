"""An OLMo-core run's config.json, as the fields of transformers' Olmo2Config (torch-free).

Every field that would change what the model computes is either carried over or refused; nothing
falls back to a default of transformers. `rms_norm_eps` is why: OLMo-2 has 1e-6, Olmo2Config's
default is 1e-5, and the difference moves logits by more than 1.
"""

from pathlib import Path
from typing import Any

from probe.errors import CheckpointError

# How a model was initialised, cast, stored or run; not what it computes.
_NOT_COMPUTED = frozenset(
    {
        *("_CLASS_", "type", "dtype", "compile", "fused_ops", "use_flash", "backend"),
        *("init_method", "init_seed", "init_std", "embedding_init_std", "freeze_params"),
        *("loss_implementation", "elementwise_affine", "full_precision", "dropout"),
        *("use_recompute_qkv_prep", "dp_config", "tp_config", "ac_config", "float8_config"),
    }
)


SAME_FOR_ALL = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    # a padding token would silence the gradient of its embedding, which OLMo-core trains
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def is_run_config(content: dict[str, Any]) -> bool:
    """Whether a JSON object is an OLMo-core run's config and no Hugging Face one."""
    return "model_type" not in content and isinstance(content.get("model"), dict)


def tokenizer_in(content: dict[str, Any]) -> str | None:
    """The hub id of the run's tokenizer, where its config names one."""
    for owner in ("dataset", "data_loader", ""):
        section = content.get(owner) if owner else content
        tokenizer = section.get("tokenizer") if isinstance(section, dict) else None
        if isinstance(tokenizer, dict) and isinstance(tokenizer.get("identifier"), str):
            return str(tokenizer["identifier"])
    return None


def olmo2_fields(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Keyword arguments of Olmo2Config for a run's model.

    Args:
        content: The run's config.json.
        path: Its file, for messages.

    Raises:
        CheckpointError: A field is missing, or the model is no OLMo-2: another block or norm,
            mixture of experts, sliding windows, scaled positions, and so on.
    """
    return _Reader(path).olmo2(content)


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path

    def olmo2(self, content: dict[str, Any]) -> dict[str, Any]:
        model = self.section(content, "model")
        block = self.section(model, "model.block")
        # OLMo-core 3 calls `sequence_mixer` what was `attention` before
        mixer = f"model.block.{'sequence_mixer' if 'sequence_mixer' in block else 'attention'}"
        attention = self.section(block, mixer)
        rope = self.section(attention, f"{mixer}.rope")
        mlp = self.section(block, "model.block.feed_forward")
        head = self.section(model, "model.lm_head")
        self.only(model, "model", "d_model vocab_size n_layers block lm_head tie_word_embeddings")
        inner = f"{mixer.rpartition('.')[2]} layer_norm feed_forward"
        self.only(block, "model.block", inner, name="reordered_norm")
        self.only(attention, mixer, "n_heads n_kv_heads head_dim rope qk_norm")
        self.only(rope, f"{mixer}.rope", "theta")
        self.only(mlp, "model.block.feed_forward", "hidden_size activation")
        self.only(head, "model.lm_head", "layer_norm")
        if mlp.get("activation", "silu") != "silu":
            raise self.refused("model.block.feed_forward.activation", mlp["activation"], "silu")
        norms = (
            (block, "model.block.layer_norm"),
            (attention, f"{mixer}.qk_norm"),
            (head, "model.lm_head.layer_norm"),
        )
        return {
            **self.sizes(model, attention, mixer),
            "intermediate_size": self.number(mlp, "model.block.feed_forward.hidden_size"),
            "max_position_embeddings": self.sequence_length(content),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": float(self.number(rope, f"{mixer}.rope.theta")),
            },
            "rms_norm_eps": self.epsilon(norms),
            **SAME_FOR_ALL,
        }

    def sizes(self, model: dict[str, Any], attention: dict[str, Any], mixer: str) -> dict[str, Any]:
        hidden = self.number(model, "model.d_model")
        heads = self.number(attention, f"{mixer}.n_heads")
        if (attention.get("head_dim") or hidden // heads) != hidden // heads:
            raise self.refused(f"{mixer}.head_dim", attention["head_dim"], "d_model / n_heads")
        return {
            "vocab_size": self.number(model, "model.vocab_size"),
            "hidden_size": hidden,
            "num_hidden_layers": self.number(model, "model.n_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": attention.get("n_kv_heads") or heads,
            "tie_word_embeddings": bool(model.get("tie_word_embeddings")),
        }

    def epsilon(self, norms: tuple[tuple[dict[str, Any], str], ...]) -> float:
        found: dict[float, str] = {}
        for owner, where in norms:
            norm = self.section(owner, where)
            if norm.get("name") not in ("rms", "fused_rms"):
                raise self.refused(f"{where}.name", norm.get("name"), "rms")
            self.nothing_else(norm, where, "name eps")
            found[float(self.number(norm, f"{where}.eps"))] = where
        if len(found) > 1:
            raise CheckpointError(
                f"{self.path}: norms of different eps, {found}; Olmo2Config has one for all"
            )
        return next(iter(found))

    def sequence_length(self, content: dict[str, Any]) -> int:
        places = (("train_module", "max_sequence_length"), ("dataset", "sequence_length"))
        for owner, key in places:
            section = content.get(owner)
            length = section.get(key) if isinstance(section, dict) else None
            if type(length) is int and length > 0:
                return length
        names = " or ".join(".".join(place) for place in places)
        raise CheckpointError(f"{self.path}: no {names}, the run's sequence length")

    def section(self, owner: dict[str, Any], where: str) -> dict[str, Any]:
        value = owner.get(where.rpartition(".")[2])
        if not isinstance(value, dict):
            raise CheckpointError(
                f"{self.path}: {where} is {value!r:.80}, expected an object, as in an OLMo-core "
                "run of an OLMo-2 model"
            )
        return value

    def number(self, owner: dict[str, Any], where: str) -> Any:
        value = owner.get(where.rpartition(".")[2])
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise CheckpointError(f"{self.path}: {where} is {value!r}, expected a number above 0")
        return value

    def only(self, owner: dict[str, Any], where: str, known: str, *, name: str = "default") -> None:
        """Refuse another implementation, and what is set and not known: it may compute other."""
        if owner.get("name", "default") != name:
            raise self.refused(f"{where}.name", owner.get("name"), name)
        self.nothing_else(owner, where, f"name {known}")

    def nothing_else(self, owner: dict[str, Any], where: str, known: str) -> None:
        for key, value in owner.items():
            neutral = key in _NOT_COMPUTED or not value or (key.endswith("_factor") and value == 1)
            if key not in known.split() and not neutral:
                raise self.refused(f"{where}.{key}", value, "nothing there")

    def refused(self, where: str, found: Any, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {where} is {found!r:.80}, expected {expected}: only OLMo-2 models are "
            "read from OLMo-core checkpoints; convert this one to Hugging Face safetensors"
        )
