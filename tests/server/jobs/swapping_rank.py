"""A rank that swaps a directory for a link before it reports, and notes if it is given a unit."""

import json
import os
import socket
import sys
from pathlib import Path

where, directory, target, note = sys.argv[1], *map(Path, sys.argv[2:])
directory.rename(directory.with_name("was"))
directory.symlink_to(target)
connection = socket.socket(socket.AF_UNIX)
connection.connect(where)
stream = connection.makefile("rw")
stream.write(json.dumps({"type": "ready", "pid": os.getpid(), "device": "fake"}) + "\n")
stream.flush()
for line in stream:
    if json.loads(line)["type"] == "unit":
        note.touch()
        sys.exit(3)
