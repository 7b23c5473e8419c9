"""What a job would do, worked out before anything is queued (torch-free).

A spec expands into an ordered list of units; the list is stored with the job, so a resumed job
measures the same checkpoints even if the directory has changed since.
"""

import glob
import re
from pathlib import Path

from probe.known_models import known_revision
from probe.model_size import ModelSize, model_size
from probe.placement import place
from probe.result import CheckpointRef, Plan, Unit
from probe.schedule import run_learning_rate
from probe.series import list_checkpoints
from probe.spec import AdamW, CheckpointSeriesSpec, FileData
from probe.spec_load import resolved, spec_sha256

# Typical passes of one search once its first guess is good; the benchmark `passes.py` measures
# them. The L(0) of a search is counted apart.
_TYPICAL_PASSES = {"interpolate": 3, "bisect": 6}


def expand_units(spec: CheckpointSeriesSpec) -> list[Unit]:
    """The units of a job in the order they are measured: one checkpoint each.

    Raises:
        CheckpointError: No checkpoint matches, or a series holds one without a step.
        CheckpointUnavailableError: The hub is needed to list revisions and did not answer.
    """
    units = []
    for index, checkpoint in enumerate(list_checkpoints(spec.checkpoints)):
        rate, source = run_learning_rate(spec.schedule, checkpoint)
        units.append(
            Unit(
                index=index,
                unit_id=_unit_id(index, checkpoint),
                checkpoint=checkpoint,
                learning_rate=rate,
                learning_rate_source=source,
            )
        )
    return units


def make_plan(spec: CheckpointSeriesSpec) -> Plan:
    """Units, passes, tokens and memory a job would take; queues and loads nothing.

    Raises:
        CheckpointError: As `expand_units`.
    """
    units = expand_units(spec)
    options = spec.measurement
    loss_batches = 2 if options.loss_batch == "both" else 1
    searches = loss_batches * options.repeats
    # Beside the search: L(0) once per update batch and once for the held-out batch, and one
    # more evaluation of eta = 0 per loss batch for the loss resolution.
    at_zero = (options.repeats if options.loss_batch != "held_out" else 0) + (
        1 if options.loss_batch != "update" else 0
    )
    per_unit = searches * _TYPICAL_PASSES[options.search] + at_zero + loss_batches
    at_most = searches * options.max_forward_passes + at_zero + loss_batches
    first = units[0].checkpoint
    size = model_size(first)
    placement = place(spec, size)
    per_rank = placement.memory_bytes_per_rank
    notes = [*_size_notes(first, size), *placement.notes, *_moment_notes(spec, units)]
    notes += _schedule_notes(spec, units)
    return Plan(
        kind=spec.kind,
        spec=resolved(spec),
        spec_sha256=spec_sha256(spec),
        units=units,
        num_forward_passes=per_unit * len(units),
        max_forward_passes=at_most * len(units),
        num_backward_passes=_backward_passes(spec, units),
        num_tokens_per_pass=spec.batches.sequence_length
        * max(spec.batches.batch_sequences, spec.batches.held_out_sequences or 0),
        num_parameters=None if size is None else size.num_parameters,
        backend=placement.backend,
        num_ranks=placement.num_ranks,
        memory_bytes_per_rank=per_rank,
        memory_bytes=None if per_rank is None else per_rank * placement.num_ranks,
        notes=notes + _file_notes(spec),
    )


def _unit_id(index: int, checkpoint: CheckpointRef) -> str:
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", checkpoint.label).strip("-") or "checkpoint"
    return f"{index:04d}-{label[:64]}"


def _backward_passes(spec: CheckpointSeriesSpec, units: list[Unit]) -> int:
    held_out = 1 if spec.measurement.loss_batch != "update" else 0
    total = 0
    for unit in units:
        total += spec.measurement.repeats + held_out
        optimizer = spec.optimizer
        if isinstance(optimizer, AdamW) and (
            optimizer.moments == "warmup"
            or (optimizer.moments == "auto" and not unit.checkpoint.has_moments)
        ):
            total += optimizer.warmup_steps
    return total


def _size_notes(first: CheckpointRef, size: ModelSize | None) -> list[str]:
    if size is not None:
        return []
    if first.source == "gguf":
        return ["the model's size is not read from a GGUF file before it is measured"]
    if first.source == "hub":
        return ["the model's size is not known before it is fetched"]
    return ["the model's size is read from safetensors only: memory is not known beforehand"]


def _moment_notes(spec: CheckpointSeriesSpec, units: list[Unit]) -> list[str]:
    if not isinstance(spec.optimizer, AdamW) or spec.optimizer.moments == "warmup":
        return []
    unknown = sum(unit.checkpoint.has_moments is None for unit in units)
    absent = sum(unit.checkpoint.has_moments is False for unit in units)
    notes = []
    places = [u.checkpoint.moments_url for u in units if u.checkpoint.moments_url is not None]
    if places:
        notes.append(
            f"optimizer states of {len(places)} of {len(units)} checkpoints are looked for at "
            f"{places[0]} and the like, and fetched: 8 bytes per parameter each; "
            "checkpoints.optimizer_states: none leaves them"
        )
    if unknown:
        notes.append(
            f"whether {unknown} of {len(units)} checkpoints hold optimizer state is known only "
            "once they are fetched; backward passes assume they do not"
        )
    if 0 < absent < len(units) and spec.optimizer.moments == "auto":
        notes.append(
            f"{absent} of {len(units)} checkpoints hold no optimizer state: theirs is accumulated "
            "over warmup_steps, the others' is read, so their lambda_c are not quite alike; "
            "optimizer.moments: warmup treats all the same"
        )
    if absent and spec.optimizer.moments == "checkpoint":
        notes.append(
            f"{absent} of {len(units)} checkpoints hold no optimizer state, and "
            "optimizer.moments is 'checkpoint': those units will fail"
        )
    return notes


def _schedule_notes(spec: CheckpointSeriesSpec, units: list[Unit]) -> list[str]:
    """What `schedule: auto` found out about a published run, and what it did not."""
    if spec.schedule.type != "auto":
        return []
    sources = {u.learning_rate_source for u in units if u.learning_rate_source is not None}
    notes = [f"learning rates for 2/eta are those of {source}" for source in sorted(sources)]
    for unit in units:
        known = known_revision(unit.checkpoint.location, unit.checkpoint.revision)
        if known is not None and known.stage.unknown:
            what = f"{unit.checkpoint.location} {unit.checkpoint.revision}"
            return [*notes, f"no 2/eta for {what} and its stage: {known.stage.unknown}"]
    return notes


def _file_notes(spec: CheckpointSeriesSpec) -> list[str]:
    """Data files that are not here. Globs are left to the run: they can be slow to follow."""
    named = [path for s in spec.batches.sources if isinstance(s, FileData) for path in s.paths]
    missing = [p for p in named if not glob.has_magic(p) and not Path(p).expanduser().is_file()]
    return [f"data file {path!r} is not on this machine: units will fail" for path in missing]
