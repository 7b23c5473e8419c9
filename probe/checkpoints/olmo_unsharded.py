"""An OLMo checkpoint `stepN-unsharded/` as a `Source`, read without OLMo's code.

Files, keys and the run's config are those of `ai2-olmo`, with which OLMo-1 and OLMo-2 7B and 13B
were trained; `olmo_core` reads the later format. Query, key and value are rows of one stored
tensor, gate and up of another, in weights and moments alike, so each is a flat range of it.
Where a directory holds the optimizer's state alone, Hugging Face weights beside it are used.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Olmo2Config, OlmoConfig, PretrainedConfig

from probe.checkpoints.bare import BareSource, config_around
from probe.checkpoints.beside import MomentKind, WithMoments
from probe.checkpoints.dcp_keys import without_wrappers
from probe.checkpoints.huggingface import HuggingFaceSource, read_range
from probe.checkpoints.layout import HOW_TO_CONVERT, check_archive
from probe.checkpoints.olmo_files import (
    CONFIG,
    Path_of_keys,
    find_olmo_files,
    plain_value,
    read_olmo_header,
)
from probe.checkpoints.olmo_names import bare_name, hugging_face_names, olmo_name, part_of
from probe.checkpoints.olmo_yaml import olmo_fields, read_run, tokenizer_of
from probe.checkpoints.report import first_line
from probe.checkpoints.source import Source, TensorKind
from probe.errors import CheckpointError
from probe.result import CheckpointRef

FORMAT = "olmo-unsharded"


def _plain_dict(*_: Any) -> dict[Any, Any]:
    return {}


# OLMo's unsharding leaves a defaultdict(dict) in optim.pt, which torch would not fill.
_ALLOWED: Any = [(_plain_dict, "collections.defaultdict"), dict]


def open_source(ref: CheckpointRef) -> Source:
    """The directory `ref.location`; see `probe.checkpoints.open_checkpoint`."""
    directory = Path(ref.location).expanduser()
    files = find_olmo_files(directory)
    weights: Source
    if files.model is not None:
        weights = OlmoWeights(ref, files.model)
    elif (directory / "config.json").is_file():
        weights = HuggingFaceSource(ref, directory)
    else:
        raise CheckpointError(
            f"{directory}: no weights; expected model.safetensors or model.pt of OLMo, or "
            "config.json and Hugging Face weights"
        )
    if files.optimizer is None:
        return weights
    return WithMoments(
        weights,
        OlmoMoments(files.optimizer),
        format_name=FORMAT,
        size_bytes=files.optimizer.stat().st_size,
    )


def open_moments(directory: Path) -> "OlmoMoments":
    """The optimizer state of a directory by Hugging Face names, whatever else lies there.

    Raises:
        CheckpointError: There is none, or it is broken.

    Cost: reads the header of optim.safetensors; unpickles the structure of an optim.pt.
    """
    for name in ("optim.safetensors", "optim.pt"):
        if (directory / name).is_file():
            return OlmoMoments(directory / name)
    raise CheckpointError(f"{directory}: no optim.safetensors or optim.pt of OLMo")


@dataclass(frozen=True, slots=True)
class _Array:
    """One stored tensor."""

    where: str
    shape: tuple[int, ...]
    read: Callable[[int, int], torch.Tensor]  # a flat range of it, fresh

    def part(self, stored: str, part: int) -> tuple[int, tuple[int, ...]]:
        return part_of(stored, part, self.shape, self.where)

    def read_part(self, stored: str, part: int, lo: int, hi: int | None) -> torch.Tensor:
        start, shape = self.part(stored, part)
        size = torch.Size(shape).numel()
        end = size if hi is None else hi
        if not 0 <= lo <= end <= size:
            raise CheckpointError(f"{self.where}: has {size} elements, asked for {lo}..{end}")
        return self.read(start + lo, start + end)


@dataclass(frozen=True, slots=True)
class _Content:
    """A file: its tensors, and everything else it holds, by path of keys."""

    path: Path
    arrays: Mapping[Path_of_keys, _Array]
    values: Mapping[Path_of_keys, Callable[[], Any]]


class OlmoMoments:
    """Adam's moments in OLMo's optimizer file; implements `probe.checkpoints.beside.Moments`.

    Args:
        path: optim.safetensors or optim.pt.

    Raises:
        CheckpointError: It is broken, incomplete, or names no parameters.
    """

    def __init__(self, path: Path) -> None:
        self._content = _open(path)
        self._path = path
        self._states = self._by_name()

    @property
    def has_moments(self) -> bool:
        """Whether AdamW moments are stored; LionW of OLMo keeps one of the two."""
        return bool(self._states)

    def moment_shape(self, name: str) -> tuple[int, ...]:
        """See `Moments.moment_shape`."""
        stored, part, keys = self._find(name)
        return self._content.arrays[(*keys, "exp_avg")].part(stored, part)[1]

    def read(self, name: str, kind: MomentKind, lo: int = 0, hi: int | None = None) -> torch.Tensor:
        """See `Source.read`."""
        stored, part, keys = self._find(name)
        return self._content.arrays[(*keys, kind)].read_part(stored, part, lo, hi)

    def hyper(self, name: str) -> dict[str, float]:
        """See `Source.hyper`."""
        keys = (*self._find(name)[2], "step")
        array = self._content.arrays.get(keys)
        if array is not None and torch.Size(array.shape).numel() == 1:
            step: Any = array.read(0, 1).item()
        else:
            step = self._content.values[keys]() if keys in self._content.values else None
        if not isinstance(step, int | float) or step != int(step) or step < 0:
            raise CheckpointError(
                f"{self._path}: step of {name!r} is {step!r:.80}, expected a whole number >= 0"
            )
        return {"step": int(step)}

    def _find(self, name: str) -> tuple[str, int, Path_of_keys]:
        stored, part = olmo_name(name)
        if stored not in self._states:
            raise CheckpointError(
                f"{self._path}: no moments of {name!r}, stored as {stored!r}; found "
                f"{len(self._states)} others"
            )
        return stored, part, self._states[stored]

    def _by_name(self) -> dict[str, Path_of_keys]:
        """OLMo's bare name -> path of its state, complete and of one shape."""
        arrays = self._content.arrays
        keys = {path[:2] for path in arrays if len(path) == 3 and path[2] == "exp_avg_sq"}
        names: Mapping[str | int, str] = {}
        if any(type(number) is int for _, number in keys):
            names = self._names_by_number()
        states: dict[str, Path_of_keys] = {}
        for path in sorted(keys, key=str):
            found = {kind: arrays.get((*path, kind)) for kind in ("exp_avg", "exp_avg_sq")}
            first, second = found["exp_avg"], found["exp_avg_sq"]
            if first is None or second is None or first.shape != second.shape:
                raise CheckpointError(
                    f"{self._path}: exp_avg of {path[1]!r} has shape {first and first.shape}, "
                    f"exp_avg_sq {second and second.shape}; the optimizer state is incomplete"
                )
            stored = names.get(path[1]) if type(path[1]) is int else str(path[1])
            if stored is None:
                raise CheckpointError(f"{self._path}: param_groups does not name state {path[1]}")
            name = _bare(stored)
            if name in states:
                raise CheckpointError(f"{self._path}: {name!r} has two states, {path[1]!r} is one")
            states[name] = path
        return states

    def _names_by_number(self) -> dict[str | int, str]:
        key = ("param_groups",)
        groups = self._content.values[key]() if key in self._content.values else None
        names: dict[str | int, str] = {}
        for group in groups if isinstance(groups, list) else []:
            numbers = group.get("params") if isinstance(group, dict) else None
            named = group.get("param_names") if isinstance(group, dict) else None
            if (
                not isinstance(numbers, list)
                or not isinstance(named, list)
                or len(numbers) != len(named)
            ):
                raise CheckpointError(
                    f"{self._path}: states are numbered, but param_groups has no param_names that "
                    "fit; which number is which parameter cannot be told"
                )
            names |= dict(zip(numbers, map(str, named), strict=True))
        if not names:
            raise CheckpointError(f"{self._path}: states are numbered and param_groups is missing")
        return names


