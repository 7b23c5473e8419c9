"""A rank of several that measures nothing, for any launcher: `tests/server/jobs/fake_rank.py` with
a number and the true connection. Rank 0 does what the job's spec says, the others only listen.

It drops the mark of its gang, by which a worker ends processes of its own machine, as if it were on
another one: what ends it must reach there, too.

Each writes the variables it was started with to `JOURNAL.rankN`, and a line to its log.
"""

import json
import os
import sys
from pathlib import Path

from probe.worker_link import TOKEN, connect_to_worker

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))
from fake_rank import measure

MARK = "PROBE_GANG"

if __name__ == "__main__":
    if os.environ.pop(MARK, None):
        os.execve(sys.executable, [sys.executable, *sys.argv], dict(os.environ))
    rank = int(os.environ["RANK"])
    connection = connect_to_worker(sys.argv[1])
    assert TOKEN not in os.environ
    stream = connection.makefile("rw")

    def send(message: dict) -> None:
        stream.write(json.dumps(message) + "\n")
        stream.flush()

    send({"type": "ready", "pid": os.getpid(), "device": "fake", "rank": rank})
    os.write(1, f"rank {rank} is here\n".encode())  # in one piece: ranks share a pipe
    for line in stream:
        message = json.loads(line)
        if message["type"] == "job":
            spec = message["spec"]
            Path(f"{spec['journal']}.rank{rank}").write_text(json.dumps(dict(os.environ)))
        elif message["type"] == "unit" and rank == 0:
            measure(spec, message["unit"], message["eta_init"], send, connection)
        elif message["type"] == "stop":
            break
