"""Assets without a network: what is refused before pip is asked."""

import pytest

from probe.assets import fetch
from probe.errors import ConfigError


def test_a_directory_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot keep c4\.jsonl\.gz in .*choose another"):
        fetch("c4", tmp_path / "file" / "below")
