"""The interface every checkpoint format implements: the engine knows nothing else of formats."""

from collections.abc import Mapping
from typing import Literal, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from probe.result import CheckpointRef

TensorKind = Literal["weight", "exp_avg", "exp_avg_sq"]


class Source(Protocol):
    """One checkpoint, opened: its model, its tensors by flat range, its tokenizer.

    No method uses collectives, so any rank may call any of them at any time.
    """

    @property
    def ref(self) -> CheckpointRef:
        """Which checkpoint this is; format, moments and size are filled in."""

    @property
    def has_moments(self) -> bool:
        """Whether AdamW moments are stored."""

    def load_model(self, dtype: torch.dtype, attention: str) -> PreTrainedModel:
        """The causal language model on the CPU, in eval mode, with every weight from the file.

        Args:
            dtype: Of the parameters; converted on load.
            attention: `sdpa`, `eager` or `flash_attention_2`.

        Raises:
            CheckpointError: A weight is missing, superfluous or of the wrong shape, the files
                are broken, or the architecture is unknown or needs code from the checkpoint.
        """

    def skeleton(self, attention: str) -> PreTrainedModel:
        """The model without its values: fp32 on the meta device, in eval mode, a new one each time.

        Args:
            attention: As for `load_model`.

        Raises:
            CheckpointError: The architecture is unknown or needs code from the checkpoint.

        Cost: no memory for weights, no tensor read.
        """

    def weight_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every weight that is stored, by the fqn `read` knows it under.

        Persistent buffers are among them, tied weights once for every copy that is stored. What
        the model has no place for keeps its stored name: `probe.checkpoints.expected` refuses it.

        Raises:
            CheckpointError: The headers are broken, or names cannot be matched to the model's.

        Cost: headers only.
        """

    def read(self, name: str, kind: TensorKind, lo: int = 0, hi: int | None = None) -> torch.Tensor:
        """Elements lo..hi of one flattened tensor, in the dtype it is stored in.

        Args:
            name: Parameter fqn, as in `model.named_parameters()`.
            kind: The weight or one of AdamW's moments.
            lo: First element.
            hi: One past the last element; None: to the end.

        Returns:
            (hi - lo,) fresh CPU tensor.

        Raises:
            CheckpointError: No such tensor, or the range does not fit; names file, key, found
                and expected.
        """

    def hyper(self, name: str) -> dict[str, float]:
        """Optimizer scalars of one parameter: `step`, how many updates made its moments.

        Raises:
            CheckpointError: No moments are stored for it.
        """

    def load_tokenizer(self, override: str | None = None) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer, or the one `override` names (a directory or hub id).

        Raises:
            CheckpointError: There is none, or it needs code from the checkpoint.
        """
