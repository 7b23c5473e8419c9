"""The unix socket on which a worker hears the ranks of one gang, a connection each: JSON lines."""

import asyncio
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LINE_LIMIT = 256 * 2**20  # bytes of one message: a result with very many repeats
_PATH_LIMIT = 100  # bytes; the kernel's limit is 107


@dataclass(frozen=True, slots=True)
class Heard:
    """One message of one rank, or the end of its connection."""

    rank: int | None  # None: it ended before it said which it is
    message: dict[str, Any] | None
    ending: str = ""  # why there is no message, where the connection says so

    @property
    def kind(self) -> str:
        """The message's `type`; `end` for a connection that ended."""
        return "end" if self.message is None else str(self.message["type"])


class RankSocket:
    """Every method belongs to the event loop that called `listen`."""

    def __init__(self) -> None:
        """Nothing is opened yet."""
        self._directory: Path | None = None
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self._hearing: list[asyncio.Task[None]] = []
        self._heard: asyncio.Queue[Heard] = asyncio.Queue()

    async def listen(self) -> Path:
        """Open the socket; the path is what the ranks connect to."""
        self._directory = _short_directory()
        path = self._directory / "s"
        self._server = await asyncio.start_unix_server(self._accept, path, limit=_LINE_LIMIT)
        return path

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of our own: asyncio logs a traceback where it has to cancel one of its own.
        self._writers.append(writer)
        self._hearing.append(asyncio.create_task(self._hear(reader, writer)))

    async def _hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read one connection to its end."""
        rank, ending = None, ""
        try:
            while line := await reader.readline():
                message = json.loads(line)
                kind = message["type"]
                rank = int(message.get("rank", 0)) if kind in ("ready", "error") else rank
                self._heard.put_nowait(Heard(rank, message))
        except (OSError, ValueError, KeyError, TypeError) as error:
            ending = f"{type(error).__name__}: {error}"
        writer.close()
        self._heard.put_nowait(Heard(rank, None, ending))

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
        for writer in self._writers:
            writer.transport.abort()
        if self._server is not None:
            self._server.close()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


def _short_directory() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="probe-"))  # readable by this user only
    if len(os.fsencode(directory / "s")) <= _PATH_LIMIT:
        return directory
    directory.rmdir()
    return Path(tempfile.mkdtemp(prefix="probe-", dir="/tmp"))
