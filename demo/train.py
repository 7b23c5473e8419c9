"""Train a small OLMo-2-architecture model on real text, saving checkpoints with optimizer state.

A stand-in for a real pre-training run: OLMo-2's optimizer settings (AdamW 0.9 / 0.95, decay 0.1 on
everything but embeddings, clip 1.0) and a warmup-stable-decay schedule, at a size that two CPU
cores finish in about a minute. The schedule is the same `Schedule` the probe draws 2/eta from.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerFast

from probe.batches import BatchSet
from probe.checkpoints import save_checkpoint
from probe.schedule import learning_rate_at
from probe.spec import Schedule

END = "<|endoftext|>"


@dataclass(frozen=True)
class Run:
    """Everything that fixes the demo's training run."""

    seed: int = 0
    vocab_size: int = 2048
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 384
    sequence_length: int = 128
    batch_sequences: int = 16
    math_share: float = 0.1875  # 3 sequences of 16; more than that and GSM8K runs out
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip_grad_norm: float = 1.0
    schedule: Schedule = field(
        default_factory=lambda: Schedule(
            type="warmup_stable_decay",
            peak=4e-3,
            warmup_steps=100,
            decay_start=440,
            total_steps=600,
        )
    )
    save_at: tuple[int, ...] = (
        20,
        40,
        60,
        80,
        100,
        140,
        180,
        230,
        280,
        330,
        380,
        430,
        460,
        490,
        520,
        550,
        580,
    )


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE over `texts`; the same texts give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def build_model(run: Run, tokenizer: PreTrainedTokenizerFast) -> Olmo2ForCausalLM:
    """The run's model with OLMo-2's initialisation (normal, std 0.02), in fp32 on the CPU."""
    torch.manual_seed(run.seed)
    config = Olmo2Config(
        vocab_size=len(tokenizer),
        hidden_size=run.hidden_size,
        intermediate_size=run.intermediate_size,
        num_hidden_layers=run.num_layers,
        num_attention_heads=run.num_heads,
        num_key_value_heads=run.num_heads,
        max_position_embeddings=4 * run.sequence_length,
        rms_norm_eps=1e-6,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        use_cache=False,
    )
    return Olmo2ForCausalLM(config)


def build_optimizer(run: Run, model: nn.Module) -> torch.optim.AdamW:
    """AdamW with decay on everything but the embeddings, as OLMo-2."""
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if "embed_tokens" not in n]},
        {"params": [p for n, p in named if "embed_tokens" in n], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=run.schedule.start, betas=run.betas, eps=1e-8, weight_decay=run.weight_decay
    )


def train(
    run: Run,
    model: Olmo2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    batches: BatchSet,
    directory: Path,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[tuple[int, float]]:
    """Train to the schedule's end; a checkpoint `step-<n>` holds the state after n updates.

    Returns:
        (step, training loss in nats per token) of every step.
    """
    optimizer = build_optimizer(run, model)
    total_steps = run.schedule.total_steps or 0
    losses = []
    for step in range(total_steps):
        learning_rate = learning_rate_at(run.schedule, step) or 0.0
        if step in run.save_at:
            state = {
                "step": step,
                "num_tokens": step * run.batch_sequences * run.sequence_length,
                "learning_rate": learning_rate,
            }
            save_checkpoint(
                model,
                directory / f"step-{step:04d}",
                optimizer=optimizer,
                tokenizer=tokenizer,
                training_state=state,
            )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        tokens = batches.update(step).input_ids
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), run.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append((step, float(loss.detach())))
        on_step(step, losses[-1][1])
    return losses
