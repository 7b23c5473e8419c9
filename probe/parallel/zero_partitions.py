"""Where DeepSpeed ZeRO keeps this rank's masters, gradients and half-precision weights.

Each inner parameter group (ZeRO-1 and 2, BF16_Optimizer) or sub-group (ZeRO-3) is one flat fp32
master, of which a parameter owns a range. The ranges are worked out from the order and the sizes
of the parameters, not from DeepSpeed's links between them: with several groups it links only the
first (`safe_get_full_optimizer_state` then finds no exp_avg).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from probe.errors import ParallelismError


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements lo to hi of a flattened parameter, at `start` of this rank's partition."""

    parameter: nn.Parameter
    lo: int
    hi: int
    start: int


@dataclass(frozen=True, slots=True, eq=False)
class Partition:
    """One flat tensor that the inner optimizer steps."""

    master: Tensor  # key of the inner optimizer's state
    live: Tensor  # (as long as master,) what the forward pass reads or gathers from
    group: int  # index of the inner optimizer's parameter group
    pieces: Sequence[Piece]  # one for every parameter of the group, empty ones too
    grads: Sequence[Tensor] | None  # end to end over the partition; None: no gradient is ready


def partitions_of(zero: Any) -> list[Partition]:
    """This rank's partitions, by the class of DeepSpeed's optimizer.

    Raises:
        ParallelismError: The optimizer keeps its parts elsewhere than DeepSpeed 0.19 does.
    """
    kinds = {
        "DeepSpeedZeroOptimizer": _stage_1_and_2,
        "DeepSpeedZeroOptimizer_Stage3": _stage_3,
        "BF16_Optimizer": _bf16,
    }
    try:
        found = list(kinds[type(zero).__name__](zero))
    except AttributeError as error:
        raise ParallelismError(
            f"this DeepSpeed keeps {type(zero).__name__}'s parts elsewhere ({error}). Use "
            "deepspeed 0.19."
        ) from error
    for partition in found:
        _check(partition)
    return found


def _stage_1_and_2(zero: Any) -> Iterator[Partition]:
    for index, parameters in enumerate(zero.round_robin_bit16_groups):
        rank = dist.get_rank(zero.real_dp_process_group[index])
        size = int(zero.partition_size[index])
        offsets = zero.round_robin_bit16_offsets[index]
        yield Partition(
            master=zero.single_partition_of_fp32_groups[index],
            live=zero.parallel_partitioned_bit16_groups[index][rank],
            group=index,
            pieces=_pieces(parameters, offsets, rank * size, size),
            grads=zero.averaged_gradients.get(index),
        )


def _bf16(zero: Any) -> Iterator[Partition]:
    for index, parameters in enumerate(zero.bf16_groups):
        rank = dist.get_rank(zero.real_dp_process_group[index])
        master = zero.fp32_groups_flat_partition[index]
        offsets = [0]
        for parameter in parameters:
            offsets.append(offsets[-1] + parameter.numel())
        ready = any(zero.fp32_groups_has_gradients[index])
        yield Partition(
            master=master,
            live=zero.bf16_partitioned_groups[index][rank],
            group=index,
            pieces=_pieces(parameters, offsets, rank * master.numel(), master.numel()),
            grads=[zero.fp32_groups_gradient_flat_partition[index]] if ready else None,
        )


def _stage_3(zero: Any) -> Iterator[Partition]:
    for index, parameters in enumerate(zero.fp16_groups):
        rank = dist.get_rank(zero.dp_process_group)
        pieces, start = [], 0
        live = zero.fp16_partitioned_groups_flat[index]
        for parameter in parameters:
            numel, each = parameter.ds_numel, parameter.ds_tensor.numel()
            lo = min(rank * each, numel)
            pieces.append(Piece(parameter, lo, min(lo + each, numel), start))
            _check_view(live, start, parameter.ds_tensor)
            start += each
        yield Partition(
            master=zero.fp32_partitioned_groups_flat[index],
            live=live,
            group=zero.sub_group_to_group_id[index],
            pieces=pieces,
            grads=zero.averaged_gradients.get(index),
        )


def _pieces(
    parameters: Sequence[nn.Parameter], offsets: Sequence[int], first: int, size: int
) -> list[Piece]:
    """Of parameters laid end to end at `offsets`, what lies in elements first to first + size."""
    found = []
    for parameter, offset in zip(parameters, offsets, strict=False):
        lo = min(max(offset, first), offset + parameter.numel())
        hi = max(min(offset + parameter.numel(), first + size), lo)
        found.append(
            Piece(parameter, lo - offset, hi - offset, max(lo - first, 0) if hi > lo else 0)
        )
    return found


def gradient_of(partition: Partition, piece: Piece) -> Tensor:
    """The piece's gradient, a flat view of DeepSpeed's own."""
    assert partition.grads is not None
    numel, position = piece.hi - piece.lo, 0
    for part in partition.grads:
        inside = piece.start - position
        if inside < part.numel() or numel == 0:
            return part.reshape(-1).narrow(0, min(inside, part.numel()), numel)
        position += part.numel()
    raise ParallelismError(f"DeepSpeed's gradients end at {position}, before {piece.start}.")


def _check(partition: Partition) -> None:
    same_size = partition.live.numel() == partition.master.numel()
    if not same_size or partition.master.dtype != torch.float32:
        raise ParallelismError(
            f"DeepSpeed's masters are {partition.master.dtype} ({partition.master.numel()}, "
            f"{partition.live.numel()} in the forward); supported are fp32 masters of the same "
            "size. Turn bf16_master_weights_and_grads and fp16_master_weights_and_grads off."
        )


def _check_view(flat: Tensor, start: int, part: Tensor) -> None:
    if part.numel() and part.data_ptr() != flat.data_ptr() + start * flat.element_size():
        raise ParallelismError(
            "a ZeRO-3 shard does not lie in its flat buffer, so a write would not be seen. "
            "Reload states that were offloaded (engine.reload_states())."
        )
