"""Keep jobs inside the directories an operator allows (`PROBE_ROOTS`), symbolic links followed.

Checked when a job is submitted, planned or listed. No roots configured means every path, which
`server.api.app.create_app` accepts on a loopback address only.
"""

import glob
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from probe.kinds import JobSpec, data_sources, image_files
from probe.result import CheckpointRef
from probe.spec import Checkpoints, FileData, HubCheckpoints, LocalCheckpoints
from probe.spec_continual import ContinualLearningSpec, HubImages
from server.api.problems import ProblemError, invalid
from server.wire import FieldProblem

_GLOB = re.compile(r"[*?\[]")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_MAX_MATCHES = 100_000


def check_checkpoints(
    checkpoints: Checkpoints, roots: Sequence[Path], field: str = "checkpoints"
) -> None:
    """Refuse a checkpoint path or glob that begins outside the roots.

    Raises:
        ProblemError: 422 `path_not_allowed`, naming the field.
    """
    if not roots:
        return
    prefix = f"{field}." if field else ""
    if not isinstance(checkpoints, HubCheckpoints):
        _check_pattern(checkpoints.path, roots, f"{prefix}path")
        if isinstance(checkpoints, LocalCheckpoints) and checkpoints.config is not None:
            _check_pattern(checkpoints.config, roots, f"{prefix}config")
            _check_path(Path(checkpoints.config) / "config.json", roots, f"{prefix}config")
    elif ".." in checkpoints.repo.split("/") or Path(checkpoints.repo).exists():
        # Loaders take a directory of that name before they ask the hub.
        raise _refused(checkpoints.repo, roots, f"{prefix}repo")
    elif checkpoints.optimizer_states.endswith(".csv"):
        _check_pattern(checkpoints.optimizer_states, roots, f"{prefix}optimizer_states")


def check_spec(spec: JobSpec, roots: Sequence[Path]) -> None:
    """Refuse every path of a job that leads out of the roots: checkpoints, tokenizer, data files.

    Raises:
        ProblemError: As `check_checkpoints`.
    """
    if not roots:
        return
    if isinstance(spec, ContinualLearningSpec):
        _check_images(spec, roots)
        return
    check_checkpoints(spec.checkpoints, roots)
    name = spec.model.tokenizer
    # A hub id may look like a relative path; it is one when something is there.
    if name is not None and (_HUB_ID.fullmatch(name) is None or Path(name).exists()):
        _check_pattern(name, roots, "model.tokenizer")
    for place, source in data_sources(spec).items():
        if isinstance(source, FileData):
            for number, pattern in enumerate(source.paths):
                field = f"{place}.paths.{number}"
                _check_pattern(pattern, roots, field)
                matches = glob.iglob(pattern, recursive=True)
                for match in itertools.islice(matches, _MAX_MATCHES):
                    _check_path(Path(match), roots, field)


def check_found(refs: Iterable[CheckpointRef], roots: Sequence[Path]) -> None:
    """Refuse checkpoints found inside the roots that a symbolic link leads out of.

    Raises:
        ProblemError: As `check_checkpoints`.
    """
    if not roots:
        return
    for ref in refs:
        if ref.source != "hub":
            location = Path(ref.location)
            _check_path(location, roots, "checkpoints.path")
            if location.is_dir():
                # formats of several ranks keep their files one level further down
                for inner in itertools.chain(location.glob("*"), location.glob("*/*")):
                    _check_path(inner, roots, "checkpoints.path")


def _check_images(spec: ContinualLearningSpec, roots: Sequence[Path]) -> None:
    for field, path in image_files(spec).items():
        # Taken as it stands when it is read, so `*` in it is a letter like any other.
        if path.startswith("~") or ".." in Path(path).parts:
            raise _refused(path, roots, field)
        _check_path(Path(path), roots, field)
    images = spec.stream.data
    # As of checkpoints: loaders take a directory of that name before they ask the hub.
    if isinstance(images, HubImages) and (
        ".." in images.repo.split("/") or Path(images.repo).exists()
    ):
        raise _refused(images.repo, roots, "stream.data.repo")


def _check_pattern(pattern: str, roots: Sequence[Path], field: str) -> None:
    if pattern.startswith("~") or ".." in Path(pattern).parts:
        raise _refused(pattern, roots, field)
    parts = Path(pattern).parts
    fixed = list(itertools.takewhile(lambda part: not _GLOB.search(part), parts))
    _check_path(Path(*fixed), roots, field)


def _check_path(path: Path, roots: Sequence[Path], field: str) -> None:
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name too long
        raise _refused(str(path), roots, field) from None
    if not any(resolved.is_relative_to(root) for root in roots):
        raise _refused(str(path), roots, field)


def _refused(path: str, roots: Sequence[Path], field: str) -> ProblemError:
    allowed = ", ".join(str(root) for root in roots)
    message = f"{path[:200]!r} leads outside of what this server may read: {allowed}"
    return invalid([FieldProblem(field=field, message=message)], "path_not_allowed")
