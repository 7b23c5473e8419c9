"""kill -9 at random, at full size: `python -m tests.server.jobs.chaos --jobs 40 --seed 0`.

Workers and ranks are killed every second or so until every job has ended. The last line counts
jobs, kills, units, lost and duplicated; exit status 1 unless the last two are 0.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from server.wire import TERMINAL
from tests.server.jobs.conftest import Lab

NUM_UNITS = 4
SETTINGS = {"max_dispatches": 1000, "unit_max_attempts": 100, "unit_retry_interval_s": 0.01}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    lab = Lab(args.directory or Path(tempfile.mkdtemp(prefix="probe-chaos-")))
    pauses = {index: ["pause"] for index in range(NUM_UNITS)}
    job_ids = [lab.submit(pauses, NUM_UNITS, device="cpu") for _ in range(args.jobs)]
    num_kills = 0
    worker = lab.start_worker(cpu_slots=4, **SETTINGS)
    while any(lab.job(job_id).status not in TERMINAL for job_id in job_ids):
        time.sleep(chance.uniform(0.2, 3.0))
        children = list(lab.children())
        victim = chance.choice(children) if children and chance.random() < 0.6 else worker.pid
        try:
            lab.kill(victim)
        except ProcessLookupError:
            continue
        num_kills += 1
        if victim == worker.pid:
            worker = lab.start_worker(cpu_slots=4, **SETTINGS)
    lost = duplicated = num_units = num_starts = 0
    expected = [2.0 ** (index + 1) for index in range(NUM_UNITS)]
    for job_id in job_ids:
        results = lab.store.unit_results(job_id)
        events = lab.store.events_after(job_id, 0, limit=100_000)
        told = [event.data["index"] for event in events if event.type == "unit.finished"]
        num_units += len(results)
        num_starts += len(lab.journal(job_id, "start"))
        lost += [r.measurements[0].eta_c for r in results] != expected
        lost += lab.job(job_id).status != "succeeded"
        lost += [event.id for event in events] != list(range(1, len(events) + 1))
        duplicated += len(told) - len(set(told))
        duplicated += sum(event.type == "job.succeeded" for event in events) - 1
    lab.close()
    line = f"jobs={args.jobs} kills={num_kills} units={num_units} unit_starts={num_starts}"
    sys.stdout.write(f"{line} lost={lost} duplicated={duplicated}\n")
    return 1 if lost or duplicated or num_units != args.jobs * NUM_UNITS else 0


if __name__ == "__main__":
    sys.exit(main())
