"""Server-sent events, as the HTML standard's event-stream format defines them.

Only the parsing: lines in, events out. Connecting and reconnecting is `clients.http`.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# A CR at the very end may be the first half of CRLF: it waits for the next chunk.
_LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One event of a stream."""

    id: str  # of the last event that carried one; sent back as Last-Event-ID
    event: str  # "message" where the stream names none
    data: str


@dataclass(slots=True)
class StreamState:
    """What the stream has said about itself so far."""

    last_event_id: str = ""
    retry_s: float | None = None  # how long the server asks to wait before a reconnect


def parse_events(lines: Iterable[str], state: StreamState) -> Iterator[ServerSentEvent]:
    """Events of a stream's lines; comments (heartbeats) are left out, `state` is kept up.

    An event cut off before its blank line is dropped, as the standard asks: its id is then not
    remembered either, so a reconnect brings it again whole.
    Source: https://html.spec.whatwg.org/multipage/server-sent-events.html section 9.2.6.
    """
    name, event_id = "", state.last_event_id
    chunks: list[str] = []
    for line in lines:
        if not line:
            state.last_event_id = event_id
            if chunks:
                yield ServerSentEvent(event_id, name or "message", "\n".join(chunks))
            name, chunks = "", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            chunks.append(value)
        elif field == "event":
            name = value
        elif field == "id" and "\0" not in value:
            event_id = value
        elif field == "retry" and value.isascii() and value.isdigit():
            state.retry_s = int(value) / 1000


def split_lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Lines of a byte stream, ended by LF, CRLF or CR only; an unfinished last line is dropped.

    `str.splitlines` would also break at U+2028 and its like, which JSON may hold inside a text.
    """
    rest = b""
    for chunk in chunks:
        *lines, rest = _LINE_END.split(rest + chunk)
        for line in lines:
            yield line.decode("utf-8", errors="replace")
