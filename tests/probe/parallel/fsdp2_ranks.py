"""One rank of the FSDP2 tests: measures what the parent prepared, leaves what it found.

`python fsdp2_ranks.py DIRECTORY RANK WORLD_SIZE`; rendezvous through a file, so no port is named.
"""

import dataclasses
import os
import sys
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from sharded_cases import measured, warmed_up
from torch.distributed.fsdp import FSDPModule

from probe.checkpoints import open_checkpoint
from probe.errors import CheckpointError, ProbeError
from probe.line_search import find_critical_learning_rate
from probe.moments import CheckpointMoments
from probe.parallel import fsdp2
from probe.parallel.distributed_loss import DistributedLoss
from probe.parallel.fsdp2 import Fsdp2Model
from probe.perturb import Ray
from probe.result import CheckpointRef
from probe.spec import AdamW
from probe.update import UpdateRule

CPU = torch.device("cpu")


class Batch:
    def __init__(self, ids: torch.Tensor, mask: torch.Tensor) -> None:
        self.input_ids, self.loss_mask = ids, mask


class CountingSource:
    """Passes reads on and remembers how much each took; fails where it is told to."""

    def __init__(self, directory: Path, fail_on: str | None = None) -> None:
        self.inner = open_checkpoint(CheckpointRef(source="local", location=str(directory)))
        self.num_read: dict[str, int] = {}
        self.fail_on = fail_on

    @property
    def ref(self):
        return self.inner.ref

    def weight_shapes(self):
        return self.inner.weight_shapes()

    def read(self, name, kind, lo=0, hi=None):
        if name == self.fail_on:
            raise CheckpointError(f"cannot read {name}")
        found = self.inner.read(name, kind, lo, hi)
        self.num_read[name] = self.num_read.get(name, 0) + found.numel()
        return found


def build(directory: Path, dtype: torch.dtype, fail_on: str | None = None):
    source = CountingSource(directory, fail_on)
    model = Fsdp2Model(source.inner.skeleton("sdpa"), source, CPU, dtype=dtype)
    return model, source


def along(model, loss, batch, delta, etas, *, restore=True):
    ray = Ray([s.live for s in model.shards], [s.base for s in model.shards], delta, exact=True)
    found = []
    for eta in etas:
        ray.move(eta)
        model.push()
        found.append(list(loss.sums(batch).nll))
    if restore:
        ray.move(0.0)
        model.push()
    return found


def measure(
    directory: Path, case: dict[str, Any], dtype: torch.dtype, make: Any = None
) -> dict[str, Any]:
    model, source = (make or build)(directory, dtype)
    batch = Batch(case["ids"], case["mask"])
    loss = DistributedLoss(model, micro_batch_sequences=case["micro_batch_sequences"])
    passes = []
    model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    delta = [case["delta"][s.name].view(-1)[s.lo : s.hi].clone() for s in model.shards]
    before = [s.live.clone() for s in model.shards]
    found: dict[str, Any] = {"head_path": loss.head_path, "num_read": source.num_read}
    found["num_parameters"] = model.num_parameters
    found["shards"] = [(s.name, s.lo, s.hi, s.base.clone()) for s in model.shards]
    found["buffers"] = {name: b.clone() for name, b in model.model.named_buffers()}
    found["losses"] = along(model, loss, batch, delta, case["etas"])
    found["num_passes"] = len(passes)
    found["searches"] = {s: search(model, loss, batch, delta, case, s) for s in case["searches"]}
    found["measured"] = measured(model, loss, case, delta)
    # An error in the middle of a pass, on all ranks alike, leaves nothing gathered behind.
    broken = model.model.model.layers[1].register_forward_pre_hook(fail)
    try:
        along(model, loss, batch, delta, [case["etas"][2]])
    except ZeroDivisionError:
        torch._foreach_copy_([s.live for s in model.shards], [s.base for s in model.shards])
        model.push()
    broken.remove()
    found["restored"] = all(
        torch.equal(s.live, b) and torch.equal(s.base.to(b.dtype), b)
        for s, b in zip(model.shards, before, strict=True)
    )
    found["losses_again"] = along(model, loss, batch, delta, case["etas"][:2])
    means: list[float] = []
    grads = model.gradient(lambda: means.append(loss.backward(batch)))
    found["backward_mean"] = means[0]
    found["gradient"] = [None if g is None else g.clone() for g in grads]
    optimizer = AdamW(clip_grad_norm=0.5, weight_decay=0.1)
    moments = CheckpointMoments(source.inner, model.shards, label="here")
    found["warm_delta"], found["warm_slope"] = warmed_up(model, optimizer, grads)
    found["delta"], found["slope"] = UpdateRule(model, optimizer, moments).direction(grads)
    found["losses_after_backward"] = along(model, loss, batch, delta, case["etas"][:2])
    found["unseen"] = model.unseen()
    return found


