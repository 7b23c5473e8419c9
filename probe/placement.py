"""Which back-end and how many ranks a job gets, and the memory of each (torch-free)."""

from collections.abc import Sequence
from dataclasses import dataclass

from probe.errors import ConfigError
from probe.gpus import gpu_memory_bytes
from probe.kinds import CheckpointJobSpec
from probe.model_size import ModelSize
from probe.result import Backend
from probe.spec import AdamW, CheckpointSeriesSpec, Optimizer, ParallelOptions
from probe.spec_mix import MixScanSpec
from probe.spec_train import MixTrainSpec

_FP32_BYTES = 4
# Share of a GPU that weights and buffers may take; the rest is activations, gathered layers and
# the CUDA context.
_ROOM = 0.8
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a job runs: `num_ranks` processes, as many on each of its nodes."""

    backend: Backend
    num_ranks: int
    memory_bytes_per_rank: int | None  # weights and buffers; None: the model's size is not known
    notes: tuple[str, ...] = ()


def backend_for(parallel: ParallelOptions, num_ranks: int) -> Backend:
    """What `parallel.backend` means where so many ranks were started.

    Args:
        parallel: As in the spec.
        num_ranks: Processes that are there: the world size of torch.distributed, 1 without it.

    Raises:
        ConfigError: The spec asks for another number of ranks.
    """
    wanted = fixed_num_ranks(parallel)
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


def fixed_num_ranks(parallel: ParallelOptions) -> int | None:
    """Ranks as the spec alone tells them; None: the machine decides."""
    return 1 if parallel.backend == "single" else parallel.ranks


def place(spec: CheckpointJobSpec, size: ModelSize | None) -> Placement:
    """Where a job runs when this machine measures it; `choose_placement` with its GPUs."""
    gpus = gpu_memory_bytes() if spec.model.device != "cpu" else []
    return choose_placement(spec, size, gpus)


def choose_placement(
    spec: CheckpointJobSpec, size: ModelSize | None, gpus: Sequence[int]
) -> Placement:
    """As many ranks as the spec says, else the fewest GPUs that hold the model.

    Args:
        spec: The job.
        size: Of its model, where it is known.
        gpus: Memory of each GPU the ranks may use, bytes; empty: they run on the CPU.
    """
    notes = []
    num_ranks = fixed_num_ranks(spec.parallel)
    if num_ranks is None:
        num_ranks = _fewest(spec, size, gpus)
        if size is None and len(gpus) > 1:
            notes.append(
                f"one of {len(gpus)} GPUs is used, since the model's size is not known before it "
                "is fetched; parallel.ranks takes more"
            )
    elif num_ranks // spec.parallel.nodes > len(gpus) > 0:
        notes.append(
            f"parallel.ranks is {num_ranks}{_on_nodes(spec.parallel)}, one GPU each; this machine "
            f"has {len(gpus)}: units will fail here"
        )
    if spec.parallel.nodes > 1:
        notes.append(
            f"parallel.nodes is {spec.parallel.nodes}: workers of launcher ray take this job, "
            "others fail it"
        )
    memory = None if size is None else memory_bytes_per_rank(spec, size, num_ranks)
    if memory is not None and gpus and memory > min(gpus):
        notes.append(
            f"weights and buffers need {memory / _GIB:.1f} GiB per rank, the smallest GPU here has "
            f"{min(gpus) / _GIB:.1f}: units will fail here"
        )
    return Placement(backend_for(spec.parallel, num_ranks), num_ranks, memory, tuple(notes))


def _on_nodes(parallel: ParallelOptions) -> str:
    return f" on {parallel.nodes} nodes" if parallel.nodes > 1 else ""


def _fewest(spec: CheckpointJobSpec, size: ModelSize | None, gpus: Sequence[int]) -> int:
    if size is None or not gpus:
        return 1
    room = _ROOM * min(gpus)
    fitting = (n for n in range(1, len(gpus)) if memory_bytes_per_rank(spec, size, n) <= room)
    return next(fitting, len(gpus))


def memory_bytes_per_rank(spec: CheckpointJobSpec, size: ModelSize, num_ranks: int) -> int:
    """Weights and buffers of one rank at the peak, activations left out.

    Live weights (in the forward dtype; FSDP2 keeps fp32), the fp32 base (in host memory where a
    GPU's is offloaded), and what the kind of job keeps beside them. Sharded, each rank has its
    share of these, and the largest group of layers while it is gathered.
    """
    backend = backend_for(spec.parallel, num_ranks)
    forward = _FP32_BYTES if spec.model.dtype == "float32" else 2
    live = _FP32_BYTES if backend == "fsdp2" else forward
    is_offloaded = spec.parallel.offload_base and spec.model.device != "cpu"
    base = 0 if is_offloaded else _FP32_BYTES
    kept = _kept_bytes(spec, live)
    share = -(-size.num_parameters // num_ranks) * (live + base + kept)
    return share if backend == "single" else share + size.largest_group * forward


def _kept_bytes(spec: CheckpointJobSpec, live: int) -> int:
    """Per parameter, what the kind of job keeps beside live weights of `live` bytes and base."""
    if isinstance(spec, MixScanSpec):
        return _mix_bytes(spec)
    if isinstance(spec, MixTrainSpec):
        # Gradient and two moments; and the fp32 weights AdamW writes, where live ones are not.
        return 3 * _FP32_BYTES + (_FP32_BYTES if live < _FP32_BYTES else 0)
    return _series_bytes(spec)


def _series_bytes(spec: CheckpointSeriesSpec) -> int:
    """Per parameter: what makes the direction, and the held-out gradient."""
    held_out = 1 if spec.measurement.loss_batch != "update" else 0
    return _step_bytes(spec.optimizer) + held_out * _FP32_BYTES


def _step_bytes(optimizer: Optimizer) -> int:
    """Per parameter, in fp32: a gradient that turns into the direction, and AdamW's moments.

    Weight by weight, the gradient goes as the direction comes; moments that a checkpoint saved are
    read as they are needed. `moments: auto` counts as accumulated ones, which are kept.
    """
    keeps_moments = isinstance(optimizer, AdamW) and optimizer.moments != "checkpoint"
    return (3 if keeps_moments else 1) * _FP32_BYTES


def _mix_bytes(spec: MixScanSpec) -> int:
    """Per parameter: every task's gradient, and what makes the direction.

    Exact gradients: as a series. Shared ones of S sources: S gradients at a time and the
    S (S + 3) / 2 moments in `mixture.buffers`; a direction is made once the gradients have entered
    them. With saved moments, which are read as needed: S gradients and the direction.
    """
    tasks = len(spec.eval_tasks) * _FP32_BYTES
    if spec.mixture.gradients == "exact":
        return tasks + _step_bytes(spec.optimizer)
    num_sources = len(spec.mixture.sources)
    if spec.optimizer.moments == "checkpoint":
        return tasks + (num_sources + 1) * _FP32_BYTES
    width = _FP32_BYTES if spec.mixture.buffers == "float32" else 2
    moments = num_sources * (num_sources + 3) // 2 * width
    return tasks + num_sources * _FP32_BYTES + moments
