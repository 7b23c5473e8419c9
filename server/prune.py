"""`python -m server.prune`: remove ended jobs from the database, by rules. For `probe prune`."""

import argparse
import datetime as dt
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError

from probe.errors import ConfigError, ProbeError
from server import queue, retention
from server.retention import Candidate, Rules
from server.settings import Settings
from server.store import SqlStore

_SHOWN = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, or nothing to do; 1 failed or declined; 2 bad input."""
    given = _parser().parse_args(argv)
    settings_given = {k: v for k in ("data_dir", "database_url") if (v := getattr(given, k))}
    try:
        settings = Settings(**settings_given)
        rules = _rules(given)
        rules.check()
        _check_exists(settings)
        return _prune(settings, rules, given)
    except (ValidationError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except (ProbeError, sa.exc.SQLAlchemyError) as error:
        cause = getattr(error, "orig", None) or error  # without the statement
        print(f"error: {cause}", file=sys.stderr)  # noqa: T201
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m server.prune", description=__doc__)
    parser.add_argument("--older-than-s", type=float, help="ended at least so many seconds ago")
    parser.add_argument("--status", action="append", default=[], help="repeatable")
    parser.add_argument("--kind", action="append", default=[], help="repeatable")
    parser.add_argument("--label", action="append", default=[], help="key=value, repeatable")
    parser.add_argument("--keep-last", type=int, default=0, help="so many of each name stay")
    parser.add_argument("--dry-run", action="store_true", help="show what would go, and end")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--vacuum", action="store_true", help="write the SQLite file anew")
    parser.add_argument("--json", action="store_true", help="print JSON to stdout")
    parser.add_argument("--data-dir", help="database and logs")
    parser.add_argument("--database-url", help="sqlite:///path or postgresql://...")
    return parser


def _rules(given: argparse.Namespace) -> Rules:
    labels = dict(word.split("=", 1) for word in given.label if "=" in word)
    if len(labels) < len(given.label):
        raise ConfigError("--label needs key=value, every key once")
    return Rules(given.older_than_s, given.status, given.kind, labels, given.keep_last)


def _check_exists(settings: Settings) -> None:
    url = sa.make_url(settings.database_url)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
        raise ConfigError(  # opening would make one
            f"there is no database {url.database}: set PROBE_DATA_DIR or PROBE_DATABASE_URL"
        )


def _prune(settings: Settings, rules: Rules, given: argparse.Namespace) -> int:
    store = SqlStore(settings.database_url)
    try:
        store.settle_all()  # what has ended while nobody looked counts as ended
        found = retention.candidates(store.engine, rules)
        if not given.json:
            _show(found)
        if given.dry_run or not (found or given.vacuum):
            _report(given, found, None, 0)
            return 0
        if found and not given.yes and not _agreed(len(found)):
            print("nothing removed", file=sys.stderr)  # noqa: T201
            return 1
        client = queue.make_client(store.engine)
        removed = retention.remove(
            store.engine, client, [job.id for job in found], settings.data_dir / "logs"
        )
        client.destroy()
        _report(given, found, removed, retention.shrink(store.engine, full=given.vacuum))
    finally:
        store.close()
    return 0


def _show(found: Sequence[Candidate]) -> None:
    lines = [
        f"{job.id}  {job.status:9}  {_day(job.ended_at)}  {job.kind}  {job.name}"
        for job in found[:_SHOWN]
    ]
    if len(found) > _SHOWN:
        lines.append(f"and {len(found) - _SHOWN} more, up to {_day(found[-1].ended_at)}")
    counts = Counter(job.status for job in found)
    parts = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
    lines.append(f"{len(found)} jobs{f': {parts}' if parts else ''}")
    print("\n".join(lines), flush=True)  # noqa: T201


def _day(ms: int) -> str:
    return dt.datetime.fromtimestamp(ms / 1000, dt.UTC).strftime("%Y-%m-%d")


def _agreed(number: int) -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("nobody is there to ask: add --yes, or --dry-run to only look")
    sys.stderr.write(f"remove these {number} jobs with their results for good? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _report(
    given: argparse.Namespace,
    found: Sequence[Candidate],
    removed: retention.Removed | None,
    bytes_freed: int,
) -> None:
    if given.json:
        told: dict[str, Any] = {
            "object": "removal",
            "dry_run": removed is None,
            "job_ids": [job.id for job in found],
            "num_jobs": 0 if removed is None else removed.num_jobs,
            "num_logs": 0 if removed is None else removed.num_logs,
            "bytes_freed": bytes_freed,
        }
        print(json.dumps(told, indent=2))  # noqa: T201
    elif removed is not None:
        text = f"removed {removed.num_jobs} jobs and {removed.num_logs} logs"
        freed = f"; the database file is {bytes_freed / 1e6:.1f} MB smaller" if bytes_freed else ""
        print(text + freed)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
