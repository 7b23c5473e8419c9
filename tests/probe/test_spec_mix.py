"""A wrong mix scan is told in its own words: the field, what was found, the choices."""

import json

import pytest

from probe.kinds import KINDS, JobKind, data_sources
from probe.spec_load import SpecError, parse_spec, spec_sha256
from probe.spec_mix import RatioGrid, ratios_of


@pytest.fixture
def changed(mix_spec):
    """The spec with one field set, by its dotted path."""

    def change(path, value):
        raw = json.loads(json.dumps(mix_spec))
        place = raw
        *parents, last = path.split(".")
        for part in parents:
            place = place[int(part)] if part.isdigit() else place.setdefault(part, {})
        place[int(last) if last.isdigit() else last] = value
        return raw

    return change


def test_kinds_and_their_names_are_listed_alike():
    assert JobKind.__args__ == tuple(KINDS)  # type: ignore[attr-defined]
    for kind, model in KINDS.items():
        assert model.model_fields["kind"].annotation.__args__ == (kind,)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("mixture.ratios", [0, 0.5, 2.0], "mixture.ratios.2: Input should be less than or equal"),
        ("mixture.ratios", {"start": 0, "stop": 3}, "mixture.ratios.stop: Input should be less"),
        (
            "mixture.ratios",
            {"start": 0, "nums": 3},
            "mixture.ratios.nums: unknown key; did you mean 'num'?; valid keys: num, start, stop",
        ),
        (
            "mixture.ratios",
            0.5,
            "mixture.ratios: must be a list of ratios or {start, stop, num} (found 0.5)",
        ),
        ("mixture.ratios", {"start": 1.0, "stop": 0.5}, "mixture.ratios: need start < stop"),
        ("mixture.ratios", [0.5, 0.1], "mixture: ratios must ascend without repeats"),
        ("mixture.ratios", [], "mixture: ratios is empty: give at least one"),
        ("mixture.sources.1.name", "web", "mixture: source names must differ, got ['web', 'web']"),
        ("mixture.ratio", [0.5], "mixture.ratio: unknown key; did you mean 'ratios'?"),
        ("mixture.gradients", "share", "mixture.gradients: Input should be 'shared' or 'exact'"),
        ("mixture.varied", "wiki", "mixture: varied is 'wiki', the sources are web, gsm8k"),
        ("optimizer.clip_grad_norm", 1.0, "(spec): optimizer.clip_grad_norm with mixture."),
        ("optimizer.name", "sgd", "optimizer.name: Input should be 'adamw' (found 'sgd')"),
        (
            "eval_tasks.1",
            {"data": {"name": "a", "paths": ["x"]}, "sequences": 2},
            "eval_tasks.1.data: needs 'type'; choose from: files, hub",
        ),
        ("eval_tasks.0.data.pathes", [], "eval_tasks.0.data.pathes: unknown key; did you mean"),
        (
            "eval_tasks.0.data.format",
            {"type": "question_answer", "question": 3},
            "eval_tasks.0.data.format.question: Input should be a valid string (found 3)",
        ),
        ("eval_tasks.0.data.name", "gsm8k_test", "(spec): names of eval_tasks must differ"),
        ("mixture.sources.0.paths", [], "mixture.sources.0.paths: List should have at least 1"),
        ("schedule", {}, "schedule: unknown key; valid keys: batches, checkpoints, eval_tasks"),
        ("kind", "mix-scan", "kind: unknown kind 'mix-scan'; did you mean 'mix_scan'?"),
    ],
)
def test_a_wrong_field_is_named(changed, path, value, message):
    with pytest.raises(SpecError) as caught:
        parse_spec(changed(path, value))
    assert str(caught.value).startswith(message)
    assert "ratio_list" not in str(caught.value)
    assert "ratio_grid" not in str(caught.value)


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"refine": 1, "ratios": [0.5]}, "mixture: refine needs at least two ratios"),
        ({"refine": 1, "gradients": "exact"}, "mixture: refine needs gradients: shared"),
    ],
)
def test_refining_needs_ratios_to_look_between_and_shared_gradients(mix_spec, mixture, message):
    with pytest.raises(SpecError) as caught:
        parse_spec(mix_spec | {"mixture": mix_spec["mixture"] | mixture})
    assert str(caught.value).startswith(message)


def test_exact_gradients_may_be_clipped(mix_spec):
    spec = parse_spec(
        mix_spec
        | {
            "mixture": mix_spec["mixture"] | {"gradients": "exact"},
            "optimizer": {"clip_grad_norm": 1.0},
        }
    )
    assert spec.optimizer.clip_grad_norm == 1.0


def test_a_grid_and_its_list_are_the_same_ratios(changed):
    grid = parse_spec(changed("mixture.ratios", {"start": 0, "stop": 1, "num": 5}))
    assert isinstance(grid.mixture.ratios, RatioGrid)
    assert ratios_of(grid.mixture) == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_the_hash_leaves_out_what_is_for_people(changed, mix_spec):
    first = spec_sha256(parse_spec(mix_spec))
    assert spec_sha256(parse_spec(changed("name", "other"))) == first
    assert spec_sha256(parse_spec(changed("labels.project", "other"))) == first
    assert spec_sha256(parse_spec(changed("mixture.ratios", [0.0, 1.0]))) != first


def test_every_data_source_is_known_by_its_place(mix_spec, series_spec):
    scan = data_sources(parse_spec(mix_spec))
    assert {place: source.name for place, source in scan.items()} == {
        "mixture.sources.0": "web",
        "mixture.sources.1": "gsm8k",
        "eval_tasks.0.data": "web_task",
        "eval_tasks.1.data": "gsm8k_test",
    }
    assert list(data_sources(parse_spec(series_spec))) == ["batches.sources.0"]
