"""What each launcher starts, and what it refuses, before anything is started."""

import asyncio
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from probe.errors import ConfigError
from probe.launch import TORCHRUN
from probe.worker_link import TOKEN
from server.launchers import GangShape, LocalLauncher, RayLauncher, launcher_for
from server.settings import Settings
from server.worker.gang import Gang, UnitFailedError
from server.worker.rank_socket import Endpoint

HERE = Endpoint("/tmp/s")
THERE = Endpoint("tcp://192.0.2.1:7000", "f00d" * 16)


def test_the_shape_of_a_job_is_in_its_spec():
    spec = {"parallel": {"nodes": 2, "ranks": 4}, "model": {"device": "cuda"}}
    assert GangShape.of(spec, 4) == GangShape(4, 2, "cuda")
    assert GangShape.of({"model": {"hidden": [8]}}, 1) == GangShape(1, 1, "auto")


def test_local_starts_torchrun_with_the_ranks():
    launch = LocalLauncher().launch(GangShape(3), HERE, {})
    assert launch.command[:3] == (sys.executable, "-m", TORCHRUN)
    assert "--nproc-per-node=3" in launch.command
    assert launch.command[launch.command.index("--socket") + 1] == "/tmp/s"
    assert set(launch.environment) == {"OMP_NUM_THREADS"}
    assert LocalLauncher().launch(GangShape(3), HERE, {"OMP_NUM_THREADS": "2"}).environment == {}
    own = LocalLauncher(("start", "{ranks}", "at", "{socket}"))
    assert own.launch(GangShape(2), HERE, {}).command == ("start", "2", "at", "/tmp/s")


def test_local_refuses_several_nodes_and_the_job_fails_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"nodes is 2, .*PROBE_LAUNCHER=ray"):
        LocalLauncher().launch(GangShape(2, 2), HERE, {})

    async def start() -> None:
        gang = Gang(log_path=tmp_path / "log", shape=GangShape(2, 2))
        try:
            await gang.start({})
        finally:
            gang.kill()

    with pytest.raises(UnitFailedError) as caught:
        asyncio.run(start())
    assert (caught.value.code, caught.value.retryable) == ("config_error", False)


def test_ray_divides_the_ranks_and_keeps_the_token_off_the_command_line():
    launcher = RayLauncher(address="192.0.2.1:6379", wait_s=7, command=("rank", "{socket}"))
    launch = launcher.launch(GangShape(6, 2, "cuda"), THERE, {"HF_TOKEN": "hidden"})
    words = dict(zip(launch.command[3:-3:2], launch.command[4:-3:2], strict=True))
    assert words == {
        "--address": "192.0.2.1:6379",
        "--wait-s": "7",
        "--nodes": "2",
        "--ranks-per-node": "3",
        "--device": "cuda",
        "--socket": THERE.where,
    }
    assert launch.command[-3:] == ("--", "rank", THERE.where)
    assert launch.environment == {TOKEN: THERE.token}
    assert not any(secret in word for word in launch.command for secret in (THERE.token, "hidden"))


def test_ray_listens_where_it_is_told_or_on_the_way_to_the_head():
    assert RayLauncher(listen_host="10.0.0.7").listen_host == "10.0.0.7"
    assert RayLauncher(address="127.0.0.1:6379").listen_host == "127.0.0.1"


def test_ray_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"Ray is not installed here: pip install"):
        RayLauncher().launch(GangShape(), THERE, {})


def test_settings_choose_the_launcher(tmp_path):
    assert isinstance(launcher_for(Settings(data_dir=tmp_path)), LocalLauncher)
    chosen = launcher_for(Settings(data_dir=tmp_path, launcher="ray", ray_wait_s=5))
    assert isinstance(chosen, RayLauncher)
    assert chosen.wait_s == 5


@pytest.mark.parametrize("address", ["local", "ray://head:10001", "head", "", "http://head:1"])
def test_addresses_that_would_start_a_cluster_or_be_no_driver_are_refused(tmp_path, address):
    with pytest.raises(ValidationError, match="ray_address"):
        Settings(data_dir=tmp_path, ray_address=address)


def test_the_worker_imports_no_ray():
    program = "import server.worker.job_runner, server.launchers, sys; print('ray' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    assert done.stdout.strip() == "False"
