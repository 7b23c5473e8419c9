"""The truth is the model and optimizer the directory was written from, by torch's own writer."""

import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from probe.checkpoints import open_checkpoint
from probe.checkpoints.dcp import read_dcp_range
from probe.checkpoints.dcp_index import Chunk, DcpTensor, Place, _covered_once, read_dcp_index
from probe.errors import CheckpointError
from probe.result import CheckpointRef
from probe.series import list_checkpoints
from probe.spec import LocalCheckpoints

MLP = "model.layers.1.mlp.up_proj.weight"


def dcp_save(state: dict, directory: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process, on purpose
        dcp.save(state, checkpoint_id=directory, no_dist=True)


def open_directory(directory: Path, **fields):
    return open_checkpoint(CheckpointRef(source="local", location=str(directory), **fields))


def listed(directory: Path, **fields) -> CheckpointRef:
    (ref,) = list_checkpoints(LocalCheckpoints(path=str(directory), **fields))
    return ref


def assert_holds(source, model, optimizer) -> None:
    assert source.has_moments
    loaded = source.load_model(torch.float32, "sdpa")
    parameters = dict(loaded.named_parameters())
    assert parameters.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameters[name], parameter)
        middle = parameter.numel() // 3
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            truth = parameter if kind == "weight" else optimizer.state[parameter][kind]
            truth = truth.detach().flatten()
            assert torch.equal(source.read(name, kind), truth)
            assert torch.equal(source.read(name, kind, middle, middle + 5), truth[middle:][:5])
            assert source.read(name, kind, middle, middle).shape == (0,)
        assert source.hyper(name) == {"step": 2}
    for (name, buffer), (other, found) in zip(
        model.named_buffers(), loaded.named_buffers(), strict=True
    ):
        assert name == other
        assert torch.equal(buffer, found)  # rotary frequencies are in no checkpoint


@pytest.fixture
def directory(trained, tmp_path) -> Path:
    weights, state = get_state_dict(trained.model, trained.optimizer)
    target = tmp_path / "step-2"
    dcp_save({"model": weights, "optim": state}, target)
    trained.model.config.save_pretrained(target)
    return target


def rewrite(directory: Path, change) -> None:
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("weights_at", "state_at"),
    [("model", "optim"), ("model", "optimizer"), (None, "optimizer"), ("app.model", "app.optim")],
)
def test_every_nesting_gives_weights_and_moments_bit_for_bit(
    trained, tmp_path, flat, weights_at, state_at
):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    weights, state = get_state_dict(trained.model, trained.optimizer, options=options)
    saved = {state_at: state} | (weights if weights_at is None else {weights_at: weights})
    dcp_save(saved, tmp_path / "step-2")
    trained.model.config.save_pretrained(tmp_path / "step-2")
    ref = listed(tmp_path / "step-2")
    assert (ref.step, ref.format, ref.has_moments) == (2, "dcp", True)
    source = open_checkpoint(ref)
    assert_holds(source, *trained)
    assert source.stored_betas == trained.optimizer.defaults["betas"]


@pytest.mark.distributed
@pytest.mark.parametrize(("size", "mode"), [(2, "nested"), (3, "flat")])
def test_saved_by_several_ranks_read_by_one(make_model, tmp_path, size, mode):
    directory = tmp_path / "step-2"
    script = Path(__file__).with_name("dcp_ranks.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(directory)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(size), mode], env=environment)
        for rank in range(size)
    ]
    try:
        assert [rank.wait(timeout=100) for rank in ranks] == [0] * size
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    model = make_model(vocab_size=49)
    optimizer = _train(model)
    assert max(len(t.chunks) for t in read_dcp_index(directory, [directory]).tensors.values()) == (
        size
    )
    assert_holds(open_checkpoint(listed(directory)), model, optimizer)


def _train(model) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        ids = torch.randint(0, 48, (2, 8), generator=generator)
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return optimizer


def test_weights_and_optimizer_saved_apart_as_accelerate_does(trained, tmp_path):
    weights, state = get_state_dict(trained.model, trained.optimizer)
    dcp_save({"model": weights}, tmp_path / "checkpoint-2" / "pytorch_model_fsdp_0")
    dcp_save({"optimizer": state}, tmp_path / "checkpoint-2" / "optimizer_0")
    trained.model.config.save_pretrained(tmp_path / "checkpoint-2")
    ref = listed(tmp_path / "checkpoint-*")
    assert (ref.step, ref.has_moments) == (2, True)
    assert_holds(open_checkpoint(ref), *trained)


