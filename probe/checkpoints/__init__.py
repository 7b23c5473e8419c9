"""Open and save checkpoints. Importing this package alone imports no torch.

A new format of local directories is one file here with a `Source`, plus one line in
`probe.checkpoints.formats`; a new kind of place is one line in `_OPENERS`.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.errors import CheckpointError
from probe.result import CheckpointRef

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from probe.checkpoints.source import Source as Source

_OPENERS = {  # CheckpointRef.source -> module with open_source(ref)
    "local": "probe.checkpoints.local",
    "hub": "probe.checkpoints.hub",
    "gguf": "probe.checkpoints.gguf",
}


def open_checkpoint(ref: CheckpointRef) -> "Source":
    """The checkpoint a reference names, opened and checked, nothing loaded yet.

    Args:
        ref: From `probe.series.list_checkpoints`, or built by hand.

    Returns:
        Its `Source`.

    Raises:
        CheckpointError: It is missing, broken, or in a format that is refused.
        CheckpointUnavailableError: The hub cannot be reached now.

    Cost: header reads; for a hub revision that is not cached, its download.
    """
    if ref.source not in _OPENERS:
        raise CheckpointError(f"unknown source {ref.source!r}; known: {', '.join(_OPENERS)}")
    source: Source = import_module(_OPENERS[ref.source]).open_source(ref)
    return source


def save_checkpoint(
    model: "PreTrainedModel",
    directory: str | Path,
    *,
    optimizer: "torch.optim.Optimizer | None" = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    training_state: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint directory that `open_checkpoint` reads, all of it or nothing.

    Args:
        model: A transformers model.
        directory: Where to; must not exist yet, or be empty.
        optimizer: Adam or AdamW over the model's parameters; its moments are saved as
            `<fqn>.exp_avg`, `<fqn>.exp_avg_sq`, `<fqn>.step` in optimizer.safetensors.
            A parameter it has not stepped yet is saved as what Adam starts from: zeros, step 0.
        tokenizer: Saved beside the weights.
        training_state: JSON values kept in training_state.json: `step`, `tokens`,
            `learning_rate`, and whatever else is useful.

    Returns:
        The directory.

    Raises:
        CheckpointError: The directory holds something, or the optimizer is not Adam.

    Cost: one copy of everything on disk, written beside the target and renamed.
    """
    from probe.checkpoints.save import write_checkpoint

    return write_checkpoint(
        model,
        Path(directory),
        optimizer=optimizer,
        tokenizer=tokenizer,
        training_state=training_state,
    )
