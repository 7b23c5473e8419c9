"""Keep jobs to what an operator allows: directories (`PROBE_ROOTS`), hub repositories.

Checked when a job is submitted, planned or listed, and by the worker again right before a unit is
measured, with symbolic links followed each time. Nothing configured means everything, which the
server accepts on a loopback address only (of directories). Torch-free.
"""

import fnmatch
import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from probe.errors import ConfigError
from probe.kinds import JobSpec, data_sources, image_files
from probe.result import CheckpointRef
from probe.spec import Checkpoints, FileData, HubCheckpoints, HubData, LocalCheckpoints
from probe.spec_continual import ContinualLearningSpec, HubImages
from server.settings import Settings

_GLOB = re.compile(r"[*?\[]")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_MAX_MATCHES = 100_000
_MOST_ANY_DEPTH = 2  # each multiplies the directories read by the depth of the tree
_MAX_PATH_BYTES = 4096  # the kernel's own limit


class NotAllowedError(ConfigError):
    """A job asks for what the operator does not allow; `field` is the dotted path in its spec."""

    code: ClassVar[str] = "not_allowed"

    def __init__(self, field: str, reason: str) -> None:
        """Keep both; the message names both."""
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason


class PathNotAllowedError(NotAllowedError):
    """A path leads out of the configured directories."""

    code = "path_not_allowed"


class RepoNotAllowedError(NotAllowedError):
    """A hub repository, or an address of optimizer states, is none of those configured."""

    code = "repo_not_allowed"


