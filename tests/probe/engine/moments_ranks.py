"""Two ranks of which one alone has moments; each prints what it chose: STORE RANK."""

import os
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist

from probe.errors import CheckpointError
from probe.moments import choose_moments
from probe.spec import AdamW


class Source:
    """A source whose download failed on rank 1."""

    def __init__(self, rank: int) -> None:
        self.has_moments = rank == 0
        self.moments_origin = "https://x/optim.safetensors" if rank == 0 else None
        self.moments_failure = None if rank == 0 else CheckpointError("no answer")

    def hyper(self, name: str) -> dict[str, float]:
        return {"step": 1}


def main() -> None:
    store, rank = sys.argv[1], int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    shards = [SimpleNamespace(name="w", base=torch.zeros(2))]
    found = choose_moments(AdamW(), Source(rank), shards, label="here")
    refused = ""
    try:
        choose_moments(AdamW(moments="checkpoint"), Source(rank), shards, label="here")
    except CheckpointError as error:
        refused = type(error).__name__
    sys.stdout.write(f"rank {rank}: {found.source} {refused}: {found.detail}\n")
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
