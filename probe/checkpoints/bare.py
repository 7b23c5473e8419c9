"""What sources have in common that store tensors with no Hugging Face directory around them.

The model is made from a config that lies beside the tensors or is named by the job, and filled
with what `read` gives; the tokenizer likewise.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from probe.checkpoints.assemble import (
    assemble_causal_lm,
    parameter_shapes,
    read_model_config,
    skeleton,
)
from probe.checkpoints.huggingface import TOKENIZER_FILES, load_tokenizer
from probe.checkpoints.source import TensorKind
from probe.errors import CheckpointError
from probe.result import CheckpointRef


class BareSource(ABC):
    """Everything of a `probe.checkpoints.source.Source` but where the tensors come from.

    Args:
        ref: What was asked for, format, moments and size filled in.
        directory: For messages.
        around: Directories a tokenizer may lie in, nearest first.
        tokenizer_hint: Ends the message where none of them has one.
    """

    def __init__(
        self,
        ref: CheckpointRef,
        directory: Path,
        *,
        around: Iterable[Path],
        tokenizer_hint: str = "",
    ) -> None:
        self.ref = ref
        self.directory = directory
        self._around = tuple(around)
        self._tokenizer_hint = tokenizer_hint

    @property
    @abstractmethod
    def has_moments(self) -> bool:
        """Whether AdamW moments are stored."""

    @abstractmethod
    def read(self, name: str, kind: TensorKind, lo: int = 0, hi: int | None = None) -> torch.Tensor:
        """See `Source.read`."""

    @abstractmethod
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Source.weight_shapes`."""

    @abstractmethod
    def _make_config(self) -> PretrainedConfig:
        """The model's config; asked for once, when it is first needed."""

    def load_model(self, dtype: torch.dtype, attention: str) -> PreTrainedModel:
        """See `Source.load_model`. Cost: the stored weights and the model stand side by side."""
        stored = self.weight_shapes()
        tensors = {name: self.read(name, "weight").reshape(stored[name]) for name in stored}
        return assemble_causal_lm(self._config, tensors, dtype, attention, where=self.directory)

    def skeleton(self, attention: str) -> PreTrainedModel:
        """See `Source.skeleton`."""
        return skeleton(self._config, attention, self.directory)

    def load_tokenizer(self, override: str | None = None) -> Tokenizer:
        """See `Source.load_tokenizer`."""
        if override is not None:
            return load_tokenizer(override)
        for directory in self._around:
            if any((directory / file).is_file() for file in TOKENIZER_FILES):
                return load_tokenizer(str(directory))
        raise CheckpointError(
            f"{self.directory}: no tokenizer beside the tensors; set model.tokenizer to a "
            f"directory or hub id{self._tokenizer_hint}"
        )

    @cached_property
    def _config(self) -> PretrainedConfig:
        return self._make_config()

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter fqn -> shape, as the config has them."""
        return parameter_shapes(self._config, self.directory)


def config_around(ref: CheckpointRef, around: Iterable[Path], what: str) -> PretrainedConfig:
    """The config.json of the nearest directory that has one, else the one the job names.

    Args:
        ref: Whose `config` is the job's.
        around: Directories, nearest first.
        what: Begins the message where there is none: what the format holds.

    Raises:
        CheckpointError: There is none, or it is not usable.
    """
    for directory in around:
        if (directory / "config.json").is_file():
            return read_model_config(directory / "config.json")
    if ref.config is None:
        raise CheckpointError(
            f"{ref.location}: {what} and there is no config.json beside them; set "
            "checkpoints.config to the model's Hugging Face config.json"
        )
    named = Path(ref.config).expanduser()
    return read_model_config(named / "config.json" if named.is_dir() else named)
