"""The flat partitions of a DeepSpeed ZeRO checkpoint, and where each parameter lies in them.

Every rank saves its part of the fp32 master weights and of both moments as one flat tensor per
group. Under ZeRO-1 and 2 (and BF16_Optimizer) `param_slice_mappings` says which rank holds which
part of a parameter. Under ZeRO-3 every parameter is cut evenly over the ranks, the last part
padded, in the order of `param_shapes`, one group of it per sub-group.

The files are opened with `weights_only` and an allow-list: the few classes of DeepSpeed's they name
become empty records, so that deepspeed is not imported and nothing in a file runs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from probe.checkpoints.betas import Betas, betas_of
from probe.checkpoints.deepspeed_files import DeepSpeedFiles
from probe.checkpoints.deepspeed_pieces import (
    MAXIMUM,
    Partition,
    Piece,
    even_pieces,
    mapped_pieces,
)
from probe.checkpoints.layout import HOW_TO_CONVERT
from probe.checkpoints.report import first_line
from probe.errors import CheckpointError

_MOMENTS = ("exp_avg", "exp_avg_sq")
_ONE_ALONE = {  # key of model_states.pt -> what is not read where it is above 1
    "mp_world_size": "tensor parallelism",
    "pp_degree": "pipeline parallelism",
    "tp_degree": "tensor parallelism",
}


class _Record:
    """Stands in for a class of DeepSpeed's; keeps the pickled fields, does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args


