"""The GPUs this process may use and their memory, asked of the driver's own tool (torch-free)."""

import os
import shutil
import subprocess

_QUERY = ("--query-gpu=uuid,memory.total", "--format=csv,noheader,nounits")
_TIMEOUT_S = 20.0


def gpu_memory_bytes() -> list[int]:
    """Memory of each GPU that `CUDA_VISIBLE_DEVICES` lets us see, in torch's order.

    Empty where there is none, no `nvidia-smi`, or only slices of a GPU (MIG), whose memory
    it does not tell.

    Cost: one run of nvidia-smi.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        done = subprocess.run(
            [tool, *_QUERY], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    cards = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    known = [(uuid, int(mib) * 2**20) for uuid, mib in cards if mib.isdecimal()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [memory for _, memory in known]
    found = []
    for name in visible.split(","):
        memory = _memory_of(name.strip(), known)
        if memory is None:  # as CUDA does: what comes after an unknown one is not seen
            break
        found.append(memory)
    return found


def _memory_of(name: str, known: list[tuple[str, int]]) -> int | None:
    if name.isdecimal():
        return known[int(name)][1] if int(name) < len(known) else None
    matches = [memory for uuid, memory in known if name and uuid.startswith(name)]
    return matches[0] if len(matches) == 1 else None
