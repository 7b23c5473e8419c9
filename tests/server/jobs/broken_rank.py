"""`probe.rank`, but rank 1 breaks while it forms a direction, as the job's label `broken` says.

`raise`: a rank's own error at a place where the others go on and wait. `hang`: it is never heard
of again, once the file of `--trap FILE` is there; it takes the file away first.
"""

import os
import signal
import sys
from pathlib import Path

from probe import rank
from probe.engine import Session
from probe.errors import DirectionError
from probe.update import UpdateRule

if __name__ == "__main__":
    trap = Path(sys.argv.pop(sys.argv.index("--trap") + 1))
    sys.argv.remove("--trap")
    intact = UpdateRule.direction
    broken = [""]
    make_session = Session.__init__

    def note_label(session, spec):
        broken[0] = spec.labels.get("broken", "")
        make_session(session, spec)

    def direction(rule, *args):
        if os.environ["RANK"] == "1":
            if broken[0] == "raise":
                raise DirectionError("no direction on this rank")
            if broken[0] == "hang" and trap.exists():
                trap.unlink()
                while True:
                    signal.pause()
        return intact(rule, *args)

    Session.__init__ = note_label
    UpdateRule.direction = direction
    status = rank.main()
    sys.stdout.flush()
    os._exit(status)
