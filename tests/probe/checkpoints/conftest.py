"""A small OLMo-2 trained for two steps, and directories that hold it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import Olmo2Config, Olmo2ForCausalLM

from probe.checkpoints import save_checkpoint

VOCAB = 48


class Trained(NamedTuple):
    model: Olmo2ForCausalLM
    optimizer: torch.optim.AdamW


def small_model(*, seed: int = 0, **overrides: Any) -> Olmo2ForCausalLM:
    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    return Olmo2ForCausalLM(Olmo2Config(**(options | overrides)))


def train(model: Olmo2ForCausalLM, num_steps: int) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        ids = torch.randint(0, VOCAB, (2, 8), generator=generator)
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return optimizer


@pytest.fixture
def trained() -> Trained:
    model = small_model()
    return Trained(model, train(model, num_steps=2))


@pytest.fixture
def saved(trained: Trained, tmp_path: Path) -> Path:
    return save_checkpoint(
        trained.model,
        tmp_path / "step-2",
        optimizer=trained.optimizer,
        training_state={"step": 2, "tokens": 32, "learning_rate": 1e-2},
    )


@pytest.fixture
def make_model() -> Callable[..., Olmo2ForCausalLM]:
    return small_model


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
