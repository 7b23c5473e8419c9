"""Memory of this machine's GPUs, as nvidia-smi says, read now and then by a thread of its own.

Nothing waits for it: nvidia-smi can take seconds, and hang with a driver that does.
"""

import logging
import shutil
import subprocess
import threading

from server.wire import GpuView

logger = logging.getLogger(__name__)

_COMMAND = (
    "--query-gpu=index,name,memory.used,memory.total",
    "--format=csv,noheader,nounits",
)
_TIMEOUT_S = 10.0
_MIB = 2**20


class GpuMemory:
    """What was found last; nothing where there is no nvidia-smi."""

    def __init__(self, interval_s: float = 10.0) -> None:
        """Begin to look, every `interval_s`."""
        self.latest: list[GpuView] = []
        self._interval_s = interval_s
        self._program = shutil.which("nvidia-smi")
        self._stopping = threading.Event()
        if self._program is not None:
            threading.Thread(target=self._look, name="gpu-memory", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._stopping.set()

    def _look(self) -> None:
        assert self._program is not None
        while not self._stopping.is_set():
            try:
                ran = subprocess.run(
                    [self._program, *_COMMAND],
                    capture_output=True,
                    text=True,
                    timeout=_TIMEOUT_S,
                    check=True,
                    stdin=subprocess.DEVNULL,
                )
                self.latest = parse(ran.stdout)
            except (OSError, subprocess.SubprocessError, ValueError) as error:
                self.latest = []  # old numbers would look like new ones
                logger.debug("nvidia-smi: %s", error, extra={"event": "gpu.unknown"})
            self._stopping.wait(self._interval_s)


def parse(text: str) -> list[GpuView]:
    """The GPUs of nvidia-smi's table; those whose memory it cannot tell are left out.

    Raises:
        ValueError: It is no such table.
    """
    gpus = []
    for line in filter(None, map(str.strip, text.splitlines())):
        index, rest = line.split(", ", 1)
        name, used, total = rest.rsplit(", ", 2)
        if used.isdecimal() and total.isdecimal():  # else "[N/A]"
            gpus.append(
                GpuView(
                    index=int(index),
                    name=name,
                    memory_used_bytes=int(used) * _MIB,
                    memory_total_bytes=int(total) * _MIB,
                )
            )
    return gpus
