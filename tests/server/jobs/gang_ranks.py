"""Several ranks in one process, which do by turns what they are told: `SOCKET RANKS SCRIPT`.

SCRIPT is JSON with two lists of turns, `start` and `unit`. A turn is `[rank, message]`, or
`[rank, null]`: that rank closes its connection. The turns of `unit` begin when every rank that is
left has been given a unit. What a rank is sent goes to stderr, which is the gang's log.
"""

import json
import os
import socket
import sys
import threading

PATH, NUM_RANKS, SCRIPT = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])


def connect() -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(PATH)
    return connection


CONNECTIONS = [connect() for _ in range(NUM_RANKS)]


def take_turns(turns: list) -> None:
    for rank, message in turns:
        if message is None:
            CONNECTIONS[rank].shutdown(socket.SHUT_RDWR)
        else:
            CONNECTIONS[rank].sendall((json.dumps(message) + "\n").encode())


def read(rank: int, started: threading.Barrier) -> None:
    for line in CONNECTIONS[rank].makefile("r"):
        message = json.loads(line)
        sys.stderr.write(f"rank {rank} is sent {message['type']}\n")
        if message["type"] == "unit" and started.wait() == 0:
            take_turns(SCRIPT["unit"])
        elif message["type"] == "stop":
            started.wait()
            os._exit(0)


take_turns(SCRIPT["start"])
started = threading.Barrier(NUM_RANKS)
for rank in range(NUM_RANKS):
    threading.Thread(target=read, args=(rank, started)).start()
