"""The next checkpoint on its way while the present one is measured.

A thread of the measuring process fetches what has to come over the network, or asks the kernel to
read local files ahead. It changes no number and fails no unit: what goes wrong is logged, and the
unit that needs the files meets it again. It ends with its process, a gang that is killed included;
downloads hold their locks, so nothing is fetched twice.
"""

import logging
import os
import threading
from pathlib import Path

from probe.errors import ProbeError
from probe.result import CheckpointRef

logger = logging.getLogger(__name__)


class Prefetcher:
    """Brings one checkpoint at a time closer.

    Args:
        wants_moments: Whether optimizer states are of use to the job.
    """

    def __init__(self, *, wants_moments: bool) -> None:
        self._wants_moments = wants_moments
        self._asked: CheckpointRef | None = None
        self._thread: threading.Thread | None = None

    def begin(self, ref: CheckpointRef) -> None:
        """Begin with a checkpoint, unless it was begun already or another one is under way."""
        if ref == self._asked or (self._thread is not None and self._thread.is_alive()):
            return
        self._asked = ref
        self._thread = threading.Thread(target=self._run, args=(ref,), name="prefetch", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for what is under way."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, ref: CheckpointRef) -> None:
        about = {"event": "prefetch", "step": ref.step}
        try:
            prefetch(ref, wants_moments=self._wants_moments)
        except (ProbeError, OSError) as error:
            logger.warning("%s is not fetched ahead: %s", ref.label, error, extra=about)
        except Exception:  # whatever a library raises: the unit itself will say it properly
            logger.exception("%s is not fetched ahead", ref.label, extra=about)
        else:
            logger.info("%s is here", ref.label, extra=about)


def prefetch(ref: CheckpointRef, *, wants_moments: bool) -> None:
    """Bring a checkpoint closer: from the hub to the disk, from a packed file or disk to memory.

    Args:
        ref: The checkpoint.
        wants_moments: Whether to fetch its published optimizer state too.

    Raises:
        CheckpointError: It cannot be had.
        OSError: A local file cannot be opened.

    Cost: the download; for local files a system call each.
    """
    if ref.source == "hub":
        _fetch_from_hub(ref, wants_moments)
    elif ref.location.lower().endswith(".gz"):
        from probe.checkpoints.gguf import unpacked

        _read_ahead(unpacked(Path(ref.location)).path)
    elif ref.source == "gguf":
        _read_ahead(Path(ref.location))
    else:
        for folder, _, names in os.walk(ref.location):
            for name in names:
                _read_ahead(Path(folder) / name)


def _fetch_from_hub(ref: CheckpointRef, wants_moments: bool) -> None:
    from probe.checkpoints.hub import fetch_revision  # seconds to import; here it costs nobody
    from probe.checkpoints.published import fetch_states

    fetched = fetch_revision(ref)
    if wants_moments and ref.moments_url is not None and not fetched.has_own_moments:
        fetch_states(ref.moments_url)


def _read_ahead(path: Path) -> None:
    """Ask the kernel for a file's pages; it takes as many as it has room for, and returns."""
    if not hasattr(os, "posix_fadvise"):  # not on macOS
        return
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
