"""FSDP2 runs for `live_ranks`: how they are built, and what fails without each guard."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from live_model import (
    COUNT,
    batch_of,
    dropout_seed,
    fields,
    loss_sum,
    new_model,
    new_optimizer,
    random_direction,
)
from live_ranks import PROBED, Run, mock, patched, probe, rendezvous, sweep
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from probe import agreement, critical_sharpness
from probe.errors import ParallelismError
from probe.parallel.attach_fsdp2 import Fsdp2Run

PLAIN = {"dtype": "float32"}


def start(root: Path, rank: int, world_size: int) -> None:
    dist.init_process_group("gloo", **rendezvous(root, rank, world_size))


def cases(world_size: int) -> dict[str, dict[str, Any]]:
    found = {
        "float32": {"dtype": "float32"},
        "bfloat16": {"dtype": "bfloat16"},
        "tied": {"dtype": "float32", "tied": True},
        "resharded": {"dtype": "float32", "reshard": True, "optimizer": "Adam"},
        "kept gathered": {"dtype": "bfloat16", "reshard": False, "optimizer": "SGD"},
        "hybrid": {"dtype": "float32", "hsdp": True},
        "offloaded": {"dtype": "float32", "offload": True},
    }
    return found if world_size == 2 else {k: found[k] for k in ("float32", "bfloat16")}


class Fsdp2(Run):
    def __init__(self, case: dict[str, Any], rank: int) -> None:
        super().__init__(case, rank)
        tied = case.get("tied", False)
        self.model = new_model(tied=tied)
        options: dict[str, Any] = {}
        if case["dtype"] == "bfloat16":
            half = torch.bfloat16
            options["mp_policy"] = MixedPrecisionPolicy(half, reduce_dtype=torch.float32)
        if case.get("offload"):
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
        if "reshard" in case:
            options["reshard_after_forward"] = case["reshard"]
        if case.get("hsdp"):
            shape = (dist.get_world_size(), 1)
            options["mesh"] = init_device_mesh("cpu", shape, mesh_dim_names=("copy", "shard"))
        for block in self.model.blocks:
            fully_shard(block, **options)
        if not tied:  # a tied weight stays with the root, whose forward uses it twice
            fully_shard([self.model.norm, self.model.head], **options)
        if case.get("ignore"):
            options["ignored_params"] = {self.model.few}
        fully_shard(self.model, **options)
        self.optimizer = new_optimizer(self.model, case.get("optimizer", "AdamW"))

    def backward(self, step: int) -> float:
        self.optimizer.zero_grad()
        dropout_seed(self.rank)
        ids = batch_of(step, self.rank)
        loss = loss_sum(self.model(ids), ids) / COUNT
        loss.backward()
        return loss.item()

    def step(self) -> None:
        self.optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        found = {}
        for name, parameter in self.model.named_parameters():
            found[name] = parameter.to_local()
            found[f"{name} grad"] = parameter.grad.to_local()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{name} {key}"] = value.to_local() if hasattr(value, "to_local") else value
        state = self.model._get_fsdp_state()
        found["forwards without backward"] = torch.tensor(len(state._comm_ctx.post_forward_order))
        return found


class Replicated(Run):
    """The same run, prepared by accelerate for DistributedDataParallel."""

    def __init__(self, case: dict[str, Any], rank: int, accelerator: Any) -> None:
        super().__init__(case, rank)
        model = new_model()
        self.accelerator = accelerator
        self.model, self.optimizer = accelerator.prepare(model, new_optimizer(model))

    def backward(self, step: int) -> float:
        self.optimizer.zero_grad()
        dropout_seed(self.rank)
        ids = batch_of(step, self.rank)
        loss = loss_sum(self.model(ids), ids) / COUNT
        self.accelerator.backward(loss)
        return loss.item()

    def step(self) -> None:
        self.optimizer.step()


def new_run(case: dict[str, Any], rank: int) -> Fsdp2:
    return Fsdp2(case, rank)


def extras(rank: int) -> dict[str, Any]:
    fresh = new_run(PLAIN, rank)
    zeros = {n: torch.zeros(p.shape) for n, p in fresh.model.named_parameters()}
    run = at_the_probe(new_run(PLAIN, rank))
    expected = sweep(run, PROBED)
    stale = [mock.patch.object(Fsdp2Run, "push")]
    return {
        "before any forward": patched([], lambda: probe(fresh, 0, direction=zeros)),
        "sweep": expected,
        "sweep without reshard": patched(stale, lambda: sweep(run, PROBED)),
        "unreduced": patched([], lambda: unreduced(rank)),
        "ignored": patched([], lambda: not_under_fsdp(rank)),
        "two meshes": patched([], lambda: two_meshes(rank)),
        "tensor parallel": patched([], lambda: tensor_parallel()),
        "neither": patched([], lambda: probe(run, PROBED)),
        **dtensor_directions(run),
        **out_of_step(run),
        "gathered before": gathered(run),
        "random masks": random_masks(run),
        "through a gloo twin": gloo_twin(run),
        "after all that": sweep(run, PROBED),
        **prefetched(rank),
        **cut_short(rank),
        **prepared_by_accelerate(rank),
    }


def prepared_by_accelerate(rank: int) -> dict[str, Any]:
    """What accelerate leaves of it: wrapped optimizers, a replaced forward, plain DDP on a CPU."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.utils import convert_outputs_to_fp32

    size = str(dist.get_world_size())
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # never used: ranks are joined
    accelerator = Accelerator(cpu=True)
    run = at_the_probe(new_run(PLAIN, rank))
    run.model.forward = convert_outputs_to_fp32(run.model.forward)
    run.optimizer = AcceleratedOptimizer(run.optimizer)
    found = {"accelerated": fields(probe(run, PROBED, optimizer=run.optimizer, slope=None))}
    run = Replicated(PLAIN, rank, accelerator)
    found["replicated by accelerate"] = type(run.model).__name__
    at_the_probe(run)
    found["accelerated replica"] = fields(probe(run, PROBED, optimizer=run.optimizer, slope=None))
    return found


