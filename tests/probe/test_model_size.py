"""Sizes from safetensors headers, against the models transformers builds."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Olmo2Config, Olmo2ForCausalLM

from probe.known_models import KNOWN_STAGES
from probe.model_size import KNOWN_SIZES, model_size
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


# hidden, intermediate, layers, heads, key/value heads: from the config.json of each repository
PUBLISHED = {
    "allenai/OLMo-2-0425-1B": (2048, 8192, 16, 16, 16),
    "allenai/OLMo-2-1124-7B": (4096, 11008, 32, 32, 32),
    "allenai/OLMo-2-1124-13B": (5120, 13824, 40, 40, 40),
    "allenai/OLMo-2-0325-32B": (5120, 27648, 64, 40, 8),
}


def test_every_known_run_has_a_size():
    assert set(KNOWN_SIZES) == set(KNOWN_STAGES) == set(PUBLISHED)


@pytest.mark.parametrize("repo", PUBLISHED)
def test_the_size_of_a_published_model(repo):
    hidden, intermediate, layers, heads, key_value_heads = PUBLISHED[repo]
    with torch.device("meta"):
        model = Olmo2ForCausalLM(
            Olmo2Config(
                vocab_size=100352,
                hidden_size=hidden,
                intermediate_size=intermediate,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=key_value_heads,
                tie_word_embeddings=False,
            )
        )
    size = model_size(CheckpointRef(source="hub", location=repo, revision="main"))
    assert size.num_parameters == num_elements(model)
    groups = [[model.model.embed_tokens], [model.model.norm, model.lm_head]]
    groups += [[layer] for layer in model.model.layers]
    assert size.largest_group == max(num_elements(*group) for group in groups)
