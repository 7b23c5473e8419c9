"""`python -m server.key_command`: make, list and revoke API keys. For `probe keys`."""

import argparse
import datetime as dt
import json
import sys
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError

from probe.errors import ConfigError, ProbeError
from server.job_views import time_of
from server.keys import SCOPES, KeyTable, StoredKey
from server.redaction import redact
from server.settings import Settings
from server.store import SqlStore

_COLUMNS = ("id", "name", "scope", "status", "created", "expires", "last used")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 bad input."""
    given = _parser().parse_args(argv)
    named = {k: v for k in ("data_dir", "database_url") if (v := getattr(given, k))}
    try:
        settings = Settings(**named)
        store = SqlStore(settings.database_url)  # makes the tables where there are none yet
        try:
            return _run(KeyTable(store.engine), given)
        finally:
            store.close()
    except (ValidationError, ConfigError) as error:
        print(redact(f"error: {error}"), file=sys.stderr)  # noqa: T201
        return 2
    except (ProbeError, sa.exc.SQLAlchemyError) as error:
        cause = getattr(error, "orig", None) or error  # without the statement
        print(redact(f"error: {cause}"), file=sys.stderr)  # noqa: T201
        return 1


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON to stdout")
    common.add_argument("--data-dir", help="of the database")
    common.add_argument("--database-url", help="sqlite:///path or postgresql://...")
    parser = argparse.ArgumentParser(prog="python -m server.key_command", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    create = actions.add_parser("create", parents=[common], help="make a key, print it once")
    create.add_argument("name")
    create.add_argument("--scope", choices=SCOPES, required=True)
    create.add_argument("--expires", type=float, help="days from now")
    actions.add_parser("list", parents=[common], help="show every key, never the key itself")
    revoke = actions.add_parser("revoke", parents=[common], help="end a key for ever")
    revoke.add_argument("name", help="or id")
    return parser


def _run(table: KeyTable, given: argparse.Namespace) -> int:
    if given.action == "create":
        stored, key = table.create(given.name, given.scope, given.expires)
        if given.json:
            _print(json.dumps(_view(stored) | {"key": key}, indent=2))
        else:
            _print(key)
            _say(f"key {stored.name!r}, scope {stored.scope}: it is shown this once and not kept")
        return 0
    if given.action == "revoke":
        stored = table.revoke(given.name)
        if given.json:
            _print(json.dumps(_view(stored), indent=2))
        else:
            _say(f"key {stored.name!r} is revoked; servers stop taking it within 2 s")
        return 0
    keys = table.list()
    if given.json:
        data = {"object": "list", "data": [_view(key) for key in keys]}
        _print(json.dumps(data, indent=2, ensure_ascii=False))
    elif keys:
        _print_table([_COLUMNS, *(_row(key) for key in keys)])
    else:
        _say("no keys")
    return 0


def _view(key: StoredKey) -> dict[str, Any]:
    times = ("created_at", "expires_at", "revoked_at", "last_used_at")
    return {
        "object": "api_key",
        "id": key.id,
        "name": key.name,
        "scope": key.scope,
        "status": key.status,
    } | {name: _iso(getattr(key, name)) for name in times}


def _row(key: StoredKey) -> tuple[str, ...]:
    times = (key.created_at, key.expires_at, key.last_used_at)
    return (key.id, key.name, key.scope, key.status, *map(_short, times))


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        _print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def _iso(ms: int | None) -> str | None:
    return None if ms is None else time_of(ms).isoformat()


def _short(ms: int | None) -> str:
    return "-" if ms is None else time_of(ms).astimezone(dt.UTC).strftime("%Y-%m-%d %H:%M")


def _print(text: str) -> None:
    print(text)  # noqa: T201


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
