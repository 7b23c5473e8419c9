"""One rank of a sharded session: `python session_ranks.py SPEC RANK WORLD_SIZE OUT`."""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from probe.plan import expand_units
from probe.sessions import open_session
from probe.spec_load import parse_spec


def main(specs: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{specs}.store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    results = []
    for raw in json.loads(specs.read_text()):
        spec = parse_spec(raw)
        session = open_session(spec)
        results.append(
            [session.measure(unit).model_dump(mode="json") for unit in expand_units(spec)[:2]]
        )
    specs.with_name(f"results-{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    os._exit(0)  # gloo's threads can abort the process while Python shuts down


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
