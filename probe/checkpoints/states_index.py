"""Where the optimizer state of a hub revision is published (torch-free; nothing is fetched).

Hub revisions hold weights alone. Some runs publish their optimizer states elsewhere, a directory
a step, listed in CSV files as those of github.com/allenai/OLMo/tree/main/configs: `Step,Checkpoint
Directory`, with `Ingredient` in front for stage 2.
"""

import csv
import logging
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from probe.errors import CheckpointError
from probe.known_models import known_revision
from probe.spec import HubCheckpoints

logger = logging.getLogger(__name__)

_MAX_CSV_BYTES = 16 << 20
_STEP, _DIRECTORY, _INGREDIENT = "step", "checkpoint directory", "ingredient"


class StatesIndex:
    """The places that `checkpoints.optimizer_states` stands for."""

    def __init__(self, spec: HubCheckpoints) -> None:
        """Nothing is read yet."""
        self._spec = spec

    def url(self, revision: str, step: int | None) -> str | None:
        """Directory that may hold the optimizer state of a revision; None: none is known.

        Raises:
            CheckpointError: The CSV file is missing or has other columns.
        """
        chosen = self._spec.optimizer_states
        if chosen == "none" or step is None:
            return None
        if chosen == "auto":
            known = known_revision(self._spec.repo, revision)
            return None if known is None or known.step != step else known.states_url
        if chosen.endswith(".csv"):
            ingredient = re.search(r"ingredient(\w+?)(?![A-Za-z0-9])", revision)
            return self._listed.get((step, "" if ingredient is None else ingredient[1]))
        return chosen.replace("{step}", str(step))

    @cached_property
    def _listed(self) -> dict[tuple[int, str], str]:
        """(step, ingredient) -> directory, of the CSV file."""
        path = Path(self._spec.optimizer_states).expanduser()
        places: dict[tuple[int, str], str] = {}
        for row in _rows(path):
            step, url = row[_STEP], row[_DIRECTORY]
            if not step.isdecimal() or not url.startswith("https://"):
                raise CheckpointError(
                    f"{path}: expected a step and an https URL, found {step!r:.40}, {url!r:.80}"
                )
            stated = re.search(r"/step(\d+)(?!.*/step\d)", url)
            if stated is not None and stated[1] != step:
                logger.warning("%s: step %s points to %s; left out", path, step, url)
                continue
            places[int(step), row.get(_INGREDIENT, "")] = url
        return places


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows by lower-case column name."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            if path.stat().st_size > _MAX_CSV_BYTES:
                raise CheckpointError(f"{path}: over {_MAX_CSV_BYTES} bytes, no list of steps")
            reader = csv.DictReader(stream, strict=True)
            columns = {name.strip().lower(): name for name in reader.fieldnames or ()}
            if not {_STEP, _DIRECTORY} <= set(columns):
                raise CheckpointError(
                    f"{path}: expected columns Step and Checkpoint Directory, found "
                    f"{', '.join(reader.fieldnames or ()) or 'none'!r:.200}"
                )
            for row in reader:
                yield {key: (row.get(name) or "").strip() for key, name in columns.items()}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CheckpointError(f"checkpoints.optimizer_states: {path}: {error}") from error
