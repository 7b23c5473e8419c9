"""Settings: defaults, environment, lists, refusals."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from server.settings import Settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))


def test_defaults_need_nothing(tmp_path):
    settings = Settings()
    assert settings.data_dir == tmp_path / "sharpness-probe"
    assert settings.database_url == f"sqlite:///{tmp_path}/sharpness-probe/probe.db"
    assert (settings.host, settings.port) == ("127.0.0.1", 8765)
    assert (settings.roots, settings.api_keys) == ([], [])
    assert settings.queues == ("gpu", "cpu")
    assert not settings.data_dir.exists()  # reading settings makes no directory


def test_the_environment_is_read_and_lists_have_a_short_form(monkeypatch, tmp_path):
    monkeypatch.setenv("PROBE_DATA_DIR", str(tmp_path / "d"))
    monkeypatch.setenv("PROBE_ROOTS", f"{tmp_path}/a:{tmp_path}/b")
    monkeypatch.setenv("PROBE_API_KEYS", "one, two")
    monkeypatch.setenv("PROBE_QUEUES", "cpu")
    monkeypatch.setenv("PROBE_RANK_COMMAND", '["run", "a,b"]')
    settings = Settings()
    assert settings.database_url == f"sqlite:///{tmp_path}/d/probe.db"
    assert settings.roots == [Path(f"{tmp_path}/a"), Path(f"{tmp_path}/b")]
    assert [key.get_secret_value() for key in settings.api_keys] == ["one", "two"]
    assert "two" not in repr(settings)
    assert settings.queues == ("cpu",)
    assert settings.rank_command == ("run", "a,b")


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_postgres_is_named_as_everywhere_else(scheme):
    url = Settings(database_url=f"{scheme}://u:postgres://@db:5432/probe").database_url
    assert url == "postgresql+psycopg://u:postgres://@db:5432/probe"


@pytest.mark.parametrize(
    "wrong",
    [
        {"database_url": "mysql://x"},
        {"queues": "gpu,tpu"},
        {"queues": ""},
        {"worker_name": "a b/c"},
        {"cpu_slots": 0},
        {"port": 70_000},
    ],
)
def test_a_wrong_value_is_refused(wrong):
    with pytest.raises(ValidationError):
        Settings(**wrong)


def test_a_lease_ends():
    with pytest.raises(ValidationError, match="worker_stale_s"):
        Settings(worker_stale_s=float("inf"))
