"""One rank of the tests of live runs: trains with and without a probe, remembers what it saw.

`python live_ranks.py DIRECTORY KIND RANK WORLD_SIZE`; KIND is fsdp2 or deepspeed.
"""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from live_model import (
    COUNT,
    ETAS,
    SEARCHES,
    Single,
    batch_of,
    dropout_seed,
    fields,
    loss_sum,
    random_direction,
)
from torch import Tensor

from probe import critical_sharpness
from probe.agreement import Agreement
from probe.directions.sharded import sharded_mapping_direction, sharded_optimizer_direction
from probe.errors import ProbeError
from probe.parallel.attach import attached
from probe.parallel.live_ray import live_ray

PROBED = 1  # the step at which a probe runs: moments are there
NUM_AFTER = 3  # training steps to compare with an unprobed run's, the probed one first


class Run:
    """A sharded training run; a kind of sharding says how to build, step and look inside."""

    def __init__(self, case: dict[str, Any], rank: int) -> None:
        self.case, self.rank = case, rank

    model: Any
    optimizer: Any

    def loss(self, step: int) -> tuple[Tensor, int]:
        dropout_seed(self.rank)
        ids = batch_of(step, self.rank)
        return loss_sum(self.model(ids), ids), COUNT

    def backward(self, step: int) -> float:
        raise NotImplementedError

    def step(self) -> None:
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """Everything that must not change, by name."""
        raise NotImplementedError

    def masters(self) -> list[tuple[str, Tensor]]:
        """What the optimizer steps, aligned with the shards."""
        return [(s.name, s.master.detach().clone()) for s in attached(self.model).shards()]


def prefix(model: Any) -> str:
    return "module." if hasattr(model, "optimizer") else ""


def probe(run: Run, step: int, **options: Any) -> Any:
    return critical_sharpness(run.model, lambda: run.loss(step), eta_init=1e-3, **options)


def sweep(
    run: Run, step: int, direction: dict[str, Tensor] | None = None, etas: Sequence[float] = ETAS
) -> list[float]:
    live = attached(run.model)
    agreement = Agreement(live.group)
    if direction is None:
        update = sharded_optimizer_direction(live, run.optimizer, agreement)
    else:
        update = sharded_mapping_direction(live, run.model, direction, agreement)
    losses = []
    with live_ray(live, update.shards, update.delta, agreement) as move:
        for eta in etas:
            move(eta)
            with torch.no_grad():
                losses.append(agreement.mean_loss(lambda: run.loss(step)))
    return losses


def whole_direction(run: Run) -> dict[str, Tensor]:
    shapes = {n: p for n, p in single_shapes(run.case).items()}
    return {prefix(run.model) + n: t for n, t in random_direction(None, shapes).items()}


def single_shapes(case: dict[str, Any]) -> dict[str, Any]:
    return {n: p.shape for n, p in Single(case, 1).model.named_parameters()}


def steady(run: Run, name: str, action: Callable[[], Any], found: dict[str, Any]) -> None:
    """Do it, and note what of the run was not as before."""
    before = {key: value.clone() for key, value in run.tensors().items()}
    random = torch.get_rng_state()
    found[name] = action()
    after = run.tensors()
    changed = [k for k in before.keys() | after.keys() if not same(before.get(k), after.get(k))]
    if not torch.equal(random, torch.get_rng_state()):
        changed.append("random state")
    found.setdefault("changed", {})[name] = sorted(changed)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


def measurements(run: Run, step: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    steady(run, "sweep", lambda: sweep(run, step), found)
    direction = whole_direction(run)
    steady(run, "direction_sweep", lambda: sweep(run, step, direction), found)
    optimizer = {"optimizer": run.optimizer, "slope": None}

    def searches() -> dict[str, Any]:
        return {s: fields(probe(run, step, search=s, **optimizer)) for s in SEARCHES}

    steady(run, "searches", searches, found)
    steady(run, "direction_search", lambda: fields(probe(run, step, direction=direction)), found)
    steady(run, "slope", lambda: probe(run, step, optimizer=run.optimizer).slope, found)
    for where in ("before", "inside", "after"):
        steady(run, f"fails {where}", lambda where=where: failing(run, step, where), found)
    return found


def failing(run: Run, step: int, where: str) -> tuple[str, str]:
    """A loss that fails on rank 1 only, at its second point; where in the pass is told."""
    calls = []

    def fail(*_: Any) -> None:
        if len(calls) == 2 and run.rank == 1:
            raise ValueError(f"no luck {where}")

    def loss_fn() -> Any:
        calls.append(1)
        if where == "before":
            fail()
        value = run.loss(step)
        if where == "after":
            fail()
        return value

    block = next(m for n, m in run.model.named_modules() if n.endswith("blocks.1.up"))
    hook = block.register_forward_pre_hook(fail) if where == "inside" else None
    try:
        critical_sharpness(run.model, loss_fn, optimizer=run.optimizer)
    except (ProbeError, ValueError) as error:
        return type(error).__name__, str(error)
    finally:
        if hook is not None:
            hook.remove()
    return "none", ""


def train(run: Run, at: int, *, probed: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"losses": []}
    for step in range(at + 1 + NUM_AFTER):
        found["losses"].append(run.backward(step))
        if step == at and probed:
            found.update(measurements(run, step))
            live = attached(run.model)
            update = sharded_optimizer_direction(live, run.optimizer, Agreement(live.group))
            found["delta"] = list(zip([s.name for s in update.shards], update.delta, strict=True))
            found["before"] = run.masters()
        run.step()
        if step == at and probed:
            found["stepped"] = run.masters()
    found["end"] = run.masters()
    return found


def truth_of(case: dict[str, Any], world_size: int, at: int) -> dict[str, Any]:
    single = Single(case, world_size)
    for step in range(at):
        single.train(step)
    single.backward(at)
    return single.truth(at)


def patched(patches: list[Any], action: Callable[[], Any]) -> Any:
    """An action with a guard taken away; the error's name where it then fails."""
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        try:
            return action()
        except (Exception, KeyboardInterrupt) as error:
            return f"{type(error).__name__}: {error}"


def main(root: Path, kind: str, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    if kind == "deepspeed":
        from live_deepspeed import cases, extras, new_run, start
    else:
        from live_fsdp2 import cases, extras, new_run, start
    start(root, rank, world_size)
    found: dict[str, Any] = {}
    # A mean over 3 ranks is rounded: before the first step the weights are still one process's.
    at = PROBED if world_size == 2 else 0
    for name, case in cases(world_size).items():
        found[name] = train(new_run(case, rank), at, probed=True)
        found[name]["unprobed"] = train(new_run(case, rank), at, probed=False)
        found[name]["truth"] = truth_of(case, world_size, at)
    if world_size == 2:
        found["extras"] = extras(rank)
    torch.save(found, root / f"found-{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads can abort the process while Python shuts down


def rendezvous(root: Path, rank: int, world_size: int) -> dict[str, Any]:
    return {
        "init_method": f"file://{root}/rendezvous",
        "rank": rank,
        "world_size": world_size,
        "timeout": timedelta(seconds=60),
    }


__all__ = ["PROBED", "Run", "mock", "patched", "probe", "rendezvous", "sweep"]

if __name__ == "__main__":
    sys.modules["live_ranks"] = sys.modules["__main__"]
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
