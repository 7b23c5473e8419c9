"""Which weights a model needs, and whether a checkpoint stores exactly those.

Whoever reads a checkpoint in parts asks here first: the stock loader's own account of missing,
superfluous and misshapen weights covers whole models only.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from probe.checkpoints.source import Source
from probe.errors import CheckpointError

_HINT = "Is config.json of another model? Where transformers converts weights as it loads: one rank"
# Rotary frequencies were stored once per layer by old versions; models make their own today.
_NEVER_NEEDED = r"rotary_emb\.inv_freq$"


@dataclass(frozen=True, slots=True)
class _Weight:
    names: tuple[str, ...]  # the fqn of `named_parameters`, then those tied to it
    shape: tuple[int, ...]


class ExpectedWeights:
    """Parameters and persistent buffers of a model, tied ones as one.

    Args:
        model: On any device; nothing of it is kept.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        tied: dict[int, list[str]] = {}
        shapes = {}
        stored = model.state_dict()  # without the buffers no checkpoint holds
        for named in (model.named_parameters, model.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                if name in stored:
                    tied.setdefault(id(tensor), []).append(name)
                    shapes[id(tensor)] = tuple(tensor.shape)
        self._weights = [_Weight(tuple(names), shapes[key]) for key, names in tied.items()]
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        self._ignored = re.compile("|".join([*sorted(ignored), _NEVER_NEEDED]))

    def find_in(self, source: Source) -> dict[str, tuple[str, ...]]:
        """The names each weight is stored under: one, or more where tied copies are stored.

        Returns:
            fqn, as in `named_parameters` and `named_buffers` -> names for `source.read`.

        Raises:
            CheckpointError: A weight is missing, left over or of the wrong shape.

        Cost: headers only.
        """
        stored, where = source.weight_shapes(), source.ref.location
        self._refuse_other_shapes(stored, where)
        found = {
            weight.names[0]: tuple(name for name in weight.names if name in stored)
            for weight in self._weights
        }
        missing = [name for name, names in found.items() if not names]
        if missing:
            raise CheckpointError(
                f"{where}: {len(missing)} weights the model needs are missing, the first is "
                f"{missing[0]!r}; found {len(stored)} weights, expected {len(found)}. {_HINT}"
            )
        known = {name for weight in self._weights for name in weight.names}
        left = sorted(n for n in stored if n not in known and not self._ignored.search(n))
        if left:
            raise CheckpointError(
                f"{where}: {len(left)} stored weights have no place in the model, the first is "
                f"{left[0]!r} of shape {list(stored[left[0]])}. {_HINT}"
            )
        return found

    def _refuse_other_shapes(self, stored: Mapping[str, tuple[int, ...]], where: str) -> None:
        wrong = [
            (name, stored[name], weight.shape)
            for weight in self._weights
            for name in weight.names
            if name in stored and tuple(stored[name]) != weight.shape
        ]
        if wrong:
            name, found, expected = wrong[0]
            raise CheckpointError(
                f"{where}: weight {name!r} has shape {list(found)}, expected {list(expected)} "
                f"({len(wrong)} weights of the wrong shape). {_HINT}"
            )
