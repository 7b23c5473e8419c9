"""The decay rates that stored moments were made with, where a format says them.

Moments decayed at other rates than the job's are another optimizer's: with beta2 0.999 in the run
and 0.95 in the job, |delta| of step 3 is 5 times too long, and nothing would show it.
"""

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

Betas = tuple[float, float]
AMSGRAD = (  # ends the message of a reader that finds max_exp_avg_sq
    "AMSGrad divides by the running maximum it keeps there, so exp_avg_sq alone gives another "
    "step. Use moments: warmup"
)


@runtime_checkable
class SaysBetas(Protocol):
    """A source that may know how its moments were made."""

    @property
    def stored_betas(self) -> Betas | None:
        """Both decay rates; None where they are not stored, or differ between groups."""


def betas_of(groups: Any) -> Betas | None:
    """The betas of an optimizer's parameter groups, as its `state_dict()` has them."""
    listed = groups if isinstance(groups, list | tuple) else []
    return one_of(group.get("betas") for group in listed if isinstance(group, dict))


def one_of(found: Iterable[Any]) -> Betas | None:
    """The pair that all of them are; None where there is none, another thing, or several."""
    pairs = {
        (float(pair[0]), float(pair[1]))
        for pair in found
        if isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(isinstance(rate, int | float) for rate in pair)
    }
    return pairs.pop() if len(pairs) == 1 else None
