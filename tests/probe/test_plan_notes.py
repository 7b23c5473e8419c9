"""A plan says beforehand what can be known to go wrong."""

import copy
from typing import Any

from probe.plan import _file_notes
from probe.spec_load import parse_spec


def test_a_data_file_that_is_not_here_is_named(series_spec: dict[str, Any], tmp_path) -> None:
    here = tmp_path / "here.jsonl"
    here.write_text('{"text": "a"}\n')
    raw = copy.deepcopy(series_spec)
    missing = str(tmp_path / "gone.jsonl")
    raw["batches"]["sources"][0]["paths"] = [str(here), missing, str(tmp_path / "*.parquet")]
    notes = _file_notes(parse_spec(raw))
    assert len(notes) == 1
    assert missing in notes[0]
