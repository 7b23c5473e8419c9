"""A rank that tells all it knows: prints its environment, then fails or ends, as its job says."""

import json
import os
import socket
import sys

connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
stream = connection.makefile("rw")
stream.write(json.dumps({"type": "ready", "pid": os.getpid(), "device": "fake"}) + "\n")
stream.flush()
everything = json.dumps(dict(os.environ))
sys.stdout.write(everything + "\n")
sys.stdout.flush()
for line in stream:
    message = json.loads(line)
    if message["type"] == "unit":
        error = {
            "type": "error",
            "unit_id": message["unit"]["unit_id"],
            "code": "fake_error",
            "message": f"401 for Authorization: Bearer {os.environ.get('HF_TOKEN')}: {everything}",
            "retryable": True,
            "traceback": "",
        }
        if os.path.exists(sys.argv[2]):  # the second try ends without a word: its log is told
            os._exit(3)
        open(sys.argv[2], "w").close()
        stream.write(json.dumps(error) + "\n")
        stream.flush()
