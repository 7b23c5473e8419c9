"""Which format a local checkpoint directory is in, and what a listing says of it (torch-free).

The order matters: OLMo-core's directories hold DCP, a Trainer's hold safetensors, and DeepSpeed's
states may lie in either. A new format is one line in `_FORMATS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from probe.checkpoints.dcp_index import dcp_parts, read_dcp_index
from probe.checkpoints.dcp_keys import moment_keys
from probe.checkpoints.deepspeed_files import find_deepspeed_files, is_deepspeed
from probe.checkpoints.layout import check_archive, looks_like_huggingface, read_layout
from probe.checkpoints.olmo_files import (
    find_olmo_files,
    has_moments,
    is_olmo_unsharded,
    read_olmo_header,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What headers say of one checkpoint."""

    format: str
    has_moments: bool
    size_bytes: int
    step: int | None = None  # where a file says it, and the directory's name may not


@dataclass(frozen=True, slots=True)
class Format:
    """One format of local directories."""

    matches: Callable[[Path], bool]
    describe: Callable[[Path], Found]  # raises CheckpointError for a broken one
    opener: str  # module with open_source(ref)


def looks_like_checkpoint(directory: Path) -> bool:
    """Whether a directory claims to be a checkpoint of any format, finished or not."""
    return directory.is_dir() and (
        looks_like_huggingface(directory)
        or is_deepspeed(directory)
        or is_olmo_unsharded(directory)
        or _is_olmo_core(directory)
        or bool(dcp_parts(directory))
        or _unfinished(directory)
    )


def format_of(directory: Path) -> Format:
    """The format of a directory; Hugging Face where no other fits, whose reader says what lacks."""
    return next(each for each in _FORMATS if each.matches(directory))


def _huggingface(directory: Path) -> Found:
    layout = read_layout(directory)
    return Found(format=layout.format, has_moments=layout.has_moments, size_bytes=layout.size_bytes)


def _deepspeed(directory: Path) -> Found:
    files = find_deepspeed_files(directory)
    # Every ZeRO optimizer of DeepSpeed's keeps moments; which ones is in pickles, not opened here.
    return Found(format="deepspeed", has_moments=True, size_bytes=files.size_bytes, step=files.step)


def _is_trainer(directory: Path) -> bool:
    pickled = (directory / "optimizer.pt").is_file()
    described = (directory / "trainer_state.json").is_file()
    weights = any(directory.glob("model*.safetensors"))
    return pickled and described and weights and not any(directory.glob("optimizer*.safetensors"))


def _trainer(directory: Path) -> Found:
    layout, optimizer = read_layout(directory), directory / "optimizer.pt"
    check_archive(optimizer)
    size = layout.size_bytes + optimizer.stat().st_size
    return Found(format="trainer", has_moments=True, size_bytes=size)


def _is_olmo_core(directory: Path) -> bool:
    return (directory / "model_and_optim").is_dir()


def _olmo_core(directory: Path) -> Found:
    part = directory / "model_and_optim"
    index = read_dcp_index(directory, dcp_parts(part)[:1])
    moments = bool(moment_keys(index))
    return Found(format="olmo-core", has_moments=moments, size_bytes=index.size_bytes)


def _olmo_unsharded(directory: Path) -> Found:
    files = find_olmo_files(directory)
    moments = files.optimizer is not None and has_moments(files.optimizer)
    size = files.size_bytes
    if files.model is None:  # Hugging Face weights, whose reader says what lacks
        size += read_layout(directory).size_bytes
    elif files.model.suffix == ".pt":
        check_archive(files.model)
    else:
        read_olmo_header(files.model)
    return Found(format="olmo-unsharded", has_moments=moments, size_bytes=size)


def _is_dcp(directory: Path) -> bool:
    holds_weights = any(directory.glob("model*.safetensors"))
    return not holds_weights and (bool(dcp_parts(directory)) or _unfinished(directory))


def _is_dcp_beside(directory: Path) -> bool:
    return any(directory.glob("model*.safetensors")) and bool(dcp_parts(directory))


def _dcp_beside(directory: Path) -> Found:
    layout, index = read_layout(directory), read_dcp_index(directory, dcp_parts(directory))
    size = layout.size_bytes + index.size_bytes
    moments = bool(moment_keys(index))
    return Found(format="safetensors+dcp", has_moments=moments, size_bytes=size)


def _dcp(directory: Path) -> Found:
    index = read_dcp_index(directory, dcp_parts(directory))
    return Found(format="dcp", has_moments=bool(moment_keys(index)), size_bytes=index.size_bytes)


def _unfinished(directory: Path) -> bool:
    """DCP writes `.metadata` last: data files without it are a save that was cut off."""
    return any(directory.glob("*.distcp")) or any(directory.glob("*/*.distcp"))


_FORMATS = (
    Format(is_deepspeed, _deepspeed, "probe.checkpoints.deepspeed"),
    Format(is_olmo_unsharded, _olmo_unsharded, "probe.checkpoints.olmo_unsharded"),
    Format(_is_trainer, _trainer, "probe.checkpoints.trainer"),
    Format(_is_olmo_core, _olmo_core, "probe.checkpoints.olmo_core"),
    Format(_is_dcp, _dcp, "probe.checkpoints.dcp"),
    Format(_is_dcp_beside, _dcp_beside, "probe.checkpoints.dcp_beside"),
    Format(lambda _: True, _huggingface, "probe.checkpoints.huggingface"),
)
