"""A language model small enough to differentiate twice, and batches for it."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import Olmo2Config, Olmo2ForCausalLM

VOCAB = 97


@dataclass(frozen=True)
class TokenBatch:
    input_ids: Tensor
    loss_mask: Tensor

    @property
    def num_targets(self) -> int:
        return int(self.loss_mask.sum())


MakeModel = Callable[..., Olmo2ForCausalLM]
MakeBatch = Callable[..., TokenBatch]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny_model() -> MakeModel:
    """Builds an Olmo2 with large enough weights that its logits are not all alike."""

    def build(*, seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> Olmo2ForCausalLM:
        torch.manual_seed(seed)
        options = {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            "pad_token_id": None,
            "eos_token_id": 1,
        }
        config = Olmo2Config(**(options | changes), attn_implementation="sdpa")
        return Olmo2ForCausalLM(config).to(dtype).eval()

    return build


@pytest.fixture
def token_batch() -> MakeBatch:
    """Random tokens; with `ragged`, sequences have different numbers of targets."""

    def build(
        num_sequences: int = 3, length: int = 16, *, seed: int = 1, ragged: bool = False
    ) -> TokenBatch:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(VOCAB, (num_sequences, length), generator=generator)
        mask = torch.ones(num_sequences, length, dtype=torch.bool)
        mask[:, 0] = False
        if ragged:
            for row in range(num_sequences):
                mask[row, : length // 2 + row] = False
                mask[row, length - row :] = False
        return TokenBatch(ids, mask)

    return build


def dense_mean_loss(model: torch.nn.Module, parameters: dict[str, Tensor], batch) -> Tensor:
    """The slow twin: one token at a time from log_softmax of whole logits, any parameters."""
    logits = torch.func.functional_call(
        model, parameters, kwargs={"input_ids": batch.input_ids, "use_cache": False}
    ).logits
    total = logits.new_zeros(())
    count = 0
    for row, column in batch.loss_mask.nonzero().tolist():
        log_p = torch.log_softmax(logits[row, column - 1], dim=-1)
        total = total - log_p[batch.input_ids[row, column]]
        count += 1
    return total / count


@pytest.fixture
def dense_loss():
    return dense_mean_loss
