"""A user's own DeepSpeed engine with ZeRO-1, 2 or 3: its shards, what its step would do.

Imported only where the program uses DeepSpeed. theta is the fp32 masters, which are never
written; what the forward reads is written beside them and cast last, as a step does it. Two
things would measure the wrong weights in silence and are seen to here: ZeRO-3 keeps small
parameters gathered (13 % off), so everything is partitioned after each write; ZeRO-1 and 2
forward reads replicas, so each write is gathered from all ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from probe.directions.optimizer import next_step, rate_ratios, reader_of, unwrapped
from probe.errors import ConfigError, DirectionError, ParallelismError
from probe.parallel.live import LiveKeeper, LiveShard, ShardStep
from probe.parallel.zero_partitions import Partition, Piece, gradient_of, partitions_of


class ZeroRun:
    """Implements `probe.parallel.live.LiveRun`.

    Args:
        engine: What `deepspeed.initialize` returned.

    Raises:
        ParallelismError: A stage or an option that is not supported.
    """

    num_copies = 1

    def __init__(self, engine: Any) -> None:
        zero = engine.optimizer
        _refuse_unsupported(engine, zero)
        self.module: nn.Module = engine
        self._engine, self._zero = engine, zero
        self._gathers = hasattr(zero, "parameter_offload")  # ZeRO-3
        self.push_waits = not self._gathers
        self.group = zero.dp_process_group
        self.devices: set[torch.device] = set()  # parameters are where they are used
        self.clip_grad_norm = float(zero.clip_grad) if zero.clip_grad else None
        self.loss_scale = float(getattr(zero, "loss_scale", 1.0))
        self._names = {id(p): name for name, p in engine.named_parameters()}
        self._partitions = partitions_of(zero)

    def shards(self) -> Sequence[LiveShard]:
        """One for every trained parameter."""
        return [self._shard(part, piece) for part in self._partitions for piece in part.pieces]

    def steps(self, optimizer: Any) -> Sequence[ShardStep]:
        """What `engine.step()` would do, from flat moments and averaged gradients.

        Args:
            optimizer: None, or the engine's own in any of its wrappings.
        """
        inner = self._inner(optimizer)
        reader = reader_of(inner)
        self._require_gradients()
        ratios = rate_ratios(inner)
        found: list[ShardStep] = []
        for part in self._partitions:
            group, state = inner.param_groups[part.group], inner.state.get(part.master, {})
            for piece in part.pieces:
                shard = self._shard(part, piece)
                own = {key: _cut_state(value, part, piece) for key, value in state.items()}
                step = next_step(reader, shard.master, group, own, ratios[part.group])
                found.append(ShardStep(shard, gradient_of(part, piece), step))
        return found

    def push(self) -> None:
        """ZeRO-3: free what is gathered. ZeRO-1 and 2: gather the ranks' parts into replicas."""
        if self._gathers:
            self._zero.parameter_offload.partition_all_parameters()
            return
        from deepspeed.runtime.utils import all_gather_dp_groups

        zero = self._zero
        bf16 = hasattr(zero, "bf16_groups_flat")
        parts = zero.bf16_partitioned_groups if bf16 else zero.parallel_partitioned_bit16_groups
        with torch.no_grad():
            all_gather_dp_groups(
                groups_flat=zero.bf16_groups_flat if bf16 else zero.bit16_groups_flat,
                partitioned_param_groups=parts,
                dp_process_group=zero.real_dp_process_group,
                start_alignment_factor=zero.nccl_start_alignment_factor,
                allgather_bucket_size=zero.allgather_bucket_size,
            )

    def meeting_modules(self) -> Sequence[nn.Module]:
        """ZeRO-3 gathers before the forward of each module that has parameters of its own."""
        if not self._gathers:
            return []
        root = self._engine.module
        own = [
            m
            for m in root.modules()
            if m is not root and next(m.parameters(False), None) is not None
        ]
        return [root, *own]

    @contextmanager
    def kept(self) -> Iterator[LiveKeeper]:
        """Counters, flags and references that a forward pass of the engine changes."""
        keeper = LiveKeeper()
        restore = [_flags_restorer(self._engine, self._zero)]
        available = self._available()
        if self._gathers:
            restore.append(_forward_leaver(self._engine.module))
            self.push()
        try:
            yield keeper
        finally:
            for put_back in restore:
                put_back()
            if self._gathers:
                self.push()
            if available and not keeper.apart:
                available[0].all_gather(available)

    def _available(self) -> list[Any]:
        """ZeRO-3 parameters that are gathered now; it keeps small ones so between steps."""
        if not self._gathers:
            return []
        return [p for p in self._engine.module.parameters() if p.ds_status.name == "AVAILABLE"]

    def _inner(self, optimizer: Any) -> torch.optim.Optimizer:
        """The torch optimizer inside the engine; an optimizer= given must be that one."""
        inner: torch.optim.Optimizer = self._zero.optimizer
        if optimizer is not None:
            given = unwrapped(optimizer)
            if given is not self._zero and given is not inner:
                raise ConfigError(
                    f"optimizer= is {type(given).__name__}, which is not this engine's. Leave it "
                    "out, or pass engine.optimizer."
                )
        if type(inner).__module__.startswith("deepspeed.ops"):
            raise DirectionError(
                f"the engine steps with DeepSpeed's own {type(inner).__name__}; read are "
                'torch.optim\'s. Set "torch_adam": true in optimizer.params of the DeepSpeed '
                "config, or hand deepspeed.initialize a torch.optim.AdamW."
            )
        return inner

    def _require_gradients(self) -> None:
        engine = self._engine
        if not engine.managed_gradient_accumulation():
            raise ParallelismError(
                "with managed_gradient_accumulation false, DeepSpeed finishes its gradients "
                "inside engine.step(). Set it true, or pass direction=."
            )
        if not engine.is_gradient_accumulation_boundary():
            raise DirectionError(
                f"{engine.gradient_accumulation_steps()} micro-batches make a step and more of "
                "them are to come, so the step's gradient is not known yet. Measure after the "
                "backward pass of the last one, before engine.step()."
            )
        if any(part.grads is None for part in self._partitions):
            raise DirectionError(
                "the engine holds no averaged gradient. Call this after engine.backward(loss) and "
                "before engine.step(). accelerator.backward(loss) steps as well: call "
                "engine.backward(loss) and engine.step() yourself there, or pass direction=."
            )

    def _shard(self, part: Partition, piece: Piece) -> LiveShard:
        numel = piece.hi - piece.lo
        parameter: Any = piece.parameter
        return LiveShard(
            name=self._names[id(parameter)],
            shape=getattr(parameter, "ds_shape", parameter.shape),
            live=part.live.data.narrow(0, piece.start, numel),
            master=part.master.data.narrow(0, piece.start, numel),
            cut=lambda whole: whole.reshape(-1)[piece.lo : piece.hi],
        )


