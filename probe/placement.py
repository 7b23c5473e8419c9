"""Which back-end a job gets, from its spec and the number of ranks (torch-free)."""

from probe.errors import ConfigError
from probe.result import Backend
from probe.spec import ParallelOptions


def backend_for(parallel: ParallelOptions, num_ranks: int) -> Backend:
    """What `parallel.backend` means where so many ranks were started.

    Args:
        parallel: As in the spec.
        num_ranks: Processes that are there: the world size of torch.distributed, 1 without it.

    Raises:
        ConfigError: The spec asks for another number of ranks.
    """
    wanted = 1 if parallel.backend == "single" else parallel.ranks
    if wanted is not None and wanted != num_ranks:
        reason = "backend is single" if parallel.backend == "single" else f"ranks is {wanted}"
        start = f"torchrun --nproc-per-node {wanted} -m probe.rank --spec FILE"
        raise ConfigError(
            f"parallel.{reason}, but {num_ranks} {'were' if num_ranks > 1 else 'was'} started. "
            f"`probe run` and workers start as many as needed; by hand: "
            + (start if wanted > 1 else "python -m probe.rank --spec FILE")
        )
    if parallel.backend != "auto":
        return parallel.backend
    return "single" if num_ranks == 1 else "fsdp2"
