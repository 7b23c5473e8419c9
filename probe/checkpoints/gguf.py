"""A GGUF file as a `Source`: weights only, dequantised to fp32 through transformers.

What is measured is the dequantised model. `.gguf.gz` is unpacked once into `probe.disk_cache`.
"""

import gzip
import os
import shutil
import tempfile
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from probe.checkpoints.assemble import skeleton
from probe.checkpoints.huggingface import load_causal_lm, load_tokenizer
from probe.checkpoints.source import TensorKind
from probe.disk_cache import Entry, hold, make_room, only_one
from probe.errors import CheckpointError
from probe.result import CheckpointRef

MAGIC = b"GGUF"
NO_MOMENTS = "GGUF files hold no optimizer state. Use moments: warmup"


def open_source(ref: CheckpointRef) -> "GgufSource":
    """The file `ref.location`; see `probe.checkpoints.open_checkpoint`."""
    return GgufSource(ref)


class GgufSource:
    """Weights of one GGUF file; `probe.checkpoints.source.Source` says what each method gives."""

    has_moments = False

    def __init__(self, ref: CheckpointRef) -> None:
        """Unpack where needed and check that the file is GGUF.

        Raises:
            CheckpointError: No such file, not GGUF, or its packing is broken.
        """
        asked = Path(ref.location).expanduser()
        if not asked.is_file():
            raise CheckpointError(f"{asked}: no such file")
        self._unpacked = unpacked(asked) if asked.name.lower().endswith(".gz") else None
        self.path = asked if self._unpacked is None else self._unpacked.path
        with self.path.open("rb") as stream:
            found = stream.read(len(MAGIC))
        if found != MAGIC:
            raise CheckpointError(f"{asked}: not GGUF; begins with {found!r}, expected {MAGIC!r}")
        self.ref = ref.model_copy(
            update={"format": "gguf", "has_moments": False, "size_bytes": asked.stat().st_size}
        )

    def load_model(self, dtype: torch.dtype, attention: str) -> PreTrainedModel:
        """See `Source.load_model`."""
        model = load_causal_lm(self.path.parent, dtype, attention, gguf_file=self.path.name)
        # Its weights are plain tensors now; the mark would make .to() and .save_pretrained() refuse
        for owner in (model, model.config):
            for mark in (
                "hf_quantizer",
                "is_quantized",
                "quantization_method",
                "quantization_config",
            ):
                if mark in vars(owner):
                    delattr(owner, mark)
        return model

    def skeleton(self, attention: str) -> PreTrainedModel:
        """See `Source.skeleton`."""
        return skeleton(self._config, attention, self.path)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Source.weight_shapes`. The shapes are those of the dequantised weights."""
        reader, places, _, _ = self._tensors
        shapes = {}
        for name, index in places.items():
            stored = reader.tensors[index]
            extents = tuple(int(extent) for extent in reversed(stored.shape))  # innermost first
            # One number seen at every place: converted like the weight, without its memory.
            blank = np.broadcast_to(np.float32(-1.0), extents)
            shapes[name] = tuple(self._converted(blank, stored.name).shape)
        return shapes

    def read(self, name: str, kind: TensorKind, lo: int = 0, hi: int | None = None) -> torch.Tensor:
        """See `Source.read`. Cost: dequantises the one tensor, fp32."""
        if kind != "weight":
            raise CheckpointError(f"{self.path}: no {name}.{kind}. {NO_MOMENTS}")
        reader, places, _, _ = self._tensors
        if name not in places:
            raise CheckpointError(
                f"{self.path}: no weight for {name!r}; found {len(places)} others"
            )
        stored = reader.tensors[places[name]]
        from gguf import dequantize

        weights = self._converted(dequantize(stored.data, stored.tensor_type), stored.name)
        flat = torch.from_numpy(np.array(weights, dtype=np.float32)).flatten()
        end = len(flat) if hi is None else hi
        if not 0 <= lo <= end <= len(flat):
            raise CheckpointError(
                f"{self.path}: {stored.name!r} has {len(flat)} elements, asked for {lo}..{end}"
            )
        return flat[lo:end].clone()

    def hyper(self, name: str) -> dict[str, float]:
        """Always an error: GGUF has no optimizer state."""
        raise CheckpointError(f"{self.path}: no optimizer step for {name!r}. {NO_MOMENTS}")

    def load_tokenizer(self, override: str | None = None) -> Tokenizer:
        """See `Source.load_tokenizer`."""
        if override is not None:
            return load_tokenizer(override)
        return load_tokenizer(str(self.path.parent), gguf_file=self.path.name)

    def _converted(self, weights: Any, key: str) -> Any:
        """A stored tensor in the order and shape of the model's weight, by transformers' rule."""
        _, _, processor, mapping = self._tensors
        tensors: dict[str, torch.Tensor] = {}  # where a rule puts tensors it merges from several
        result = processor.process(
            weights=weights,
            name=key,
            tensor_key_mapping=mapping,
            parsed_parameters={"tensors": tensors},
        )
        if result.name is None:
            raise CheckpointError(
                f"{self.path}: key {key!r} is one of several that make one weight of this "
                "architecture, which cannot be read in parts. Use one rank"
            )
        return result.weights

    @cached_property
    def _config(self) -> PretrainedConfig:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            self.path.parent,
            gguf_file=self.path.name,
            local_files_only=True,
            trust_remote_code=False,
        )
        return config

    @cached_property
    def _tensors(self) -> tuple[Any, dict[str, int], Any, dict[str, str]]:
        """The open file, parameter fqn -> tensor index, and transformers' own conversion."""
        from gguf import GGUFReader
        from transformers import modeling_gguf_pytorch_utils as conversion

        reader = GGUFReader(self.path)
        architecture = reader.fields["general.architecture"].contents()
        processors: Any = conversion.TENSOR_PROCESSORS
        processor = processors.get(architecture, conversion.TensorProcessor)(
            config=self._config.to_dict()
        )
        mapping = conversion.get_gguf_hf_weights_map(self.skeleton("eager"), processor)
        places = {
            mapping[tensor.name]: index
            for index, tensor in enumerate(reader.tensors)
            if tensor.name in mapping
        }
        return reader, places, processor, mapping


class Unpacked(NamedTuple):
    """A plain file in the cache, kept there while `entry` lives."""

    path: Path
    entry: Entry


def unpacked(path: Path) -> Unpacked:
    """The plain file inside a .gguf.gz, in the cache; unpacked when not there yet.

    It is keyed by the packed file's path, size and time of change, so a changed file is unpacked
    again; it appears under its name only when it is complete.

    Raises:
        CheckpointError: The packing is broken, or the cache cannot be written or is full.
    """
    status = path.stat()
    entry = hold("gguf", f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}")
    target = entry.directory / path.name.removesuffix(path.suffix)
    with only_one(str(target)):
        if not target.is_file():
            make_room(_size_when_unpacked(path, status.st_size))
            _unpack(path, target)
    return Unpacked(target, entry)


def _unpack(path: Path, target: Path) -> None:
    partial: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(dir=target.parent, suffix=".partial")
        partial = Path(name)
        with os.fdopen(descriptor, "wb") as out, gzip.open(path, "rb") as packed:
            shutil.copyfileobj(packed, out, 1 << 20)
        partial.replace(target)
    except (OSError, EOFError, zlib.error) as error:
        raise CheckpointError(
            f"{path}: cannot be unpacked into {target.parent}: {error}"
        ) from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def _size_when_unpacked(path: Path, packed_bytes: int) -> int:
    """What gzip says at its end: the size modulo 4 GiB, and at least the packed one."""
    with path.open("rb") as stream:
        stream.seek(max(0, packed_bytes - 4))
        size = int.from_bytes(stream.read(4), "little")
    while size < packed_bytes:
        size += 1 << 32
    return size