def fail(*_):
    raise ZeroDivisionError


def search(model, loss, batch, delta, case, algorithm):
    ray = Ray([s.live for s in model.shards], [s.base for s in model.shards], delta, exact=True)

    def loss_at(eta: float) -> float:
        ray.move(eta)
        model.push()
        return loss.mean(batch)

    found = find_critical_learning_rate(
        loss_at, eta_init=1e-4, rel_tol=1 / 16, slope=case["slope"], search=algorithm
    )
    ray.move(0.0)
    model.push()
    return [found.outcome.value, found.eta_lower, found.eta_upper, *found.trials]


def trap(directory: Path, case: dict[str, Any], dtype: torch.dtype, patches, *, no_push=False):
    """Losses along the ray with a guard taken away; the error's code where it is noticed."""
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        try:
            model, _ = build(directory, dtype)
        except ProbeError as error:
            return error.code
        if no_push:
            model._groups = []
        loss = DistributedLoss(model, micro_batch_sequences=case["micro_batch_sequences"])
        delta = [case["delta"][s.name].view(-1)[s.lo : s.hi].clone() for s in model.shards]
        batch = Batch(case["ids"], case["mask"])
        return along(model, loss, batch, delta, case["etas"])


def traps(directory: Path, cases: dict[str, Any]) -> dict[str, Any]:
    fp32, bf16 = cases["plain-float32"], cases["plain-bfloat16"]
    shard, policy = fsdp2.fully_shard, fsdp2.MixedPrecisionPolicy

    def keep_gathered(modules, *, reshard_after_forward, **options):
        return shard(modules, reshard_after_forward=False, **options)

    def cast_inputs(*, cast_forward_inputs, **options):
        return policy(cast_forward_inputs=True, **options)

    shard_of = fsdp2._shard

    def detached_shard(name, parameter, offload_base):
        shard = shard_of(name, parameter, offload_base)
        return dataclasses.replace(shard, live=shard.live.clone())

    def only_zero(model):
        for parameter in model.model.parameters():
            parameter.data.zero_()

    stale = [mock.patch.object(fsdp2, "fully_shard", keep_gathered)]
    # `FSDPModule._apply` sets shards up anew; a load that bypasses it leaves that to the forward.
    late = [mock.patch.object(FSDPModule, "_apply", torch.nn.Module._apply)]
    early = [*late, mock.patch.object(Fsdp2Model, "_warm_up", only_zero)]
    cloned = [mock.patch.object(fsdp2, "_shard", detached_shard)]
    cast = [mock.patch.object(fsdp2, "MixedPrecisionPolicy", cast_inputs)]
    rotary = [mock.patch.object(fsdp2, "fill_buffers")]
    one, two = torch.float32, torch.bfloat16
    return {
        "kept_gathered_but_pushed": trap(directory, fp32, one, stale),
        "kept_gathered_not_pushed": trap(directory, fp32, one, stale, no_push=True),
        "captured_late": trap(directory, fp32, one, late),
        "captured_early": trap(directory, fp32, one, early),
        "not_fsdps_own": trap(directory, fp32, one, cloned),
        "inputs_cast": trap(directory, bf16, two, cast),
        "buffers_not_filled": trap(directory, fp32, one, rotary),
    }


def refusals(root: Path) -> dict[str, Any]:
    found = {}
    name = "model.norm.weight"
    for key, directory, fail_on in (
        ("one_rank_cannot_read", root / "plain", name if dist.get_rank() == 1 else None),
        ("wrong_size", root / "wrong", None),
    ):
        try:
            build(directory, torch.float32, fail_on)
        except ProbeError as error:
            found[key] = (error.code, str(error))
    return found


def main(root: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{root}/rendezvous-{world_size}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    cases = torch.load(root / "cases.pt", weights_only=True)
    found: dict[str, Any] = {
        name: measure(root / case["model"], case, getattr(torch, case["dtype"]))
        for name, case in cases.items()
    }
    found["traps"] = traps(root / "plain", cases)
    found["refusals"] = refusals(root)
    torch.save(found, root / f"found-fsdp2_ranks-{world_size}-{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads can abort the process while Python shuts down


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
