"""`python -m server.worker`: run a worker until it is stopped."""

import argparse
import logging
import sys
from typing import Any

from pydantic import ValidationError
from sqlalchemy.exc import OperationalError

from probe.errors import ProbeError
from server.log_format import set_up_logging
from server.readiness import not_reached
from server.redaction import redact
from server.settings import Settings
from server.tracing import end_tracing, set_up_tracing
from server.worker.check import what_is_wrong
from server.worker.main import run_worker

EXAMPLE = """\
example:
  python -m server.worker --name gpu-box-0 --queues gpu
  python -m server.worker --name cpu-box-0 --queues cpu --slots 4

Every option can also be set as PROBE_<SETTING> in the environment. SIGTERM and Ctrl-C stop the
worker within seconds; a job under way goes on when a worker of the same name starts again.
"""


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 stopped on request, 1 failed, 2 bad setting."""
    parser = argparse.ArgumentParser(
        prog="python -m server.worker",
        description="Take jobs from the queue and measure them.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--name", help="stable name of this worker (default: HOSTNAME-0)")
    parser.add_argument("--queues", help="queues to take jobs from (default: gpu,cpu)")
    parser.add_argument(
        "--slots", type=int, help="jobs of queue cpu at once; of gpu it is always one (default: 1)"
    )
    parser.add_argument("--data-dir", help="database, logs and locks")
    parser.add_argument("--database-url", help="sqlite:///path or postgresql://...")
    parser.add_argument("--log-level", help="DEBUG, INFO, WARNING or ERROR (default: INFO)")
    parser.add_argument(
        "--check",
        action="store_true",
        help="start nothing; exit 0 if the worker of this name has a fresh heartbeat, else 1",
    )
    given: dict[str, Any] = {
        k: v for k, v in vars(parser.parse_args(argv)).items() if v not in (None, False)
    }
    check_only = given.pop("check", False)
    if "name" in given:
        given["worker_name"] = given.pop("name")
    if "slots" in given:
        given["cpu_slots"] = given.pop("slots")
    try:
        settings = Settings(**given)
    except ValidationError as error:
        print(redact(str(error)), file=sys.stderr)  # noqa: T201
        return 2
    if check_only:
        return _check(settings)
    set_up_logging(settings, worker=settings.worker_name)
    try:
        set_up_tracing("sharpness-probe-worker")
        run_worker(settings)
    except ProbeError as error:
        logging.getLogger(__name__).error("%s", error)
        return 1
    except OperationalError as error:  # at the start only: later ones are waited out
        logging.getLogger(__name__).error("%s", not_reached(error))
        return 1
    finally:
        end_tracing()
    return 0


def _check(settings: Settings) -> int:
    problem = what_is_wrong(settings)
    if problem is not None:
        print(redact(problem), file=sys.stderr)  # noqa: T201
    return 0 if problem is None else 1


if __name__ == "__main__":
    sys.exit(main())
