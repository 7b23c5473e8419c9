"""Presets of a job file: what is merged, what is replaced, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from probe.errors import ConfigError
from probe.spec_load import SpecError, load_spec, parse_spec, spec_sha256

BASE: dict[str, Any] = {
    "kind": "checkpoint_series",
    "name": "a series",
    "checkpoints": {"source": "local", "path": "runs/step-*", "first_step": 100, "every": 2},
    "batches": {
        "sources": [{"name": "web", "type": "files", "paths": ["web.jsonl.gz"]}],
        "sequence_length": 128,
        "batch_sequences": 4,
    },
    "optimizer": {"name": "adamw", "betas": [0.8, 0.9], "clip_grad_norm": 1.0},
    "measurement": {"loss_batch": "update", "repeats": 5, "eta_max": 7.0},
}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(presets: Any, **changes: Any) -> Path:
        file = tmp_path / "job.yaml"
        file.write_text(yaml.safe_dump({**BASE, **changes, "presets": presets}))
        return file

    return write


def by_hand(**changes: Any) -> Any:
    """The spec of the base file with `a__b=c` written into it by a person."""
    raw = copy.deepcopy(BASE)
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = raw
        for part in parents:
            place = place.setdefault(part, {})
        place[last] = value
    return parse_spec(raw)


def test_without_a_preset_the_section_is_dropped(write: Any) -> None:
    spec = load_spec(write({"quick": {"measurement": {"repeats": 1}}}))
    assert spec == by_hand()
    assert spec_sha256(spec) == spec_sha256(by_hand())


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, {}),
        ({"measurement": {"repeats": 1}}, {"measurement__repeats": 1}),
        ({"name": "short"}, {"name": "short"}),
        ({"model": {"dtype": "bfloat16"}}, {"model": {"dtype": "bfloat16"}}),  # not in the file
        ({"optimizer": {"betas": [0.7, 0.8]}}, {"optimizer__betas": [0.7, 0.8]}),
        ({"optimizer": {"clip_grad_norm": None}}, {"optimizer__clip_grad_norm": None}),
        (
            {"batches": {"sources": [{"name": "c4", "type": "files", "paths": ["c4.txt"]}]}},
            {"batches__sources": [{"name": "c4", "type": "files", "paths": ["c4.txt"]}]},
        ),
        (  # the same source: a local path's other fields stay
            {"checkpoints": {"source": "local", "path": "other/*"}},
            {"checkpoints__path": "other/*"},
        ),
        (  # another source: fields of the old one mean nothing there
            {"checkpoints": {"source": "gguf", "path": "a.gguf"}},
            {"checkpoints": {"source": "gguf", "path": "a.gguf"}},
        ),
        ({"optimizer": {"name": "sgd"}}, {"optimizer": {"name": "sgd"}}),
    ],
)
def test_a_preset_is_what_a_person_would_have_changed(
    write: Any, changes: dict[str, Any], same: dict[str, Any]
) -> None:
    found = load_spec(write({"quick": changes, "other": {"name": "x"}}), preset="quick")
    assert found == by_hand(**same)


def test_set_comes_after_the_preset_and_the_preset_after_the_file(write: Any) -> None:
    file = write({"quick": {"measurement": {"repeats": 1, "eta_max": 9.0}}})
    spec = load_spec(file, ["measurement.repeats=3"], "quick")
    assert spec == by_hand(measurement__repeats=3, measurement__eta_max=9.0)


def test_an_alias_is_changed_in_one_place_only(tmp_path: Path) -> None:
    """YAML's `*name` makes two keys one object: a merge must not write into it."""
    file = tmp_path / "job.yaml"
    presets = "presets: {quick: {model: {dtype: bfloat16}}}\n"
    file.write_text(f"{yaml.safe_dump(BASE)}model: &empty {{}}\nparallel: *empty\n{presets}")
    assert load_spec(file, preset="quick") == by_hand(model={"dtype": "bfloat16"})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("quik", "no preset 'quik'; did you mean 'quick'?; choose from: quick, tiny"),
        ("zzz", "no preset 'zzz'; choose from: quick, tiny"),
    ],
)
def test_an_unknown_preset_lists_those_there_are(write: Any, name: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_spec(write({"tiny": {"name": "t"}, "quick": {"name": "q"}}), preset=name)
    assert says in str(caught.value)


def test_a_file_without_presets_says_so(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(BASE))
    with pytest.raises(ConfigError, match="no preset 'quick'; the file has none"):
        load_spec(file, preset="quick")


@pytest.mark.parametrize(
    ("presets", "field", "says"),
    [
        ({"quick": {"measurement": {"repeat": 1}}}, "measurement.repeat", "mean 'repeats'"),
        ({"quick": {"measurment": {}}}, "measurment", "did you mean 'measurement'"),
        ({"quick": {"measurement": {"repeats": 0}}}, "measurement.repeats", "found 0"),
        ({"quick": {"measurement": 3}}, "measurement", "found 3"),
        (["quick"], "presets", "mapping of names to changes, found list"),
        (None, "presets", "mapping of names to changes, found NoneType"),
        ({"quick": None}, "presets.quick", "mapping of fields, found NoneType"),
        ({"quick": {"presets": {}}}, "presets.quick", "presets of its own"),
        ({"quick": {}, 2: {}}, "presets.2", "must be text, found int"),
    ],
)
def test_a_bad_preset_is_named(write: Any, presets: Any, field: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(write(presets), preset="quick")
    (problem,) = caught.value.problems
    assert problem["field"] == field
    assert says in problem["message"]


def test_a_malformed_section_is_refused_also_where_no_preset_is_asked_for(write: Any) -> None:
    with pytest.raises(SpecError, match="mapping of fields"):
        load_spec(write({"quick": 1}))


@pytest.mark.parametrize("presets", [{}, {"quick": {"measurement": {"repeats": 1}}}, None])
def test_plain_values_with_presets_are_refused(presets: Any) -> None:
    """As sent over HTTP: nothing there says which one is meant."""
    with pytest.raises(SpecError) as caught:
        parse_spec({**BASE, "presets": presets})
    (problem,) = caught.value.problems
    assert problem["field"] == "presets"
    assert "for job files" in problem["message"]
    assert "--preset" in problem["message"]
