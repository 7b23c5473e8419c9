"""Random numbers of continual-learning runs: a generator of its own for every purpose and place.

What a run draws depends on its seed and on nothing else: not on the runs beside it, on the device
or on where it was resumed.
"""

from typing import Literal

import numpy as np

Purpose = Literal["images", "labels", "permutation", "order", "parameters", "power_iteration"]
_NUMBERS: dict[Purpose, int] = {
    "images": 0,
    "labels": 1,
    "permutation": 2,
    "order": 3,
    "parameters": 4,
    "power_iteration": 5,
}


def generator_for(purpose: Purpose, seed: int, *place: int) -> np.random.Generator:
    """The generator of one purpose.

    Args:
        purpose: What is drawn.
        seed: Of the run, or of the stream.
        place: Task, epoch: whatever tells this draw from others of the same purpose.
    """
    key = np.random.SeedSequence(entropy=seed, spawn_key=(_NUMBERS[purpose], *place))
    return np.random.Generator(np.random.Philox(key))
