"""What every kind of measurement needs ready: device, resident model, batches, provenance.

Model, tokenizer and batches stay in memory from checkpoint to checkpoint; what is measured with
them is `probe.engine`'s and `probe.mix_engine`'s matter.
"""

import datetime as dt
import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from probe.attention import choose_attention
from probe.batches import Batch
from probe.checkpoints import open_checkpoint
from probe.checkpoints.source import Source
from probe.errors import ConfigError
from probe.loss import CausalLoss, num_rows
from probe.parallel.resident import Model, ResidentModel, num_ranks
from probe.placement import backend_for
from probe.progress import Meter
from probe.provenance import device_name, git_commit, package_versions
from probe.ray_search import check_finite
from probe.result import CheckpointRef, MomentsSource, Provenance
from probe.spec import ModelOptions, ParallelOptions

BatchesT = TypeVar("BatchesT")


@dataclass(frozen=True, slots=True)
class Opened(Generic[BatchesT]):
    """One checkpoint, ready to be measured."""

    source: Source
    model: Model
    loss: CausalLoss
    batches: BatchesT

    def gradient(self, batch: Batch, meter: Meter) -> list[Tensor | None]:
        """Gradient of the batch's mean loss at the base: flat fp32 shards, not clipped.

        Raises:
            ConfigError: A token is beyond the model's vocabulary.
            NonFiniteLossError: The loss is NaN or infinite.

        Cost: one forward and one backward pass of the batch.
        """
        mean, grads = self.loss_and_gradient(batch, meter)
        check_finite(mean, "a")
        return grads

    def loss_and_gradient(self, batch: Batch, meter: Meter) -> tuple[float, list[Tensor | None]]:
        """The batch's mean loss, NaN and inf included, and its gradient, at the live weights.

        Raises:
            ConfigError: A token is beyond the model's vocabulary.

        Cost: one forward and one backward pass of the batch.
        """
        check_vocabulary(batch, self.model.model)
        means: list[float] = []
        grads = self.model.gradient(lambda: means.append(self.loss.backward(batch)))
        meter.num_backward_passes += 1
        for grad in grads:
            if grad is not None:
                grad.div_(batch.num_targets)
        return means[0], grads


class Workbench(Generic[BatchesT]):
    """Opens the checkpoints of one job, one after the other.

    Args:
        model: How the model is run. The tokenizer is each checkpoint's own unless it names one
            for all; batches are drawn again only where it differs from the one before.
        parallel: How it is spread over ranks.
        micro_batch_sequences: Sequences of one forward call.
        sequence_length: Tokens of a sequence.
        draw: Makes the job's batches with a tokenizer.

    Raises:
        ConfigError: The device or the attention kernel asked for cannot be had here, or
            `parallel` asks for another number of ranks than there are.
    """

    def __init__(
        self,
        model: ModelOptions,
        parallel: ParallelOptions,
        *,
        micro_batch_sequences: int,
        sequence_length: int,
        draw: Callable[[PreTrainedTokenizerBase], BatchesT],
    ) -> None:
        self.device = choose_device(model.device)
        self.num_ranks = num_ranks()
        self.backend = backend_for(parallel, self.num_ranks)
        self.micro_batch_sequences = micro_batch_sequences
        self._options, self._draw, self._sequence_length = model, draw, sequence_length
        dtype: torch.dtype = getattr(torch, model.dtype)
        self.attention = choose_attention(model.attention, device=self.device, dtype=dtype)
        self._batches: BatchesT | None = None
        self._tokenizer_key = ""  # of the tokenizer the batches were made with
        self._resident: tuple[Model, CausalLoss] | None = None
        self._models = ResidentModel(
            backend=self.backend,
            device=self.device,
            dtype=dtype,
            attention=self.attention,
            micro_batch_sequences=micro_batch_sequences,
            offload_base=parallel.offload_base,
            activation_checkpointing=model.activation_checkpointing,
            compile=model.compile,
        )

    def open(self, checkpoint: CheckpointRef) -> Opened[BatchesT]:
        """The checkpoint's values in the resident model, or a new one where the config differs.

        Raises:
            CheckpointError: It is broken.
            BatchError: The text does not last for the batches asked for.
            ConfigError: The sequences are longer than the model has positions for.
        """
        source = open_checkpoint(checkpoint)
        self._resident = None  # no second reference while another one is built
        self._resident = self._models.load(source)
        model, loss = self._resident
        check_positions(self._sequence_length, model.model)
        return Opened(source, model, loss, self._batches_for(source))

    def provenance(
        self,
        opened: Opened[BatchesT],
        *,
        spec_sha256: str,
        moments: MomentsSource,
        moments_detail: str,
        memory_kind: str,
        started_at: dt.datetime,
    ) -> Provenance:
        """Everything needed to say where a result came from."""
        return Provenance(
            spec_sha256=spec_sha256,
            versions=package_versions(),
            git_commit=git_commit(),
            device=device_name(self.device),
            dtype=self._options.dtype,
            backend=opened.model.backend,
            num_ranks=self.num_ranks,
            attention=self.attention,
            moments=moments,
            moments_detail=moments_detail,
            num_parameters=opened.model.num_parameters,
            memory_kind=memory_kind,
            head_path=opened.loss.head_path,
            hostname=platform.node(),
            started_at=started_at,
            finished_at=dt.datetime.now(dt.UTC),
        )

    def _batches_for(self, source: Source) -> BatchesT:
        if self._batches is not None and self._options.tokenizer is not None:
            return self._batches
        tokenizer = source.load_tokenizer(self._options.tokenizer)
        key = _tokenizer_key(tokenizer)
        if self._batches is None or key != self._tokenizer_key:
            self._batches, self._tokenizer_key = None, key  # free them before others are drawn
            self._batches = self._draw(tokenizer)
        return self._batches


def choose_device(requested: str) -> torch.device:
    """The device `model.device` means here; `auto` is cuda where present, else cpu.

    Raises:
        ConfigError: cuda is asked for and there is none.
    """
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "cpu"
    if requested == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                "model.device is cuda, but torch finds no CUDA device. Use device: auto or cpu."
            )
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(requested)


def check_vocabulary(batch: Batch, model: nn.Module) -> None:
    """Refuse tokens the model has no embedding for.

    Raises:
        ConfigError: The tokenizer is larger than the model's vocabulary.
    """
    embeddings = num_rows(model.get_input_embeddings().weight)  # type: ignore[operator]
    largest = int(batch.input_ids.max())
    if largest >= embeddings:
        raise ConfigError(
            f"a batch holds token {largest}, the model has {embeddings} embeddings. "
            "model.tokenizer must name the tokenizer this model was trained with."
        )


def check_positions(sequence_length: int, model: nn.Module) -> None:
    """Refuse sequences longer than the model has positions for.

    Raises:
        ConfigError: Beyond them a model fails, or gives losses that mean nothing.
    """
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and sequence_length > positions > 0:
        raise ConfigError(
            f"batches.sequence_length is {sequence_length}, the model has {positions} positions "
            f"(max_position_embeddings in config.json). Use at most {positions}."
        )


def _tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers that make the same tokens; taken before the tokenizer is used."""
    model = (
        tokenizer.backend_tokenizer.to_str()
        if tokenizer.is_fast
        else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    )
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    text = f"{type(tokenizer).__name__} {special} {model}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
