"""Results of units of any kind: read from JSON, and what they hand on (torch-free)."""

from typing import Annotated, Any

from pydantic import Discriminator, Tag, TypeAdapter

from probe.result import UnitResult, eta_init_hint
from probe.result_continual import ContinualUnitResult
from probe.result_mix import MixUnitResult, mix_eta_init_hint
from probe.result_train import MixTrainUnitResult


def _kind_of(value: Any) -> str | None:
    """The kind a result says it is of; results of the first release say none."""
    if isinstance(value, dict):
        return str(value.get("kind", "checkpoint_series"))
    return getattr(value, "kind", None)


AnyUnitResult = Annotated[
    Annotated[UnitResult, Tag("checkpoint_series")]
    | Annotated[MixUnitResult, Tag("mix_scan")]
    | Annotated[MixTrainUnitResult, Tag("mix_train")]
    | Annotated[ContinualUnitResult, Tag("continual_learning")],
    Discriminator(_kind_of),
]
_Parsed = UnitResult | MixUnitResult | MixTrainUnitResult | ContinualUnitResult
_ADAPTER: TypeAdapter[_Parsed] = TypeAdapter(AnyUnitResult)


def parse_result(raw: Any) -> _Parsed:
    """A unit's result from plain values, by its `kind`; without one, a checkpoint series'.

    Raises:
        ValidationError: It is of no kind known here, or malformed.
    """
    return _ADAPTER.validate_python(raw)


def next_eta_init(result: AnyUnitResult) -> dict[str, float] | None:
    """First guesses for the unit after this one, per loss batch or per task; None: no answer.

    Empty where nothing is searched (a training grid, continual learning), so that no earlier unit
    need be asked.

    Taken from the recorded result and from nothing else, so that a resumed job gives the same
    numbers as one that was never interrupted.
    """
    if isinstance(result, MixUnitResult):
        return mix_eta_init_hint(result)
    if isinstance(result, MixTrainUnitResult | ContinualUnitResult):
        return {}
    return eta_init_hint(result)