def test_names_of_a_compiled_model_are_cleaned(trained, tmp_path):
    weights = {f"model._orig_mod.{k}": v for k, v in trained.model.state_dict().items()}
    dcp_save(weights, tmp_path / "step-2")
    trained.model.config.save_pretrained(tmp_path / "step-2")
    source = open_directory(tmp_path / "step-2")
    assert not source.has_moments
    assert torch.equal(source.read("lm_head.weight", "weight"), weights_of(trained, "lm_head"))
    with pytest.raises(CheckpointError, match=r"no optimizer state.*warmup"):
        source.read(MLP, "exp_avg")


def weights_of(trained, module: str) -> torch.Tensor:
    return trained.model.get_parameter(f"{module}.weight").detach().flatten()


def test_tied_embeddings_stored_twice_are_one(make_model, tmp_path):
    model = make_model(tie_word_embeddings=True)
    dcp_save({"model": model.state_dict()}, tmp_path / "step-1")
    model.config.save_pretrained(tmp_path / "step-1")
    loaded = open_directory(tmp_path / "step-1").load_model(torch.float32, "sdpa")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    untied = model.state_dict() | {"lm_head.weight": model.lm_head.weight + 1}
    dcp_save({"model": untied}, tmp_path / "step-2")
    model.config.save_pretrained(tmp_path / "step-2")
    with pytest.raises(CheckpointError, match="differ, but the config ties"):
        open_directory(tmp_path / "step-2").load_model(torch.float32, "sdpa")


def test_boxes_that_cut_columns_are_put_together(directory, tmp_path):
    whole = torch.arange(35.0).reshape(5, 7)
    chunks = []
    file = tmp_path / "boxes"
    with file.open("wb") as stream:
        for top, bottom in ((0, 2), (2, 5)):
            for left, right in ((0, 3), (3, 7)):
                start = stream.tell()
                torch.save(whole[top:bottom, left:right].clone(), stream)
                place = Place(file, start, stream.tell() - start)
                chunks.append(Chunk((top, left), (bottom - top, right - left), place))
    tensor = DcpTensor(key="x", dtype="float32", shape=(5, 7), chunks=tuple(chunks))
    for lo in range(36):
        for hi in range(lo, 36):
            assert torch.equal(read_dcp_range(tensor, lo, hi), whole.flatten()[lo:hi])


def test_half_precision_moments_keep_their_dtype(trained, tmp_path):
    weights, state = get_state_dict(trained.model, trained.optimizer)
    for moments in state["state"].values():
        moments["exp_avg"] = moments["exp_avg"].bfloat16()
    dcp_save({"model": weights, "optim": state}, tmp_path / "step-2")
    trained.model.config.save_pretrained(tmp_path / "step-2")
    read = open_directory(tmp_path / "step-2").read(MLP, "exp_avg")
    truth = trained.optimizer.state[trained.model.get_parameter(MLP)]["exp_avg"]
    assert read.dtype == torch.bfloat16
    assert torch.equal(read, truth.bfloat16().flatten())


def test_without_a_config_the_job_names_one(trained, directory, tmp_path):
    (directory / "config.json").rename(tmp_path / "config.json")
    ref = listed(directory)
    assert ref.has_moments  # listing needs none
    with pytest.raises(CheckpointError, match=r"no config\.json.*checkpoints\.config"):
        open_checkpoint(ref).load_model(torch.float32, "sdpa")
    for config in (tmp_path, tmp_path / "config.json"):
        assert_holds(open_checkpoint(listed(directory, config=str(config))), *trained)
    with pytest.raises(CheckpointError, match=r"checkpoints\.config: .*no such file"):
        listed(directory, config=str(tmp_path / "absent.json"))
    with pytest.raises(CheckpointError, match=r"no tokenizer.*model\.tokenizer"):
        open_checkpoint(ref).load_tokenizer()


