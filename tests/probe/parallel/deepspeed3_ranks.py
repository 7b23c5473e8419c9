"""One rank of the ZeRO-3 tests: as fsdp2_ranks.py, whose measurement it shares.

`python deepspeed3_ranks.py DIRECTORY RANK WORLD_SIZE`
"""

import os
import sys
from contextlib import ExitStack, nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from fsdp2_ranks import Batch, CountingSource, along, fail, measure
from torch.multiprocessing.reductions import StorageWeakRef

from probe.errors import ProbeError
from probe.parallel import deepspeed3
from probe.parallel.deepspeed3 import DeepSpeed3Model
from probe.parallel.distributed_loss import DistributedLoss

CPU = torch.device("cpu")


def build(directory: Path, dtype: torch.dtype, fail_on: str | None = None):
    source = CountingSource(directory, fail_on)
    skeleton = source.inner.skeleton("sdpa")
    return DeepSpeed3Model(skeleton, source, CPU, dtype=dtype), source


def losses(directory: Path, case: dict[str, Any], patches=(), *, push=None, gathered=False):
    """Losses along the ray with a guard taken away; the error's code where it is noticed.

    `gathered`: every parameter is, whenever the shards are written.
    """
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        try:
            model, _ = build(directory, getattr(torch, case["dtype"]))
        except ProbeError as error:
            return error.code
        loss = DistributedLoss(model, micro_batch_sequences=case["micro_batch_sequences"])
        if push is not None:
            model.push = lambda: push(model)
        delta = [case["delta"][s.name].view(-1)[s.lo : s.hi].clone() for s in model.shards]
        found = []
        for eta in case["etas"]:
            for parameter in model._parameters.values() if gathered else ():
                parameter.all_gather()
            batch = Batch(case["ids"], case["mask"])
            found += along(model, loss, batch, delta, [eta], restore=False)
        model.close()
        return found


def traps(directory: Path, cases: dict[str, Any]) -> dict[str, Any]:
    fp32, bf16 = cases["plain-float32"], cases["plain-bfloat16"]
    options, shard_of, fill = deepspeed3.engine_options, deepspeed3._shard, deepspeed3.fill_buffers

    def stock_threshold(dtype):
        chosen = options(dtype)
        del chosen["zero_optimization"]["stage3_param_persistence_threshold"]
        return chosen

    def nothing(model):
        pass

    def take_back(model):
        """A partition that trusts the gathered copy undoes what was written."""
        for parameter in model._parameters.values():
            parameter.partition(param_list=[parameter], has_been_updated=True)

    def rounded(model):
        fill(model)
        for _, buffer in model.named_buffers():
            buffer.copy_(buffer.bfloat16())

    def detached_shard(*arguments):
        shard = shard_of(*arguments)
        return deepspeed3.Shard(shard.name, shard.lo, shard.hi, shard.base, shard.live.clone())

    stock = [mock.patch.object(deepspeed3, "engine_options", stock_threshold)]
    empty = [mock.patch.object(deepspeed3, "fill_buffers")]
    angles = [mock.patch.object(deepspeed3, "fill_buffers", rounded)]
    cloned = [mock.patch.object(deepspeed3, "_shard", detached_shard)]
    return {
        "persistent_but_pushed": losses(directory, fp32, stock),
        "persistent_not_pushed": losses(directory, fp32, stock, push=nothing),
        "gathered_but_pushed": losses(directory, fp32, gathered=True),
        "gathered_not_pushed": losses(directory, fp32, push=nothing, gathered=True),
        "partitioned_as_updated": losses(directory, fp32, push=take_back, gathered=True),
        "angles_rounded": losses(directory, bf16, angles),
        "buffers_not_filled": losses(directory, fp32, empty),
        "not_deepspeeds_own": losses(directory, fp32, cloned),
    }


def refusals(root: Path) -> dict[str, Any]:
    found = {}
    name = "model.norm.weight"
    for key, directory, dtype, fail_on in (
        ("half_precision", root / "plain", torch.float16, None),
        (
            "one_rank_cannot_read",
            root / "plain",
            torch.float32,
            name if dist.get_rank() == 1 else None,
        ),
        ("wrong_size", root / "wrong", torch.float32, None),
    ):
        try:
            build(directory, dtype, fail_on)
        except ProbeError as error:
            found[key] = (error.code, str(error))
    return found


def alive_after_forward(directory: Path, case: dict[str, Any]) -> list[str]:
    """Parameters whose gathered values are still in memory between forward and backward."""
    model, _ = build(directory, torch.float32)
    loss = DistributedLoss(model, micro_batch_sequences=case["micro_batch_sequences"])
    gathered: dict[str, StorageWeakRef] = {}
    alive: set[str] = set()

    def watch(parameters, *_):
        for name, parameter in parameters:
            gathered[name] = StorageWeakRef(parameter.untyped_storage())

    def look(*_):
        alive.update(name for name, storage in gathered.items() if not storage.expired())

    for name, module in model.model.named_modules():
        own = [(f"{name}.{n}", p) for n, p in module.named_parameters(recurse=False)]
        module.register_forward_pre_hook(partial(watch, own))
    model.model.register_forward_hook(look)
    with suppress(RuntimeError):  # autograd misses the weights it let go of where nothing is packed
        model.gradient(lambda: loss.backward(Batch(case["ids"], case["mask"])))
    model.close()
    assert len(gathered) == len(model._parameters)
    return sorted(alive)


def memory(directory: Path, case: dict[str, Any]) -> dict[str, list[str]]:
    found = {"ours": alive_after_forward(directory, case)}
    graph = torch.autograd.graph
    with mock.patch.object(graph, "saved_tensors_hooks", return_value=nullcontext()):
        found["autograds_own"] = alive_after_forward(directory, case)
    return found


def gradient_after_an_error(directory: Path, case: dict[str, Any]) -> list[torch.Tensor]:
    """A gradient taken after one that broke off in the second layer's backward pass."""
    model, _ = build(directory, torch.float32)
    loss = DistributedLoss(model, micro_batch_sequences=case["micro_batch_sequences"])
    batch = Batch(case["ids"], case["mask"])
    query = model.model.model.layers[1].self_attn.q_proj.weight
    broken = query.register_hook(fail)
    with suppress(ZeroDivisionError):
        model.gradient(lambda: loss.backward(batch))
        raise AssertionError("the hook did not run")
    broken.remove()
    assert all(parameter.grad is None for parameter in model._parameters.values())
    found = model.gradient(lambda: loss.backward(batch))
    model.close()
    return found


def main(root: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{root}/rendezvous-deepspeed3-{world_size}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    cases = torch.load(root / "cases.pt", weights_only=True)
    linear = torch.nn.functional.linear
    found: dict[str, Any] = {
        name: measure(root / case["model"], case, getattr(torch, case["dtype"]), build)
        for name, case in cases.items()
    }
    found["traps"] = traps(root / "plain", cases)
    found["refusals"] = refusals(root)
    found["memory"] = memory(root / "plain", cases["plain-float32"])
    found["again"] = gradient_after_an_error(root / "plain", cases["plain-float32"])
    found["linear_is_torchs"] = torch.nn.functional.linear is linear
    torch.save(found, root / f"found-deepspeed3_ranks-{world_size}-{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads can abort the process while Python shuts down


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
