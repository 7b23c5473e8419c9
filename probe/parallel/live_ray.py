"""Points theta - eta * delta of a sharded training run, and the run as it was afterwards.

theta comes from the optimizer's fp32 masters where it has them; they are never written. What the
forward reads is written in place and put back from a local copy, so that putting back needs the
other ranks only where they hold replicas of it (ZeRO-1 and 2).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from probe.agreement import Agreement
from probe.guard import finally_restored, undisturbed
from probe.parallel.live import LiveRun, LiveShard
from probe.perturb import Ray

STRANDED_NOTE = (
    "This rank's own shards were put back, but its replica of the other ranks' shards may hold "
    "weights of a trial, because the ranks were interrupted at different places. Do not train on: "
    "load a checkpoint."
)


@contextmanager
def live_ray(
    run: LiveRun, shards: Sequence[LiveShard], delta: Sequence[Tensor], agreement: Agreement
) -> Iterator[Callable[[float], None]]:
    """A function that puts the whole sharded model at theta - eta * delta; undone at the end.

    Args:
        run: The training run.
        shards: Those that move.
        delta: Aligned with them, fp32 or fp64.
        agreement: Of all ranks of the run.

    Cost: memory as `probe.perturb.Ray`: with delta, 8 bytes per parameter over the number of
    ranks where the forward reads fp32 masters themselves, 4 where it reads other tensors.
    """
    with run.kept() as keeper, undisturbed(run.module, run.devices) as guard:
        ray = agreement.together(lambda: _ray(shards, delta))

        def move(eta: float) -> None:
            def write() -> None:
                guard.rewind()
                ray.move(eta)

            agreement.together(write)
            run.push()

        def restore() -> None:
            ray.restore()
            if not (keeper.apart and run.push_waits):
                run.push()

        with finally_restored(restore), agreement.meeting_before(run.meeting_modules()):
            try:
                yield move
            except BaseException as error:
                keeper.cut_short = True
                keeper.apart = agreement.apart or not isinstance(error, Exception)
                if keeper.apart and run.push_waits:
                    error.add_note(STRANDED_NOTE)
                raise


def _ray(shards: Sequence[LiveShard], delta: Sequence[Tensor]) -> Ray:
    """From the masters where there are any, else from copies of what is about to be written."""
    live = [shard.live.data for shard in shards]
    base = [shard.master.data for shard in shards]
    if all(a.data_ptr() == b.data_ptr() for a, b in zip(live, base, strict=True)):
        return Ray.through(live, delta)
    return Ray(live, base, delta)
