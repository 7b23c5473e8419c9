"""Bring a database to this program's schema: alembic, run from code, no configuration file.

A new revision is a new file in `versions/`; released ones are never changed, because databases
out there have been through them. `server/tables.py` says what they come to, and a test holds
the two together.
"""

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError

from server.errors import StoreVersionError

_BASELINE = "0001"  # what the first release made, before alembic kept count


def upgrade(connection: sa.Connection) -> None:
    """Run what is missing, inside the caller's transaction.

    Raises:
        StoreVersionError: A newer program has written this database.
    """
    found = current_revision(connection)
    if found is None and sa.inspect(connection).has_table("schema_version"):
        command.stamp(_config(connection), _BASELINE)
    elif found == newest_revision():
        return
    try:
        command.upgrade(_config(connection), "head")
    except CommandError as error:
        raise StoreVersionError(
            f"the database has schema revision {found}, this program knows up to "
            f"{newest_revision()}: install the newer release, or use another database"
        ) from error


def current_revision(connection: sa.Connection) -> str | None:
    """The revision the database is at; None where alembic has never been."""
    return MigrationContext.configure(connection).get_current_revision()


def newest_revision() -> str:
    """The revision this program needs."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None
    return head


def _config(connection: sa.Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["connection"] = connection
    return config
