"""The chunked loss against a loop over tokens in fp64, in value, gradient and memory."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from probe import chunked_head
from probe.errors import BatchError
from probe.loss import CausalLoss, LossSums, plain_path_reason

ROOT = Path(__file__).resolve().parents[3]


def test_loss_and_gradient_equal_the_dense_twin_in_fp64(tiny_model, token_batch, dense_loss):
    model = tiny_model(dtype=torch.float64)
    batch = token_batch(5, ragged=True)
    loss = CausalLoss(model, micro_batch_sequences=2)
    expected = dense_loss(model, dict(model.named_parameters()), batch)
    grads = torch.autograd.grad(expected, list(model.parameters()))

    assert loss.head_path == "chunked"
    assert loss.mean(batch) == pytest.approx(expected.item(), rel=1e-13)
    assert loss.backward(batch) == pytest.approx(expected.item(), rel=1e-13)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        # Olmo2's norms compute in fp32 whatever the dtype, so gradients differ by its rounding.
        torch.testing.assert_close(parameter.grad / batch.num_targets, grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("tied", [False, True])
def test_chunked_equals_plain_to_fp32_rounding(tiny_model, token_batch, tied, monkeypatch):
    monkeypatch.setattr(chunked_head, "HEAD_BUFFER_BYTES", 97 * 4 * 3)  # 3 rows at a time
    monkeypatch.setattr(chunked_head, "_TILE_COLUMNS", 40)  # 97 = 40 + 40 + 17
    model = tiny_model(tie_word_embeddings=tied)
    batch = token_batch(3, ragged=True)
    found = {}
    for path in ("chunked", "plain"):
        loss = CausalLoss(model, micro_batch_sequences=2)
        assert loss.head_path == "chunked"
        loss.head_path = path
        model.zero_grad()
        loss.backward(batch)
        found[path] = (loss.sums(batch), [p.grad.clone() for p in model.parameters()])
    # Sums of about 8 terms near 5 nats: a few fp32 roundings each.
    assert found["chunked"][0].nll == pytest.approx(found["plain"][0].nll, rel=1e-6)
    for ours, theirs in zip(found["chunked"][1], found["plain"][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_a_head_with_bias_has_a_bias_gradient(monkeypatch):
    monkeypatch.setattr(chunked_head, "_TILE_COLUMNS", 7)
    torch.manual_seed(0)
    hidden = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(19, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(19, dtype=torch.float64, requires_grad=True)
    rows, targets = torch.tensor([0, 2, 5]), torch.tensor([18, 0, 7])

    assert torch.autograd.gradcheck(
        lambda h, w, b: chunked_head.head_nll(h, w, b, rows, targets), (hidden, weight, bias)
    )


def test_bf16_logits_are_formed_in_fp32(token_batch):
    torch.manual_seed(0)
    hidden = torch.randn(64, 48, dtype=torch.bfloat16)
    weight = torch.randn(500, 48, dtype=torch.bfloat16)
    rows, targets = torch.arange(64), torch.arange(64) * 7
    exact = torch.nn.functional.cross_entropy(
        hidden.double() @ weight.double().t(), targets, reduction="none"
    )
    ours = chunked_head.head_nll(hidden, weight, None, rows, targets)
    rounded = torch.nn.functional.cross_entropy(
        (hidden @ weight.t()).float(), targets, reduction="none"
    )
    assert ours.dtype == torch.float32
    # fp32 sums of 48 products near 7: 48 * 2^-24 * 7; bf16 logits are 4,000 times as coarse.
    assert (ours - exact).abs().max() < 3e-5
    assert (rounded - exact).abs().max() > 1e-2


def test_a_mean_of_micro_batch_means_would_be_another_number(tiny_model, token_batch):
    model = tiny_model()
    batch = token_batch(4, ragged=True)
    sums = CausalLoss(model, micro_batch_sequences=1).sums(batch)
    mean_of_means = sum(n / c for n, c in zip(sums.nll, sums.num_targets, strict=True)) / 4
    assert sums.mean == pytest.approx(sum(sums.nll) / sum(sums.num_targets), rel=1e-15)
    assert abs(sums.mean - mean_of_means) > 1e-3


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_micro_batch_size_moves_the_loss_by_rounding_only(tiny_model, token_batch, size):
    model = tiny_model()
    batch = token_batch(4)
    one = CausalLoss(model, micro_batch_sequences=1).sums(batch)
    many = CausalLoss(model, micro_batch_sequences=size).sums(batch)
    assert many.num_targets == one.num_targets == (15, 15, 15, 15)
    assert many.nll == pytest.approx(one.nll, rel=1e-6)


def test_every_forward_call_has_the_same_shape(tiny_model, token_batch):
    model = tiny_model()
    loss = CausalLoss(model, micro_batch_sequences=3)
    shapes = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    loss.mean(token_batch(7))
    assert shapes == [(3, 16)] * 3


def test_sums_are_exact_and_divided_once():
    sums = LossSums((1e16, 1.0, -1e16), (1, 1, 2))
    assert sums.mean == 0.25  # a left-to-right float sum gives 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_diverged_sequence_makes_the_mean_nan(bad):
    assert math.isnan(LossSums((1.0, bad), (1, 1)).mean)


def test_a_batch_without_targets_has_no_gradient(tiny_model, token_batch):
    batch = token_batch(2)
    batch.loss_mask[:] = False
    with pytest.raises(BatchError, match="loss mask is all False"):
        CausalLoss(tiny_model(), micro_batch_sequences=1).backward(batch)


def test_the_head_is_left_as_it_was(tiny_model, token_batch):
    model = tiny_model()
    loss = CausalLoss(model, micro_batch_sequences=1)
    loss.mean(token_batch(1))
    assert "forward" not in model.lm_head.__dict__
    assert model(input_ids=token_batch(1).input_ids).logits.shape == (1, 16, 97)
    with pytest.raises(IndexError):
        loss.mean(token_batch(1, seed=2).__class__(torch.full((1, 4), 500), _mask(4)))
    assert "forward" not in model.lm_head.__dict__


def _mask(length: int) -> torch.Tensor:
    mask = torch.ones(1, length, dtype=torch.bool)
    mask[:, 0] = False
    return mask


SMALL = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def test_models_that_change_their_logits_take_the_plain_path(token_batch, dense_loss):
    torch.manual_seed(0)
    capped = Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=5.0)).eval()
    scaled = CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)).eval()
    for model in (capped, scaled):
        loss = CausalLoss(model, micro_batch_sequences=1)
        batch = token_batch(1)
        expected = dense_loss(model, dict(model.named_parameters()), batch).item()
        assert loss.head_path == "plain"
        assert loss.head_reason == "the model changes its logits after the output layer"
        assert loss.mean(batch) == pytest.approx(expected, rel=1e-6)


def test_a_tiny_cap_on_small_logits_is_still_seen(tiny_model):
    # Logits of a fresh model are near 0, where a soft cap of 1000 changes no fp32 value at all.
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=1000.0)).eval()
    assert plain_path_reason(model) is not None


def test_other_output_layers_take_the_plain_path(tiny_model):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = tiny_model()
    model.lm_head = Doubled(32, 97, bias=False)
    assert "Doubled" in plain_path_reason(model)
    hooked = tiny_model()
    hooked.lm_head.register_forward_hook(lambda *_: None)
    assert plain_path_reason(hooked) == "the output layer has hooks"


def test_gpt2_with_tied_weights_is_chunked(token_batch, dense_loss):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    model = GPT2LMHeadModel(config).eval()
    loss = CausalLoss(model, micro_batch_sequences=2)
    batch = token_batch(2)
    assert loss.head_path == "chunked"
    expected = dense_loss(model, dict(model.named_parameters()), batch).item()
    assert loss.mean(batch) == pytest.approx(expected, rel=1e-6)


MEMORY_SCRIPT = """
import sys, torch
from probe.chunked_head import head_nll
from probe.memory import PeakMemory
torch.set_num_threads(2)
hidden = torch.randn(4096, 16, requires_grad=True)
weight = torch.randn(100278, 16, requires_grad=True)
rows, targets = torch.arange(4095), torch.arange(4095)
head_nll(hidden[:64], weight, None, rows[:64], targets[:64]).sum().backward()  # warm the kernels
weight.grad = hidden.grad = None
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
before, peak = resident(), PeakMemory(torch.device("cpu"))
nll = head_nll(hidden, weight, None, rows, targets)
if sys.argv[1] == "backward":
    nll.sum().backward()
print((peak.peak_bytes() - before) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_vocabulary_of_100278_takes_less_than_300_mib(direction):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux /proc to measure the peak")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, direction],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    # Full logits are 4095 * 100278 * 4 B = 1567 MiB, and the plain path holds two of them.
    assert float(done.stdout) < 300