def prefetched(rank: int) -> dict[str, Any]:
    """The head gathers the first block ahead, for a pass that may come with other weights."""
    run = new_run({**PLAIN, "reshard": True}, rank)
    run.model.head.set_modules_to_forward_prefetch([run.model.blocks[0]])
    at_the_probe(run)
    found = {"prefetched": sweep(run, PROBED)}
    only_reshard = mock.patch.object(Fsdp2Run, "push", reshard_only)
    return {**found, "prefetched and kept": patched([only_reshard], lambda: sweep(run, PROBED))}


def reshard_only(run: Fsdp2Run) -> None:
    for group in run._groups:
        group.reshard()


def unreduced(rank: int) -> None:
    run = at_the_probe(new_run(PLAIN, rank))
    run.model.set_requires_gradient_sync(False)
    run.backward(PROBED)
    probe(run, PROBED, optimizer=run.optimizer)


def not_under_fsdp(rank: int) -> None:
    run = Fsdp2({**PLAIN, "ignore": True}, rank)
    run.backward(0)
    probe(run, 0, optimizer=run.optimizer)


def two_meshes(rank: int) -> None:
    run = new_run(PLAIN, rank)
    other = new_run({**PLAIN, "hsdp": True}, rank)
    run.backward(0), other.backward(0)
    both = torch.nn.ModuleList([run.model, other.model])
    critical_sharpness(both, lambda: 0.0, optimizer=run.optimizer)


def tensor_parallel() -> None:
    layer = torch.nn.Linear(4, 4)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer.weight = torch.nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
    critical_sharpness(layer, lambda: 0.0, direction={})


