"""Which back-end a job gets, on how many ranks, and what each of them needs."""

import pytest

from probe.errors import ConfigError
from probe.model_size import ModelSize
from probe.placement import backend_for, choose_placement, memory_bytes_per_rank, place
from probe.spec import ParallelOptions
from probe.spec_load import parse_spec


@pytest.mark.parametrize(
    ("backend", "ranks", "num_ranks", "expected"),
    [
        ("auto", None, 1, "single"),
        ("auto", None, 3, "fsdp2"),
        ("auto", 1, 1, "single"),
        ("auto", 2, 2, "fsdp2"),
        ("single", None, 1, "single"),
        ("fsdp2", None, 1, "fsdp2"),
        ("fsdp2", 2, 2, "fsdp2"),
        ("deepspeed", 1, 1, "deepspeed"),
        ("deepspeed", None, 4, "deepspeed"),
    ],
)
def test_the_backend_follows_from_the_spec_and_the_ranks(backend, ranks, num_ranks, expected):
    assert backend_for(ParallelOptions(backend=backend, ranks=ranks), num_ranks) == expected


@pytest.mark.parametrize(
    ("backend", "ranks", "num_ranks", "says"),
    [
        ("auto", 2, 1, "parallel.ranks is 2, but 1 was started.*--nproc-per-node 2"),
        ("deepspeed", 1, 2, "parallel.ranks is 1, but 2 were started.*python -m probe.rank"),
        ("single", None, 2, "parallel.backend is single, but 2 were started"),
    ],
)
def test_another_number_of_ranks_is_refused(backend, ranks, num_ranks, says):
    with pytest.raises(ConfigError, match=says):
        backend_for(ParallelOptions(backend=backend, ranks=ranks), num_ranks)


# 1e9 parameters, the largest group 1e8. AdamW with loss_batch `both` keeps 5 fp32 buffers (base,
# a gradient that turns into the direction, two moments, held-out gradient); live weights are fp32
# under FSDP2.
SIZE = ModelSize(num_parameters=10**9, largest_group=10**8)
GB = 10**9


@pytest.fixture
def spec(series_spec):
    def build(parallel=None, dtype="float32", **changed):
        model = {"dtype": dtype, "device": changed.pop("device", "auto")}
        return parse_spec({**series_spec, "model": model, "parallel": parallel or {}, **changed})

    return build


@pytest.mark.parametrize(
    ("parallel", "dtype", "num_ranks", "expected"),
    [
        ({}, "float32", 1, 24 * GB),
        ({}, "bfloat16", 1, 22 * GB),
        ({}, "float32", 2, 12 * GB + 0.4 * GB),
        ({}, "bfloat16", 2, 12 * GB + 0.2 * GB),
        ({}, "bfloat16", 4, 6 * GB + 0.2 * GB),
        ({"backend": "fsdp2"}, "bfloat16", 1, 24 * GB + 0.2 * GB),
        ({"backend": "deepspeed"}, "bfloat16", 2, 11 * GB + 0.2 * GB),
        ({"offload_base": True}, "bfloat16", 1, 18 * GB),
        ({"offload_base": True}, "bfloat16", 4, 5 * GB + 0.2 * GB),
    ],
)
def test_memory_of_one_rank(spec, parallel, dtype, num_ranks, expected):
    assert memory_bytes_per_rank(spec(parallel, dtype), SIZE, num_ranks) == expected


def test_memory_of_one_rank_with_fewer_buffers(spec):
    update = {"loss_batch": "update"}
    assert memory_bytes_per_rank(spec(measurement=update), SIZE, 1) == 20 * GB
    # Saved moments are read as they are needed; SGD has none.
    for optimizer in ({"name": "adamw", "moments": "checkpoint"}, {"name": "sgd"}):
        fewer = spec(measurement=update, optimizer=optimizer)
        assert memory_bytes_per_rank(fewer, SIZE, 1) == 12 * GB


def test_a_cpu_offloads_nothing(spec):
    job = spec({"offload_base": True}, device="cpu")
    assert memory_bytes_per_rank(job, SIZE, 1) == 24 * GB


@pytest.mark.parametrize(
    ("parallel", "gpus", "expected"),
    [
        ({}, [], ("single", 1)),  # a CPU
        ({}, [80 * GB] * 4, ("single", 1)),
        ({}, [28 * GB] * 4, ("fsdp2", 2)),  # a fifth is left for activations: 12.4 of 22.4
        ({}, [80 * GB, 10 * GB, 12 * GB, 16 * GB], ("fsdp2", 4)),  # by the smallest: 6.4 of 8
        ({"backend": "single"}, [10 * GB] * 4, ("single", 1)),
        ({"backend": "deepspeed"}, [80 * GB] * 4, ("deepspeed", 1)),
        ({"ranks": 3}, [80 * GB] * 4, ("fsdp2", 3)),
        ({"backend": "deepspeed", "ranks": 3}, [], ("deepspeed", 3)),
    ],
)
def test_the_fewest_gpus_that_hold_the_model(spec, parallel, gpus, expected):
    found = choose_placement(spec(parallel), SIZE, gpus)
    assert (found.backend, found.num_ranks) == expected
    assert found.notes == () or parallel == {"backend": "single"}


def test_what_cannot_fit_or_is_not_known_is_said(spec):
    found = choose_placement(spec(), SIZE, [GB, GB])
    assert found.num_ranks == 2
    assert "need 11.5 GiB per rank, the smallest GPU here has 0.9" in found.notes[0]
    found = choose_placement(spec(), None, [GB, GB])
    assert (found.num_ranks, found.memory_bytes_per_rank) == (1, None)
    assert "one of 2 GPUs is used" in found.notes[0]
    found = choose_placement(spec({"ranks": 3}), SIZE, [80 * GB])
    assert "this machine has 1" in found.notes[0]
    found = choose_placement(spec({"ranks": 4, "nodes": 2}), SIZE, [80 * GB])
    assert "ranks is 4 on 2 nodes, one GPU each; this machine has 1" in found.notes[0]


def test_a_job_on_several_nodes_says_who_can_take_it(spec):
    found = choose_placement(spec({"ranks": 4, "nodes": 2}), SIZE, [80 * GB] * 2)
    assert (found.backend, found.num_ranks) == ("fsdp2", 4)
    assert [note.split(":")[0] for note in found.notes] == ["parallel.nodes is 2"]


def test_gpus_are_left_alone_by_a_job_for_the_cpu(spec, monkeypatch):
    monkeypatch.setattr("probe.placement.gpu_memory_bytes", lambda: [20 * GB] * 8)
    assert place(spec(device="cpu"), SIZE).num_ranks == 1
    assert place(spec(), SIZE).num_ranks == 2