def _cut_state(value: Any, part: Partition, piece: Piece) -> Any:
    if isinstance(value, Tensor) and value.shape == part.master.shape:
        return value.narrow(0, piece.start, piece.hi - piece.lo)
    return value


def _flags_restorer(engine: Any, zero: Any) -> Callable[[], None]:
    """A function that puts back what the engine's forward counts, flags or drops."""
    hooks = zero._backward_hook_state
    flags = dict(vars(hooks))
    micro_step = getattr(zero, "micro_step_id", None)
    gradients = [(p, p.grad_accum) for p in engine.module.parameters() if hasattr(p, "grad_accum")]
    counts = [
        (module, name, module.__dict__[name])
        for module in engine.module.modules()
        for name in ("applied_pre_backward_ref_cnt", "ds_grads_remaining")
        if name in module.__dict__
    ]

    def restore() -> None:
        vars(hooks).update(flags)
        if micro_step is not None:
            zero.micro_step_id = micro_step
        for parameter, value in gradients:
            parameter.grad_accum = value
        for module, name, value in counts:
            setattr(module, name, value)

    return restore


def _forward_leaver(module: nn.Module) -> Callable[[], None]:
    """A function that undoes what a ZeRO-3 forward pass that ended in the middle left behind.

    A module still marked as in its forward would gather a parameter when it is merely looked at.
    """
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    depth = len(FWD_MODULE_STACK)

    def leave() -> None:
        del FWD_MODULE_STACK[depth:]
        for each in module.modules():
            if getattr(each._parameters, "_in_forward", False):
                each._parameters._in_forward = False  # type: ignore[attr-defined]

    return leave


def _refuse_unsupported(engine: Any, zero: Any) -> None:
    known = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer")
    config = engine._config.zero_config
    found = {
        "pipeline parallelism": engine.pipeline_parallelism,
        "MoE layers": engine.has_moe_layers,
        "tensor parallelism": engine.autotp_size() > 1
        or getattr(zero, "model_parallel_group", None) is not None,
        "sequence parallelism": getattr(zero, "sequence_parallel_size", 1) > 1,
        "ZenFlow": engine.zenflow,
        "DeepCompile": engine.is_deepcompile_active(),
        "optimizer offload": _is_on(engine.zero_offload_optimizer()),
        "parameter offload": _is_on(engine.zero_offload_param()),
        "quantized weights": config.zero_quantized_weights
        or config.zero_quantized_nontrainable_weights,
        "hierarchical partitioning": config.zero_hpz_partition_size > 1,
        "states offloaded by engine.offload_states": bool(getattr(zero, "offloaded_states", ())),
        "torch autocast with a gradient scaler": getattr(zero, "torch_autocast_gradscaler", None)
        is not None,
    }
    options = [name for name, present in found.items() if present]
    if type(zero).__name__ not in known:
        options.insert(0, f"{type(zero).__name__} (ZeRO stage {engine.zero_optimization_stage()})")
    if options:
        raise ParallelismError(
            f"this DeepSpeed engine uses {', '.join(options)}, which is not supported. Supported "
            "are ZeRO stages 1, 2 and 3 over data-parallel ranks, with their states on the "
            "device. Measure on an unsharded replica, or a checkpoint with `probe run`."
        )


def _is_on(offload: Any) -> bool:
    device = getattr(offload, "device", "none")
    return str(getattr(device, "value", device)) != "none"