@dataclass(frozen=True, slots=True)
class Confinement:
    """What jobs may read."""

    roots: Sequence[Path] = ()  # resolved directories; empty: any path
    hub_repos: Sequence[str] = ()  # patterns; empty: any repository

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """As the operator has set it."""
        return cls(tuple(settings.roots), tuple(settings.hub_repos))

    def check_spec(self, spec: JobSpec) -> None:
        """Refuse a job that names a path or a repository it may not have.

        Raises:
            NotAllowedError: Naming the field.
        """
        if isinstance(spec, ContinualLearningSpec):
            self._check_images(spec)
            return
        self.check_checkpoints(spec.checkpoints)
        name = spec.model.tokenizer
        if name is not None:
            self._check_tokenizer(name)
        for place, source in data_sources(spec).items():
            if isinstance(source, FileData):
                for number, pattern in enumerate(source.paths):
                    self._check_files(pattern, f"{place}.paths.{number}")
            else:
                self._check_data_set(source, place)

    def check_checkpoints(self, checkpoints: Checkpoints, field: str = "checkpoints") -> None:
        """Refuse a checkpoint path or glob that begins outside the roots, or a repository.

        Raises:
            NotAllowedError: Naming the field.
        """
        prefix = f"{field}." if field else ""
        if isinstance(checkpoints, HubCheckpoints):
            self._check_repo(checkpoints.repo, f"{prefix}repo")
            for revision in checkpoints.revisions:
                self._check_revision(revision, f"{prefix}revisions")
            self._check_states(checkpoints.optimizer_states, f"{prefix}optimizer_states")
            return
        self._check_pattern(checkpoints.path, f"{prefix}path")
        if isinstance(checkpoints, LocalCheckpoints) and checkpoints.config is not None:
            self._check_pattern(checkpoints.config, f"{prefix}config")
            self._check_path(Path(checkpoints.config) / "config.json", f"{prefix}config")

    def check_found(self, refs: Iterable[CheckpointRef]) -> None:
        """Refuse checkpoints found inside the roots that a symbolic link leads out of.

        Raises:
            NotAllowedError: Naming the field.
        """
        for ref in refs:
            if ref.source == "hub":
                self._check_repo(ref.location, "checkpoints.repo")
                continue
            if self.roots:
                for path in _files_of(Path(ref.location)):
                    self._check_path(path, "checkpoints.path")

    def _check_tokenizer(self, name: str) -> None:
        field = "model.tokenizer"
        # A hub id may look like a relative path; it is one when something is there.
        if _HUB_ID.fullmatch(name) and not Path(name).exists():
            self._check_repo(name, field)
            return
        self._check_pattern(name, field)
        if self.roots:
            for path in _files_of(Path(name)):
                self._check_path(path, field)

    def _check_files(self, pattern: str, field: str) -> None:
        self._check_pattern(pattern, field)
        if not self.roots:
            return
        for number, match in enumerate(glob.iglob(pattern, recursive=True)):
            if number >= _MAX_MATCHES:
                raise PathNotAllowedError(
                    field, f"{pattern[:200]!r} matches over {_MAX_MATCHES} files; narrow it"
                )
            self._check_path(Path(match), field)

    def _check_data_set(self, source: HubData, place: str) -> None:
        self._check_repo(source.dataset, f"{place}.dataset")
        # `datasets` takes a single word such as json or text for a reader of local files.
        if self.roots and "/" not in source.dataset:
            raise PathNotAllowedError(
                f"{place}.dataset", f"write it as owner/name, found {source.dataset[:200]!r}"
            )
        if source.revision is not None:
            self._check_revision(source.revision, f"{place}.revision")

    def _check_images(self, spec: ContinualLearningSpec) -> None:
        for field, path in image_files(spec).items():
            # Taken as it stands when it is read, so `*` in it is a letter like any other.
            self._check_text(path, field)
            self._check_path(Path(path), field)
        images = spec.stream.data
        if isinstance(images, HubImages):
            self._check_repo(images.repo, "stream.data.repo")
            if images.revision is not None:
                self._check_revision(images.revision, "stream.data.revision")

    def _check_repo(self, repo: str, field: str) -> None:
        if self.hub_repos and not _matches(repo, self.hub_repos):
            raise self._repo_refused(repo, field)
        # Loaders take a directory of that name before they ask the hub.
        is_id = _HUB_ID.fullmatch(repo) and ".." not in repo.split("/")
        if self.roots and (not is_id or Path(repo).exists()):
            raise self._refused(repo, field)

    def _check_revision(self, revision: str, field: str) -> None:
        # It becomes part of a file's name in the cache.
        parts = revision.split("/")
        if self.roots and ("" in parts or ".." in parts or "\\" in revision):
            raise self._refused(revision, field)

    def _check_states(self, states: str, field: str) -> None:
        if states.endswith(".csv"):
            self._check_pattern(states, field)
        elif "://" in states and self.hub_repos:
            addresses = [pattern for pattern in self.hub_repos if "://" in pattern]
            if "/../" in states or not _matches(states, addresses):
                raise self._repo_refused(states, field)

    def _check_pattern(self, pattern: str, field: str) -> None:
        self._check_text(pattern, field)
        parts = Path(pattern).parts
        if parts.count("**") > _MOST_ANY_DEPTH:
            raise PathNotAllowedError(
                field, f"{pattern[:200]!r} has ** more than {_MOST_ANY_DEPTH} times; once is enough"
            )
        fixed = list(itertools.takewhile(lambda part: not _GLOB.search(part), parts))
        self._check_path(Path(*fixed), field)
        # Readers take what has exactly that name first, whatever brackets are in it.
        self._check_path(Path(pattern), field)

    def _check_text(self, path: str, field: str) -> None:
        """Refuse what is no plain path, before any file system is asked."""
        if not self.roots:
            return
        is_odd = path.startswith("~") or _SCHEME.match(path) or "\0" in path
        if is_odd or len(os.fsencode(path)) > _MAX_PATH_BYTES or ".." in Path(path).parts:
            raise self._refused(path, field)

    def _check_path(self, path: Path, field: str) -> None:
        if not self.roots:
            return
        try:
            resolved = path.resolve()
        except (OSError, RuntimeError, ValueError):  # a loop of links, a name too long
            raise self._refused(str(path), field) from None
        if not any(resolved.is_relative_to(root) for root in self.roots):
            raise self._refused(str(path), field)

    def _refused(self, path: str, field: str) -> PathNotAllowedError:
        allowed = ", ".join(str(root) for root in self.roots)
        shown = path[:200].encode("utf-8", "backslashreplace").decode()
        return PathNotAllowedError(
            field, f"{shown!r} leads outside of what may be read here: {allowed}"
        )

    def _repo_refused(self, name: str, field: str) -> RepoNotAllowedError:
        allowed = ", ".join(self.hub_repos)
        return RepoNotAllowedError(
            field, f"{name[:200]!r} is none of those allowed here: {allowed}"
        )


def _files_of(location: Path) -> Iterator[Path]:
    """A checkpoint and its files; formats of several ranks keep theirs one level further down."""
    yield location
    if location.is_dir():
        yield from itertools.chain(location.glob("*"), location.glob("*/*"))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