def test_a_config_of_another_model_is_found_out(trained, directory, make_model):
    make_model(num_hidden_layers=3).config.save_pretrained(directory)
    with pytest.raises(CheckpointError, match=r"no key 'model\.model\.layers\.2.*another model"):
        open_directory(directory).load_model(torch.float32, "sdpa")
    make_model(num_hidden_layers=1).config.save_pretrained(directory)
    with pytest.raises(CheckpointError, match=r"have no place.*model\.model\.layers\.1"):
        open_directory(directory).load_model(torch.float32, "sdpa")
    make_model(intermediate_size=25).config.save_pretrained(directory)
    with pytest.raises(CheckpointError, match=r"step-2.*proj.*shape \[24, 16\], expected \[25, 16"):
        open_directory(directory).load_model(torch.float32, "sdpa")


def test_two_copies_of_the_weights_are_not_guessed_between(trained, tmp_path):
    weights = trained.model.state_dict()
    dcp_save({"model": weights, "ema": weights}, tmp_path / "step-2")
    trained.model.config.save_pretrained(tmp_path / "step-2")
    with pytest.raises(CheckpointError, match=r"several prefixes, 'ema\.', 'model\.'"):
        open_directory(tmp_path / "step-2").load_model(torch.float32, "sdpa")


def test_moments_of_amsgrad_are_refused_when_read(make_model, tmp_path):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    weights, state = get_state_dict(model, optimizer)
    dcp_save({"model": weights, "optim": state}, tmp_path / "step-1")
    model.config.save_pretrained(tmp_path / "step-1")
    source = open_checkpoint(listed(tmp_path / "step-1"))
    assert torch.equal(source.read(MLP, "weight"), model.get_parameter(MLP).detach().flatten())
    for call in (lambda: source.read(MLP, "exp_avg_sq"), lambda: source.hyper(MLP)):
        with pytest.raises(CheckpointError, match=r"max_exp_avg_sq'\. AMSGrad .* moments: warmup"):
            call()


def test_moments_keyed_by_number_are_refused_when_read(trained, tmp_path):
    state = {"model": trained.model.state_dict(), "optim": trained.optimizer.state_dict()}
    dcp_save(state, tmp_path / "step-2")
    trained.model.config.save_pretrained(tmp_path / "step-2")
    source = open_directory(tmp_path / "step-2")
    with pytest.raises(CheckpointError, match=r"keyed by number.*get_state_dict"):
        source.read(MLP, "exp_avg")
    assert torch.equal(source.read("lm_head.weight", "weight"), weights_of(trained, "lm_head"))


def data_file(directory: Path) -> Path:
    (file,) = directory.glob("*.distcp")
    return file


def test_a_truncated_data_file_is_named_before_anything_is_loaded(directory):
    file = data_file(directory)
    file.write_bytes(file.read_bytes()[:-10_000])
    with pytest.raises(CheckpointError, match=r"distcp: key '.*' ends at byte \d+, found \d+"):
        listed(directory)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"distcp: missing.*expects key"):
        listed(directory)


def test_a_save_cut_off_before_its_metadata_is_named(directory):
    (directory / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"no \.metadata.*cut off"):
        listed(directory)
    with pytest.raises(CheckpointError, match=r"no \.metadata.*cut off"):
        open_directory(directory)


@pytest.mark.parametrize("length", [0, 1, 100, 2000])
def test_a_truncated_metadata_is_named(directory, length):
    path = directory / ".metadata"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"\.metadata: not usable as torch DCP metadata"):
        listed(directory)


def test_corrupt_data_is_named_with_its_key(directory):
    file = data_file(directory)
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(
        CheckpointError, match=r"distcp: key '.*up_proj.*': bytes .* cannot be read"
    ):
        open_directory(directory).read(MLP, "weight")


def test_a_chunk_of_another_shape_or_dtype_is_refused(directory):
    key = f"model.{MLP}"

    def swap(metadata: Metadata) -> None:
        stored = {index.fqn: index for index in metadata.storage_data}
        other = stored["model.model.layers.1.mlp.down_proj.weight"]
        metadata.storage_data[stored[key]] = metadata.storage_data[other]

    rewrite(directory, swap)
    with pytest.raises(
        CheckpointError, match=r"up_proj.*found a chunk of shape \[16, 24\].*24, 16"
    ):
        open_directory(directory).read(MLP, "weight")


