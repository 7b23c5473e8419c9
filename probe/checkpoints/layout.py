"""What a Hugging Face checkpoint directory holds, found from headers alone (torch-free).

Weights are `model.safetensors`, or the shards `model.safetensors.index.json` names. AdamW
moments are the keys `<fqn>.exp_avg`, `<fqn>.exp_avg_sq` and `<fqn>.step` of any `*.safetensors`
file in the directory; `optimizer.safetensors` by convention. Pickles are never opened.
"""

import json
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probe.checkpoints.header import StoredTensor, read_header
from probe.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MOMENT_KINDS = ("exp_avg", "exp_avg_sq", "step")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
HOW_TO_CONVERT = (
    "Pickles can run code when opened, so they are refused. Where you trust the file, load it "
    "yourself once and save it with probe.checkpoints.save_checkpoint(model, directory, "
    "optimizer=optimizer)."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The tensors of one checkpoint directory and where they lie."""

    directory: Path
    format: str  # safetensors, or safetensors-index
    weights: dict[str, StoredTensor]
    moments: dict[str, StoredTensor]  # `<fqn>.exp_avg` -> place
    size_bytes: int  # of every file that holds weights or moments
    pickles: tuple[str, ...]  # names of pickle files, never opened

    @property
    def has_moments(self) -> bool:
        """Whether AdamW moments are present for at least one parameter."""
        return bool(self.moments)


def looks_like_huggingface(directory: Path) -> bool:
    """Whether a directory claims to be a checkpoint: a config, weights, or pickles of them."""
    return directory.is_dir() and (
        (directory / "config.json").is_file()
        or any(directory.glob("*.safetensors"))
        or any(directory.glob("pytorch_model*.bin"))
    )


def read_layout(directory: Path) -> Layout:
    """Every weight and moment of a checkpoint directory, checked against the headers.

    Args:
        directory: A directory with config.json and safetensors weights.

    Returns:
        The places of all tensors.

    Raises:
        CheckpointError: No config.json, no safetensors weights (pickles are named and refused),
            both a single file and an index, a missing shard or key, a truncated file, a moment
            without its partner or of another shape than its weight.

    Cost: one header read per safetensors file.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    read_config(directory)
    weights, weight_files, format_name = _weights(directory)
    headers = {
        path: read_header(path)
        for path in sorted(directory.glob("*.safetensors"))
        if path.is_file()
    }
    for index in sorted(directory.glob("*.safetensors.index.json")):
        if index.name != INDEX:
            _indexed(index)
    moments = _moments(headers)
    weights = {key: tensor for key, tensor in weights.items() if key not in moments}
    _check_moments(moments, weights)
    files = weight_files | {tensor.file for tensor in moments.values()}
    return Layout(
        directory=directory,
        format=format_name,
        weights=weights,
        moments=moments,
        size_bytes=sum(path.stat().st_size for path in files),
        pickles=pickle_names(directory),
    )


def read_config(directory: Path) -> dict[str, Any]:
    """The directory's config.json.

    Raises:
        CheckpointError: It is missing or not a JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        names = ", ".join(sorted(entry.name for entry in directory.iterdir())[:12]) or "nothing"
        raise CheckpointError(f"{directory}: no config.json; found {names}")
    return read_json_object(path)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file whose top level is an object.

    Raises:
        CheckpointError: It cannot be read, or is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def check_archive(path: Path) -> None:
    """See that a file is a whole archive of torch.save, opening nothing in it.

    Raises:
        CheckpointError: It is truncated or another format.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path}: found {path.stat().st_size} bytes, expected a torch.save archive: {error}. "
            "It is truncated or another format"
        ) from error
    if not any(name.endswith("/data.pkl") for name in names):
        raise CheckpointError(f"{path}: a zip file without data.pkl, expected one of torch.save")


def pickle_names(directory: Path) -> tuple[str, ...]:
    """Names of the pickle files in a directory, sorted."""
    return tuple(
        sorted(entry.name for entry in directory.iterdir() if entry.suffix in PICKLE_SUFFIXES)
    )


def _weights(directory: Path) -> tuple[dict[str, StoredTensor], set[Path], str]:
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file() and index.is_file():
        raise CheckpointError(
            f"{directory}: holds both {SINGLE} and {INDEX}, two sets of weights; remove one"
        )
    if single.is_file():
        return read_header(single), {single}, "safetensors"
    if index.is_file():
        weights = _indexed(index)
        return weights, {tensor.file for tensor in weights.values()}, "safetensors-index"
    pickles = pickle_names(directory)
    if pickles:
        raise CheckpointError(
            f"{directory}: weights only as pickles ({', '.join(pickles)}), expected {SINGLE} or "
            f"{INDEX}. {HOW_TO_CONVERT}"
        )
    found = ", ".join(sorted(p.name for p in directory.glob("*.safetensors"))) or "none"
    raise CheckpointError(
        f"{directory}: no weights; expected {SINGLE} or {INDEX}, safetensors files found: {found}"
    )


def _indexed(index: Path) -> dict[str, StoredTensor]:
    """Tensors an index names; every file and key it promises must be there."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected an object `weight_map`, key -> file")
    headers: dict[str, dict[str, StoredTensor]] = {}
    tensors: dict[str, StoredTensor] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(
                f"{index}: key {key!r} points to {name!r}; expected a file name in the same "
                "directory"
            )
        if name not in headers:
            if not (index.parent / name).is_file():
                raise CheckpointError(f"{index.parent / name}: missing; {index.name} names it")
            headers[name] = read_header(index.parent / name)
        if key not in headers[name]:
            raise CheckpointError(
                f"{index.parent / name}: key {key!r} missing, {index.name} expects it there; "
                f"found {_some(headers[name])}"
            )
        tensors[key] = headers[name][key]
    return tensors


def _moments(headers: dict[Path, dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    names = {
        key.removesuffix(".exp_avg")
        for header in headers.values()
        for key in header
        if key.endswith(".exp_avg")
    }
    moments: dict[str, StoredTensor] = {}
    for header in headers.values():
        for key, tensor in header.items():
            name, _, kind = key.rpartition(".")
            if kind not in MOMENT_KINDS or (name not in names and kind == "step"):
                continue
            if key in moments:
                raise CheckpointError(
                    f"{tensor.file}: key {key!r} is also in {moments[key].file.name}; "
                    "which one is meant?"
                )
            moments[key] = tensor
    return moments


def _check_moments(moments: dict[str, StoredTensor], weights: dict[str, StoredTensor]) -> None:
    for name in {key.rpartition(".")[0] for key in moments}:
        parts = {kind: moments.get(f"{name}.{kind}") for kind in MOMENT_KINDS}
        some = next(part for part in parts.values() if part is not None)
        for kind, part in parts.items():
            if part is None:
                raise CheckpointError(
                    f"{some.file}: found {some.key!r} but no {name}.{kind}; the optimizer state "
                    "is incomplete. Save it again, or remove it and use moments: warmup"
                )
        weight = weights.get(name) or parts["exp_avg"]
        for kind in ("exp_avg", "exp_avg_sq"):
            part = parts[kind]
            if part is not None and weight is not None and part.shape != weight.shape:
                raise CheckpointError(
                    f"{part.file}: key {part.key!r} has shape {list(part.shape)}, expected "
                    f"{list(weight.shape)} as {weight.key!r} in {weight.file.name}"
                )


def _some(keys: Iterable[str], limit: int = 4) -> str:
    names = sorted(keys)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "no keys") + more
