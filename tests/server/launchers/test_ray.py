"""Jobs over two nodes of a Ray cluster: whatever is killed, nothing is left, the job succeeds."""

import pytest

from probe.plan import make_plan
from probe.result import UnitResult
from probe.spec_load import parse_spec

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def retries(lab, job_id: str) -> list[str]:
    events = lab.store.events_after(job_id, 0)
    return [event.data["message"] for event in events if event.type == "unit.retrying"]


def test_ranks_are_spread_over_the_nodes_and_numbered_as_torchrun_does(ray_lab):
    job_id = ray_lab.submit(ranks=4, device="auto")  # GPUs, since the cluster says it has some
    ray_lab.start_worker()
    ray_lab.assert_whole(job_id, starts=[0, 1, 2])
    found = [ray_lab.variables_of(job_id, rank) for rank in range(4)]
    assert [v["LOCAL_RANK"] for v in found] == ["0", "1", "0", "1"]
    assert [v["GROUP_RANK"] for v in found] == ["0", "0", "1", "1"]
    assert {(v["WORLD_SIZE"], v["LOCAL_WORLD_SIZE"]) for v in found} == {("4", "2")}
    assert len({(v["MASTER_ADDR"], v["MASTER_PORT"]) for v in found}) == 1
    assert {v["CUDA_VISIBLE_DEVICES"] for v in found} == {"0,1"}  # of which each takes its own
    assert {v["OMP_NUM_THREADS"] for v in found} == {"1"}
    assert not any("PROBE_DATABASE_URL" in v for v in found)
    log = ray_lab.log(job_id).splitlines()
    for rank in range(4):
        assert f"[node {rank // 2}] rank {rank} is here" in log


def test_kill_9_of_a_rank_of_an_actor_and_of_the_agent(ray_lab):
    job_id = ray_lab.submit({index: ["silent", "ok"] for index in range(3)})
    ray_lab.start_worker()
    victims = [lambda: ray_lab.pid_of(1), lambda: ray_lab.actor_of(1), ray_lab.agent]
    for index, victim in enumerate(victims):
        ray_lab.until_deaf(job_id, index)  # rank 0 does not even see its connection close
        gang = {ray_lab.pid_of(0), ray_lab.pid_of(1), ray_lab.agent()}
        ray_lab.kill(victim())
        ray_lab.until_gone(gang)
    ray_lab.assert_whole(job_id, starts=[0, 0, 1, 1, 2, 2])
    of_rank, of_actor, of_agent = retries(ray_lab, job_id)
    assert "rank 1 on node 1, " in of_rank
    assert "was killed by signal 9" in of_rank
    assert "node 1, " in of_actor
    assert "is lost or cannot start its ranks" in of_actor
    assert "killed by signal 9" in of_agent


def test_kill_9_of_the_worker(ray_lab):
    job_id = ray_lab.submit({1: ["silent", "ok"]})
    worker = ray_lab.start_worker()
    ray_lab.until_deaf(job_id, 1)
    ray_lab.kill(worker.pid)
    ray_lab.until_nothing_is_left()
    ray_lab.start_worker()
    ray_lab.assert_whole(job_id, starts=[0, 1, 1, 2])


def test_a_cancelled_job_leaves_nothing(ray_lab):
    job_id = ray_lab.submit({1: ["stubborn"]})
    ray_lab.start_worker()
    ray_lab.until_deaf(job_id, 1)
    assert ray_lab.store.cancel_job(job_id).status == "cancelled"
    ray_lab.until_nothing_is_left()
    following = ray_lab.submit()  # needs both nodes
    ray_lab.assert_whole(following, starts=[0, 1, 2])


def test_more_nodes_than_there_are_is_an_error_that_names_both(ray_lab):
    job_id = ray_lab.submit(ranks=3, nodes=3)
    ray_lab.start_worker(ray_wait_s=1, unit_max_attempts=1)
    error = ray_lab.until_status(job_id, "succeeded", "failed").error
    assert error.code == "placement_error"
    assert "asks for 3 nodes with 1 CPU each, which were not free within 1 s" in error.message
    assert error.message.count("with 2 CPU") == 2
    assert "free in all: 4 CPU" in error.message
    ray_lab.until_nothing_is_left()


def measured(lab, raw, **settings) -> list[UnitResult]:
    """The results of a true job, by a worker of its own."""
    plan = make_plan(parse_spec(raw))
    job_id = lab.store.create_job(plan=plan, idempotency_key=None, body_sha256="0")[0].id
    worker = lab.start_worker(rank_command="[]", **settings)
    view = lab.until_status(job_id, "succeeded", "failed")
    assert view.status == "succeeded", view.error
    worker.terminate()
    worker.wait(60)
    return lab.store.unit_results(job_id)


def test_two_nodes_measure_what_two_ranks_of_one_machine_do_bit_for_bit(ray_lab, series_spec):
    series_spec["checkpoints"]["last_step"] = 1
    series_spec["model"] = {"device": "cpu"}
    on_two_nodes = measured(ray_lab, series_spec | {"parallel": {"ranks": 2, "nodes": 2}})
    on_one = measured(ray_lab, series_spec | {"parallel": {"ranks": 2}}, launcher="local")
    assert len(on_one) == 1
    for found, expected in zip(on_two_nodes, on_one, strict=True):
        assert (found.provenance.backend, found.provenance.num_ranks) == ("fsdp2", 2)
        assert found.provenance.spec_sha256 == expected.provenance.spec_sha256
        for ours, theirs in zip(found.measurements, expected.measurements, strict=True):
            assert theirs.outcome == "converged"
            left_out = {"duration_s"}
            assert ours.model_dump(exclude=left_out) == theirs.model_dump(exclude=left_out)
