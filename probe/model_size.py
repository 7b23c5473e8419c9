"""How large a checkpoint's model is, from file headers or because it is known (torch-free)."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from probe.result import CheckpointRef

_LAYER = re.compile(r"^.*?\.\d+(?=\.)")  # up to the first number: model.layers.3
_EMBEDDING = re.compile(r"embed|wte|wpe")
_NOT_WEIGHTS = (".exp_avg", ".exp_avg_sq", ".step")


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Counts of elements."""

    num_parameters: int
    largest_group: int  # of the embedding, a layer, or norm with output layer: gathered at once


# Of the runs in probe.known_models. The largest group is norm with output layer in all of them.
KNOWN_SIZES = {
    "allenai/OLMo-2-0425-1B": ModelSize(1_484_916_736, 205_522_944),
    "allenai/OLMo-2-1124-7B": ModelSize(7_298_617_344, 411_045_888),
    "allenai/OLMo-2-1124-13B": ModelSize(13_716_198_400, 513_807_360),
    "allenai/OLMo-2-0325-32B": ModelSize(32_234_279_936, 513_807_360),
}


def model_size(checkpoint: CheckpointRef) -> ModelSize | None:
    """Size of a local directory's model, or of a known hub repository's; None where nothing tells.

    Cost: one small read per file.
    """
    if checkpoint.source == "hub":
        return KNOWN_SIZES.get(checkpoint.location)
    if checkpoint.source != "local":
        return None
    shapes: dict[str, list[int]] = {}
    for file in sorted(Path(checkpoint.location).glob("*.safetensors")):
        shapes |= _header_shapes(file)
    counts = {n: math.prod(s) for n, s in shapes.items() if not n.endswith(_NOT_WEIGHTS)}
    if not counts:
        return None
    return ModelSize(sum(counts.values()), max(_groups(counts).values()))


def _groups(counts: dict[str, int]) -> dict[str, int]:
    """Elements per group of layers, as the FSDP2 back-end gathers them."""
    groups: dict[str, int] = {}
    layers = {name: found.group() for name in counts if (found := _LAYER.match(name))}
    # Without an output layer of its own the embedding is both, and one group with the norm.
    untied = any("head" in name for name in counts if name not in layers)
    for name, count in counts.items():
        group = layers.get(name, "last")
        if group == "last" and untied and _EMBEDDING.search(name):
            group = "embedding"
        groups[group] = groups.get(group, 0) + count
    return groups


def _header_shapes(file: Path) -> dict[str, list[int]]:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > file.stat().st_size:  # a truncated or foreign file: its unit reports it
            return {}
        try:
            header = json.loads(stream.read(size))
        except ValueError:
            return {}
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
