"""An OLMo-core checkpoint `stepN/` as a `Source`, read without olmo_core.

`model_and_optim/` is torch DCP under OLMo-core's own parameter names; `config.json` is the run's,
from which the Olmo2Config is made. No tensor is permuted or merged: names alone differ.

SkipStepAdamW of OLMo-core 2 never counted its steps: `step` is stored as 0 however long the run.
Its update raises the betas to the power step + 1, so 0 means exponent 1, and that is what a
source's `step` of 0 gives the engine.
"""

import re
from pathlib import Path

from transformers import Olmo2Config, PretrainedConfig

from probe.checkpoints.assemble import read_model_config
from probe.checkpoints.dcp import DcpSource
from probe.checkpoints.dcp_index import dcp_parts, read_dcp_index
from probe.checkpoints.layout import read_json_object
from probe.checkpoints.olmo_config import is_run_config, olmo2_fields, tokenizer_in
from probe.errors import CheckpointError
from probe.result import CheckpointRef

PART = "model_and_optim"
_OUTER = {
    "model.embed_tokens.weight": "embeddings.weight",
    "model.norm.weight": "lm_head.norm.weight",
    "lm_head.weight": "lm_head.w_out.weight",
}
_INNER = {
    "self_attn.q_proj": "attention.w_q",
    "self_attn.k_proj": "attention.w_k",
    "self_attn.v_proj": "attention.w_v",
    "self_attn.o_proj": "attention.w_out",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "post_attention_layernorm": "attention_norm",
    "post_feedforward_layernorm": "feed_forward_norm",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")


def open_source(ref: CheckpointRef) -> DcpSource:
    """The directory `ref.location`; see `probe.checkpoints.open_checkpoint`."""
    directory = Path(ref.location).expanduser()
    path = _config_path(ref, directory)
    return DcpSource(
        ref,
        read_dcp_index(directory, dcp_parts(directory / PART)[:1]),
        lambda: _config(path, directory),
        stored_name=olmo_core_name,
        tokenizer_hint=_tokenizer_hint(path),
        format_name="olmo-core",
    )


def olmo_core_name(name: str) -> str:
    """OLMo-core's name of an Olmo2ForCausalLM parameter.

    Raises:
        CheckpointError: An OLMo-2 model has no such parameter.
    """
    if name in _OUTER:
        return _OUTER[name]
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in _INNER:
        raise CheckpointError(f"{name!r} is no parameter of an OLMo-2 model")
    return f"blocks.{match[1]}.{_INNER[match[2]]}.weight"


def _config_path(ref: CheckpointRef, directory: Path) -> Path | None:
    own = directory / "config.json"
    if own.is_file():
        return own
    if ref.config is None:
        return None
    named = Path(ref.config).expanduser()
    return named / "config.json" if named.is_dir() else named


def _config(path: Path | None, directory: Path) -> PretrainedConfig:
    if path is None:
        raise CheckpointError(
            f"{directory}: no config.json; set checkpoints.config to that of the OLMo-core run, or "
            "to the model's Hugging Face config.json"
        )
    content = read_json_object(path)
    if is_run_config(content):
        return Olmo2Config(**olmo2_fields(content, path))
    config = read_model_config(path)
    if not isinstance(config, Olmo2Config):
        raise CheckpointError(f"{path}: model_type is {config.model_type!r}, expected olmo2")
    return config


def _tokenizer_hint(path: Path | None) -> str:
    name = None if path is None or not path.is_file() else tokenizer_in(read_json_object(path))
    return "" if name is None else f"; the run's config.json names {name}"
