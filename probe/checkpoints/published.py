"""A hub revision whose optimizer state is published elsewhere, fetched when it is asked for.

Whether it is there shows only then: `has_moments` fetches. Where it is not, or cannot be had now,
there are no moments, and `moments_failure` says why; nothing else of the checkpoint depends on it.
"""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from probe.checkpoints.beside import WithMoments
from probe.checkpoints.download import Downloaded, NotThereError, Patience, download
from probe.checkpoints.header import read_header
from probe.checkpoints.huggingface import HuggingFaceSource
from probe.checkpoints.layout import check_archive
from probe.checkpoints.olmo_unsharded import open_moments
from probe.checkpoints.source import TensorKind
from probe.disk_cache import Entry, hold, make_room
from probe.errors import CheckpointError
from probe.result import CheckpointRef

logger = logging.getLogger(__name__)

KIND = "optimizer-states"
FILES = ("optim.safetensors", "optim.pt")  # the second from older runs


@runtime_checkable
class SaysWhereFrom(Protocol):
    """A source that knows more of its moments than whether they are there."""

    @property
    def moments_origin(self) -> str | None:
        """Where they were read, in words; None where there are none."""

    @property
    def moments_failure(self) -> CheckpointError | None:
        """Why there are none; None where there are."""


@dataclass(frozen=True, slots=True)
class FetchedStates:
    """An optimizer file in the cache, kept there while this object lives."""

    entry: Entry
    url: str
    file: Downloaded


def fetch_states(url: str, patience: Patience | None = None) -> FetchedStates:
    """The optimizer file of a published directory, from the cache where it was fetched before.

    Args:
        url: The directory.
        patience: With a server that does not answer.

    Raises:
        NotThereError: The directory has none.
        CheckpointError: It is broken, twice in a row, or does not fit into the cache.
        CheckpointUnavailableError: No answer.

    Cost: the download, 8 bytes per parameter of the model.
    """
    entry = hold(KIND, url)
    missing: list[str] = []
    for name in FILES:
        place = f"{url.rstrip('/')}/{name}"
        try:
            done = download(
                place,
                entry.directory / name,
                check=check_archive if name.endswith(".pt") else _check_header,
                before=make_room,
                patience=patience,
            )
        except NotThereError as error:
            missing.append(str(error))
            continue
        return FetchedStates(entry, place, done)
    raise NotThereError("; ".join(missing))


class PublishedSource(HuggingFaceSource):
    """Weights from the hub, moments from `ref.moments_url` where they are to be had."""

    def __init__(
        self, ref: CheckpointRef, directory: Path, patience: Patience | None = None
    ) -> None:
        """Nothing is fetched yet; see `HuggingFaceSource`."""
        super().__init__(ref, directory)
        self._patience = patience
        self._failure: CheckpointError | None = None

    @property
    def has_moments(self) -> bool:
        """Whether the optimizer state could be fetched. Cost: its download, the first time."""
        return self._published is not None

    @property
    def moments_origin(self) -> str | None:
        """See `SaysWhereFrom`."""
        if self._published is None:
            return None
        file = self._published[0].file
        return f"{self._published[0].url} (sha256 {file.sha256}, checked by {file.checked_by})"

    @property
    def moments_failure(self) -> CheckpointError | None:
        """See `SaysWhereFrom`."""
        return None if self._published is not None else self._failure

    def read(self, name: str, kind: TensorKind, lo: int = 0, hi: int | None = None) -> torch.Tensor:
        """See `Source.read`."""
        if kind == "weight" or self._published is None:
            return super().read(name, kind, lo, hi)
        return self._published[1].read(name, kind, lo, hi)

    def hyper(self, name: str) -> dict[str, float]:
        """See `Source.hyper`."""
        return super().hyper(name) if self._published is None else self._published[1].hyper(name)

    @cached_property
    def _published(self) -> tuple[FetchedStates, WithMoments] | None:
        assert self.ref.moments_url is not None
        try:
            states = fetch_states(self.ref.moments_url, self._patience)
            moments = open_moments(states.entry.directory)
        except CheckpointError as error:
            logger.warning("no published optimizer state: %s", error)
            self._failure = error
            return None
        weights = HuggingFaceSource(self.ref, self.directory)  # not self: a cycle is freed late
        return states, WithMoments(
            weights,
            moments,
            format_name=self.ref.format or "",
            size_bytes=states.file.num_bytes,
        )


def _check_header(path: Path) -> None:
    if not read_header(path):
        raise CheckpointError(f"{path}: holds no tensor")