def test_gaps_and_overlaps_are_refused(directory):
    def shrink(metadata: Metadata) -> None:
        metadata.state_dict_metadata[f"model.{MLP}"].chunks[0].sizes = torch.Size((23, 16))

    rewrite(directory, shrink)
    with pytest.raises(CheckpointError, match=r"up_proj.*1 chunks of 368 .*expected 384 elements"):
        listed(directory)


@pytest.mark.parametrize(
    ("boxes", "whole"),
    [
        ([((0, 0), (2, 4)), ((2, 0), (2, 4))], True),
        ([((2, 0), (2, 4)), ((0, 0), (2, 4))], True),
        ([((0, 0), (2, 4)), ((1, 0), (2, 4))], False),
        ([((0, 0), (4, 2)), ((0, 2), (4, 2))], True),
        ([((0, 0), (4, 2)), ((0, 1), (4, 2))], False),
        ([((0, 0), (4, 4)), ((0, 4), (4, 4))], False),
        ([((0,), (16,))], False),
    ],
)
def test_chunks_cover_a_tensor_exactly_once(boxes, whole, tmp_path):
    place = Place(tmp_path, 0, 0)
    chunks = tuple(Chunk(*box, place) for box in boxes)
    assert _covered_once(DcpTensor(key="x", dtype="float32", shape=(4, 4), chunks=chunks)) is whole


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "..", ""])
def test_a_path_out_of_the_directory_is_refused(directory, name):
    def redirect(metadata: Metadata) -> None:
        next(iter(metadata.storage_data.values())).relative_path = name

    rewrite(directory, redirect)
    with pytest.raises(CheckpointError, match="expected a file name in the same directory"):
        listed(directory)


def test_compressed_chunks_are_refused(directory):
    def compress(metadata: Metadata) -> None:
        next(iter(metadata.storage_data.values())).transform_descriptors = ["zstd"]

    rewrite(directory, compress)
    with pytest.raises(CheckpointError, match=r"zstd.*plain torch\.save"):
        listed(directory)


def test_a_moment_without_its_partner_or_of_another_shape_is_refused(directory):
    name = f"optim.state.{MLP}"
    rewrite(directory, lambda m: m.state_dict_metadata.pop(f"{name}.exp_avg_sq"))
    with pytest.raises(CheckpointError, match=r"up_proj.*no exp_avg_sq of '.*incomplete"):
        listed(directory)


class Trap:
    """Unpickling it makes a directory; it names nothing but a function and plain text."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize("where", ["alone", "inside"])
def test_a_hostile_metadata_executes_nothing(directory, tmp_path, where):
    sprung = tmp_path / "sprung"
    path = directory / ".metadata"
    if where == "alone":
        path.write_bytes(pickle.dumps(Trap(sprung)))
    else:
        rewrite(directory, lambda m: setattr(m, "planner_data", Trap(sprung)))
    for call in (lambda: listed(directory), lambda: open_directory(directory)):
        with pytest.raises(CheckpointError, match=r"\.metadata.*nothing in it was run"):
            call()
    assert not sprung.exists()
    pickle.loads(path.read_bytes())
    assert sprung.exists()  # the trap works


def test_a_metadata_that_announces_an_absurd_size_is_corrupt(directory):
    (directory / ".metadata").write_bytes(b"\x80\x05\x96" + (2**50).to_bytes(8, "little"))
    with pytest.raises(CheckpointError, match=r"\.metadata: not usable.*MemoryError"):
        open_directory(directory)


def test_a_hostile_chunk_executes_nothing(directory, tmp_path):
    sprung = tmp_path / "sprung"
    trap = pickle.dumps(Trap(sprung))
    file = data_file(directory)
    file.write_bytes(trap + bytes(file.stat().st_size - len(trap)))

    def aim(metadata: Metadata) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn in (f"model.{MLP}", f"optim.state.{MLP}.step"):
                info.offset, info.length = 0, len(trap)

    rewrite(directory, aim)
    source = open_directory(directory)
    for call in (lambda: source.read(MLP, "weight"), lambda: source.hyper(MLP)):
        with pytest.raises(CheckpointError, match="cannot be read"):
            call()
    assert not sprung.exists()


def test_listing_imports_no_torch(directory):
    code = (
        "import sys; from probe.series import list_checkpoints; "
        "from probe.spec import LocalCheckpoints; "
        f"refs = list_checkpoints(LocalCheckpoints(path={str(directory)!r})); "
        "print(refs[0].has_moments, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", "False"], done.stderr