class OlmoWeights(BareSource):
    """Weights of one step, no moments; `probe.checkpoints.source.Source` says what for.

    Args:
        ref: What was asked for.
        path: model.safetensors or model.pt.

    Raises:
        CheckpointError: The file is broken or holds the same weight twice.
    """

    def __init__(self, ref: CheckpointRef, path: Path) -> None:
        content = _open(path)
        self._weights: dict[str, _Array] = {}
        for keys, array in content.arrays.items():
            name = _bare(".".join(map(str, keys)))
            if name in self._weights:
                raise CheckpointError(f"{array.where}: {name!r} is there twice")
            self._weights[name] = array
        self._names = hugging_face_names(self._weights)
        update = {"format": FORMAT, "has_moments": False, "size_bytes": path.stat().st_size}
        directory = path.parent
        super().__init__(
            ref.model_copy(update=update),
            directory,
            around=[directory],
            tokenizer_hint=_tokenizer_hint(directory / CONFIG),
        )

    @property
    def has_moments(self) -> bool:
        """No: they are in another file."""
        return False

    def read(self, name: str, kind: TensorKind, lo: int = 0, hi: int | None = None) -> torch.Tensor:
        """See `Source.read`."""
        if kind != "weight":
            raise CheckpointError(
                f"{self.directory}: no {name}.{kind}, expected optim.safetensors or optim.pt "
                "beside the model. Use moments: warmup"
            )
        if name not in self._names:
            raise CheckpointError(
                f"{self.directory}: no weight {name!r}; found {len(self._names)} others"
            )
        stored, part = self._names[name]
        return self._weights[stored].read_part(stored, part, lo, hi)

    def hyper(self, name: str) -> dict[str, float]:
        """See `Source.hyper`."""
        raise CheckpointError(f"{self.directory}: no optimizer state of {name!r}")

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Source.weight_shapes`."""
        return {
            name: self._weights[stored].part(stored, part)[1]
            for name, (stored, part) in self._names.items()
        }

    def _make_config(self) -> PretrainedConfig:
        path = self.directory / CONFIG
        if not path.is_file() and self.ref.config is not None:
            named = Path(self.ref.config).expanduser()
            path = named / CONFIG if named.is_dir() else named
        if path.suffix in (".yaml", ".yml") and path.is_file():
            kind, fields = olmo_fields(read_run(path), path)
            return Olmo2Config(**fields) if kind == "olmo2" else OlmoConfig(**fields)
        return config_around(
            self.ref, self._around, f"no {CONFIG} of the run (checkpoints.config may name one)"
        )


def _open(path: Path) -> _Content:
    """The contents of one file; tensors stay on disk."""
    if path.suffix == ".safetensors":
        tensors, pickled = read_olmo_header(path)
        arrays = {
            keys: _Array(f"{path}: key {keys}", stored.shape, partial(read_range, stored))
            for keys, stored in tensors.items()
        }
        values = {
            keys: partial(_unpickled, f"{path}: value of {keys}", partial(read_range, stored))
            for keys, stored in pickled.items()
        }
        return _Content(path, arrays, values)
    check_archive(path)
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except Exception as error:  # zip, pickle and torch errors alike
        raise CheckpointError(
            f"{path}: cannot be read: {first_line(error)}. {HOW_TO_CONVERT}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dict, found {type(content).__name__}")
    found = _Content(path, {}, {})
    _flatten(found, (), content)
    return found


def _flatten(found: _Content, keys: Path_of_keys, content: dict[Any, Any]) -> None:
    arrays: Any = found.arrays
    values: Any = found.values
    for key, value in content.items():
        inner = (*keys, key if type(key) is int else str(key))
        if isinstance(value, torch.Tensor):
            where = f"{found.path}: key {inner}"
            arrays[inner] = _Array(where, tuple(value.shape), partial(_slice, value))
        elif isinstance(value, dict):
            _flatten(found, inner, value)
        else:
            values[inner] = partial(_same, value)


def _slice(tensor: torch.Tensor, lo: int, hi: int) -> torch.Tensor:
    return tensor.detach().reshape(-1)[lo:hi].clone()


def _same(value: Any) -> Any:
    return value


def _unpickled(where: str, read: Callable[[], torch.Tensor]) -> Any:
    return plain_value(read().numpy().tobytes(), where)


def _bare(stored: str) -> str:
    return bare_name(without_wrappers(stored))


def _tokenizer_hint(path: Path) -> str:
    name = tokenizer_of(read_run(path)) if path.is_file() else None
    return "" if name is None else f"; the run's {path.name} names {name}"
