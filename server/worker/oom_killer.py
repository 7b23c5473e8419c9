"""Whether the kernel has killed for lack of memory: a rank that it kills cannot say so itself."""

from pathlib import Path

COUNTERS = Path("/proc/vmstat")


def num_kills() -> int:
    """Processes of this machine that the kernel has killed for lack of memory since it started.

    Containers that reach their own limit are counted too. 0 where the kernel does not count.
    """
    try:
        lines = COUNTERS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def remark(kills_before: int) -> str:
    """What to add to the report of a lost process; empty when the kernel killed none since."""
    if num_kills() <= kills_before:
        return ""
    return (
        "; meanwhile the kernel killed a process for lack of memory: use smaller batches, "
        "bfloat16, fewer ranks or jobs at once on this machine, or a larger one"
    )
