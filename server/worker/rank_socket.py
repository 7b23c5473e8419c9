"""The socket on which a worker hears the ranks of one gang, a connection each: JSON lines.

A unix socket in a directory of this user's, or TCP for ranks on other machines. Whoever connects
over TCP is nobody until it has said the gang's token: it is sent nothing and not listened to.
"""

import asyncio
import hmac
import json
import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from probe.worker_link import TOKEN_BYTES, keep_alive, tcp_address

_TOKEN_S = 10.0  # a rank says it at once
_LINE_LIMIT = 256 * 2**20  # bytes of one message: a result with very many repeats
_PATH_LIMIT = 100  # bytes; the kernel's limit is 107


@dataclass(frozen=True, slots=True)
class Heard:
    """One message of one rank, or the end of its connection."""

    rank: int | None  # None: it ended before it said which it is, or is what starts the ranks
    message: dict[str, Any] | None
    ending: str = ""  # why there is no message, where the connection says so

    @property
    def kind(self) -> str:
        """The message's `type`; `end` for a connection that ended."""
        return "end" if self.message is None else str(self.message["type"])


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the ranks of a gang report, and what they have to know to be heard there."""

    where: str  # as `probe.worker_link.connect_to_worker` takes it
    token: str = field(default="", repr=False)  # empty: a unix socket, which needs none


class RankSocket:
    """Every method belongs to the event loop that called `listen`."""

    def __init__(self, host: str | None = None) -> None:
        """Nothing is opened yet.

        Args:
            host: Address of this machine to listen on, over TCP; None: a unix socket.
        """
        self._host = host
        self._token = "" if host is None else secrets.token_hex(TOKEN_BYTES // 2)
        self._directory: Path | None = None
        self._server: asyncio.Server | None = None
        self._strangers: list[asyncio.StreamWriter] = []
        self._writers: list[asyncio.StreamWriter] = []
        self._hearing: list[asyncio.Task[None]] = []
        self._heard: asyncio.Queue[Heard] = asyncio.Queue()

    async def listen(self) -> Endpoint:
        """Open the socket.

        Raises:
            OSError: The host is no address of this machine.
        """
        if self._host is not None:
            self._server = await asyncio.start_server(
                self._accept, self._host, 0, limit=_LINE_LIMIT
            )
            host, port = self._server.sockets[0].getsockname()[:2]
            return Endpoint(tcp_address(host, port), self._token)
        self._directory = _short_directory()
        path = self._directory / "s"
        self._server = await asyncio.start_unix_server(self._accept, path, limit=_LINE_LIMIT)
        return Endpoint(str(path))

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._strangers.append(writer)
        # A task of our own: asyncio logs a traceback where it has to cancel one of its own.
        self._hearing.append(asyncio.create_task(self._hear(reader, writer)))

    async def _hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read one connection to its end."""
        known = not self._token or await self._has_token(reader)
        self._strangers.remove(writer)
        if not known:
            writer.transport.abort()
            return
        self._writers.append(writer)
        rank, ending = None, ""
        try:
            if self._token:
                keep_alive(writer.get_extra_info("socket"))
            while line := await reader.readline():
                message = json.loads(line)
                kind = message["type"]
                if kind in ("ready", "error"):
                    rank = _rank_of(message)
                self._heard.put_nowait(Heard(rank, message))
        except (OSError, ValueError, KeyError, TypeError) as error:
            ending = f"{type(error).__name__}: {error}"
        writer.close()
        self._heard.put_nowait(Heard(rank, None, ending))

    async def _has_token(self, reader: asyncio.StreamReader) -> bool:
        """Whether the first line is the token; no more is read of another one."""
        try:
            async with asyncio.timeout(_TOKEN_S):
                line = await reader.readexactly(TOKEN_BYTES + 1)
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            return False
        return hmac.compare_digest(line, self._token.encode() + b"\n")

    async def receive(self) -> Heard:
        """The next message of any rank, in the order they arrived."""
        return await self._heard.get()

    async def send(self, message: dict[str, Any]) -> None:
        """Send to every rank.

        Raises:
            OSError: A connection is gone.
        """
        for writer in self._writers:
            writer.write(json.dumps(message).encode() + b"\n")
        for writer in self._writers:
            await writer.drain()

    def close(self) -> None:
        """Close it all now. Does not wait for the event loop, so a cancel cannot cut it short."""
        for task in self._hearing:
            task.cancel()
        for writer in (*self._strangers, *self._writers):
            writer.transport.abort()
        if self._server is not None:
            self._server.close()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


def _rank_of(message: dict[str, Any]) -> int | None:
    rank = message.get("rank", 0)
    return None if rank is None else int(rank)  # None: whoever starts the ranks


def _short_directory() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="probe-"))  # readable by this user only
    if len(os.fsencode(directory / "s")) <= _PATH_LIMIT:
        return directory
    directory.rmdir()
    return Path(tempfile.mkdtemp(prefix="probe-", dir="/tmp"))
