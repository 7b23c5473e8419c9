"""Recomputed layers give the same bits, compiled ones the same numbers to rounding."""

import shutil

import pytest
import torch
from torch import nn
from transformers import Olmo2Config, Olmo2ForCausalLM

from probe.errors import ConfigError
from probe.layers import decoder_layers, run_layers
from probe.loss import CausalLoss

COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile on a CPU needs a C++ compiler, and there is none",
)
NUM_LAYERS = 3


class Batch:
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.input_ids = torch.randint(97, (3, 16), generator=generator)
        self.loss_mask = torch.ones(3, 16, dtype=torch.bool)
        self.loss_mask[:, 0] = False


def build(dtype: torch.dtype = torch.float32) -> Olmo2ForCausalLM:
    torch.manual_seed(0)
    config = Olmo2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=None,
        eos_token_id=None,
        bos_token_id=None,
        attn_implementation="sdpa",
    )
    return Olmo2ForCausalLM(config).to(dtype).eval()


def measured(
    model: Olmo2ForCausalLM, loss: CausalLoss | None = None
) -> tuple[tuple[float, ...], dict[str, torch.Tensor]]:
    loss = loss or CausalLoss(model, micro_batch_sequences=2)
    loss.backward(Batch())
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return loss.sums(Batch()).nll, grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_layers_give_the_same_bits_from_one_more_forward(dtype):
    truth = measured(build(dtype))
    model = build(dtype)
    names = [name for name, _ in model.named_parameters()]
    run_layers(model, activation_checkpointing=True, compile=False)
    assert [name for name, _ in model.named_parameters()] == names
    loss, calls = CausalLoss(model, micro_batch_sequences=2), []
    for layer in decoder_layers(model):
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    found = measured(model, loss)
    assert found[0] == truth[0]
    assert all(torch.equal(found[1][name], truth[1][name]) for name in names)
    assert len(calls) == NUM_LAYERS * (2 * 2 + 2)  # two micro-batches: twice each, then once


def test_recomputed_layers_keep_no_activations_of_their_own():
    def kept(*, activation_checkpointing: bool) -> int:
        model = build()
        run_layers(model, activation_checkpointing=activation_checkpointing, compile=False)
        own = {p.data_ptr() for p in model.parameters()}
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in own:
                sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=Batch().input_ids, use_cache=False)
        return sum(sizes.values())

    assert kept(activation_checkpointing=True) < 0.5 * kept(activation_checkpointing=False)


@COMPILER
@pytest.mark.filterwarnings("default")  # torch's compiler warns about what it does itself
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_compiled_layers_agree_to_rounding(activation_checkpointing):
    truth = measured(build())
    model = build()
    run_layers(model, activation_checkpointing=activation_checkpointing, compile=True)
    found = measured(model)
    assert found[0] == pytest.approx(truth[0], rel=1e-5)
    for name, grad in truth[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-5)


@COMPILER
@pytest.mark.filterwarnings("default")  # torch's compiler warns about what it does itself
def test_all_layers_share_the_compiled_graphs():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build()
    run_layers(model, activation_checkpointing=False, compile=True)
    ids = Batch().input_ids
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    model(input_ids=ids, use_cache=False)
    stats = torch._dynamo.utils.counters["stats"]
    assert stats["unique_graphs"] == 2  # without and with autograd


def test_a_model_without_named_layers_is_refused():
    with pytest.raises(ConfigError, match=r"Linear names no layers.*activation_checkpointing"):
        run_layers(nn.Linear(2, 2), activation_checkpointing=True, compile=False)


def test_nothing_changes_unless_asked_for():
    model = build()
    run_layers(model, activation_checkpointing=False, compile=False)
    assert all("forward" not in layer.__dict__ for layer in decoder_layers(model))
