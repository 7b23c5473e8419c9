"""A torch distributed checkpoint (DCP) directory as a `Source`, saved by any number of ranks.

Read without a process group and without collectives: `.metadata` says which chunk of which file
holds which box of a tensor, and only the chunks a range touches are opened, one at a time. DCP
holds tensors alone, so the model's config comes from a config.json in the directory or from
`checkpoints.config` of the job, and the tokenizer from the directory or `model.tokenizer`.
"""

import io
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from probe.checkpoints.assemble import (
    assemble_causal_lm,
    parameter_shapes,
    persistent_buffer_shapes,
    read_model_config,
    skeleton,
)
from probe.checkpoints.betas import AMSGRAD, Betas, one_of
from probe.checkpoints.dcp_index import Chunk, DcpIndex, DcpTensor, Place, dcp_parts, read_dcp_index
from probe.checkpoints.dcp_keys import (
    amsgrad_key,
    betas_keys,
    find_prefix,
    moment_keys,
    superfluous,
    weight_keys,
)
from probe.checkpoints.huggingface import TOKENIZER_FILES, load_tokenizer
from probe.checkpoints.report import first_line
from probe.checkpoints.source import TensorKind
from probe.errors import CheckpointError
from probe.result import CheckpointRef


def open_source(ref: CheckpointRef) -> "DcpSource":
    """The directory `ref.location`; see `probe.checkpoints.open_checkpoint`."""
    directory = Path(ref.location).expanduser()
    return DcpSource(ref, read_dcp_index(directory, dcp_parts(directory)), lambda: _config(ref))


