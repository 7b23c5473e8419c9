"""API keys in the database: made, listed, revoked, looked up. Keys themselves are never stored.

A key reads `spk_<id>_<secret>`. The id stands in clear and finds the row. Of the secret the
dashboard's session token is an HMAC, and of that token the row keeps the SHA-256: whoever reads
the database can make neither, and whoever steals a browser's cookie does not have the key.
"""

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from probe.errors import ConfigError
from server import queue, tables
from server.tables import api_keys

KeyScope = Literal["read", "submit", "admin"]  # each holds what stands before it
SCOPES: tuple[KeyScope, ...] = get_args(KeyScope)
KEY_PATTERN = re.compile(r"spk_([a-z0-9]{12})_([A-Za-z0-9_-]{43})")
_KEY_ID = re.compile(r"[a-z0-9]{12}")
_ID_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_SECRET_BYTES = 32
_USED_EVERY_MS = 60_000  # a busy key must not mean a write per request
_DAY_MS = 86_400_000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._@-]{0,99}")
_PURPOSE = b"sharpness-probe dashboard"


class KeyNameError(ConfigError):
    """There is a key of that name already, or none where one is needed."""

    code = "key_name"


@dataclass(frozen=True, slots=True)
class StoredKey:
    """What is known of a key. Times are milliseconds since the epoch, on the database's clock."""

    id: str
    name: str
    scope: KeyScope
    token_sha256: str
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    last_used_at: int | None
    read_at: int

    @property
    def status(self) -> Literal["active", "expired", "revoked"]:
        """Whether it opens anything, when it was read."""
        if self.revoked_at is not None:
            return "revoked"
        is_over = self.expires_at is not None and self.expires_at <= self.read_at
        return "expired" if is_over else "active"


def is_key_id(text: str) -> bool:
    """Whether a key can have this id."""
    return _KEY_ID.fullmatch(text) is not None


def session_token(secret: str) -> str:
    """What a browser keeps instead of a key's secret: it opens this server's pages, no more."""
    # Hashed first: HMAC fills its key up with zeros, so two keys could have one token.
    key = hashlib.sha256(secret.encode()).digest()
    return hmac.new(key, _PURPOSE, hashlib.sha256).hexdigest()


def token_sha256(token: str) -> str:
    """What is stored of a session token."""
    return hashlib.sha256(token.encode()).hexdigest()


class KeyTable:
    """The keys of one database. Thread-safe, synchronous."""

    def __init__(self, engine: sa.Engine) -> None:
        """Nothing is asked yet."""
        self._engine = engine
        self._now = tables.now_ms(engine)

    def create(
        self, name: str, scope: KeyScope, expires_days: float | None = None
    ) -> tuple[StoredKey, str]:
        """A new key: what is stored, and the key itself, which is nowhere afterwards.

        Raises:
            KeyNameError: The name is taken, also by a revoked key, or cannot be one.
        """
        if not _NAME.fullmatch(name):
            raise KeyNameError(
                f"{name[:120]!r} cannot name a key: use up to 100 letters, digits, spaces and "
                "any of . _ @ -, a letter or digit first"
            )
        key_id = "".join(secrets.choice(_ID_CHARACTERS) for _ in range(12))
        secret = secrets.token_urlsafe(_SECRET_BYTES)
        lifetime = None if expires_days is None else round(expires_days * _DAY_MS)
        row: dict[str, Any] = {
            "id": key_id,
            "name": name,
            "secret_sha256": token_sha256(session_token(secret)),
            "scope": scope,
        }
        try:
            with self._engine.begin() as connection:
                # Read once: Postgres's clock goes on within a statement.
                now = connection.execute(sa.select(self._now)).scalar_one()
                row["created_at"] = now
                row["expires_at"] = None if lifetime is None else now + lifetime
                connection.execute(sa.insert(api_keys).values(**row))
        except IntegrityError as error:
            raise KeyNameError(
                f"there is a key named {name!r}: choose another name, so that a job's "
                "submitted_by means one key"
            ) from error
        found = self.find(key_id)
        assert found is not None
        return found, f"spk_{key_id}_{secret}"

    def revoke(self, name_or_id: str) -> StoredKey:
        """End a key for ever; one that is revoked already stays as it is.

        Raises:
            KeyNameError: There is none.
        """
        named = sa.or_(api_keys.c.name == name_or_id, api_keys.c.id == name_or_id)
        with self._engine.begin() as connection:
            key_id = connection.scalar(sa.select(api_keys.c.id).where(named))
            if key_id is None:
                raise KeyNameError(
                    f"there is no key {name_or_id[:120]!r}; `probe keys list` shows those there are"
                )
            connection.execute(
                sa.update(api_keys)
                .where(api_keys.c.id == key_id)
                .values(revoked_at=sa.func.coalesce(api_keys.c.revoked_at, self._now))
            )
        found = self.find(key_id)
        assert found is not None
        return found

    def list(self) -> "list[StoredKey]":
        """Every key, oldest first, revoked and expired ones too."""
        query = self._query().order_by(api_keys.c.created_at, api_keys.c.id)
        with self._engine.connect() as connection:
            return [_stored(row) for row in connection.execute(query)]

    def find(self, key_id: str) -> StoredKey | None:
        """The key of this id, whatever its status."""
        with self._engine.connect() as connection:
            row = connection.execute(self._query().where(api_keys.c.id == key_id)).first()
        return None if row is None else _stored(row)

    def any_exist(self) -> bool:
        """Whether a key was ever made here. A revoked one counts: its end must open no door."""
        with self._engine.connect() as connection:
            return connection.execute(sa.select(api_keys.c.id).limit(1)).first() is not None

    def note_use(self, key: StoredKey) -> None:
        """Remember that a key was used just now, to the minute."""
        if key.last_used_at is not None and key.read_at - key.last_used_at < _USED_EVERY_MS:
            return
        with self._engine.begin() as connection:
            connection.execute(
                sa.update(api_keys)
                .where(api_keys.c.id == key.id)
                .where(sa.func.coalesce(api_keys.c.last_used_at, 0) <= key.read_at - _USED_EVERY_MS)
                .values(last_used_at=self._now)
            )

    def _query(self) -> "sa.Select[tuple[object, ...]]":
        return sa.select(*api_keys.c, self._now.label("read_at"))


def _stored(row: "sa.Row[tuple[object, ...]]") -> StoredKey:
    values = dict(row._mapping)
    values["token_sha256"] = values.pop("secret_sha256")
    return StoredKey(**values)


def keys_of_database(database_url: str) -> bool:
    """Whether a database has keys, without making one where there is none yet.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: It does not answer.
    """
    url = sa.make_url(database_url)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
        return False
    engine = queue.create_engine(database_url)
    try:
        if not sa.inspect(engine).has_table(api_keys.name):
            return False
        return KeyTable(engine).any_exist()
    finally:
        engine.dispose()
