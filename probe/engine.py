"""The recipe: checkpoint -> model -> batches -> update direction -> loss along the ray -> search.

One `Session` measures the units of one job, one after the other; tokenizer, batches and model
stay resident between them. It knows nothing of queues, sockets or files of results.
"""

import datetime as dt
import hashlib
import json
import platform
import time

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from probe.attention import choose_attention
from probe.batches import Batch, BatchSet
from probe.checkpoints import open_checkpoint
from probe.checkpoints.source import Source
from probe.errors import BatchError, ConfigError
from probe.loss import CausalLoss, num_rows
from probe.memory import PeakMemory, out_of_memory_explained
from probe.moments import Moments, NoMoments, WarmupMoments, choose_moments
from probe.parallel.resident import Model, ResidentModel, num_ranks
from probe.placement import backend_for
from probe.progress import Meter, OnProgress
from probe.provenance import device_name, git_commit, package_versions
from probe.ray_search import RaySearch, check_finite
from probe.result import LossBatch, Measurement, Provenance, Unit, UnitResult
from probe.spec import AdamW, CheckpointSeriesSpec
from probe.spec_load import resolved, spec_sha256
from probe.summary import summarise
from probe.update import UpdateRule, check_no_decay, slope_along

_LOSS_BATCHES: dict[str, tuple[LossBatch, ...]] = {
    "update": ("update",),
    "held_out": ("held_out",),
    "both": ("update", "held_out"),
}


class Session:
    """Measures checkpoints of one job spec on this machine.

    Where torch.distributed was initialised with more than one rank, the model is sharded over all
    of them: every rank makes a session of the same spec and measures the same units.

    Args:
        spec: The job. The tokenizer is each checkpoint's own unless `model.tokenizer` names
            one for all; batches are drawn again only where it differs from the one before.

    Raises:
        ConfigError: The device or the attention kernel asked for cannot be had here, or
            `parallel` asks for another number of ranks than there are.
    """

    def __init__(self, spec: CheckpointSeriesSpec) -> None:
        self.spec = spec
        self.device = choose_device(spec.model.device)
        self.dtype: torch.dtype = getattr(torch, spec.model.dtype)
        self.num_ranks = num_ranks()
        self.backend = backend_for(spec.parallel, self.num_ranks)
        self.attention = choose_attention(
            spec.model.attention, device=self.device, dtype=self.dtype
        )
        self.loss_batches = _LOSS_BATCHES[spec.measurement.loss_batch]
        self._micro_batch_sequences = min(
            spec.batches.micro_batch_sequences,
            max(spec.batches.batch_sequences, spec.batches.held_out_sequences or 0),
        )
        self._batches: BatchSet | None = None
        self._tokenizer_key = ""  # of the tokenizer the batches were made with
        self._resident: tuple[Model, CausalLoss] | None = None
        self._models = ResidentModel(
            backend=self.backend,
            device=self.device,
            dtype=self.dtype,
            attention=self.attention,
            micro_batch_sequences=self._micro_batch_sequences,
            offload_base=spec.parallel.offload_base,
            activation_checkpointing=spec.model.activation_checkpointing,
            compile=spec.model.compile,
        )

    def measure(
        self,
        unit: Unit,
        *,
        eta_init: dict[str, float] | None = None,
        on_progress: OnProgress | None = None,
    ) -> UnitResult:
        """Critical sharpness of one checkpoint: every repeat, on every loss batch asked for.

        Args:
            unit: One of `probe.plan.expand_units`.
            eta_init: First guess per loss batch, from `probe.result.eta_init_hint` of the unit
                before; None: `measurement.eta_init`.
            on_progress: Called with `phase`, `done`, `total`, `num_forward_passes`.

        Returns:
            The result. The same unit, spec and hint give the same numbers, in this process or
            another one on the same machine.

        Raises:
            CheckpointError: The checkpoint is broken or lacks what the spec asks for.
            BatchError: The text does not last for the batches asked for.
            NonFiniteLossError: The loss at the checkpoint's own parameters is NaN or inf.
            DirectionError: The gradient is not finite.
            OutOfMemoryError: It did not fit.

        Cost: per repeat one backward pass and about 3 forward passes per loss batch; once per
            checkpoint the moments' warm-up, one backward pass for the held-out gradient, and
            one forward pass per loss batch for the loss resolution.
        """
        started_at, clock = dt.datetime.now(dt.UTC), time.perf_counter()
        memory, meter = PeakMemory(self.device), Meter(on_progress)
        with out_of_memory_explained(self._micro_batch_sequences, self.spec.model.dtype):
            meter.report("load", 0, 1)
            source = open_checkpoint(unit.checkpoint)
            model, loss = self._load(source)
            check_positions(self.spec.batches.sequence_length, model.model)
            check_no_decay([shard.name for shard in model.shards], self.spec.optimizer)
            batches = self._batches_for(source)
            meter.report("load", 1, 1)
            checkpoint = _Checkpoint(self, unit, source, model, loss, batches, meter)
            measurements = checkpoint.measure(eta_init or {})
        return UnitResult(
            unit=unit,
            spec=resolved(self.spec),
            measurements=measurements,
            summaries=[summarise(measurements, batch) for batch in self.loss_batches],
            stability_threshold=None if not unit.learning_rate else 2.0 / unit.learning_rate,
            num_forward_passes=meter.num_forward_passes,
            num_backward_passes=meter.num_backward_passes,
            duration_s=time.perf_counter() - clock,
            memory_bytes=memory.peak_bytes(),
            provenance=self._provenance(checkpoint, memory.kind, started_at),
        )

    def _provenance(
        self, checkpoint: "_Checkpoint", memory_kind: str, started_at: dt.datetime
    ) -> Provenance:
        return Provenance(
            spec_sha256=spec_sha256(self.spec),
            versions=package_versions(),
            git_commit=git_commit(),
            device=device_name(self.device),
            dtype=self.spec.model.dtype,
            backend=checkpoint.model.backend,
            num_ranks=self.num_ranks,
            attention=self.attention,
            moments=checkpoint.moments.source,
            moments_detail=checkpoint.moments.detail,
            num_parameters=checkpoint.model.num_parameters,
            memory_kind=memory_kind,
            head_path=checkpoint.loss.head_path,
            hostname=platform.node(),
            started_at=started_at,
            finished_at=dt.datetime.now(dt.UTC),
        )

    def _load(self, source: Source) -> tuple[Model, CausalLoss]:
        """The checkpoint's values in the resident model, or a new one where the config differs."""
        self._resident = None  # no second reference while another one is built
        self._resident = self._models.load(source)
        return self._resident

    def _batches_for(self, source: Source) -> BatchSet:
        if self._batches is not None and self.spec.model.tokenizer is not None:
            return self._batches
        tokenizer = source.load_tokenizer(self.spec.model.tokenizer)
        key = _tokenizer_key(tokenizer)
        if self._batches is None or key != self._tokenizer_key:
            self._batches, self._tokenizer_key = None, key  # free them before others are drawn
            self._batches = BatchSet(self.spec.batches, tokenizer)
        return self._batches


