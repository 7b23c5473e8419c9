"""Results of every kind are read back as what they were; hints come from them alone."""

import pytest
from pydantic import ValidationError

from probe.result import UnitResult
from probe.result_mix import MixUnitResult
from probe.unit_results import next_eta_init, parse_result


def test_a_result_is_read_by_its_kind(make_unit_result, make_mix_result):
    for made in (make_unit_result(), make_mix_result()):
        raw = made.model_dump(mode="json")
        assert raw["kind"] in ("checkpoint_series", "mix_scan")
        assert parse_result(raw) == made
        assert type(parse_result(raw)) is type(made)


def test_a_result_stored_before_there_were_kinds_is_a_series(make_unit_result):
    raw = make_unit_result().model_dump(mode="json")
    del raw["kind"]
    found = parse_result(raw)
    assert isinstance(found, UnitResult)
    assert found.kind == "checkpoint_series"


@pytest.mark.parametrize("raw", [{"kind": "mix_scam"}, {"kind": "mix_scan"}, {}, [], None])
def test_what_is_no_result_is_refused(raw):
    with pytest.raises(ValidationError):
        parse_result(raw)


def test_a_scan_starts_where_the_one_before_began(make_mix_result):
    curves = {
        "a": {0.0: ["not_a_descent_direction"] * 2, 0.5: [0.3, 0.5], 1.0: [0.7, 0.7]},
        "b": {0.0: [0.2, "no_crossing"], 0.5: [0.9, 0.9], 1.0: [0.9, 0.9]},
        "c": {r: ["no_crossing", "no_crossing"] for r in (0.0, 0.5, 1.0)},
    }
    # a: the last repeat at the least ratio that has an answer; b: the one repeat that has one.
    assert next_eta_init(make_mix_result(curves=curves)) == {"a": 0.5, "b": 0.2}
    assert next_eta_init(make_mix_result(curves={"c": curves["c"]})) is None


def test_a_ratio_starts_where_the_one_before_ended(make_mix_result):
    result = make_mix_result(ratio=0.5)
    assert isinstance(result, MixUnitResult)
    assert next_eta_init(result) == {"web_task": 0.4, "gsm8k_test": 0.2}
