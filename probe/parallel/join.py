"""How a process becomes one rank of several: number, device, process group, lost contact.

torchrun says which rank a process is in the environment. Torch is imported when a rank joins.
"""

import datetime as dt
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from probe.errors import ConfigError, ParallelismError
from probe.result import Backend


def rank_number() -> int:
    """This process's rank as torchrun numbers them; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many ranks torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def use_own_gpu() -> None:
    """Make the GPU of this rank the current one, where each has its own.

    Call it before anything else touches CUDA: memory would be taken on the first GPU by all.
    """
    import torch

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)


def join_ranks(backend: Backend, device: str, timeout_s: float) -> None:
    """Make the default process group of all ranks, once; nothing for a single process.

    Args:
        backend: A sharded one needs a process group even on one rank.
        device: `model.device`: auto, cpu or cuda.
        timeout_s: Longest wait in one exchange between ranks before it fails on all of them; a
            rank may read a checkpoint while the others wait.

    Raises:
        ConfigError: There are fewer GPUs than ranks of this machine.
        ParallelismError: The ranks do not find each other.
    """
    import torch
    import torch.distributed as dist

    if backend == "single" or dist.is_initialized():
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if on_gpu and num_local > torch.cuda.device_count():
        raise ConfigError(
            f"{num_local} ranks need a GPU each, this machine has {torch.cuda.device_count()}. "
            "Lower parallel.ranks, or set model.device: cpu."
        )
    backends = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    timeout = dt.timedelta(seconds=timeout_s)
    if world_size() == 1 and "MASTER_ADDR" not in os.environ:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backends, store=store, rank=0, world_size=1, timeout=timeout)
        return
    with lost_contact_explained():
        dist.init_process_group(backends, timeout=timeout)


def has_joined() -> bool:
    """Whether this process has a process group. Does not import torch."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.distributed.is_initialized())


def wait_for_all() -> None:
    """Return when every rank is here.

    Raises:
        ParallelismError: One of them failed or did not come in time.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        with lost_contact_explained():
            dist.barrier()


@contextmanager
def lost_contact_explained() -> Iterator[None]:
    """Turn an exchange between ranks that failed into an error that says so.

    Gloo raises bare RuntimeErrors, on every rank but the one that ended or hangs.

    Raises:
        ParallelismError: The body failed in such an exchange.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_contact(error):
            raise
        raise ParallelismError(
            f"rank {rank_number()} of {world_size()} lost contact with the others: "
            f"{str(error).splitlines()[0]}. The one that ended or hangs says why in its own log."
        ) from error


def _is_lost_contact(error: RuntimeError) -> bool:
    import torch.distributed as dist

    if isinstance(error, dist.DistError) or "/gloo/" in str(error):
        return True
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = "" if frame is None else str(frame.tb_frame.f_globals.get("__name__"))
    return module == "torch.distributed.distributed_c10d"
