"""Update directions: what an optimizer step would subtract, per unit of learning rate.

One file per optimizer. Each holds the formula for one tensor, as a pure function.
"""

from probe.directions.adam import adamw_direction
from probe.directions.sgd import sgd_direction

__all__ = ["adamw_direction", "sgd_direction"]
