"""A rank that measures nothing: standard library only, same protocol, told by its spec what to do.

`spec["acts"]` maps a unit id to a list with one entry per try, the last one repeated:
`ok` (default), `hold` (wait until the file `release` is there), `error` (retryable), `fatal`
(not retryable), `exit` (end without a word), `silent` (never answer), `stubborn` (nor heed
SIGTERM), `stopped` (by SIGSTOP), `nonsense` (not a result), `pause` (take a moment, for the
chaos run).
Every step is added to `spec["journal"]`, a file that outlives every process. A job that came
through the HTTP server has no such keys: its labels name the journal and a file with the result,
and every try is a `pause`.

The result's eta_c is twice the hint (1.0 without one), so the final numbers tell whether hints
arrived as they should: unit k has eta_c = 2^(k+1), whatever was killed on the way.
"""

import argparse
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    path = parser.parse_args().socket
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    stream = connection.makefile("rw")

    def send(message: dict) -> None:
        stream.write(json.dumps(message) + "\n")
        stream.flush()

    send({"type": "ready", "pid": os.getpid(), "device": "fake"})
    spec = {}
    for line in stream:
        message = json.loads(line)
        if message["type"] == "job":
            spec = message["spec"]
            if "journal" not in spec:
                spec |= {"journal": spec["labels"]["journal"], "acts": {}, "act": "pause"}
                spec["result"] = json.loads(Path(spec["labels"]["template"]).read_text())
        elif message["type"] == "unit":
            if message["next"] is not None:
                note(Path(spec["journal"]), "next", message["next"]["unit_id"])
            measure(spec, message["unit"], message["eta_init"], send, connection)
        else:
            return


def measure(spec: dict, unit: dict, eta_init: dict | None, send, connection) -> None:
    unit_id = unit["unit_id"]
    journal = Path(spec["journal"])
    earlier = journal.read_text().splitlines() if journal.exists() else []
    num_tries = sum(line.split()[:2] == ["start", unit_id] for line in earlier)
    acts = spec.get("acts", {}).get(unit_id, [spec.get("act", "ok")])
    act = acts[min(num_tries, len(acts) - 1)]
    note(journal, "start", unit_id)
    for done in range(3):
        data = {"phase": "search", "done": done, "total": 3, "num_forward_passes": done}
        send({"type": "progress", "unit_id": unit_id, "data": data})
    if act == "pause":
        time.sleep(float(spec.get("labels", {}).get("pause_s", 0.2)))
    elif act == "hold":
        wait_for_release(Path(spec["release"]), connection)
    elif act in ("error", "fatal"):
        error = {"type": "error", "unit_id": unit_id, "code": "fake_error", "traceback": ""}
        send(error | {"message": f"{act} in {unit_id}", "retryable": act == "error"})
        return
    elif act == "exit":
        sys.stderr.write("the rank says goodbye\n")
        sys.stderr.flush()
        os._exit(3)
    elif act in ("silent", "stubborn"):
        if act == "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        note(journal, "deaf", unit_id)
        while True:
            signal.pause()
    elif act == "stopped":
        note(journal, "deaf", unit_id)
        os.kill(os.getpid(), signal.SIGSTOP)
    elif act == "nonsense":
        send({"type": "result", "unit_id": unit_id, "result": {"unit": unit}})
        return
    result = json.loads(json.dumps(spec["result"]))
    result["unit"] = unit
    eta_c = 2.0 * (eta_init["held_out"] if eta_init else 1.0)
    result["measurements"][0]["eta_c"] = eta_c
    note(journal, "done", unit_id)
    send({"type": "result", "unit_id": unit_id, "result": result})


def note(journal: Path, what: str, unit_id: str) -> None:
    with journal.open("a") as file:
        file.write(f"{what} {unit_id} {os.getpid()}\n")


def wait_for_release(release: Path, connection: socket.socket) -> None:
    parent = os.getppid()
    while not release.exists():
        if os.getppid() != parent or not connected(connection):
            sys.exit(0)
        time.sleep(0.01)


def connected(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


if __name__ == "__main__":
    main()