_RECORDS = [
    (type(name.rpartition(".")[2], (_Record,), {}), name)
    for name in (
        "deepspeed.utils.tensor_fragment.fragment_address",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    )
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroState:
    """All partitions of a checkpoint, mapped from the files, and the way into them."""

    partitions: Sequence[Sequence[Partition]]  # [rank][group]
    shapes: Mapping[str, tuple[int, ...]]  # name as saved -> shape
    pieces: Mapping[str, tuple[Piece, ...]]  # name as saved -> its elements in order
    buffers: Mapping[str, torch.Tensor]  # name as saved -> what every rank holds whole
    shared: Mapping[str, str]  # name that is not stored -> the one it shares its values with
    has_moments: bool
    betas: Betas | None  # of the first rank's groups, where they say and agree

    def read(self, name: str, kind: str, lo: int = 0, hi: int | None = None) -> torch.Tensor:
        """Elements lo..hi of one parameter, flattened: (hi - lo,) as stored, fresh.

        Raises:
            CheckpointError: No such tensor, the range does not fit, or these are moments of
                AMSGrad.

        Cost: reads these elements of the files and no others.
        """
        size = math.prod(self.shapes[name])
        end = size if hi is None else hi
        first = self._partition(self.pieces[name][0])
        if kind in _MOMENTS:
            first.check_moments()
        if kind not in first.flat:
            raise CheckpointError(
                f"{first.path}: no {kind} for {name!r}; found {', '.join(first.flat)}. Use "
                "moments: warmup, or a checkpoint of Adam or AdamW"
            )
        if not 0 <= lo <= end <= size:
            raise CheckpointError(
                f"{first.path}: {name}.{kind} has {size} elements, asked for {lo}..{end}"
            )
        parts, at = [], 0
        for piece in self.pieces[name]:
            top, bottom = max(lo, at), min(end, at + piece.num_elements)
            if top < bottom:
                flat = self._partition(piece).flat[kind]
                parts.append(flat[piece.start + top - at : piece.start + bottom - at])
            at += piece.num_elements
        return torch.cat(parts) if parts else first.flat[kind][:0].clone()

    def step(self, name: str) -> int | None:
        """How many updates made the moments of one parameter; None where none are stored.

        Raises:
            CheckpointError: They are those of AMSGrad.
        """
        first = self._partition(self.pieces[name][0])
        first.check_moments()
        return first.step

    def _partition(self, piece: Piece) -> Partition:
        return self.partitions[piece.rank][piece.group]


def read_zero_state(files: DeepSpeedFiles) -> ZeroState:
    """Open every file of a checkpoint and fit the parts together, each one checked.

    Raises:
        CheckpointError: A file is corrupt, would run code or is of another run; the ranks differ in
            number or step; the parts do not make up the parameters; or the run froze parameters
            or used tensor, pipeline or expert parallelism, which is not read.

    Cost: unpickles the structure; tensors stay on disk until they are read.
    """
    models = [load_states(path) for path in files.model_states]
    opened = [_optimizer(path) for path in files.optimizer_states]
    try:
        return _fitted(files, models, opened)
    except (AttributeError, TypeError, LookupError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{files.tag}: malformed states: {error or type(error).__name__}; expected those of "
            "DeepSpeed 0.7 or newer"
        ) from error


def _fitted(
    files: DeepSpeedFiles, models: list[dict[str, Any]], opened: list[dict[str, Any]]
) -> ZeroState:
    for path, model in zip(files.model_states, models, strict=True):
        _check_model(path, model, files)
    for path, optimizer in zip(files.optimizer_states, opened, strict=True):
        _check_world(path, optimizer, len(opened))
    partitions = [
        _partitions(path, optimizer)
        for path, optimizer in zip(files.optimizer_states, opened, strict=True)
    ]
    for rank in partitions[1:]:
        if len(rank) != len(partitions[0]):
            raise CheckpointError(
                f"{rank[0].path}: found {len(rank)} groups, expected {len(partitions[0])} as in "
                f"{partitions[0][0].path.name}; files of two runs"
            )
    _check_steps(partitions, files.model_states[0], models[0])
    groups = _shapes(files.model_states[0], models[0], len(partitions[0]))
    if "fp32_flat_groups" in opened[0]:
        pieces = even_pieces(groups, partitions)
    else:
        pieces = mapped_pieces(groups, opened, partitions)
    shared = models[0].get("shared_params") or {}
    return ZeroState(
        partitions=partitions,
        shapes={name: shape for group in groups for name, shape in group.items()},
        pieces=pieces,
        buffers=_buffers(files.model_states[0], models[0]),
        shared={str(name): str(other) for name, other in shared.items()},
        has_moments=_has_moments(partitions, files.tag),
        betas=betas_of(_base(opened[0]).get("param_groups")),
    )


def _buffers(path: Path, model: dict[str, Any]) -> dict[str, torch.Tensor]:
    module = model.get("module") or {}
    buffers = {str(name): module[name] for name in model.get("buffer_names") or ()}
    for name, tensor in buffers.items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{path}: buffer {name!r} is no tensor")
    return buffers


def _has_moments(partitions: Sequence[Sequence[Partition]], tag: Path) -> bool:
    """Whether every partition has both of Adam's moments; False where none has the second."""
    everywhere = sum(len(rank) for rank in partitions)
    counts = {kind: sum(kind in p.flat for rank in partitions for p in rank) for kind in _MOMENTS}
    if counts["exp_avg_sq"] and set(counts.values()) != {everywhere}:
        raise CheckpointError(
            f"{tag}: found {counts} partitions with moments, expected all {everywhere} or none; "
            "the optimizer state is incomplete"
        )
    return counts["exp_avg_sq"] > 0


def load_states(path: Path) -> dict[str, Any]:
    """What one file holds, tensors mapped from disk.

    Raises:
        CheckpointError: It is broken or names anything beyond the allow-list.
    """
    try:
        with torch.serialization.safe_globals(_RECORDS):  # type: ignore[arg-type]
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except Exception as error:  # zip, pickle and torch errors alike
        raise CheckpointError(
            f"{path}: cannot be read: {first_line(error)}. {HOW_TO_CONVERT}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dict of states, found {type(content).__name__}")
    return content


def _optimizer(path: Path) -> dict[str, Any]:
    state = load_states(path).get("optimizer_state_dict")
    if not isinstance(state, dict) or not {"fp32_flat_groups", "param_slice_mappings"} & set(state):
        found = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(
            f"{path}: optimizer_state_dict holds {found or 'nothing'}, expected fp32_flat_groups "
            "(ZeRO-3) or param_slice_mappings (ZeRO-1 and 2), as DeepSpeed saves since 0.7"
        )
    return state


def _check_model(path: Path, model: dict[str, Any], files: DeepSpeedFiles) -> None:
    sizes = model | (model.get("checkpoint_parallel_dimensions") or {})
    for key, what in _ONE_ALONE.items():
        if sizes.get(key, 1) not in (None, 1):
            raise CheckpointError(f"{path}: {key} is {sizes[key]}: {what} is not read")
    frozen = model.get("frozen_param_shapes")
    if frozen:
        raise CheckpointError(
            f"{path}: {len(frozen)} frozen parameters, the first is {next(iter(frozen))!r}; only "
            "runs that train every parameter are read"
        )
    found, world = model.get("dp_world_size"), len(files.optimizer_states)
    if found not in (None, world):
        raise CheckpointError(
            f"{path}: dp_world_size is {found}, found {world} optim_states.pt; files of two runs"
        )
    step = model.get("global_steps")
    if files.step not in (None, step):
        raise CheckpointError(
            f"{path}: global_steps is {step}, expected {files.step} in {files.tag.name}"
        )


def _check_world(path: Path, optimizer: dict[str, Any], world: int) -> None:
    count = optimizer.get("partition_count")
    counts = count if isinstance(count, list) else [count]
    if any(found != world for found in counts):
        raise CheckpointError(
            f"{path}: partition_count is {count}, found {world} optim_states.pt in "
            f"{path.parent}; files of two runs, or of mixture of experts"
        )


def _partitions(path: Path, optimizer: dict[str, Any]) -> list[Partition]:
    """One rank's share of every group."""
    flats = optimizer.get("fp32_flat_groups", optimizer.get("single_partition_of_fp32_groups"))
    base = _base(optimizer)
    if not isinstance(flats, list | tuple) or not isinstance(base, dict):
        raise CheckpointError(
            f"{path}: found fp32 partitions as {type(flats).__name__} and the optimizer's state as "
            f"{type(base).__name__}, expected a list and a dict; set elastic_checkpoint: false"
        )
    common = [group["step"] for group in base.get("param_groups", ()) if "step" in group]
    partitions = []
    for group, flat in enumerate(flats):
        state = base.get("state", {}).get(group, {})
        tensors = {"weight": flat} | {kind: state[kind] for kind in _MOMENTS if kind in state}
        for kind, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor) or tensor.ndim != 1:
                raise CheckpointError(f"{path}: {kind} of group {group} is no flat tensor")
        step = state.get("step", common[0] if common else None)
        partitions.append(
            Partition(
                path=path,
                flat=tensors,
                step=_whole(path, group, step),
                is_amsgrad=MAXIMUM in state,
            )
        )
    if not partitions:
        raise CheckpointError(f"{path}: no fp32 partitions")
    return partitions


