"""Which files a DeepSpeed ZeRO checkpoint has, and whether they are all there (torch-free).

`DIR/latest` names the newest tag and `DIR/global_stepN/` holds it: one `..optim_states.pt` per
rank, and `mp_rank_00_model_states.pt`, or under ZeRO-3 one `..model_states.pt` per rank. Trainer
puts both into its own `checkpoint-N/`. The files are pickles and are not opened here.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from probe.checkpoints.layout import check_archive, read_json_object
from probe.errors import CheckpointError

LATEST = "latest"
TRAINER_STATE = "trainer_state.json"
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_STEP = re.compile(r"global_step(\d+)")
_NOT_COVERED = (  # what is recognised by a file's name
    (re.compile(r"layer_\d+-model_\d+-model_states\.pt"), "pipeline parallelism"),
    (re.compile(r"layer_\d+-model_states\.pt"), "pipeline parallelism"),
    (re.compile(r".*expert_\d+_mp_rank_\d+_model_states\.pt"), "mixture of experts"),
    (re.compile(r"expp_rank_\d+_mp_rank_\d+_optim_states\.pt"), "mixture of experts"),
    (re.compile(r"offloaded_tensors"), "offload to NVMe"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSpeedFiles:
    """One saved step of a DeepSpeed run."""

    directory: Path  # what was asked for
    tag: Path  # the directory of the step
    step: int | None  # where the tag says it
    model_states: tuple[Path, ...]  # by rank; one for all under ZeRO-1 and 2
    optimizer_states: tuple[Path, ...]  # by rank
    size_bytes: int

    @property
    def around(self) -> tuple[Path, ...]:
        """Where config.json and a tokenizer may lie: nearest first."""
        return tuple(dict.fromkeys((self.directory, self.tag, self.tag.parent)))


def is_deepspeed(directory: Path) -> bool:
    """Whether a directory is a DeepSpeed checkpoint, or holds one beside what Trainer saves."""
    if not directory.is_dir():
        return False
    return _holds_states(directory) or any(
        _holds_states(tag) for tag in _tags(directory) if tag.is_dir()
    )


def find_deepspeed_files(directory: Path) -> DeepSpeedFiles:
    """The files of a checkpoint: of the tag `latest` names where there are several.

    Args:
        directory: The directory of one tag, or the one around it.

    Raises:
        CheckpointError: A rank's file is missing or cut off, `latest` names nothing, or the run
            was split in a way that is not read (tensor or pipeline parallelism, experts, NVMe).

    Cost: reads the table of contents of every file.
    """
    tag = directory if _holds_states(directory) else _chosen_tag(directory)
    names = sorted(path.name for path in tag.iterdir())
    for pattern, what in _NOT_COVERED:
        for name in names:
            if pattern.fullmatch(name):
                raise _not_covered(tag / name, what)
    optimizer = _by_rank(tag, names, _OPTIMIZER)
    model = _by_rank(tag, names, _MODEL)
    _check_counts(tag, model, optimizer)
    for path in (*model, *optimizer):
        check_archive(path)
    step = _step(directory, tag)
    return DeepSpeedFiles(
        directory=directory,
        tag=tag,
        step=step,
        model_states=model,
        optimizer_states=optimizer,
        size_bytes=sum(path.stat().st_size for path in (*model, *optimizer)),
    )


def _holds_states(directory: Path) -> bool:
    return any(directory.glob("*mp_rank_*_optim_states.pt")) or any(
        directory.glob("*mp_rank_*_model_states.pt")
    )


def _tags(directory: Path) -> list[Path]:
    """Directories that may hold the states; what `latest` names is one of them."""
    latest = directory / LATEST
    named = [directory / _latest(latest)] if latest.is_file() else []
    return [*named, *sorted(directory.glob("global_step*"))]


def _chosen_tag(directory: Path) -> Path:
    latest = directory / LATEST
    tags = [tag for tag in _tags(directory) if tag.is_dir() and _holds_states(tag)]
    if latest.is_file():
        chosen = directory / _latest(latest)
        if chosen not in tags:
            found = ", ".join(tag.name for tag in tags)
            raise CheckpointError(
                f"{latest}: names {chosen.name!r}, but that directory holds no states; found "
                f"{found}. The save was cut off, or the directory was not copied"
            )
        return chosen
    if len(tags) > 1:
        raise CheckpointError(
            f"{directory}: no file `{LATEST}` says which of {', '.join(t.name for t in tags)} is "
            "meant; name one of these directories"
        )
    return tags[0]


def _step(directory: Path, tag: Path) -> int | None:
    match = _STEP.fullmatch(tag.name)
    step = None if match is None else int(match[1])
    trainer = directory / TRAINER_STATE
    if step is not None and trainer.is_file():
        stated = read_json_object(trainer).get("global_step")
        if stated != step:
            raise CheckpointError(
                f"{trainer}: global_step is {stated}, expected {step} as the directory {tag.name} "
                "says; files of different checkpoints"
            )
    return step


def _latest(path: Path) -> str:
    """The tag in `latest`: a plain name, so that nothing outside the directory is opened."""
    try:
        with path.open("rb") as stream:
            name = stream.read(4096).decode().strip()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not name or Path(name).name != name or name == "..":
        raise CheckpointError(
            f"{path}: holds {name[:80]!r}, expected the name of a directory beside it"
        )
    return name


def _by_rank(tag: Path, names: list[str], pattern: re.Pattern[str]) -> tuple[Path, ...]:
    """The files of one kind, in the order of their ranks, every rank once."""
    found: dict[int, Path] = {}
    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        if int(match[2]) != 0:
            raise _not_covered(tag / name, "tensor or pipeline parallelism (mp_rank above 0)")
        rank = int(match[1] or 0)
        if rank in found:
            raise CheckpointError(
                f"{tag}: {found[rank].name} and {name} both are of rank {rank}; files of two runs"
            )
        found[rank] = tag / name
    for rank in range(max(found, default=-1) + 1):
        if rank not in found:
            last = found[max(found)]
            raise CheckpointError(
                f"{tag}: the file of rank {rank} is missing, found {len(found)} up to {last.name}. "
                "The save was cut off, or the file was not copied"
            )
    return tuple(found[rank] for rank in sorted(found))


def _check_counts(tag: Path, model: tuple[Path, ...], optimizer: tuple[Path, ...]) -> None:
    if not model:
        raise CheckpointError(f"{tag}: no model_states.pt beside {optimizer[0].name}")
    if not optimizer:
        raise CheckpointError(
            f"{tag}: no zero_pp_rank_0_mp_rank_00_optim_states.pt beside {model[0].name}; only "
            "ZeRO stages 1, 2 and 3 are read. Save safetensors with save_16bit_model, or with "
            "probe.checkpoints.save_checkpoint"
        )
    if len(model) not in (1, len(optimizer)):
        raise CheckpointError(
            f"{tag}: found {len(model)} model_states.pt and {len(optimizer)} optim_states.pt, "
            "expected as many. Files of two runs, or a rank's file was not copied"
        )


def _not_covered(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {what}, which is not read from DeepSpeed directories; expected ZeRO over data-"
        "parallel ranks alone. Save the model and optimizer as torch DCP or safetensors"
    )
