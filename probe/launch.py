"""How the ranks of one machine are started: by torchrun, also where there is only one."""

import os
from collections.abc import Mapping

from probe.errors import ConfigError

TORCHRUN = "torch.distributed.run"


def torchrun_arguments(num_ranks: int, *arguments: str) -> list[str]:
    """What `python -m torch.distributed.run` needs to start `probe.rank` so many times.

    Args:
        num_ranks: Processes.
        arguments: Of each `probe.rank`.
    """
    # --standalone picks a free port, so that gangs do not meet. Without --log-dir torchrun makes a
    # directory of its own for every start, empty here, and never removes it.
    agent = ["--standalone", f"--log-dir={os.devnull}", f"--nproc-per-node={num_ranks}"]
    return [*agent, "-m", "probe.rank", *arguments]


def thread_environment(num_ranks: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that divide the cores among the ranks, where the user has not done it.

    torchrun itself gives each of several ranks one thread.
    """
    if num_ranks == 1 or "OMP_NUM_THREADS" in environment:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_ranks))}


def refuse_several_nodes(num_nodes: int, who: str) -> None:
    """Raise for a job that asks for more machines than the one `who` starts ranks on.

    Raises:
        ConfigError: It says what to do instead.
    """
    if num_nodes > 1:
        raise ConfigError(
            f"parallel.nodes is {num_nodes}, but {who} starts ranks on one machine only. Submit "
            "the job to a worker with PROBE_LAUNCHER=ray, or set parallel.nodes: 1."
        )
