"""GGUF files written here in fp32, so that the weights are known; and a real one where it is.

Set PROBE_TEST_GGUF to SmolLM2-135M-Instruct.Q4_1.gguf(.gz) for the real one.
"""

import gzip
import os
from pathlib import Path

import pytest
import torch
from gguf_file import write_gguf
from transformers import LlamaConfig, LlamaForCausalLM

from probe.checkpoints import open_checkpoint
from probe.checkpoints.gguf import unpacked
from probe.errors import CheckpointError
from probe.result import CheckpointRef

HIDDEN, HEADS, LAYERS, VOCAB = 32, 4, 1, 40
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gguf")


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


def test_shapes_are_known_without_decoding(file, llama, monkeypatch):
    def decode(*_):
        raise AssertionError("a tensor was decoded")

    monkeypatch.setattr("gguf.dequantize", decode)
    source = open_file(file)
    shapes = {name: tuple(p.shape) for name, p in llama.named_parameters()}
    assert source.weight_shapes() == shapes
    assert {n: tuple(p.shape) for n, p in source.skeleton("sdpa").named_parameters()} == shapes


def test_the_model_is_a_plain_one(file, tmp_path):
    model = open_file(file).load_model(torch.bfloat16, "eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.use_cache is False
    assert not hasattr(model.config, "quantization_config")
    assert model.float().dtype == torch.float32  # transformers refuses this on quantised models


def test_packed_files_are_unpacked_once_and_again_when_changed(file, llama, tmp_path):
    packed = tmp_path / "m.gguf.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    first = unpacked(packed).path
    assert first.read_bytes() == file.read_bytes()
    assert first.name == "m.gguf"
    inode = first.stat().st_ino
    assert unpacked(packed).path.stat().st_ino == inode
    assert [path.name for path in first.parent.iterdir()] == ["m.gguf"]
    source = open_file(packed)
    assert source.ref.location == str(packed)
    assert torch.equal(
        source.load_model(torch.float32, "sdpa").lm_head.weight, llama.lm_head.weight
    )
    os.utime(packed, ns=(1, 1))
    assert unpacked(packed).path != first


def test_broken_packing_leaves_nothing_behind(file, tmp_path):
    packed = tmp_path / "m.gguf.gz"
    packed.write_bytes(gzip.compress(file.read_bytes())[:-100])
    with pytest.raises(CheckpointError, match="cannot be unpacked"):
        open_file(packed)
    kept = (tmp_path / "cache" / "sharpness-probe" / "gguf").rglob("*")
    assert [path for path in kept if path.is_file()] == []


def test_what_is_unpacked_keeps_the_caches_limit(file, tmp_path, monkeypatch):
    size = file.stat().st_size
    monkeypatch.setenv("PROBE_CACHE_LIMIT", str(size * 3 // 2))
    packed = [tmp_path / "a.gguf.gz", tmp_path / "b.gguf.gz"]
    for path in packed:
        path.write_bytes(gzip.compress(file.read_bytes()))
    first = open_file(packed[0])
    with pytest.raises(CheckpointError, match="do not fit"):
        open_file(packed[1])
    assert first.path.is_file()
    place = first.path
    del first
    assert open_file(packed[1]).path.is_file()
    assert not place.exists()


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
