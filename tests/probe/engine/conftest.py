"""A language model small enough to differentiate twice, and batches for it."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerFast

from probe.checkpoints import save_checkpoint

VOCAB = 97
OPTIONS: dict[str, Any] = {
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
        config = Olmo2Config(**(OPTIONS | changes), attn_implementation="sdpa")
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


def _tokenizer() -> PreTrainedTokenizerFast:
    vocab = {"<pad>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    model = WordLevel(vocab, unk_token="<pad>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )


def _documents(count: int) -> list[str]:
    """Walks in which each word mostly names the next: something a tiny model can learn."""
    generator = random.Random(0)
    documents = []
    for _ in range(count):
        word, words = generator.randrange(2, VOCAB), []
        for _ in range(40):
            words.append(f"w{word}")
            step = (word * 3 + 1) % (VOCAB - 2) + 2
            word = step if generator.random() < 0.8 else generator.randrange(2, VOCAB)
        documents.append(" ".join(words))
    return documents


@dataclass(frozen=True)
class Series:
    """Three checkpoints of one short run, with optimizer state, and text to probe them with."""

    directory: Path
    text: Path
    betas: tuple[float, float]

    def spec(self, **changes: Any) -> dict[str, Any]:
        raw: dict[str, Any] = {
            "kind": "checkpoint_series",
            "name": "tiny",
            "checkpoints": {"source": "local", "path": str(self.directory / "step-*")},
            "optimizer": {
                "name": "adamw",
                "betas": list(self.betas),
                "weight_decay": 0.1,
                "warmup_steps": 3,
            },
            "batches": {
                "sources": [{"type": "files", "name": "walks", "paths": [str(self.text)]}],
                "sequence_length": 32,
                "batch_sequences": 4,
                "held_out_sequences": 6,
                "micro_batch_sequences": 2,
            },
            "measurement": {"loss_batch": "both", "repeats": 2},
        }
        for key, value in changes.items():
            target, *path = key.split("__")
            if path:
                raw.setdefault(target, {})[path[0]] = value
            else:
                raw[target] = value
        return raw


@pytest.fixture(scope="session")
def series(tmp_path_factory: pytest.TempPathFactory) -> Series:
    """Trained for 20 steps of AdamW at 1e-2, saved at 4, 12 and 20."""
    root = tmp_path_factory.mktemp("series")
    documents = _documents(300)
    text = root / "walks.jsonl"
    text.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    model = Olmo2ForCausalLM(Olmo2Config(**OPTIONS, attn_implementation="sdpa"))
    betas = (0.9, 0.95)
    groups = [
        {"params": [p], "weight_decay": 0.0 if "embed_tokens" in n else 0.1}
        for n, p in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=betas, eps=1e-8)
    for step in range(1, 21):
        chosen = documents[8 * step : 8 * step + 8]
        ids = torch.tensor([tokenizer(d)["input_ids"] for d in chosen])
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        if step in (4, 12, 20):
            save_checkpoint(model, root / f"step-{step}", optimizer=optimizer, tokenizer=tokenizer)
    return Series(root, text, betas)


@pytest.fixture(scope="session")
def other_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Walks by another rule than the model was trained on."""
    generator = random.Random(9)
    file = tmp_path_factory.mktemp("other") / "other.jsonl"
    with file.open("w") as stream:
        for _ in range(200):
            word, words = generator.randrange(2, VOCAB), []
            for _ in range(40):
                words.append(f"w{word}")
                word = (word * 5 + 7) % (VOCAB - 2) + 2
            stream.write(json.dumps({"text": " ".join(words)}) + "\n")
    return file


@pytest.fixture(scope="session")
def raw_scan(series: Series, other_text: Path) -> Callable[..., dict[str, Any]]:
    """Builds a mix scan of the last checkpoint: its own text against the other walks."""

    def build(**changes: Any) -> dict[str, Any]:
        walks = {"type": "files", "name": "walks", "paths": [str(series.text)]}
        other = {"type": "files", "name": "other", "paths": [str(other_text)]}
        raw: dict[str, Any] = {
            "kind": "mix_scan",
            "name": "tiny scan",
            "checkpoints": {"source": "local", "path": str(series.directory / "step-20")},
            "optimizer": {"betas": [0.9, 0.95], "warmup_steps": 3, "moments": "warmup"},
            "mixture": {"sources": [walks, other], "ratios": [0.0, 0.3, 1.0]},
            "eval_tasks": [
                {"data": walks | {"name": "walks_task"}, "sequences": 6},
                {"data": other | {"name": "other_task"}, "sequences": 4},
            ],
            "batches": {"sequence_length": 32, "batch_sequences": 4, "micro_batch_sequences": 2},
            "measurement": {"repeats": 2},
        }
        for key, value in changes.items():
            target, _, inner = key.partition("__")
            raw[target] = raw.get(target, {}) | {inner: value} if inner else value
        return raw

    return build
