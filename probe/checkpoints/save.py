"""Write checkpoint directories that hold everything a measurement needs, safetensors only."""

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from probe.checkpoints.layout import MOMENT_KINDS
from probe.checkpoints.quiet import quiet_transformers
from probe.errors import CheckpointError


def write_checkpoint(
    model: PreTrainedModel,
    directory: Path,
    *,
    optimizer: torch.optim.Optimizer | None,
    tokenizer: PreTrainedTokenizerBase | None,
    training_state: dict[str, Any] | None,
) -> Path:
    """See `probe.checkpoints.save_checkpoint`."""
    directory = directory.expanduser()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory}: exists already; checkpoints are never overwritten")
    moments = None if optimizer is None else adam_moments(model, optimizer)
    state = None if training_state is None else json.dumps(training_state, indent=2) + "\n"
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.parent / f".{directory.name}.{secrets.token_hex(6)}.partial"
    partial.mkdir()
    try:
        with quiet_transformers():
            model.save_pretrained(partial)
        if moments is not None:
            save_file(moments, partial / "optimizer.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if state is not None:
            (partial / "training_state.json").write_text(state, encoding="utf-8")
        for path in partial.rglob("*"):
            _flush(path)
        partial.replace(directory)
        _flush(directory.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return directory


def adam_moments(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """AdamW's state keyed by parameter fqn: `<fqn>.exp_avg`, `<fqn>.exp_avg_sq`, `<fqn>.step`.

    Args:
        model: Names the parameters.
        optimizer: Adam or AdamW, without amsgrad.

    Returns:
        CPU tensors; moments in the dtype the optimizer keeps, `step` as a float32 scalar.

    Raises:
        CheckpointError: The optimizer is another one, has amsgrad (its running maximum is part
            of the direction), or holds parameters the model does not have.
    """
    held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    names = {id(p): name for name, p in model.named_parameters()}
    strangers = len(held.keys() - names.keys())
    if strangers:
        raise CheckpointError(
            f"the optimizer holds {strangers} parameters that model.named_parameters() does not"
        )
    moments: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        group = held.get(id(parameter))
        if group is None:
            continue
        if "betas" not in group or group.get("amsgrad"):
            raise CheckpointError(
                f"optimizer {type(optimizer).__name__}: moments are saved for Adam and AdamW "
                "without amsgrad; pass optimizer=None for others"
            )
        state = optimizer.state.get(parameter) or _state_before_the_first_step(parameter)
        for kind in MOMENT_KINDS:
            if kind not in state:
                raise CheckpointError(
                    f"optimizer {type(optimizer).__name__} has no {kind!r} for {name!r}; found "
                    f"{', '.join(map(str, state)) or 'nothing'}"
                )
            value = torch.as_tensor(state[kind])
            if kind == "step":
                value = value.to(torch.float32)
            moments[f"{name}.{kind}"] = value.detach().to("cpu", copy=True).contiguous()
    return moments


def _state_before_the_first_step(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """What Adam starts from: both moments zero, no step taken."""
    zeros = torch.zeros_like(parameter, requires_grad=False)
    return {"exp_avg": zeros, "exp_avg_sq": zeros, "step": torch.zeros(())}


def _flush(path: Path) -> None:
    """Make the rename mean something after a power cut: data first, then the directory entry."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
