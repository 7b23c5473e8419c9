"""What the plans of all kinds of jobs share: sizes, placement, and what can be known to go wrong.

Torch-free.
"""

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from probe.kinds import CheckpointJobSpec, data_sources
from probe.model_size import ModelSize, model_size
from probe.placement import place
from probe.result import CheckpointRef, Plan, Unit
from probe.shares import lost_sources, source_shares
from probe.spec import AdamW, DataSource, FileData, Optimizer
from probe.spec_load import resolved, spec_sha256
from probe.spec_mix import MixtureSources

# Typical passes of one search once its first guess is good; the benchmark `passes.py` measures
# them. The L(0) of a search is counted apart.
TYPICAL_PASSES = {"interpolate": 3, "bisect": 6}
_MAX_LISTED = 5


def assemble(
    spec: CheckpointJobSpec,
    units: list[Unit],
    *,
    num_forward_passes: int,
    max_forward_passes: int,
    num_backward_passes: int,
    num_tokens_per_pass: int,
    notes: Sequence[str],
) -> Plan:
    """The plan of a job whose units and passes are known; adds model size and placement.

    Args:
        spec: The job.
        units: At least one.
        num_forward_passes: Expected in all.
        max_forward_passes: Upper limit in all.
        num_backward_passes: In all.
        num_tokens_per_pass: Of the largest batch.
        notes: What this kind of job has to say; others are added before and after.
    """
    first = units[0].checkpoint_ref
    size = model_size(first)
    placement = place(spec, size)
    per_rank = placement.memory_bytes_per_rank
    return Plan(
        kind=spec.kind,
        spec=resolved(spec),
        spec_sha256=spec_sha256(spec),
        units=units,
        num_forward_passes=num_forward_passes,
        max_forward_passes=max_forward_passes,
        num_backward_passes=num_backward_passes,
        num_tokens_per_pass=num_tokens_per_pass,
        num_parameters=None if size is None else size.num_parameters,
        backend=placement.backend,
        num_ranks=placement.num_ranks,
        memory_bytes_per_rank=per_rank,
        memory_bytes=None if per_rank is None else per_rank * placement.num_ranks,
        notes=[
            *_size_notes(first, size),
            *placement.notes,
            *notes,
            *file_notes(data_sources(spec).values()),
        ],
    )


def unit_id(index: int, label: str) -> str:
    """A unit's name inside its job, safe in paths and URLs: `0003-step-120`."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-") or "checkpoint"
    return f"{index:04d}-{safe[:64]}"


def warm_up_passes(optimizer: Optimizer, checkpoint: CheckpointRef) -> int:
    """Steps whose gradients the moments of a checkpoint are accumulated over."""
    if isinstance(optimizer, AdamW) and (
        optimizer.moments == "warmup"
        or (optimizer.moments == "auto" and not checkpoint.has_moments)
    ):
        return optimizer.warmup_steps
    return 0


def _size_notes(first: CheckpointRef, size: ModelSize | None) -> list[str]:
    if size is not None:
        return []
    if first.source == "gguf":
        return ["the model's size is not read from a GGUF file before it is measured"]
    if first.source == "hub":
        return ["the model's size is not known before it is fetched"]
    return ["the model's size is read from safetensors only: memory is not known beforehand"]


def moment_notes(optimizer: Optimizer, checkpoints: Sequence[CheckpointRef]) -> list[str]:
    """Where AdamW's moments will come from, as far as that is not plain from the spec."""
    if not isinstance(optimizer, AdamW) or optimizer.moments == "warmup":
        return []
    total = len(checkpoints)
    unknown = sum(ref.has_moments is None for ref in checkpoints)
    absent = sum(ref.has_moments is False for ref in checkpoints)
    notes = []
    places = [ref.moments_url for ref in checkpoints if ref.moments_url is not None]
    if places:
        notes.append(
            f"optimizer states of {len(places)} of {total} checkpoints are looked for at "
            f"{places[0]} and the like, and fetched: 8 bytes per parameter each; "
            "checkpoints.optimizer_states: none leaves them"
        )
    if unknown:
        notes.append(
            f"whether {unknown} of {total} checkpoints hold optimizer state is known only "
            "once they are fetched; backward passes assume they do not"
        )
    if 0 < absent < total and optimizer.moments == "auto":
        notes.append(
            f"{absent} of {total} checkpoints hold no optimizer state: theirs is accumulated "
            "over warmup_steps, the others' is read, so their lambda_c are not quite alike; "
            "optimizer.moments: warmup treats all the same"
        )
    if absent and optimizer.moments == "checkpoint":
        notes.append(
            f"{absent} of {total} checkpoints hold no optimizer state, and "
            "optimizer.moments is 'checkpoint': those units will fail"
        )
    return notes


def lost_share_notes(
    mixture: MixtureSources, ratios: Sequence[float], batch_sequences: int, instead: str
) -> list[str]:
    """Ratios at which a source's share of a mixed batch rounds to no sequence, by source.

    Args:
        mixture: Sources and their shares.
        ratios: Of the varied source.
        batch_sequences: Of a mixed batch.
        instead: What can be done about it beside raising batch_sequences.
    """
    lost: dict[str, list[float]] = {}
    for ratio in ratios:
        for s in lost_sources(source_shares(mixture, ratio), batch_sequences):
            lost.setdefault(mixture.sources[s].name, []).append(ratio)
    return [
        f"batches.batch_sequences {batch_sequences} leaves {name} no whole sequence at "
        f"{_listed_ratios(at)}: units will fail there; raise it, {instead}"
        for name, at in lost.items()
    ]


def _listed_ratios(ratios: Sequence[float]) -> str:
    word = "ratio" if len(ratios) == 1 else "ratios"
    shown = ", ".join(f"{ratio:g}" for ratio in ratios[:_MAX_LISTED])
    rest = len(ratios) - _MAX_LISTED
    return f"{word} {shown} and {rest} more" if rest > 0 else f"{word} {shown}"


def file_notes(sources: Iterable[DataSource]) -> list[str]:
    """Data files that are not here. Globs are left to the run: they can be slow to follow."""
    named = [path for s in sources if isinstance(s, FileData) for path in s.paths]
    return missing_file_notes(path for path in named if not glob.has_magic(path))


def missing_file_notes(paths: Iterable[str]) -> list[str]:
    """Data files, named without globs, that are not here."""
    plain = dict.fromkeys(paths)
    missing = [path for path in plain if not Path(path).expanduser().is_file()]
    return [f"data file {path!r} is not on this machine: units will fail" for path in missing]
