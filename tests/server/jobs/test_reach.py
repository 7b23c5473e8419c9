"""What a worker refuses to let its ranks read, though it was right when the job was submitted."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from probe.plan import make_plan
from probe.result import Plan
from probe.spec_load import parse_spec
from server.settings import Settings
from server.worker.gang import UnitFailedError
from server.worker.reach import refuse_what_is_out_of_reach
from tests.server.conftest import on_sqlite_only

SWAPPING_RANK = Path(__file__).with_name("swapping_rank.py")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for place in ("root/step-1", "root/step-2", "outside"):
        directory = tmp_path / place
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
        save_file({"w": np.zeros((2, 2), np.float32)}, str(directory / "model.safetensors"))
    (tmp_path / "root" / "text.jsonl").write_text('{"text": "hello"}\n')
    return tmp_path / "root"


def plan_in(root: Path, **more: Any) -> Plan:
    spec: dict[str, Any] = {
        "kind": "checkpoint_series",
        "name": "x",
        "checkpoints": {"source": "local", "path": str(root / "step-*")},
        "batches": {
            "sources": [{"type": "files", "name": "t", "paths": [str(root / "text.jsonl")]}],
            "sequence_length": 8,
            "batch_sequences": 1,
        },
        "measurement": {"loss_batch": "update"},
    }
    return make_plan(parse_spec(spec | more))


def test_each_unit_is_looked_at_again(root):
    plan, settings = plan_in(root), Settings(roots=[root])
    for unit in plan.units:
        refuse_what_is_out_of_reach(plan, unit, settings)
    (root / "step-2").rename(root / "was")
    (root / "step-2").symlink_to(root.parent / "outside")
    refuse_what_is_out_of_reach(plan, plan.units[0], settings)
    with pytest.raises(UnitFailedError) as caught:
        refuse_what_is_out_of_reach(plan, plan.units[1], settings)
    assert (caught.value.code, caught.value.retryable) == ("path_not_allowed", False)
    (root / "text.jsonl").unlink()
    (root / "text.jsonl").symlink_to("/etc/hostname")
    with pytest.raises(UnitFailedError, match=r"batches\.sources\.0\.paths\.0"):
        refuse_what_is_out_of_reach(plan, plan.units[0], settings)
    refuse_what_is_out_of_reach(plan, plan.units[1], Settings())  # no roots: anything


def test_a_job_queued_under_other_rules_is_held_to_the_workers(root):
    plan = plan_in(root, model={"tokenizer": "evil/tokenizer"})
    with pytest.raises(UnitFailedError) as caught:
        refuse_what_is_out_of_reach(plan, plan.units[0], Settings(hub_repos=["allenai/*"]))
    assert caught.value.code == "repo_not_allowed"


@on_sqlite_only
def test_a_link_swapped_while_the_ranks_start_is_not_followed(lab, root):
    """The rank has swapped it before it reports, so it must never be given the unit."""
    note = lab.directory / "was-given-the-unit"
    rank = [
        sys.executable,
        SWAPPING_RANK,
        "{socket}",
        root / "step-1",
        root.parent / "outside",
        note,
    ]
    plan = plan_in(root)
    job, _ = lab.store.create_job(plan=plan, idempotency_key=None, body_sha256="0")
    lab.start_worker(rank_command=json.dumps([str(word) for word in rank]), roots=root)
    failed = lab.until_status(job.id, "failed")
    assert (failed.error.code, failed.error.unit_id) == ("path_not_allowed", plan.units[0].unit_id)
    assert (root / "step-1").is_symlink()
    assert not note.exists()
