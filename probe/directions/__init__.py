"""Update directions: what an optimizer step would subtract, per unit of learning rate.

One file per optimizer holds the formula for one tensor, as a pure function; `optimizer` reads a
live optimizer, `mapping` takes the caller's own tensors.
"""

from probe.directions.adam import adamw_direction
from probe.directions.mapping import mapping_direction
from probe.directions.optimizer import optimizer_direction
from probe.directions.sgd import sgd_direction
from probe.directions.update import UpdateDirection

__all__ = [
    "UpdateDirection",
    "adamw_direction",
    "mapping_direction",
    "optimizer_direction",
    "sgd_direction",
]
