"""A Hugging Face directory of safetensors as a `Source`.

The stock transformers loader makes the model; what it would only warn about (a weight that is
missing and drawn at random, one left over, one of the wrong shape) is an error here. Tensors
are read by flat range straight from the file, so no rank ever needs a whole model.
"""

import difflib
import re
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from probe.checkpoints.assemble import read_model_config, skeleton
from probe.checkpoints.fetch import TOKENIZER, fetch
from probe.checkpoints.header import ITEM_BYTES, StoredTensor
from probe.checkpoints.layout import (
    HOW_TO_CONVERT,
    Layout,
    read_config,
    read_json_object,
    read_layout,
)
from probe.checkpoints.quiet import quiet_transformers
from probe.checkpoints.report import check_report, first_line
from probe.checkpoints.source import TensorKind
from probe.errors import CheckpointError
from probe.result import CheckpointRef

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)


def open_source(ref: CheckpointRef) -> "HuggingFaceSource":
    """The directory `ref.location`; see `probe.checkpoints.open_checkpoint`."""
    return HuggingFaceSource(ref, Path(ref.location).expanduser())


class HuggingFaceSource:
    """Weights and moments of one directory; `probe.checkpoints.source.Source` says what for."""

    def __init__(self, ref: CheckpointRef, directory: Path) -> None:
        """Read the headers.

        Args:
            ref: What was asked for.
            directory: Where its files are; differs from `ref.location` for hub revisions.

        Raises:
            CheckpointError: The directory is broken or refused.
        """
        self._layout: Layout = read_layout(directory)
        _refuse_what_cannot_be_measured(directory)
        self.directory = directory
        self.keep: object = None  # what must live as long as this source: a lock on its files
        self.ref = ref.model_copy(
            update={
                "format": self._layout.format,
                "has_moments": self._layout.has_moments,
                "size_bytes": self._layout.size_bytes,
            }
        )

    @property
    def has_moments(self) -> bool:
        """Whether AdamW moments are stored."""
        return self._layout.has_moments

    def load_model(self, dtype: torch.dtype, attention: str) -> PreTrainedModel:
        """See `Source.load_model`."""
        model = load_causal_lm(self.directory, dtype, attention)
        self._check_floating()
        return model

    def skeleton(self, attention: str) -> PreTrainedModel:
        """See `Source.skeleton`."""
        config = read_model_config(self.directory / "config.json")
        return skeleton(config, attention, self.directory)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Source.weight_shapes`."""
        self._check_floating()
        keys = {name: self._key(name) for name in self.skeleton("eager").state_dict()}
        left = self._layout.weights.keys() - set(keys.values())
        names = keys | {key: key for key in left}
        return {n: self._layout.weights[key].shape for n, key in names.items() if key is not None}

    def read(self, name: str, kind: TensorKind, lo: int = 0, hi: int | None = None) -> torch.Tensor:
        """See `Source.read`."""
        return read_range(self._find(name, kind), lo, hi)

    def hyper(self, name: str) -> dict[str, float]:
        """See `Source.hyper`."""
        tensor = self._find_moment(name, "step")
        if tensor.num_elements != 1:
            raise CheckpointError(
                f"{tensor.file}: key {tensor.key!r} has shape {list(tensor.shape)}, expected one "
                "number"
            )
        value = read_range(tensor).item()
        if value != int(value) or value < 0:
            raise CheckpointError(
                f"{tensor.file}: key {tensor.key!r} is {value}, expected a whole number >= 0"
            )
        return {"step": int(value)}

    def load_tokenizer(self, override: str | None = None) -> Tokenizer:
        """See `Source.load_tokenizer`."""
        return load_tokenizer(override or str(self.directory))

    def _find(self, name: str, kind: str) -> StoredTensor:
        if kind != "weight":
            return self._find_moment(name, kind)
        key = self._key(name)
        if key is not None:
            return self._layout.weights[key]
        raise CheckpointError(
            f"{self.directory}: no weight {name!r}; found {_nearest(name, self._layout.weights)}"
        )

    def _key(self, name: str) -> str | None:
        """The key a weight is stored under: base models are saved without the head's prefix."""
        keys = (name, name.partition(".")[2], f"model.{name}", f"transformer.{name}")
        return next((key for key in keys if key in self._layout.weights), None)

    def _find_moment(self, name: str, kind: str) -> StoredTensor:
        key = f"{name}.{kind}"
        if key in self._layout.moments:
            return self._layout.moments[key]
        if self._layout.has_moments:
            raise CheckpointError(
                f"{self.directory}: no {key!r} among the stored moments; found "
                f"{_nearest(key, self._layout.moments)}. Use moments: warmup, or a checkpoint "
                "saved with the whole optimizer state"
            )
        pickled = [p for p in self._layout.pickles if p.startswith(("optim", "global_step"))]
        hint = f" {', '.join(pickled)} is a pickle. {HOW_TO_CONVERT}" if pickled else ""
        raise CheckpointError(
            f"{self.directory}: no optimizer state, expected {key!r} in optimizer.safetensors. "
            f"Use moments: warmup, or a checkpoint saved with optimizer state.{hint}"
        )

    def _check_floating(self) -> None:
        for tensor in self._layout.weights.values():
            if tensor.dtype not in DTYPES:
                raise CheckpointError(
                    f"{tensor.file}: key {tensor.key!r} has dtype {tensor.dtype}; expected one of "
                    f"{', '.join(DTYPES)}"
                )


def read_range(tensor: StoredTensor, lo: int = 0, hi: int | None = None) -> torch.Tensor:
    """Elements lo..hi of one stored tensor, flattened: (hi - lo,) in its stored dtype.

    Raises:
        CheckpointError: The range lies outside the tensor, the dtype is none torch knows, or
            the file ends early.

    Cost: one seek and one read of exactly these bytes.
    """
    end = tensor.num_elements if hi is None else hi
    if not 0 <= lo <= end <= tensor.num_elements:
        raise CheckpointError(
            f"{tensor.file}: key {tensor.key!r} has {tensor.num_elements} elements, asked for "
            f"{lo}..{end}"
        )
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None or sys.byteorder != "little":
        raise CheckpointError(
            f"{tensor.file}: key {tensor.key!r} has dtype {tensor.dtype}; expected one of "
            f"{', '.join(DTYPES)} on a little-endian machine"
        )
    if lo == end:
        return torch.empty(0, dtype=dtype)
    item = ITEM_BYTES[tensor.dtype]
    buffer = bytearray((end - lo) * item)
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start + lo * item)
        num_read = stream.readinto(buffer)
    if num_read != len(buffer):
        raise CheckpointError(
            f"{tensor.file}: key {tensor.key!r}: found {num_read} bytes, expected {len(buffer)}"
        )
    return torch.frombuffer(buffer, dtype=dtype)


def load_causal_lm(
    directory: Path, dtype: torch.dtype, attention: str, *, gguf_file: str | None = None
) -> PreTrainedModel:
    """A causal language model from local files, every weight accounted for.

    Args:
        directory: Holds config.json and safetensors, or the GGUF file.
        dtype: Of the parameters.
        attention: Kernel name for transformers.
        gguf_file: Name of a GGUF file in the directory, instead of safetensors.

    Returns:
        The model on the CPU, in eval mode, without a key/value cache.

    Raises:
        CheckpointError: See `Source.load_model`.
    """
    where = directory / gguf_file if gguf_file else directory
    options: dict[str, Any] = (
        {"gguf_file": gguf_file} if gguf_file is not None else {"use_safetensors": True}
    )
    loader: Any = AutoModelForCausalLM
    try:
        with quiet_transformers():
            model, report = loader.from_pretrained(
                directory,
                dtype=dtype,
                attn_implementation=attention,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # reported, and raised below with both shapes
                output_loading_info=True,
                **options,
            )
    except MemoryError:
        raise
    except Exception as error:  # transformers, safetensors and config checks each raise their own
        hint = ""
        if attention != "eager" and "attn_implementation" in str(error):
            hint = f". This model has no {attention} attention: use model.attention: eager"
        raise CheckpointError(f"{where}: cannot be loaded: {first_line(error)}{hint}") from error
    check_report(where, report)
    model.config.use_cache = False
    loaded: PreTrainedModel = model.eval()
    return loaded


def load_tokenizer(name: str, *, gguf_file: str | None = None) -> Tokenizer:
    """A tokenizer from a directory or, where no such directory exists, from the hub.

    Raises:
        CheckpointError: There is none, or it needs code from the checkpoint.
        CheckpointUnavailableError: It is on the hub, which cannot be reached.
    """
    directory = Path(name).expanduser()
    if not directory.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise CheckpointError(f"{name}: no such directory, and no hub id (owner/name) either")
        directory = fetch(name, None, TOKENIZER)
    if gguf_file is None and not any((directory / file).is_file() for file in TOKENIZER_FILES):
        raise CheckpointError(
            f"{directory}: no tokenizer; expected one of {', '.join(TOKENIZER_FILES)}. "
            "Set model.tokenizer to a directory or hub id"
        )
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    loader: Any = PreTrainedTokenizerFast if _is_its_file(directory) else AutoTokenizer
    try:
        tokenizer: Tokenizer = loader.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:  # as above
        raise CheckpointError(f"{name}: no usable tokenizer: {first_line(error)}") from error
    return tokenizer


def _is_its_file(directory: Path) -> bool:
    """Whether tokenizer.json says all there is to the tokenizer.

    AutoTokenizer does not believe that of some architectures: beside the config of a Qwen2 it
    splits text as Qwen2's own does, whatever the file says, and leaves tokens out in silence.
    """
    path = directory / "tokenizer_config.json"
    if not path.is_file() or not (directory / "tokenizer.json").is_file():
        return False
    named = read_json_object(path).get("tokenizer_class")
    return named in ("PreTrainedTokenizerFast", "TokenizersBackend")


def _refuse_what_cannot_be_measured(directory: Path) -> None:
    config = read_config(directory)
    if (directory / "adapter_config.json").is_file():
        raise CheckpointError(f"{directory}: an adapter, not a model; merge it and save the model")
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{directory}: quantised weights (quantization_config in config.json) have no update "
            "direction; use the unquantised checkpoint"
        )
    if config.get("transformers_weights"):
        raise CheckpointError(
            f"{directory}: config.json redirects the weights (transformers_weights); expected "
            "model.safetensors or model.safetensors.index.json"
        )


def _nearest(key: str, candidates: dict[str, StoredTensor]) -> str:
    near = difflib.get_close_matches(key, candidates, n=3, cutoff=0.0)
    return ", ".join(near) + f" of {len(candidates)}" if near else "none"
