"""Specs and data small enough to be trained in a blink, shared by tests."""

from typing import Any

import numpy as np

from probe.continual.datasets import Images
from probe.spec_continual import ContinualLearningSpec


def made_images(num_images: int = 40, num_inputs: int = 6, num_classes: int = 3) -> Images:
    """Normal numbers and classes that follow from them."""
    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(num_images, num_inputs)).astype(np.float32)
    labels = np.argmax(inputs[:, :num_classes], axis=1).astype(np.int64)
    return Images(inputs, labels, num_classes, sha256="made", name="made images")


def small_spec(**changes: Any) -> ContinualLearningSpec:
    """Three tasks of 2 epochs of 3 steps, the last of 8 images; signals at every second step."""
    values: dict[str, Any] = {
        "kind": "continual_learning",
        "name": "small",
        "stream": {
            "type": "random_labels",
            "data": {"type": "npz", "path": "unused.npz"},
            "num_tasks": 3,
            "epochs": 2,
            "batch_size": 16,
        },
        "model": {"hidden": [8, 5]},
        "optimizer": {"name": "adam", "learning_rate": 0.01},
        "methods": [{"name": "plain"}],
        "seeds": [0],
        "signals": {"log_every": 2, "control_every": 2, "windows_per_task": 2, "rank_samples": 8},
        "tasks_per_unit": 2,
    }
    return ContinualLearningSpec.model_validate(values | changes)