class DcpSource:
    """Weights and moments of one checkpoint; `probe.checkpoints.source.Source` says what for.

    Args:
        ref: What was asked for.
        index: What the directory holds.
        config: Gives the model's config; called when names are first needed.
        stored_name: Parameter fqn -> the name the trainer stored it under, without prefix.
        tokenizer_hint: Ends the message where the directory has no tokenizer.
        format_name: For the reference.

    Raises:
        CheckpointError: The optimizer state is incomplete.
    """

    def __init__(
        self,
        ref: CheckpointRef,
        index: DcpIndex,
        config: Callable[[], PretrainedConfig],
        *,
        stored_name: Callable[[str], str] = str,
        tokenizer_hint: str = "",
        format_name: str = "dcp",
    ) -> None:
        self._index = index
        self._make_config = config
        self._stored_name = stored_name
        self._tokenizer_hint = tokenizer_hint
        self._moments = moment_keys(index)
        self.directory = index.directory
        self.ref = ref.model_copy(
            update={
                "format": format_name,
                "has_moments": bool(self._moments),
                "size_bytes": index.size_bytes,
            }
        )

    @property
    def has_moments(self) -> bool:
        """Whether AdamW moments are stored."""
        return bool(self._moments)

    def load_model(self, dtype: torch.dtype, attention: str) -> PreTrainedModel:
        """See `Source.load_model`. Cost: the stored weights and the model stand side by side."""
        tensors = {name: read_box(self._weight(name)) for name in self._weights}
        return assemble_causal_lm(self._config, tensors, dtype, attention, where=self.directory)

    def skeleton(self, attention: str) -> PreTrainedModel:
        """See `Source.skeleton`."""
        return skeleton(self._config, attention, self.directory)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Source.weight_shapes`."""
        return {name: self._index.tensors[key].shape for name, key in self._weights.items()}

    def read(self, name: str, kind: TensorKind, lo: int = 0, hi: int | None = None) -> torch.Tensor:
        """See `Source.read`. Cost: each chunk the range touches is read whole, one at a time."""
        tensor = self._weight(name) if kind == "weight" else self._moment(name, kind)
        return read_dcp_range(tensor, lo, hi)

    def moment_shape(self, name: str) -> tuple[int, ...]:
        """See `probe.checkpoints.beside.Moments.moment_shape`."""
        return self._moment(name, "exp_avg").shape

    def hyper(self, name: str) -> dict[str, float]:
        """See `Source.hyper`."""
        key = self._moment_key(name, "step")
        if key in self._index.tensors:
            value: Any = read_dcp_range(self._index.tensors[key]).squeeze()
        else:
            value = load_stream(self._index.objects[key], key)
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(
                f"{self.directory}: key {key!r} is {value!r}, expected one number"
            )
        if value != int(value) or value < 0:
            raise CheckpointError(
                f"{self.directory}: key {key!r} is {value}, expected a whole number >= 0"
            )
        return {"step": int(value)}

    @property
    def stored_betas(self) -> Betas | None:
        """See `SaysBetas`. Cost: one small object per parameter group, or parameter."""
        return one_of(load_stream(place, key) for key, place in betas_keys(self._index).items())

    def load_tokenizer(self, override: str | None = None) -> Tokenizer:
        """See `Source.load_tokenizer`."""
        own = any((self.directory / file).is_file() for file in TOKENIZER_FILES)
        if override is None and not own:
            raise CheckpointError(
                f"{self.directory}: no tokenizer beside the tensors; set model.tokenizer to a "
                f"directory or hub id{self._tokenizer_hint}"
            )
        return load_tokenizer(override or str(self.directory))

    @cached_property
    def _config(self) -> PretrainedConfig:
        return self._make_config()

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter fqn -> shape, as the config has them."""
        return parameter_shapes(self._config, self.directory)

    @cached_property
    def _weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Fqn -> shape of every parameter and every buffer that checkpoints hold."""
        return self._shapes | persistent_buffer_shapes(self._config, self.directory)

    @cached_property
    def _weights(self) -> dict[str, str]:
        """Fqn of a parameter or persistent buffer -> key of its values."""
        stored = weight_keys(self._index)
        names = [self._stored_name(name) for name in self._weight_shapes]
        prefix = find_prefix(stored, names, where=f"{self.directory}: weights")
        left = superfluous(stored, prefix, [*names, *self._untied(prefix, stored)])
        if left:
            raise CheckpointError(
                f"{self.directory}: {len(left)} stored weights have no place in the model, the "
                f"first is {stored[left[0]]!r}. Is the config of another model?"
            )
        return {name: stored[prefix + self._stored_name(name)] for name in self._weight_shapes}

    def _untied(self, prefix: str, stored: dict[str, str]) -> list[str]:
        """The output layer, where it is tied to the embeddings and stored a second time.

        Raises:
            CheckpointError: The two stored copies differ, so the model was not tied.
        """
        if not self._config.tie_word_embeddings:
            return []
        head, embeddings = (
            self._stored_name(n) for n in ("lm_head.weight", "model.embed_tokens.weight")
        )
        if prefix + head not in stored or prefix + embeddings not in stored:
            return []
        one, other = (self._index.tensors[stored[prefix + name]] for name in (head, embeddings))
        if one.shape != other.shape or not torch.equal(read_box(one), read_box(other)):
            raise CheckpointError(
                f"{self.directory}: keys {one.key!r} and {other.key!r} differ, but the config ties "
                "them (tie_word_embeddings). Is the config of another model?"
            )
        return [head]

    @cached_property
    def _moment_prefix(self) -> str:
        names = [self._stored_name(name) for name in self._shapes]
        if maximum := amsgrad_key(self._index):
            raise CheckpointError(f"{self.directory}: found {maximum!r}. {AMSGRAD}")
        if all(name.isdecimal() for name in self._moments):
            raise CheckpointError(
                f"{self.directory}: moments are keyed by number (the first is "
                f"{min(self._moments)!r}), expected parameter names. Save the state of "
                "torch.distributed.checkpoint.state_dict.get_state_dict, or use moments: warmup"
            )
        return find_prefix(self._moments, names, where=f"{self.directory}: moments")

    def _weight(self, name: str) -> DcpTensor:
        if name not in self._weight_shapes:
            raise CheckpointError(f"{self.directory}: the model has no parameter {name!r}")
        return self._checked(name, self._index.tensors[self._weights[name]])

    def _moment(self, name: str, kind: str) -> DcpTensor:
        return self._checked(name, self._index.tensors[self._moment_key(name, kind)])

    def _moment_key(self, name: str, kind: str) -> str:
        if not self._moments:
            raise CheckpointError(
                f"{self.directory}: no optimizer state, expected {name}.{kind}. Use moments: "
                "warmup, or a checkpoint saved with optimizer state"
            )
        if name not in self._shapes:
            raise CheckpointError(f"{self.directory}: the model has no parameter {name!r}")
        return self._moments[self._moment_prefix + self._stored_name(name)][kind]

    def _checked(self, name: str, tensor: DcpTensor) -> DcpTensor:
        if tensor.shape != self._weight_shapes[name]:
            raise CheckpointError(
                f"{self.directory}: key {tensor.key!r} has shape {list(tensor.shape)}, expected "
                f"{list(self._weight_shapes[name])} for {name!r}"
            )
        return tensor


def read_box(tensor: DcpTensor) -> torch.Tensor:
    """A whole stored tensor in its own shape and dtype."""
    return read_dcp_range(tensor).reshape(tensor.shape)


def read_dcp_range(tensor: DcpTensor, lo: int = 0, hi: int | None = None) -> torch.Tensor:
    """Elements lo..hi of one stored tensor, flattened: (hi - lo,) in its stored dtype.

    Raises:
        CheckpointError: The range lies outside the tensor, or a chunk cannot be read or is not
            what the metadata says.

    Cost: memory for the rows the range touches and for one chunk.
    """
    end = tensor.num_elements if hi is None else hi
    if not 0 <= lo <= end <= tensor.num_elements:
        where = f"{tensor.chunks[0].place.file.parent}: " if tensor.chunks else ""
        raise CheckpointError(
            f"{where}key {tensor.key!r} has {tensor.num_elements} elements, asked for {lo}..{end}"
        )
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    if lo == end:
        return torch.empty(0, dtype=dtype)
    shape = tensor.shape or (1,)
    row = math.prod(shape[1:])
    first, last = lo // row, -(-end // row)
    rows = torch.empty((last - first, *shape[1:]), dtype=dtype)
    for chunk in tensor.chunks:
        offsets, sizes = chunk.offsets or (0,), chunk.sizes or (1,)
        top, bottom = max(first, offsets[0]), min(last, offsets[0] + sizes[0])
        if top >= bottom:
            continue
        box = _read_chunk(tensor, chunk, dtype).reshape(sizes)[
            top - offsets[0] : bottom - offsets[0]
        ]
        columns = tuple(slice(o, o + n) for o, n in zip(offsets[1:], sizes[1:], strict=True))
        rows[(slice(top - first, bottom - first), *columns)] = box
    return rows.flatten()[lo - first * row : end - first * row].clone()


def load_stream(place: Place, key: str) -> Any:
    """One `torch.save` stream inside a file, through torch's own allow-list.

    Raises:
        CheckpointError: It is broken, or holds anything but tensors and plain values.
    """
    try:
        with place.file.open("rb") as stream:
            stream.seek(place.start)
            content = stream.read(place.num_bytes)
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # zip, pickle and torch errors alike
        raise CheckpointError(
            f"{place.file}: key {key!r}: bytes {place.start}..{place.start + place.num_bytes} "
            f"cannot be read: {first_line(error)}"
        ) from error


def _read_chunk(tensor: DcpTensor, chunk: Chunk, dtype: torch.dtype) -> torch.Tensor:
    value = load_stream(chunk.place, tensor.key)
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(
            f"{chunk.place.file}: key {tensor.key!r}: found {type(value).__name__}, expected a "
            "tensor"
        )
    if tuple(value.shape) != chunk.sizes or value.dtype != dtype:
        raise CheckpointError(
            f"{chunk.place.file}: key {tensor.key!r}: found a chunk of shape {list(value.shape)} "
            f"and {value.dtype}, expected {list(chunk.sizes)} and {dtype}"
        )
    return value


def _config(ref: CheckpointRef) -> PretrainedConfig:
    own = Path(ref.location).expanduser() / "config.json"
    if own.is_file():
        return read_model_config(own)
    if ref.config is None:
        raise CheckpointError(
            f"{own.parent}: torch DCP holds tensors only and there is no config.json beside them; "
            "set checkpoints.config to the model's Hugging Face config.json"
        )
    named = Path(ref.config).expanduser()
    return read_model_config(named / "config.json" if named.is_dir() else named)
