"""One rank of a sharded training grid: `python mix_train_ranks.py SPEC UNIT RANK WORLD_SIZE`."""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from probe.mix_train import MixTrainSession
from probe.result import Unit
from probe.spec_train import MixTrainSpec


def main(spec: Path, unit: str, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{spec}.store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    session = MixTrainSession(MixTrainSpec.model_validate_json(spec.read_text()))
    first = session.measure(Unit.model_validate_json(unit))
    shards = session.workbench._resident[0].shards  # type: ignore[index]
    assert all(torch.equal(s.live, s.base.to(s.live.dtype)) for s in shards)
    again = session.measure(Unit.model_validate_json(unit))
    assert again.tasks == first.tasks
    spec.with_name(f"result-{rank}.json").write_text(first.model_dump_json())
    dist.barrier()
    os._exit(0)  # gloo's threads can abort the process while Python shuts down


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
