"""Sizes from safetensors headers, against the models transformers builds."""

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, Olmo2Config, Olmo2ForCausalLM

from probe.model_size import model_size
from probe.result import CheckpointRef

OLMO2 = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def num_elements(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize(
    ("vocab_size", "tied", "largest"),
    [
        # norm and output layer are gathered together; tied, the embedding is the output layer
        (211, False, lambda m: num_elements(m.model.norm, m.lm_head)),
        (211, True, lambda m: num_elements(m.model.norm, m.lm_head)),
        (17, False, lambda m: num_elements(m.model.layers[0])),
    ],
)
def test_the_size_of_a_saved_model(tmp_path, vocab_size, tied, largest):
    config = Olmo2Config(**OLMO2, vocab_size=vocab_size, tie_word_embeddings=tied)
    model = Olmo2ForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    size = model_size(CheckpointRef(source="local", location=str(tmp_path)))
    assert size.num_parameters == num_elements(model)
    assert size.largest_group == largest(model)


def test_layers_of_other_names(tmp_path):
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=3, n_head=2, vocab_size=11, n_positions=8)
    )
    model.save_pretrained(tmp_path)
    size = model_size(CheckpointRef(source="local", location=str(tmp_path)))
    assert size.num_parameters == num_elements(model)
    assert size.largest_group == num_elements(model.transformer.h[0])


@pytest.mark.parametrize("source", ["local", "hub", "gguf"])
def test_what_has_no_headers_here_has_no_size(tmp_path, source):
    assert model_size(CheckpointRef(source=source, location=str(tmp_path))) is None
