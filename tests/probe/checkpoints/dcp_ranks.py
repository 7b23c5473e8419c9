"""Save a small model with FSDP2, one child process per rank: DIRECTORY RANK SIZE MODE."""

import importlib.util
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import fully_shard


def sharded_save(directory: Path, mode: str, build) -> None:
    model, optimizer = build()
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    states = {name: optimizer.state[p] for name, p in model.named_parameters()}
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    sharded = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for name, parameter in model.named_parameters():
        mesh, placements = parameter.device_mesh, parameter.placements
        parameter.grad = torch.zeros_like(parameter)
        sharded.state[parameter] = {
            key: dist.tensor.distribute_tensor(states[name][key].clone(), mesh, placements)
            for key in ("exp_avg", "exp_avg_sq")
        } | {"step": states[name]["step"].clone()}
        assert torch.equal(parameter.full_tensor(), tensors[name])
    options = StateDictOptions(flatten_optimizer_state_dict=mode == "flat")
    weights, state = get_state_dict(model, sharded, options=options)
    if mode == "flat":
        dcp.save({"app": {"model": weights}, "optimizer": state}, checkpoint_id=directory)
    else:
        dcp.save({"model": weights, "optim": state}, checkpoint_id=directory)
    if dist.get_rank() == 0:
        model.config.save_pretrained(directory)


def main() -> None:
    directory, rank, size, mode = sys.argv[1:]
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("small", Path(__file__).parent / "conftest.py")
    small = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small)

    def build():
        model = small.small_model(vocab_size=49)  # uneven over 2 ranks and over 3
        return model, small.train(model, num_steps=2)

    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}.store",
        rank=int(rank),
        world_size=int(size),
        timeout=timedelta(seconds=60),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sharded_save(Path(directory), mode, build)
    dist.barrier()
    os._exit(0)  # gloo's threads can abort the process while Python shuts down


if __name__ == "__main__":
    main()