def _base(optimizer: dict[str, Any]) -> Any:
    """State of the torch optimizer inside, as ZeRO-3 and as ZeRO-1 and 2 name it."""
    return optimizer.get("optimizer_state_dict", optimizer.get("base_optimizer_state"))


def _whole(path: Path, group: int, step: Any) -> int | None:
    if step is None:
        return None
    value = torch.as_tensor(step)
    if value.numel() != 1 or float(value) != int(value) or int(value) < 0:
        raise CheckpointError(
            f"{path}: step of group {group} is {step!r:.80}, expected a whole number >= 0"
        )
    return int(value)


def _check_steps(
    partitions: Sequence[Sequence[Partition]], model_path: Path, model: dict[str, Any]
) -> None:
    stated = model.get("global_steps")
    for rank in partitions:
        for group, (partition, first) in enumerate(zip(rank, partitions[0], strict=True)):
            if partition.step != first.step:
                raise CheckpointError(
                    f"{partition.path}: group {group} is of step {partition.step}, expected "
                    f"{first.step} as in {first.path.name}; files of two steps"
                )
            if isinstance(stated, int) and (partition.step or 0) > stated:
                raise CheckpointError(  # fewer is fine: skipped on overflow
                    f"{partition.path}: group {group} is of step {partition.step}, "
                    f"{model_path.name} says {stated}; files of two steps"
                )


def _shapes(path: Path, model: dict[str, Any], num_groups: int) -> list[dict[str, tuple[int, ...]]]:
    """Of every group: name -> shape, in the order of the partitions."""
    groups = model.get("param_shapes")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise CheckpointError(f"{path}: no param_shapes; save with DeepSpeed 0.7 or newer")
    if len(groups) != num_groups:
        raise CheckpointError(
            f"{path}: param_shapes has {len(groups)} groups, the partitions have {num_groups}; "
            "files of two runs"
        )
    shapes = [{str(n): tuple(map(int, shape)) for n, shape in g.items()} for g in groups]
    names = [name for group in shapes for name in group]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"{path}: param_shapes names {twice!r} twice")
    return shapes
