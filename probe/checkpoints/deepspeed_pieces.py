"""Where every parameter lies in the flat partitions of a DeepSpeed ZeRO checkpoint."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from probe.checkpoints.betas import AMSGRAD
from probe.errors import CheckpointError

MAXIMUM = "max_exp_avg_sq"  # AMSGrad's, which is not read


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of a parameter's elements inside one rank's flat partition of one group."""

    rank: int
    group: int
    start: int
    num_elements: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """One rank's share of one group."""

    path: Path
    flat: Mapping[str, torch.Tensor]  # weight and, where saved, the moments -> (num_elements,)
    step: int | None
    is_amsgrad: bool

    def check_moments(self) -> None:
        """Before they are read.

        Raises:
            CheckpointError: They are those of AMSGrad.
        """
        if self.is_amsgrad:
            raise CheckpointError(f"{self.path}: found {MAXIMUM!r}. {AMSGRAD}")


def even_pieces(
    groups: list[dict[str, tuple[int, ...]]], partitions: Sequence[Sequence[Partition]]
) -> dict[str, tuple[Piece, ...]]:
    """ZeRO-3: every parameter over all ranks, ceil(elements / ranks) each."""
    world = len(partitions)
    pieces = {}
    for group, shapes in enumerate(groups):
        start = 0
        for name, shape in shapes.items():
            size = math.prod(shape)
            each = -(-size // world)
            held = [min(each, max(0, size - rank * each)) for rank in range(world)]
            pieces[name] = tuple(Piece(r, group, start, n) for r, n in enumerate(held))
            start += each
        for rank in partitions:
            for kind, flat in rank[group].flat.items():
                if flat.numel() != start:
                    raise CheckpointError(
                        f"{rank[group].path}: {kind} of group {group} has {flat.numel()} elements, "
                        f"expected {start}: {len(shapes)} parameters over {world} ranks"
                    )
    return pieces


def mapped_pieces(
    groups: list[dict[str, tuple[int, ...]]],
    opened: list[dict[str, Any]],
    partitions: Sequence[Sequence[Partition]],
) -> dict[str, tuple[Piece, ...]]:
    """ZeRO-1 and 2: as `param_slice_mappings` of every rank says."""
    pieces: dict[str, list[Piece]] = {name: [] for group in groups for name in group}
    for rank, optimizer in enumerate(opened):
        for group, mapping in enumerate(optimizer["param_slice_mappings"]):
            partition = partitions[rank][group]
            for name, address in mapping.items():
                if name not in groups[group]:
                    raise CheckpointError(
                        f"{partition.path}: param_slice_mappings names {name!r} in group {group}, "
                        "param_shapes does not; files of two runs"
                    )
                start, size = vars(address).get("start"), vars(address).get("numel")
                pieces[name].append(_piece(partition, rank, group, name, start, size))
    for shapes in groups:
        for name, shape in shapes.items():
            found, expected = sum(p.num_elements for p in pieces[name]), math.prod(shape)
            if found != expected:
                raise CheckpointError(
                    f"{partitions[0][0].path.parent}: the ranks hold {found} elements of {name!r}, "
                    f"expected {expected}: {list(shape)}; files of two runs"
                )
    return {name: tuple(parts) for name, parts in pieces.items()}


def _piece(partition: Partition, rank: int, group: int, name: str, start: Any, size: Any) -> Piece:
    if type(start) is not int or type(size) is not int or start < 0 or size < 0:
        raise CheckpointError(f"{partition.path}: {name!r} lies at {start!r} + {size!r}")
    for kind, flat in partition.flat.items():
        if start + size > flat.numel():
            raise CheckpointError(
                f"{partition.path}: {kind} of group {group} has {flat.numel()} elements, expected "
                f"{start + size} up to the end of {name!r}"
            )
    return Piece(rank, group, start, size)
