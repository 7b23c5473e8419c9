"""A DeepSpeed ZeRO-1, 2 or 3 checkpoint as a `Source`, read without deepspeed.

Weights are the fp32 masters the optimizer steps, also where Trainer saved bf16 safetensors beside
them: those are rounded copies. DeepSpeed saves no model config, so that comes from a config.json
in the directory or around it, or from `checkpoints.config` of the job.
"""

from functools import cached_property
from pathlib import Path

import torch
from transformers import PretrainedConfig

from probe.checkpoints.bare import BareSource, config_around
from probe.checkpoints.dcp_keys import find_prefix, without_wrappers
from probe.checkpoints.deepspeed_files import DeepSpeedFiles, find_deepspeed_files
from probe.checkpoints.deepspeed_state import read_zero_state
from probe.checkpoints.source import TensorKind
from probe.errors import CheckpointError
from probe.result import CheckpointRef


def open_source(ref: CheckpointRef) -> "DeepSpeedSource":
    """The directory `ref.location`; see `probe.checkpoints.open_checkpoint`."""
    return DeepSpeedSource(ref, find_deepspeed_files(Path(ref.location).expanduser()))


class DeepSpeedSource(BareSource):
    """Weights and moments of one step; `probe.checkpoints.source.Source` says what for.

    Args:
        ref: What was asked for.
        files: Where everything lies.

    Raises:
        CheckpointError: The files are broken, of two runs, or of a run that is not read.
    """

    def __init__(self, ref: CheckpointRef, files: DeepSpeedFiles) -> None:
        self._state = read_zero_state(files)
        found = {
            "format": "deepspeed",
            "has_moments": self._state.has_moments,
            "size_bytes": files.size_bytes,
        }
        super().__init__(ref.model_copy(update=found), files.directory, around=files.around)

    @property
    def has_moments(self) -> bool:
        """Whether AdamW moments are stored."""
        return self._state.has_moments

    def read(self, name: str, kind: TensorKind, lo: int = 0, hi: int | None = None) -> torch.Tensor:
        """See `Source.read`. Cost: exactly the range, mapped from the files."""
        return self._state.read(self._saved(name), kind, lo, hi)

    def hyper(self, name: str) -> dict[str, float]:
        """See `Source.hyper`."""
        step = self._state.step(self._saved(name))
        if step is None:
            raise CheckpointError(
                f"{self.directory}: no optimizer step of {name!r}; use moments: warmup"
            )
        return {"step": step}

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Source.weight_shapes`."""
        return {name: self._state.shapes[saved] for name, saved in self._names.items()}

    def _make_config(self) -> PretrainedConfig:
        return config_around(self.ref, self._around, "DeepSpeed saves tensors only")

    def _saved(self, name: str) -> str:
        if name not in self._names:
            raise CheckpointError(f"{self.directory}: the model has no parameter {name!r}")
        return self._names[name]

    @cached_property
    def _names(self) -> dict[str, str]:
        """Parameter fqn -> name as saved; every shape checked, none left over."""
        saved = {without_wrappers(name): name for name in self._state.shapes}
        shared = {without_wrappers(name): other for name, other in self._state.shared.items()}
        prefix = find_prefix([*saved, *shared], self._shapes, where=f"{self.directory}: weights")
        names = {}
        for name, shape in self._shapes.items():
            if prefix + name in shared:
                raise CheckpointError(
                    f"{self.directory}: {name!r} shares its values with "
                    f"{shared[prefix + name]!r}, in the config it does not. Is the config of "
                    "another model?"
                )
            names[name] = saved[prefix + name]
            found = self._state.shapes[names[name]]
            if found != shape:
                raise CheckpointError(
                    f"{self.directory}: key {names[name]!r} has shape {list(found)}, expected "
                    f"{list(shape)} for {name!r}. Is the config of another model?"
                )
        left = sorted(saved[name] for name in saved.keys() - {prefix + name for name in names})
        if left:
            raise CheckpointError(
                f"{self.directory}: {len(left)} stored weights have no place in the model, the "
                f"first is {left[0]!r}. Is the config of another model?"
            )
        return names