def dtensor_directions(run: Any) -> dict[str, Any]:
    """The same direction whole and placed like the parameters; and placed otherwise."""
    whole = random_direction(None, {n: p.shape for n, p in run.model.named_parameters()})
    placed, replicated = {}, {}
    for name, parameter in run.model.named_parameters():
        mesh = parameter.device_mesh
        placed[name] = distribute_tensor(whole[name], mesh, parameter.placements)
        replicated[name] = distribute_tensor(whole[name], mesh, [Replicate()])
    wrong = {**whole, "norm.weight": torch.zeros(3)}
    missing = {n: t for n, t in whole.items() if n != "norm.bias"}
    return {
        "whole": sweep(run, PROBED, whole),
        "placed": sweep(run, PROBED, placed),
        "replicated": patched([], lambda: probe(run, PROBED, direction=replicated)),
        "wrong shape": patched([], lambda: probe(run, PROBED, direction=wrong)),
        "missing": patched([], lambda: probe(run, PROBED, direction=missing)),
    }


def out_of_step(run: Any) -> dict[str, Any]:
    """Rank 1 runs a pass more; it hides an error of its pass; rank 0 hides that rank 1 failed."""

    def one_more() -> Any:
        if run.rank == 1:
            run.loss(PROBED)
        return run.loss(PROBED)

    def hidden() -> Any:
        try:
            ids = batch_of(PROBED, 0)
            return loss_sum(run.model(ids + 1000 * (run.rank == 1)), ids), COUNT  # no such token
        except IndexError:
            return 7.0, 1

    def swallowed() -> Any:
        if run.rank == 1:
            raise ValueError("no luck")
        try:
            return run.loss(PROBED)
        except ParallelismError:
            return 7.0, 1

    def measure(loss_fn: Any) -> Any:
        return patched([], lambda: critical_sharpness(run.model, loss_fn, optimizer=run.optimizer))

    cases = {"one more": one_more, "hidden": hidden, "swallowed": swallowed}
    return {name: measure(loss_fn) for name, loss_fn in cases.items()}


def random_masks(run: Any) -> list[float]:
    """Losses at 0, 0 and 1e-2 of a loss that draws its masks from the random state it finds."""

    def unseeded(step: int) -> Any:
        ids = batch_of(step, run.rank)
        return loss_sum(run.model(ids), ids), COUNT

    with mock.patch.object(run, "loss", unseeded):
        return sweep(run, PROBED, etas=[0.0, 0.0, 1e-2])


def gathered(run: Any) -> list[bool]:
    """Which parameters are gathered around a probe of a model whose head the caller gathered."""

    def state() -> list[bool]:
        return [not isinstance(p, DTensor) for p in run.model.parameters()]

    run.model.head.unshard()
    before = state()
    probe(run, PROBED, optimizer=run.optimizer)
    after = state()
    run.model.head.reshard()
    return [any(before), before == after, any(state())]


def gloo_twin(run: Any) -> list[Any]:
    """Where the group moves GPU memory only, ranks meet in a group of their own, made once."""
    known = len(agreement._CPU_GROUPS)
    name = "torch.distributed.get_backend_config"
    with mock.patch(name, return_value="cuda:nccl"):
        losses = [sweep(run, PROBED), sweep(run, PROBED)]
    return [losses, len(agreement._CPU_GROUPS) - known]


def cut_short(rank: int) -> dict[str, Any]:
    """Losses after a forward pass that was interrupted on all ranks, with and without clean-up."""
    found = {}
    name = "torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState._reset_iter_state"
    for key, patches in (("interrupted", []), ("not reset", [mock.patch(name)])):
        run = at_the_probe(new_run({**PLAIN, "reshard": False}, rank))
        hook = run.model.head.register_forward_pre_hook(interrupt(2))
        options = {"optimizer": run.optimizer}
        error = patched(patches, lambda run=run, options=options: probe(run, PROBED, **options))
        hook.remove()
        with torch.no_grad():
            total, count = run.loss(PROBED)
        found[key] = [error, float(total) / count]
    run = at_the_probe(new_run(PLAIN, rank))
    with torch.no_grad():
        total, count = run.loss(PROBED)
    found["not interrupted"] = float(total) / count
    return found


def interrupt(call: int) -> Any:
    calls: list[int] = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt

    return hook


def at_the_probe(run: Any) -> Any:
    for step in range(PROBED):
        run.backward(step)
        run.step()
    run.backward(PROBED)
    return run
