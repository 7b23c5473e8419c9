"""Reading in parts: every weight of the model is stored, nothing is left over, shapes fit."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Olmo2ForCausalLM

from probe.checkpoints import open_checkpoint, save_checkpoint
from probe.checkpoints.expected import ExpectedWeights
from probe.errors import CheckpointError
from probe.parallel import Shard
from probe.parallel.fill import fill_persistent_buffers, fill_shards
from probe.result import CheckpointRef

EXPERTS = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def source_of(directory: Path):
    return open_checkpoint(CheckpointRef(source="local", location=str(directory)))


def found_in(source) -> dict[str, tuple[str, ...]]:
    return ExpectedWeights(source.skeleton("eager")).find_in(source)


def rewrite(directory: Path, change) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.fixture
def tied(make_model, tmp_path) -> Path:
    return save_checkpoint(make_model(tie_word_embeddings=True), tmp_path / "tied")


def empty_shards(model: Olmo2ForCausalLM) -> list[Shard]:
    """Each parameter but for its first three elements, which are another rank's."""
    return [
        Shard(n, 3, p.numel(), torch.full((p.numel() - 3,), 7.0), torch.empty(p.numel() - 3))
        for n, p in model.named_parameters()
    ]


def test_a_skeleton_has_the_structure_and_no_values(saved, trained):
    source = source_of(saved)
    skeleton = source.skeleton("sdpa")
    expected = {n: tuple(p.shape) for n, p in trained.model.named_parameters()}
    assert {n: tuple(p.shape) for n, p in skeleton.named_parameters()} == expected
    for tensor in (*skeleton.parameters(), *skeleton.buffers()):
        assert tensor.device.type == "meta"
    assert {p.dtype for p in skeleton.parameters()} == {torch.float32}
    assert not skeleton.training
    assert skeleton.config.use_cache is False
    assert skeleton.config._attn_implementation == "sdpa"
    assert source.skeleton("sdpa") is not skeleton
    assert source.weight_shapes() == expected


def test_shards_are_the_stored_elements(saved, trained):
    source = source_of(saved)
    shards = empty_shards(trained.model)
    fill_shards(shards, source, found_in(source))
    for shard in shards:
        whole = trained.model.get_parameter(shard.name).detach().flatten()
        assert torch.equal(shard.base, whole[3:])
        assert torch.equal(shard.live, whole[3:])


def test_a_missing_weight_is_named(saved):
    rewrite(saved, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"1 weights the model needs are missing.*up_proj"):
        found_in(source_of(saved))


def test_a_weight_left_over_is_named(saved):
    rewrite(saved, lambda weights: weights.update({"model.layers.2.extra": torch.ones(2)}))
    with pytest.raises(
        CheckpointError, match=r"no place.*'model\.layers\.2\.extra' of shape \[2\]"
    ):
        found_in(source_of(saved))


def test_a_wrong_shape_is_named_with_both(saved):
    config = saved / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"intermediate_size": 25}))
    with pytest.raises(CheckpointError, match=r"\[24, 16\], expected \[25, 16\] \(6 weights"):
        found_in(source_of(saved))


def test_what_every_version_ignores_is_ignored(saved):
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    rewrite(saved, lambda weights: weights.update(old))
    assert set(found_in(source_of(saved))) == set(load_file(saved / "model.safetensors")) - set(old)


def test_tied_weights_are_one_under_either_name(tied):
    assert HEAD not in load_file(tied / "model.safetensors")
    assert found_in(source_of(tied))[EMBEDDINGS] == (EMBEDDINGS,)

    def rename(weights):
        weights[HEAD] = weights.pop(EMBEDDINGS)

    rewrite(tied, rename)
    assert found_in(source_of(tied))[EMBEDDINGS] == (HEAD,)


def test_two_stored_copies_of_tied_weights_must_agree(tied, make_model):
    rewrite(tied, lambda weights: weights.update({HEAD: weights[EMBEDDINGS].clone()}))
    source = source_of(tied)
    found = found_in(source)
    assert found[EMBEDDINGS] == (EMBEDDINGS, HEAD)
    shards = empty_shards(make_model(tie_word_embeddings=True))
    fill_shards(shards, source, found)

    def differ(weights):
        weights[HEAD] = weights[HEAD].clone()
        weights[HEAD][-1, -1] += 1.0

    rewrite(tied, differ)
    source = source_of(tied)
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' differ in elements 3\.\.768"):
        fill_shards(shards, source, found_in(source))


def test_a_base_model_lacks_the_heads_prefix(make_model, tmp_path):
    model = make_model(tie_word_embeddings=True)
    model.model.save_pretrained(tmp_path / "base")
    source = source_of(tmp_path / "base")
    assert "embed_tokens.weight" in load_file(tmp_path / "base" / "model.safetensors")
    assert found_in(source) == {n: (n,) for n, _ in model.named_parameters()}


def test_persistent_buffers_are_weights_too(make_model):
    model = make_model()
    model.model.register_buffer("bias", torch.zeros(2, 3))
    model.model.register_buffer("scratch", torch.zeros(5), persistent=False)
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    values = torch.arange(6.0)
    source = SimpleNamespace(
        ref=SimpleNamespace(location="here"),
        weight_shapes=lambda: shapes,
        read=lambda name, kind: values if name == "model.bias" else None,
    )
    found = ExpectedWeights(model).find_in(source)
    assert found["model.bias"] == ("model.bias",)
    assert "model.scratch" not in found
    fill_persistent_buffers(model, source, found)
    assert torch.equal(model.model.bias, values.view(2, 3))
    assert torch.equal(model.model.scratch, torch.zeros(5))
    del shapes["model.bias"]
    with pytest.raises(CheckpointError, match=r"missing, the first is 'model\.bias'"):
        ExpectedWeights(model).find_in(source)


def test_a_dcp_directory_gives_persistent_buffers_too(tmp_path):
    """The router's bias of a mixture of experts is trained, and no parameter."""
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**EXPERTS)).eval()
    model.get_buffer(bias).copy_(torch.tensor([0.5, -0.25, 0.0, 1.0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process, on purpose
        state = {f"model.{name}": value for name, value in model.state_dict().items()}
        dcp.save(state, checkpoint_id=tmp_path / "step-1", no_dist=True)
    model.config.save_pretrained(tmp_path / "step-1")
    source = source_of(tmp_path / "step-1")
    assert found_in(source)[bias] == (bias,)
    assert torch.equal(source.read(bias, "weight"), model.get_buffer(bias))
    loaded = source.load_model(torch.float32, model.config._attn_implementation)
    assert torch.equal(loaded.get_buffer(bias), model.get_buffer(bias))
    ids = torch.arange(12)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
