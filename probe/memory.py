"""Peak memory of a measurement, and a clear word when there was not enough."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from probe.errors import OutOfMemoryError


class PeakMemory:
    """The highest memory in use since this object was made.

    On a GPU: bytes allocated by torch. On a CPU: the resident set's high-water mark, which Linux
    lets a process reset; elsewhere the mark of the whole process. `kind` says which.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            self.kind = "device memory allocated by torch"
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # 5: reset the high-water mark
            self.kind = "resident set, peak of this unit"
        except OSError:
            self.kind = "resident set, peak of the process so far"

    def peak_bytes(self) -> int:
        """Bytes at the peak so far."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        try:
            status = Path("/proc/self/status").read_text()
            line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
            return int(line.split()[1]) * 1024
        except (OSError, StopIteration):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def out_of_memory_explained(micro_batch_sequences: int, dtype: str) -> Iterator[None]:
    """Turn an allocation failure into an error that says what to change.

    Raises:
        OutOfMemoryError: The body ran out of device or host memory.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        host = "can't allocate memory" in str(error)  # how torch's CPU allocator says it
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not host:
            raise
        raise OutOfMemoryError(
            f"out of memory: {str(error).splitlines()[0] if str(error) else 'no more memory'}. "
            f"batches.micro_batch_sequences is {micro_batch_sequences} and model.dtype {dtype}: "
            "lower the first (results change only by rounding), use bfloat16, or a larger device."
        ) from error
