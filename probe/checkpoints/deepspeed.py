"""A DeepSpeed ZeRO-1, 2 or 3 checkpoint as a `Source`, read without deepspeed.

Weights are the fp32 masters the optimizer steps, also where Trainer saved bf16 safetensors beside
them: those are rounded copies. DeepSpeed saves no model config, so that comes from a config.json
in the directory or around it, or from `checkpoints.config` of the job.
"""

from functools import cached_property
from pathlib import Path

import torch
from transformers import PretrainedConfig

from probe.checkpoints.assemble import persistent_buffer_shapes
from probe.checkpoints.bare import BareSource, config_around
from probe.checkpoints.betas import Betas
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
        saved = self._saved(name)
        if saved not in self._state.buffers:
            return self._state.read(saved, kind, lo, hi)
        flat = self._state.buffers[saved].reshape(-1)
        end = flat.numel() if hi is None else hi
        if kind != "weight" or not 0 <= lo <= end <= flat.numel():
            raise CheckpointError(
                f"{self.directory}: {name!r} is a buffer of {flat.numel()} elements without "
                f"moments, asked for {kind} {lo}..{end}"
            )
        return flat[lo:end].clone()

    def hyper(self, name: str) -> dict[str, float]:
        """See `Source.hyper`."""
        saved = self._saved(name)
        step = None if saved in self._state.buffers else self._state.step(saved)
        if step is None:
            raise CheckpointError(
                f"{self.directory}: no optimizer step of {name!r}; use moments: warmup"
            )
        return {"step": step}

    @property
    def stored_betas(self) -> Betas | None:
        """See `SaysBetas`."""
        return self._state.betas

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Source.weight_shapes`."""
        stored = self._stored_shapes
        return {name: stored[saved] for name, saved in self._names.items()}

    def _make_config(self) -> PretrainedConfig:
        return config_around(self.ref, self._around, "DeepSpeed saves tensors only")

    def _saved(self, name: str) -> str:
        if name not in self._names:
            raise CheckpointError(f"{self.directory}: the model has no parameter {name!r}")
        return self._names[name]

    @cached_property
    def _stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name as saved -> shape, of every parameter and buffer."""
        buffers = {name: tuple(tensor.shape) for name, tensor in self._state.buffers.items()}
        return buffers | dict(self._state.shapes)

    @cached_property
    def _names(self) -> dict[str, str]:
        """Fqn of a parameter or persistent buffer -> name as saved; every shape checked."""
        saved = {without_wrappers(name): name for name in self._stored_shapes}
        shared = {without_wrappers(name): other for name, other in self._state.shared.items()}
        prefix = find_prefix([*saved, *shared], self._shapes, where=f"{self.directory}: weights")
        expected = self._shapes | persistent_buffer_shapes(self._config, self.directory)
        names = {}
        for name, shape in expected.items():
            if prefix + name in shared:
                raise CheckpointError(
                    f"{self.directory}: {name!r} shares its values with "
                    f"{shared[prefix + name]!r}, in the config it does not. Is the config of "
                    "another model?"
                )
            if prefix + name not in saved:
                raise CheckpointError(f"{self.directory}: no buffer {name!r} among those saved")
            names[name] = saved[prefix + name]
            found = self._stored_shapes[names[name]]
            if found != shape:
                raise CheckpointError(
                    f"{self.directory}: key {names[name]!r} has shape {list(found)}, expected "
                    f"{list(shape)} for {name!r}. Is the config of another model?"
                )
        left = sorted(set(self._state.shapes) - set(names.values()))
        if left:
            raise CheckpointError(
                f"{self.directory}: {len(left)} stored weights have no place in the model, the "
                f"first is {left[0]!r}. Is the config of another model?"
            )
        return names