class _Checkpoint:
    """One unit under measurement."""

    def __init__(
        self,
        session: Session,
        unit: Unit,
        source: Source,
        model: Model,
        loss: CausalLoss,
        batches: BatchSet,
        meter: Meter,
    ) -> None:
        self.spec = session.spec
        self.loss_batches = session.loss_batches
        self.model, self.loss, self.batches, self.meter = model, loss, batches, meter
        self.moments: Moments = NoMoments()
        if isinstance(self.spec.optimizer, AdamW):
            self.moments = choose_moments(
                self.spec.optimizer, source, model.shards, label=unit.checkpoint.label
            )
        self.rule = UpdateRule(model, self.spec.optimizer, self.moments)

    def measure(self, eta_init: dict[str, float]) -> list[Measurement]:
        """Warm up, then for each repeat: gradient, direction, a search per loss batch."""
        self._warm_up()
        held_out = self._held_out()
        searches: dict[LossBatch, RaySearch] = {
            name: RaySearch(
                self.model, self.loss, self.spec.measurement, self.meter, name, eta_init.get(name)
            )
            for name in self.loss_batches
        }
        total = self.spec.measurement.repeats * len(searches)
        measurements: list[Measurement] = []
        for repeat in range(self.spec.measurement.repeats):
            self.meter.report("gradient", repeat, self.spec.measurement.repeats)
            update = self.batches.update(first_repeat_batch(self.spec) + repeat)
            delta, slope = self.rule.direction(self._gradient(update))
            for name, search in searches.items():
                self.meter.report("search", len(measurements), total)
                batch = update
                if name == "held_out" and held_out is not None:
                    batch, slope = held_out[0], slope_along(self.model, delta, held_out[1])
                measurements.append(
                    search.run(
                        repeat=repeat,
                        delta=delta,
                        slope=slope,
                        update_batch=update,
                        loss_batch=batch,
                    )
                )
            del delta  # before the next gradient is made
        self.meter.report("search", total, total)
        return measurements

    def _warm_up(self) -> None:
        if not isinstance(self.moments, WarmupMoments):
            return
        assert isinstance(self.spec.optimizer, AdamW)
        total = self.spec.optimizer.warmup_steps
        for index in range(total):
            self.meter.report("moments", index, total)
            self.rule.absorb(self._gradient(self.batches.update(index)))
            self.moments.num_warmup_batches += 1
        self.meter.report("moments", total, total)

    def _held_out(self) -> tuple[Batch, list[Tensor | None]] | None:
        """The fixed batch and its gradient, once per checkpoint, so that each slope is known."""
        if "held_out" not in self.loss_batches:
            return None
        batch = self.batches.held_out
        if batch is None:
            raise BatchError("measurement.loss_batch needs batches.held_out_sequences")
        return batch, self._gradient(batch)

    def _gradient(self, batch: Batch) -> list[Tensor | None]:
        """Gradient of the batch's mean loss at the base, in fp32, not clipped."""
        check_vocabulary(batch, self.model.model)
        means: list[float] = []
        grads = self.model.gradient(lambda: means.append(self.loss.backward(batch)))
        check_finite(means[0], "a")
        self.meter.num_backward_passes += 1
        for grad in grads:
            if grad is not None:
                grad.div_(batch.num_targets)
        return grads


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


def first_repeat_batch(spec: CheckpointSeriesSpec) -> int:
    """Index of the update batch of the first repeat: those before it warm the moments up.

    With moments `auto` they are left out where a checkpoint has moments too, so that every
    checkpoint of a series is measured on the same tokens.
    """
    optimizer = spec.optimizer
    if isinstance(optimizer, AdamW) and optimizer.moments != "checkpoint":
        return optimizer.warmup_steps
    return 0


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
