"""A Ray cluster of two nodes on this machine, and a laboratory whose workers use it."""

import importlib.util
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.jobs import conftest as jobs

CLUSTER = Path(__file__).with_name("cluster.py")
NODE_RANK = Path(__file__).with_name("node_rank.py")

make_plan_fixture = jobs.make_plan_fixture
make_result_fixture = jobs.make_result_fixture
series_spec = jobs.series_spec


class RayCluster:
    """The cluster's address, and its processes by what Ray calls them."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        marked = {
            "PROBE_TEST_CLUSTER": self.mark,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # of 15 and beside another busy process, nothing moves
        }
        self._process = subprocess.Popen(
            [sys.executable, str(CLUSTER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | marked,
            text=True,
        )
        self.address = self._process.stdout.readline().strip()
        assert self.address, "the Ray cluster did not start"

    def actors(self) -> list[int]:
        """Process ids of the gangs' actors."""
        return [pid for pid, line in self._processes() if line.startswith("ray::RankNode")]

    def _processes(self) -> list[tuple[int, str]]:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if f"PROBE_TEST_CLUSTER={self.mark}".encode() in (entry / "environ").read_bytes():
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found.append((int(entry.name), command))
            except OSError:
                continue
        return found

    def close(self) -> None:
        self._process.communicate(timeout=60)
        deadline = time.monotonic() + 60
        while left := self._processes():  # some notice only by and by that theirs is gone
            assert time.monotonic() < deadline, left
            time.sleep(0.05)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("needs Ray: pip install -e '.[ray]'")
    cluster = RayCluster()
    yield cluster
    cluster.close()


class RayLab(jobs.Lab):
    """Workers of launcher ray; jobs of two nodes with one rank each unless told otherwise."""

    def __init__(self, directory: Path, cluster: RayCluster) -> None:
        super().__init__(directory, f"sqlite:///{directory / 'data' / 'probe.db'}")
        self.cluster = cluster

    def submit(
        self,
        acts: dict[int, list[str]] | None = None,
        num_units: int = 3,
        device: str = "cpu",
        **parallel: int,
    ) -> str:
        spread = {"ranks": 2, "nodes": 2} | parallel
        return super().submit(acts, num_units, device, parallel=spread)

    def start_worker(self, name: str = "w", **settings: Any) -> subprocess.Popen[bytes]:
        with_ray = {
            "launcher": "ray",
            "ray_address": self.cluster.address,
            "rank_command": json.dumps(["{python}", str(NODE_RANK), "{socket}"]),
        }
        return super().start_worker(name, **(with_ray | settings))

    def variables_of(self, job_id: str, rank: int) -> dict[str, str]:
        """What a rank of the job was started with, the last time."""
        return json.loads(Path(f"{self.job(job_id).spec['journal']}.rank{rank}").read_text())

    def pid_of(self, rank: int) -> int:
        for pid in self.processes():
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in variables:
                return pid
        raise AssertionError(f"rank {rank} is not running: {self.processes()}")

    def actor_of(self, rank: int) -> int:
        """The process whose child a rank is."""
        status = Path(f"/proc/{self.pid_of(rank)}/stat").read_text()
        parent = int(status.rpartition(") ")[2].split()[1])
        assert parent in self.cluster.actors()
        return parent

    def agent(self) -> int:
        [agent] = [p for p, line in self.processes().items() if "ray_agent" in line]
        return agent

    def assert_whole(self, job_id: str, starts: list[int]) -> None:
        super().assert_whole(job_id, starts)
        self.until_nothing_is_left()

    def until_gone(self, pids: set[int]) -> None:
        self.until(lambda: not pids & set(self.processes()), f"{pids} to end")

    def until_nothing_is_left(self) -> None:
        """No agent and rank of this laboratory, no actor on the cluster."""
        self.until(lambda: not self.children(), "agent and ranks to be gone")
        self.until(lambda: not self.cluster.actors(), "the actors to be gone")

    def log(self, job_id: str) -> str:
        return (self.data_dir / "logs" / f"{job_id}.log").read_text()


@pytest.fixture
def ray_lab(tmp_path: Path, ray_cluster: RayCluster) -> Iterator[RayLab]:
    lab = RayLab(tmp_path, ray_cluster)
    yield lab
    lab.close()
    lab.until_nothing_is_left()
