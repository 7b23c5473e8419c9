"""A user's own FSDP2 training run: its shards, what its optimizer would do to them.

The live shards are FSDP's own, at the precision the optimizer steps in; where half precision is
asked for, FSDP casts them when it gathers. Two things would measure the wrong weights in silence
and are seen to here: a group left gathered (the root's, by FSDP's default), or gathered ahead,
keeps its old values, so every group is resharded after each write; shards move in FSDP's lazy
set-up, so they are taken only after it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from probe.directions.optimizer import next_step, rate_ratios, reader_of, unwrapped
from probe.errors import ConfigError, DirectionError, ParallelismError
from probe.parallel.live import LiveKeeper, LiveShard, ShardStep


class Fsdp2Run:
    """Implements `probe.parallel.live.LiveRun`.

    Args:
        model: Holds modules under `fully_shard`, all on one data-parallel mesh.

    Raises:
        ParallelismError: Another mesh than FSDP's or HSDP's, or a trainable parameter that
            is not sharded.
        DirectionError: No forward pass has run yet, or gradients wait to be reduced.
    """

    push_waits = False
    clip_grad_norm: float | None = None  # the training loop's matter, done before the step
    loss_scale = 1.0

    def __init__(self, model: nn.Module) -> None:
        self.module = model
        self._groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._states: list[Any] = list({id(s): s for s in map(_state, self._groups)}.values())
        if not hasattr(self._states[0], "_fsdp_param_groups"):
            raise ParallelismError(
                f"torch {torch.__version__} keeps FSDP2's state elsewhere. Use torch 2.13."
            )
        if any(state._is_root is None for state in self._states):
            raise DirectionError(
                "FSDP sets up its shards in the first forward pass, and not every module of this "
                "model has run one. Run the model once (a training step has)."
            )
        self._refuse_unreduced_gradients()
        gathered = {name for name, p in model.named_parameters() if not isinstance(p, DTensor)}
        self.push()
        self._sharded: dict[str, DTensor] = _sharded_parameters(model)
        self._was_gathered = self._owners(gathered & self._sharded.keys())
        mesh = _one_mesh(self._sharded)
        self.group: dist.ProcessGroup | None = mesh.get_group() if mesh.ndim == 1 else None
        self.num_copies = mesh.size(0) if mesh.ndim == 2 else 1
        on_device = mesh.device_type != "cpu"
        self.devices: set[torch.device] = (
            {_current_device(mesh.device_type)} if on_device else set()
        )

    def shards(self) -> Sequence[LiveShard]:
        """One for every sharded parameter, frozen ones too."""
        return [_shard(name, parameter) for name, parameter in self._sharded.items()]

    def steps(self, optimizer: Any) -> Sequence[ShardStep]:
        """What `optimizer.step()` would do, from DTensor moments and gradients."""
        if optimizer is None:
            raise ConfigError("pass exactly one of optimizer= and direction=; found neither.")
        optimizer = unwrapped(optimizer)
        reader = reader_of(optimizer)
        shards = {id(self._sharded[s.name]): s for s in self.shards()}
        found: list[ShardStep] = []
        for scale, group in zip(rate_ratios(optimizer), optimizer.param_groups, strict=True):
            for parameter in group["params"]:
                shard = shards.get(id(parameter))
                if shard is None:
                    raise DirectionError(
                        f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that "
                        "is not one of this model's shards. Make the optimizer after fully_shard, "
                        "from the sharded model's parameters."
                    )
                state = {key: _local(v) for key, v in optimizer.state.get(parameter, {}).items()}
                step = next_step(reader, shard.master, group, state, scale)
                grad = None if parameter.grad is None else _local(parameter.grad)
                found.append(ShardStep(shard, grad, step))
        return found

    def push(self) -> None:
        """Drop every gathered copy, so that the next forward pass gathers what was written.

        A gather that was begun ahead of use and never used holds old values too.
        """
        for group in self._groups:
            if any(g._all_gather_result is not None for g in _param_groups(_state(group))):
                group.unshard()
            group.reshard()

    def meeting_modules(self) -> Sequence[nn.Module]:
        """FSDP gathers before the forward of each of its modules."""
        return [group for group in self._groups if isinstance(group, nn.Module)]

    @contextmanager
    def kept(self) -> Iterator[LiveKeeper]:
        """Gathered groups are gathered again; lists of forwards that no backward follows end."""
        keeper = LiveKeeper()
        lists: list[list[Any]] = [_comm_context(s).post_forward_order for s in self._states]
        lists += [g._post_forward_indices for s in self._states for g in _param_groups(s)]
        lengths = [len(entries) for entries in lists]
        try:
            yield keeper
        finally:
            if keeper.cut_short:
                for state in self._states:
                    if state._is_root:
                        state._reset_iter_state()
            for entries, length in zip(lists, lengths, strict=True):
                del entries[length:]
            self.push()
            if not keeper.apart:
                for group in self._was_gathered:
                    group.unshard()

    def _owners(self, names: set[str]) -> list[FSDPModule]:
        """The innermost FSDP module above each of these parameters, in the model's order."""
        modules = dict(self.module.named_modules())
        owners: dict[int, FSDPModule] = {}
        for name in sorted(names):
            path = name.rpartition(".")[0]
            while not isinstance(modules[path], FSDPModule):
                path = path.rpartition(".")[0]
            owners[id(modules[path])] = modules[path]
        return [group for group in self._groups if id(group) in owners]

    def _refuse_unreduced_gradients(self) -> None:
        for state in self._states:
            for group in _param_groups(state):
                waiting = group._partial_reduce_output is not None or any(
                    p.unsharded_accumulated_grad is not None
                    or getattr(getattr(p, "_unsharded_param", None), "grad", None) is not None
                    for p in group.fsdp_params
                )
                if waiting:
                    raise DirectionError(
                        "gradients are accumulated but not reduced over the ranks yet: the last "
                        "backward ran under set_requires_gradient_sync(False) or "
                        "set_requires_all_reduce(False). Measure after the backward pass that "
                        "reduces them, right before optimizer.step()."
                    )


