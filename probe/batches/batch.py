"""A batch of fixed tokens, and the hash by which results name it."""

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Tokens every loss of one measurement is taken on.

    Sequences are padded on the right only, and nothing after a sequence's last target can
    reach its loss, so a causal model needs no attention mask. Columns after the last target of
    a micro-batch may be cut without changing the loss.
    """

    input_ids: torch.Tensor  # (num_sequences, sequence_length) int64
    loss_mask: torch.Tensor  # same shape, bool: token t is a target, predicted from t - 1
    sha256: str  # of shape, input_ids and loss_mask
    num_targets: int
    source_names: list[str]  # one per sequence

    @property
    def num_sequences(self) -> int:
        """Rows of the batch."""
        return int(self.input_ids.shape[0])

    @property
    def sequence_length(self) -> int:
        """Columns of the batch, padding included."""
        return int(self.input_ids.shape[1])


def make_batch(input_ids: torch.Tensor, loss_mask: torch.Tensor, source_names: list[str]) -> Batch:
    """Check a batch and name it by its hash.

    Args:
        input_ids: (num_sequences, sequence_length) int64.
        loss_mask: Same shape, bool; column 0 must be False, since nothing predicts it.
        source_names: One per sequence.

    Returns:
        The batch. `sha256` is over the shape as two little-endian int64, then input_ids as
        little-endian int64, then loss_mask as bytes 0 and 1, all row by row.
    """
    assert input_ids.shape == loss_mask.shape
    assert input_ids.dtype == torch.int64
    assert len(source_names) == len(input_ids)
    assert not bool(loss_mask[:, 0].any())
    digest = hashlib.sha256()
    for extent in input_ids.shape:
        digest.update(int(extent).to_bytes(8, "little"))
    digest.update(input_ids.contiguous().numpy().astype("<i8", copy=False).tobytes())
    digest.update(loss_mask.contiguous().numpy().astype("u1", copy=False).tobytes())
    return Batch(
        input_ids=input_ids,
        loss_mask=loss_mask,
        sha256=digest.hexdigest(),
        num_targets=int(loss_mask.sum()),
        source_names=source_names,
    )
