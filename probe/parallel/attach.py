"""Which kind of sharded training run a model belongs to, if any.

`probe.critical_sharpness` asks here. DeepSpeed is only looked at where the program has imported
it already: a model can be a DeepSpeed engine only then.
"""

import sys
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from probe.errors import ParallelismError
from probe.parallel.live import LiveRun


def attached(model: nn.Module) -> LiveRun | None:
    """The run this model is trained in; None where every rank holds all of it.

    Args:
        model: As loss_fn calls it: an FSDP2 module (also inside a wrapper, or prepared by
            accelerate), a DeepSpeed engine, or anything that is not sharded.

    Raises:
        ParallelismError: Sharded in a way that is not supported; the message says which.
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ParallelismError(
            "this model is wrapped by FullyShardedDataParallel (FSDP1), which keeps flattened "
            "copies of its own. Use torch.distributed.fsdp.fully_shard (FSDP2)."
        )
    deepspeed: Any = sys.modules.get("deepspeed")
    engine_class = getattr(deepspeed, "DeepSpeedEngine", None)  # None too while it is imported
    if engine_class is not None and isinstance(model, engine_class):
        from probe.parallel.attach_deepspeed import ZeroRun

        return ZeroRun(model)
    _refuse_module_of_an_engine(model)
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        from probe.parallel.attach_fsdp2 import Fsdp2Run

        return Fsdp2Run(model)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ParallelismError(
                f"{name!r} is a DTensor placed {parameter.placements}, but no module is under "
                "fully_shard: tensor parallelism alone is not supported. Call it on an unsharded "
                "replica, or shard with fully_shard over one data-parallel mesh."
            )
    return None


def _refuse_module_of_an_engine(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            raise ParallelismError(
                f"{name!r} belongs to a DeepSpeed engine. Pass the engine itself as model: its "
                "module alone does not say where masters, moments and gradients are."
            )
