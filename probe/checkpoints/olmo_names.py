"""Hugging Face names of OLMo's own parameters, three and two of which it keeps fused (torch-free).

`att_proj` holds the rows of query, key and value, in this order; `ff_proj` those of `up_proj` and
then `gate_proj`. OLMo-1 and OLMo-2 name alike; OLMo-1 has no learned norms.
"""

import re
from collections.abc import Iterable

from probe.errors import CheckpointError

_OUTER = {
    "model.embed_tokens.weight": "wte.weight",
    "model.norm.weight": "ln_f.weight",
    "lm_head.weight": "ff_out.weight",
}
_INNER = {
    "self_attn.o_proj": "attn_out",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    "mlp.down_proj": "ff_out",
    "post_attention_layernorm": "attn_norm",
    "post_feedforward_layernorm": "ff_norm",
}
_FUSED = {
    "att_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "ff_proj": ("mlp.up_proj", "mlp.gate_proj"),
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.weight")
_ROOT = re.compile(r"(?:^|.*\.)transformer\.(?=\w)")  # `module.` of DDP may stand before it


def bare_name(stored: str) -> str:
    """A stored name without `transformer.` and what wraps it."""
    return _ROOT.sub("", stored, count=1)


def olmo_name(name: str) -> tuple[str, int]:
    """Where a Hugging Face parameter is stored.

    Returns:
        OLMo's bare name, and which part of that tensor it is: 0 where it is not fused.

    Raises:
        CheckpointError: An OLMo model has no such parameter.
    """
    if name in _OUTER:
        return _OUTER[name], 0
    match = _LAYER.fullmatch(name)
    if match is not None and match[2] in _INNER:
        return f"blocks.{match[1]}.{_INNER[match[2]]}.weight", 0
    for fused, parts in _FUSED.items():
        if match is not None and match[2] in parts:
            return f"blocks.{match[1]}.{fused}.weight", parts.index(match[2])
    raise CheckpointError(f"{name!r} is no parameter of an OLMo model")


def hugging_face_names(stored: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Hugging Face name -> (stored, part) for stored bare names; what is unknown keeps its name."""
    outer = {theirs: ours for ours, theirs in _OUTER.items()}
    inner = {theirs: ours for ours, theirs in _INNER.items()}
    names = {}
    for key in stored:
        match = _BLOCK.fullmatch(key)
        if key in outer:
            names[outer[key]] = (key, 0)
        elif match is not None and match[2] in inner:
            names[f"model.layers.{match[1]}.{inner[match[2]]}.weight"] = (key, 0)
        elif match is not None and match[2] in _FUSED:
            for part, ours in enumerate(_FUSED[match[2]]):
                names[f"model.layers.{match[1]}.{ours}.weight"] = (key, part)
        else:
            names[key] = (key, 0)
    return names


def part_of(
    stored: str, part: int, shape: tuple[int, ...], where: str
) -> tuple[int, tuple[int, ...]]:
    """Where a part begins in a flattened stored tensor, and the part's shape.

    Args:
        stored: Bare name.
        part: From `olmo_name`.
        shape: Of the stored tensor. Query has as many rows as columns; key and value share
            the rest, `up_proj` and `gate_proj` have half each.
        where: File and key, for messages.

    Raises:
        CheckpointError: The rows cannot be shared out so.
    """
    match = _BLOCK.fullmatch(stored)
    if match is None or match[2] not in _FUSED:
        return 0, shape
    rows, columns = shape if len(shape) == 2 else (0, 0)
    first = columns if match[2] == "att_proj" else rows // 2
    others = len(_FUSED[match[2]]) - 1
    each = (rows - first) // others
    halves = match[2] == "att_proj" or first == each
    if each <= 0 or first + others * each != rows or not halves:
        raise CheckpointError(
            f"{where}: {stored!r} has shape {list(shape)}, expected the rows of "
            f"{', '.join(_FUSED[match[2]])}"
        )
    start = 0 if part == 0 else first + (part - 1) * each
    return start * columns, (first if part == 0 else each, columns)
