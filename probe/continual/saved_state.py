"""Keep a group's state after every finished task, so that a killed unit goes on from there.

One safetensors file per task under `<cache>/continual/<key>/`: no code in it is run, it appears
whole or not at all, and its metadata holds the results of the unit's tasks so far. The key is the
hash of everything the numbers depend on: a state of another spec, device or version of torch or
NumPy (which makes the draws) is never taken. A state that is gone costs time only: the group is
trained again from its start, with the same numbers.
"""

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from probe.assets import asset_directory
from probe.errors import ProbeError
from probe.result import RunRef
from probe.result_continual import RunTask
from probe.spec_base import NOT_MEASURED

logger = logging.getLogger(__name__)

# To be raised with every change of what is kept, of what it means or of how a run is trained.
_FORMAT = 3
_KEEP_S = 14 * 24 * 3600.0  # states nobody came back for


class StateStorageError(ProbeError):
    """A state could not be written: the disk is full, or the directory may not be written."""

    code = "state_not_saved"
    retryable = True


class SavedStates:
    """The states of one group of runs.

    Args:
        spec: The resolved job spec; fields of the queue are left out.
        runs: Of the group.
        images_sha256: Of the data set.
        device: What it is trained on, as it is named in results.
        root: Directory of all groups; None: `continual` in the cache directory.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        runs: Sequence[RunRef],
        images_sha256: str,
        device: str,
        root: Path | None = None,
    ) -> None:
        ingredients = {
            "format": _FORMAT,
            "spec": {k: v for k, v in spec.items() if k not in NOT_MEASURED},
            "runs": [run.model_dump() for run in runs],
            "images": images_sha256,
            "device": device,
            "torch": torch.__version__,
            "numpy": np.__version__,
        }
        text = json.dumps(ingredients, sort_keys=True)
        self._root = asset_directory() / "continual" if root is None else root
        self.directory = self._root / hashlib.sha256(text.encode()).hexdigest()[:32]

    def save(self, next_task: int, state: dict[str, Tensor], rows: list[list[RunTask]]) -> None:
        """Keep the state before `next_task`, and let go of those before the latest two.

        Args:
            next_task: The task that comes next.
            state: As `GroupTrainer.state` gives it.
            rows: Per finished task of the unit, one result per run.

        Raises:
            StateStorageError: It cannot be written.
        """
        kept = [[run.model_dump(mode="json") for run in runs] for runs in rows]
        scratch = self.directory / f"{uuid.uuid4().hex}.part"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
            save_file(tensors, scratch, metadata={"rows": json.dumps(kept)})
            with scratch.open("rb") as file:
                os.fsync(file.fileno())
            scratch.replace(self._path(next_task))
            for old in self._tasks()[:-2]:
                self._path(old).unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                scratch.unlink(missing_ok=True)
            raise StateStorageError(
                f"the state after task {next_task - 1} cannot be kept in {self.directory}: "
                f"{error}. Make room, or set PROBE_CACHE_DIR to another directory."
            ) from error

    def load_latest(
        self, first_task: int, end_task: int
    ) -> tuple[int, dict[str, Tensor], list[list[RunTask]]] | None:
        """The latest state that a unit of these tasks can go on from.

        Args:
            first_task: First task of the unit.
            end_task: Task after its last.

        Returns:
            (next task, state, results of the unit's tasks before it); None where there is none.
            A file that cannot be read is passed over.
        """
        for task in reversed(self._tasks()):
            if task > end_task:
                continue
            try:
                with safe_open(self._path(task), framework="pt") as file:
                    names = file.keys()
                    state = {name: file.get_tensor(name) for name in names}
                    kept = json.loads(file.metadata()["rows"])
                rows = [[RunTask.model_validate(run) for run in runs] for runs in kept]
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
                logger.warning("%s cannot be read, passed over: %s", self._path(task), error)
                continue
            own = [runs for runs in rows if first_task <= runs[0].task < task]
            if len(own) == max(0, task - first_task):
                return task, state, own
        return None

    def remove_forgotten(self, now: float | None = None) -> None:
        """Let go of groups whose latest state is older than two weeks."""
        limit = (time.time() if now is None else now) - _KEEP_S
        for directory in self._root.glob("*"):
            try:
                if directory != self.directory and directory.stat().st_mtime < limit:
                    shutil.rmtree(directory, ignore_errors=True)
            except OSError:
                continue  # another process was first

    def _tasks(self) -> list[int]:
        found = self.directory.glob("before-task-*.safetensors")
        return sorted(int(path.stem.rsplit("-", 1)[1]) for path in found)

    def _path(self, next_task: int) -> Path:
        return self.directory / f"before-task-{next_task:06d}.safetensors"
