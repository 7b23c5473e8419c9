"""The chaos run at a small size; `make chaos` is the full one."""

import re

import pytest

from tests.server.jobs.chaos import LONGEST_RUN_S, Chaos, is_clean


@pytest.mark.slow
@pytest.mark.timeout(LONGEST_RUN_S + 100)  # the run gives itself up before, and says why
def test_nothing_is_lost_or_done_twice_whatever_is_killed(lab, request):
    postgres = request.getfixturevalue("postgres") if "postgres" in lab.database_url else None
    line = Chaos(lab, seed=2, postgres=postgres, pause_s=0.2).run(num_jobs=4)
    assert is_clean(line), line
    assert re.match(r"jobs=4 kills=[1-9]\d* \(.*\) units=16 unit_starts=\d+ ", line), line


@pytest.mark.parametrize("wrong", ["lost=1", "duplicated=1", "stuck=1", "left_behind=1"])
def test_a_line_that_counts_anything_wrong_is_not_clean(wrong):
    counts = "lost=0 duplicated=0 stuck=0 left_behind=0"
    assert is_clean(f"jobs=4 units=16 {counts}")
    name = wrong.split("=")[0]
    assert not is_clean(f"jobs=4 units=16 {counts}".replace(f"{name}=0", wrong))
