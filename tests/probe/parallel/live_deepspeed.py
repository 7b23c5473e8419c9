"""DeepSpeed runs for `live_ranks`: how they are built, and what fails without each guard."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from live_model import COUNT, batch_of, dropout_seed, fields, loss_sum, new_model, new_optimizer
from live_ranks import PROBED, Run, mock, patched, probe, rendezvous, sweep
from torch import Tensor

from probe.parallel.attach import attached
from probe.parallel.attach_deepspeed import ZeroRun

os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK="0")


def start(root: Path, rank: int, world_size: int) -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
    dist.init_process_group("gloo", **rendezvous(root, rank, world_size))
    deepspeed.init_distributed("gloo")
    accelerator = deepspeed.accelerator.get_accelerator()
    accelerator.is_fp16_supported = lambda: True  # slow here, but right


def cases(world_size: int) -> dict[str, dict[str, Any]]:
    bf16 = {"dtype": "bfloat16", "reduce": "bfloat16", "rounded": True}
    fp16 = {"dtype": "float16", "reduce": "float16", "rounded": True, "scale": 128.0}
    fp32_sums = {"accumulate": "fp32"}
    return {
        "zero1 float32": {"stage": 1, "dtype": "float32"},
        "zero2 float32": {"stage": 2, "dtype": "float32"},
        "zero3 float32": {"stage": 3, "dtype": "float32"},
        "zero1 bfloat16": {"stage": 1, **bf16},
        "zero2 bfloat16": {"stage": 2, **bf16, "zero": {"round_robin_gradients": True}},
        "zero3 bfloat16": {"stage": 3, **bf16},
        "zero1 bf16 optimizer": {"stage": 1, **bf16, **fp32_sums},
        "zero3 float16": {"stage": 3, **fp16},
        "zero1 clipped": {"stage": 1, **fp16, **fp32_sums, "clip": 0.05, "optimizer": "SGD"},
        "zero3 clipped": {"stage": 3, **bf16, "clip": 0.05, "optimizer": "SGD"},
        "bf16 clipped": {"stage": 1, **bf16, **fp32_sums, "clip": 0.05},
    }


class Zero(Run):
    def __init__(self, case: dict[str, Any], rank: int) -> None:
        import deepspeed

        super().__init__(case, rank)
        model = new_model()
        if "frozen" in case:
            model.get_parameter(case["frozen"]).requires_grad_(False)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": case.get("accumulation", 1),
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": case.get("clip", 0.0),
            "zero_optimization": {"stage": case["stage"], **case.get("zero", {})},
        }
        if case["stage"] == 3:  # several sub-groups; all but the largest matrices stay gathered
            config["zero_optimization"] |= {
                "sub_group_size": 3000,
                "stage3_param_persistence_threshold": 1000,
            }
        if case["dtype"] == "bfloat16":
            config["bf16"] = {"enabled": True}
        if case["dtype"] == "float16":
            config["fp16"] = {"enabled": True, "loss_scale": case["scale"]}
        if "accumulate" in case:
            config["data_types"] = {"grad_accum_dtype": case["accumulate"]}
        config |= case.get("config", {})
        inner = new_optimizer(model, case.get("optimizer", "AdamW"))
        with contextlib.redirect_stdout(sys.stderr):
            self.model, *_ = deepspeed.initialize(model=model, optimizer=inner, config=config)
        self.optimizer = None

    def backward(self, step: int) -> float:
        dropout_seed(self.rank)
        ids = batch_of(step, self.rank)
        loss = loss_sum(self.model(ids), ids) / COUNT
        self.model.backward(loss)
        return loss.item()

    def step(self) -> None:
        self.model.step()

    def tensors(self) -> dict[str, Tensor]:
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        zero = self.model.optimizer
        found: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if hasattr(parameter, "ds_tensor"):
                found[f"{name} shard"] = parameter.ds_tensor.data
                found[f"{name} gathered"] = torch.tensor(parameter.ds_status.value)
            found[name] = parameter.data
            for key in ("grad", "grad_accum", "_hp_grad"):
                if getattr(parameter, key, None) is not None:
                    found[f"{name} {key}"] = getattr(parameter, key)
        for index, (master, state) in enumerate(zero.optimizer.state.items()):
            found[f"master {index}"] = master.data
            found |= {f"{key} {index}": value for key, value in state.items()}
        for group, parts in getattr(zero, "averaged_gradients", {}).items():
            found |= {f"averaged {group} {i}": part for i, part in enumerate(parts)}
        for index, flat in enumerate(getattr(zero, "fp32_groups_gradients_flat", [])):
            found[f"flat gradient {index}"] = flat
        flags = {**vars(zero._backward_hook_state), "micro": getattr(zero, "micro_step_id", 0)}
        flags["forward depth"] = len(FWD_MODULE_STACK)
        for name, module in self.model.named_modules():
            flags[f"{name} in forward"] = getattr(module._parameters, "_in_forward", False)
            flags[f"{name} forwards"] = module.__dict__.get("applied_pre_backward_ref_cnt")
        for name, value in flags.items():
            if isinstance(value, int):
                found[f"flag {name}"] = torch.tensor(value)
        return found


def new_run(case: dict[str, Any], rank: int) -> Zero:
    return Zero(case, rank)


def extras(rank: int) -> dict[str, Any]:
    runs = {stage: at_the_probe({"stage": stage, "dtype": "float32"}, rank) for stage in (2, 3)}
    unseen = [mock.patch.object(ZeroRun, "push")]
    found: dict[str, Any] = {}
    for stage, run in runs.items():
        found[f"sweep {stage}"] = sweep(run, PROBED)
        found[f"sweep {stage} without push"] = patched(unseen, lambda run=run: sweep(run, PROBED))
    found |= optimizers(runs[2])
    found |= refused_moments(rank)
    found |= refused_engines(rank)
    found["linked"] = linked(runs[2])
    found["its module"] = patched([], lambda: attached(runs[2].model.module))
    found["frozen"] = patched([], lambda: frozen(rank))
    found["interrupted"] = [interrupted(stage, rank) for stage in (2, 3)]
    return found


def at_the_probe(case: dict[str, Any], rank: int) -> Zero:
    run = new_run(case, rank)
    for step in range(PROBED):
        run.backward(step)
        run.step()
    run.backward(PROBED)
    return run


def optimizers(run: Zero) -> dict[str, Any]:
    """Any wrapping of the engine's own optimizer is the engine's own; another one is not."""
    from accelerate import Accelerator
    from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper

    Accelerator(cpu=True)  # the wrapper asks for its state
    zero = run.model.optimizer
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    given = {"zero": zero, "inner": zero.optimizer, "accelerate": DeepSpeedOptimizerWrapper(zero)}
    search = {"slope": None}
    found = {n: fields(probe(run, PROBED, optimizer=o, **search)) for n, o in given.items()}
    found["none"] = fields(probe(run, PROBED, **search))
    return {
        "optimizers": found,
        "another": patched([], lambda: probe(run, PROBED, optimizer=other)),
        "both": patched([], lambda: probe(run, PROBED, optimizer=zero, direction={})),
    }


def refused_moments(rank: int) -> dict[str, Any]:
    """Between the micro-batches of a step, before a backward pass, after the step, at NaN."""
    found: dict[str, Any] = {}
    for stage in (2, 3):
        run = new_run({"stage": stage, "dtype": "float32", "accumulation": 2}, rank)
        found[f"no backward {stage}"] = patched([], lambda run=run: probe(run, 0))
        run.backward(0)
        run.step()  # DeepSpeed counts micro-batches here
        run.backward(1)
        found[f"last micro-batch {stage}"] = probe(run, 1).outcome.value
        run.step()
        found[f"after step {stage}"] = patched([], lambda run=run: probe(run, 1))
        run.backward(2)
        found[f"micro-batch {stage}"] = patched([], lambda run=run: probe(run, 2))
    for stage in (1, 2, 3):
        run = new_run({"stage": stage, "dtype": "float32"}, rank)
        found[f"nothing {stage}"] = patched([], lambda run=run: probe(run, 0))
    run = new_run({"stage": 2, "dtype": "float32"}, rank)
    run.backward(0)
    if rank == 1:
        run.model.optimizer.averaged_gradients[0][0].view(-1)[0] = torch.nan
    found["nan"] = patched([], lambda: probe(run, 0))
    return found


def refused_engines(rank: int) -> dict[str, Any]:
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
    unmanaged = {"managed_gradient_accumulation": False}
    cases = {
        "stage 0": {"stage": 0},
        "offload 2": {"stage": 2, "zero": offload},
        "offload 3": {"stage": 3, "zero": offload},
        "unmanaged": {"stage": 2, "config": unmanaged},
    }

    def measure(case: dict[str, Any]) -> None:
        run = new_run({"dtype": "float32", **case}, rank)
        run.backward(0)
        probe(run, 0)

    return {name: patched([], lambda case=case: measure(case)) for name, case in cases.items()}


def linked(run: Zero) -> list[bool]:
    """Which of this rank's fragments DeepSpeed has linked to moments, by parameter group."""
    groups = run.model.optimizer.bit16_groups
    held = [[p for p in group if p._hp_mapping is not None] for group in groups]
    return [all("exp_avg" in p._hp_mapping.optim_fragment for p in g) for g in held if g]


def frozen(rank: int) -> None:
    run = new_run({"stage": 2, "dtype": "float32", "frozen": "few"}, rank)
    names = {n: torch.zeros(p.shape) for n, p in run.model.named_parameters()}
    probe(run, 0, direction=names)


def interrupted(stage: int, rank: int) -> list[Any]:
    """Ctrl-C on every rank in the middle of a forward pass; then what the caller sees."""
    run = at_the_probe({"stage": stage, "dtype": "float32"}, rank)
    calls: list[int] = []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    expected = sweep(run, PROBED)
    hook = run.model.module.blocks[1].up.register_forward_pre_hook(interrupt)
    try:
        probe(run, PROBED)
        notes = ["not interrupted"]
    except KeyboardInterrupt as error:
        notes = getattr(error, "__notes__", [])
    hook.remove()
    if stage == 3:
        return [notes, sweep(run, PROBED) == expected]
    live = attached(run.model)
    own = [s.live.equal(s.master) for s in live.shards()]
    live.push()
    return [notes, all(own) and sweep(run, PROBED) == expected]
