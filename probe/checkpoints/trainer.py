"""A `checkpoint-N/` of the Hugging Face Trainer as a `Source`: safetensors and optimizer.pt.

optimizer.pt keys its moments by number and holds no names, and shapes cannot tell them apart (a
model has many parameters of one shape). The numbers follow the order in which Trainer hands
parameters to the optimizer: those with weight decay, then those without, each in
`named_parameters` order. That list is rebuilt with Trainer's own rule and checked against the
groups and every shape; where it does not fit (an optimizer of one's own, another version's rule)
nothing is guessed.
"""

from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

from probe.checkpoints.assemble import read_model_config, skeleton
from probe.checkpoints.betas import AMSGRAD, Betas, betas_of
from probe.checkpoints.huggingface import HuggingFaceSource
from probe.checkpoints.layout import HOW_TO_CONVERT, check_archive, read_json_object
from probe.checkpoints.report import first_line
from probe.checkpoints.source import TensorKind
from probe.errors import CheckpointError
from probe.result import CheckpointRef

OPTIMIZER = "optimizer.pt"
STATE = "trainer_state.json"


def open_source(ref: CheckpointRef) -> "TrainerSource":
    """The directory `ref.location`; see `probe.checkpoints.open_checkpoint`."""
    return TrainerSource(ref, Path(ref.location).expanduser())


class TrainerSource(HuggingFaceSource):
    """Weights from safetensors, moments from optimizer.pt, opened with weights_only alone."""

    def __init__(self, ref: CheckpointRef, directory: Path) -> None:
        """As `HuggingFaceSource`; optimizer.pt is opened when moments are first asked for."""
        super().__init__(ref, directory)
        self._path = directory / OPTIMIZER
        size = self.ref.size_bytes or 0
        self.ref = self.ref.model_copy(
            update={
                "format": "trainer",
                "has_moments": True,
                "size_bytes": size + self._path.stat().st_size,
            }
        )

    @property
    def has_moments(self) -> bool:
        """Always: without optimizer.pt it is another format."""
        return True

    def read(self, name: str, kind: TensorKind, lo: int = 0, hi: int | None = None) -> torch.Tensor:
        """See `Source.read`. Moments are mapped from the file, not loaded whole."""
        if kind == "weight":
            return super().read(name, kind, lo, hi)
        flat = self._state(name)[kind].flatten()
        end = flat.numel() if hi is None else hi
        if not 0 <= lo <= end <= flat.numel():
            raise CheckpointError(
                f"{self._path}: {name}.{kind} has {flat.numel()} elements, asked for {lo}..{end}"
            )
        return flat[lo:end].clone()

    def hyper(self, name: str) -> dict[str, float]:
        """See `Source.hyper`."""
        step = float(torch.as_tensor(self._state(name)["step"]))
        if step != int(step) or step < 0:
            raise CheckpointError(
                f"{self._path}: step of {name!r} is {step}, expected a whole number >= 0"
            )
        stated = read_json_object(self.directory / STATE).get("global_step")
        if isinstance(stated, int) and step > stated:  # fewer is fine: skipped on overflow
            raise CheckpointError(
                f"{self._path}: moments of step {step:g}, {STATE} says {stated}; the files are of "
                "different checkpoints"
            )
        return {"step": int(step)}

    @property
    def stored_betas(self) -> Betas | None:
        """See `SaysBetas`."""
        return betas_of(self._content["param_groups"])

    def _state(self, name: str) -> dict[str, torch.Tensor]:
        if name not in self._moments:
            raise CheckpointError(
                f"{self._path}: no moments of {name!r}; found {len(self._moments)} others"
            )
        return self._moments[name]

    @cached_property
    def _content(self) -> dict[str, Any]:
        return load_optimizer(self._path)

    @cached_property
    def _moments(self) -> dict[str, dict[str, torch.Tensor]]:
        """Parameter fqn -> its state, every shape checked."""
        content = self._content
        config = self.directory / "config.json"
        model = skeleton(read_model_config(config), "eager", self.directory)
        names = _names_by_index(model, content["param_groups"], self._path)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        moments = {}
        for index, name in names.items():
            state = content["state"].get(index)
            if state is not None:  # a parameter that never had a gradient has none
                _check_state(state, index, name, shapes[name], self._path)
                moments[name] = state
        return moments


def load_optimizer(path: Path) -> dict[str, Any]:
    """What optimizer.pt holds, through torch's allow-list; tensors stay on disk until read.

    Raises:
        CheckpointError: It is truncated, no torch file, would run code, or holds no optimizer's
            `state_dict()`.
    """
    check_archive(path)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except Exception as error:  # zip, pickle and torch errors alike
        raise CheckpointError(
            f"{path}: cannot be read: {first_line(error)}. {HOW_TO_CONVERT}"
        ) from error
    parts = content if isinstance(content, dict) else {}
    if not isinstance(parts.get("state"), dict) or not isinstance(parts.get("param_groups"), list):
        raise CheckpointError(
            f"{path}: expected `state` and `param_groups` of an optimizer, found "
            f"{', '.join(map(str, parts)) or type(content).__name__}"
        )
    return parts


def _names_by_index(model: PreTrainedModel, groups: list[Any], path: Path) -> dict[int, str]:
    """Number in the optimizer's state -> parameter, in the order Trainer builds its groups."""
    rule: Any = Trainer.get_decay_parameter_names
    decayed = set(rule(None, model))
    names = [name for name, _ in model.named_parameters()]
    expected = [[n for n in names if n in decayed], [n for n in names if n not in decayed]]
    try:
        found = [[int(index) for index in group["params"]] for group in groups]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: malformed param_groups: {error}") from error
    sizes, wanted = [len(group) for group in found], [len(group) for group in expected]
    if sizes != wanted or list(chain(*found)) != list(range(len(names))):
        raise CheckpointError(
            f"{path}: found parameter groups of {sizes} numbers, expected {wanted}: those with "
            "and without decay by Trainer's rule. Which number is which parameter cannot be told; "
            f"{HOW_TO_CONVERT}"
        )
    return dict(enumerate(expected[0] + expected[1]))


def _check_state(state: Any, index: int, name: str, shape: tuple[int, ...], path: Path) -> None:
    held = state if isinstance(state, dict) else {}
    for kind in ("exp_avg", "exp_avg_sq", "step"):
        if kind not in held:
            raise CheckpointError(
                f"{path}: state {index} ({name!r}) has no {kind}; found "
                f"{', '.join(map(str, held)) or 'nothing'}. Only Adam and AdamW are read"
            )
    if "max_exp_avg_sq" in held:
        raise CheckpointError(f"{path}: state {index} ({name!r}) has max_exp_avg_sq. {AMSGRAD}")
    for kind in ("exp_avg", "exp_avg_sq"):
        found = tuple(held[kind].shape) if isinstance(held[kind], torch.Tensor) else None
        if found != shape:
            raise CheckpointError(
                f"{path}: {kind} of state {index} has shape {found and list(found)}, expected "
                f"{list(shape)} for {name!r}. The optimizer had its parameters in another order"
            )
    if torch.as_tensor(held["step"]).numel() != 1:
        raise CheckpointError(f"{path}: step of state {index} ({name!r}) is no single number")