def _sharded_parameters(model: nn.Module) -> dict[str, DTensor]:
    """Every sharded parameter by name, once all groups are resharded."""
    found: dict[str, DTensor] = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            found[name] = parameter
        elif parameter.requires_grad:
            raise ParallelismError(
                f"{name!r} is trainable, but under no fully_shard (ignored_params, or a module "
                "outside): nothing says whether the ranks agree on it. Shard it, or freeze it."
            )
    return found


def _one_mesh(parameters: dict[str, DTensor]) -> DeviceMesh:
    """The mesh all parameters are on: one data-parallel dimension, or HSDP's two."""
    mesh: DeviceMesh | None = None
    for name, parameter in parameters.items():
        placements = parameter.placements
        fits = type(placements[-1]) is Shard and all(type(p) is Replicate for p in placements[:-1])
        if mesh is not None:
            fits = fits and parameter.device_mesh == mesh
        mesh = parameter.device_mesh
        if not fits or mesh.ndim > 2 or (mesh.ndim == 2 and mesh.size() != dist.get_world_size()):
            raise ParallelismError(
                f"{name!r} is placed {placements} on {mesh}. Supported is one mesh for all "
                "parameters: FSDP2 over one dimension, or HSDP over (replicate, shard) that holds "
                "every rank. Not supported: tensor, pipeline or expert parallelism. Call it on an "
                "unsharded replica."
            )
    assert mesh is not None
    return mesh


def _shard(name: str, parameter: DTensor) -> LiveShard:
    live = parameter.to_local().data

    def cut(whole: Tensor) -> Tensor:
        if isinstance(whole, DTensor):
            same = whole.device_mesh == parameter.device_mesh
            if not same or whole.placements != parameter.placements:
                raise DirectionError(
                    f"the direction of {name!r} is a DTensor placed {whole.placements}; the "
                    f"parameter is placed {parameter.placements}. Give the same placement, or "
                    "the whole tensor."
                )
            return whole.to_local()
        placement = parameter.placements[-1]
        assert isinstance(placement, Shard)
        mesh, dim = parameter.device_mesh, placement.dim
        size = whole.shape[dim]
        each = -(-size // mesh.size(mesh.ndim - 1))
        start = min(mesh.get_local_rank(mesh.ndim - 1) * each, size)
        return whole.narrow(dim, start, live.shape[dim] if live.numel() else 0)

    return LiveShard(name=name, shape=parameter.shape, live=live, master=live, cut=cut)


def _local(value: Any) -> Any:
    return value.to_local().detach() if isinstance(value, DTensor) else value


def _current_device(kind: str) -> torch.device:
    return torch.device(kind, torch.get_device_module(kind).current_device())


def _state(module: FSDPModule) -> Any:
    return module._get_fsdp_state()


def _param_groups(state: Any) -> list[Any]:
    groups: list[Any] = state._fsdp_param_groups
    return groups


def _comm_context(state: Any) -> Any:
    return state._comm_ctx
