"""GGUF files written here in fp32, so that the weights are known; and a real one where it is.

Set PROBE_TEST_GGUF to SmolLM2-135M-Instruct.Q4_1.gguf(.gz) for the real one.
"""

import gzip
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from probe.checkpoints import open_checkpoint
from probe.checkpoints.gguf import unpacked
from probe.errors import CheckpointError
from probe.result import CheckpointRef

HIDDEN, HEADS, LAYERS, VOCAB = 32, 4, 1, 40
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gguf")


def to_gguf_order(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """GGUF keeps the two halves of each rotary head interleaved; Llama keeps them apart."""
    return (
        weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(model.config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<e>", *(chr(i) for i in range(ord("A"), ord("A") + VOCAB - 1))])
    writer.add_token_merges(["A B"])
    writer.add_eos_token_id(0)
    state = model.state_dict()
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for i in range(LAYERS):
        for ours, theirs in {
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        }.items():
            names[f"model.layers.{i}.{ours}.weight"] = f"blk.{i}.{theirs}.weight"
    for ours, theirs in names.items():
        tensor = state[ours]
        if ours.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = to_gguf_order(tensor, HEADS)
        writer.add_tensor(theirs, np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            rms_norm_eps=1e-5,
        )
    )


@pytest.fixture
def file(llama, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_gguf(tmp_path / "m.gguf", llama)
    return tmp_path / "m.gguf"


def open_file(path: Path):
    return open_checkpoint(CheckpointRef(source="gguf", location=str(path)))


def test_gives_back_the_weights_it_was_written_from(file, llama):
    source = open_file(file)
    loaded = source.load_model(torch.float32, "sdpa")
    assert {n for n, _ in loaded.named_parameters()} == {n for n, _ in llama.named_parameters()}
    for name, parameter in llama.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
        assert torch.equal(source.read(name, "weight"), parameter.detach().flatten()), name
        assert torch.equal(source.read(name, "weight", 3, 9), parameter.detach().flatten()[3:9])
    ids = torch.arange(10)[None]
    assert torch.equal(loaded(ids).logits, llama.eval()(ids).logits)


def test_the_model_is_a_plain_one(file, tmp_path):
    model = open_file(file).load_model(torch.bfloat16, "eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.use_cache is False
    assert not hasattr(model.config, "quantization_config")
    assert model.float().dtype == torch.float32  # transformers refuses this on quantised models


def test_packed_files_are_unpacked_once_and_again_when_changed(file, llama, tmp_path):
    packed = tmp_path / "m.gguf.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    first = unpacked(packed)
    assert first.read_bytes() == file.read_bytes()
    assert first.name == "m.gguf"
    inode = first.stat().st_ino
    assert unpacked(packed).stat().st_ino == inode
    assert [path.name for path in first.parent.iterdir()] == ["m.gguf"]
    source = open_file(packed)
    assert source.ref.location == str(packed)
    assert torch.equal(
        source.load_model(torch.float32, "sdpa").lm_head.weight, llama.lm_head.weight
    )
    os.utime(packed, ns=(1, 1))
    assert unpacked(packed) != first


def test_broken_packing_leaves_nothing_behind(file, tmp_path):
    packed = tmp_path / "m.gguf.gz"
    packed.write_bytes(gzip.compress(file.read_bytes())[:-100])
    with pytest.raises(CheckpointError, match="cannot be unpacked"):
        open_file(packed)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_no_moments_and_says_so(file):
    source = open_file(file)
    assert source.has_moments is False
    with pytest.raises(CheckpointError, match="moments: warmup"):
        source.read("lm_head.weight", "exp_avg")
    with pytest.raises(CheckpointError, match="moments: warmup"):
        source.hyper("lm_head.weight")
    with pytest.raises(CheckpointError, match="no weight for 'nothing'"):
        source.read("nothing", "weight")
    with pytest.raises(CheckpointError, match=r"asked for 0\.\.99999"):
        source.read("lm_head.weight", "weight", 0, 99999)


def test_another_format_is_an_error(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="not GGUF; begins with b'PK"):
        open_file(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="no such file"):
        open_file(tmp_path / "n.gguf")


TEXT = (
    "The sun rises in the east and sets in the west. Every day, people all over the world go to "
    "work, to school, or to the market, and in the evening they come home to their families."
)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_real_model_reads_english():
    """A pretrained model is near 3 nats per token on plain text; chance is ln 49152 = 10.8."""
    where = os.environ.get("PROBE_TEST_GGUF")
    if not where or not Path(where).is_file():
        pytest.skip("PROBE_TEST_GGUF names no SmolLM2-135M-Instruct.Q4_1.gguf(.gz)")
    source = open_file(Path(where))
    model = source.load_model(torch.float32, "sdpa")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = source.load_tokenizer(None)(TEXT, return_tensors="pt").input_ids
    with torch.inference_mode():
        loss = model(ids, labels=ids).loss.item()
        shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.manual_seed(0))]
        assert loss < 3.0
        assert model(shuffled, labels=shuffled).loss.item() > loss + 2.0
    for name in ("model.layers.29.self_attn.k_proj.weight", "model.norm.weight"):
        assert torch.equal(source.read(name, "weight"), model.get_parameter(name).flatten())
