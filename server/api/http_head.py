"""uvicorn's fast HTTP parser with a limit on what comes before a body.

httptools keeps headers in memory for as long as they come; h11, uvicorn's other parser, has a limit
of its own.
"""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 65_536  # the guard's own limits are lower, and answer with a problem


class BoundedHttpProtocol(HttpToolsProtocol):
    """Ends a connection whose request line and headers do not end."""

    _head_bytes = 0
    _in_head = True

    def data_received(self, data: bytes) -> None:
        """Count, then parse."""
        if self._in_head:
            self._head_bytes += len(data)
            # Whole requests may follow each other in one piece: only what adds up counts.
            if self._head_bytes - len(data) > MAX_HEAD_BYTES:
                self.send_400_response("The request's headers are too large.")
                return
        super().data_received(data)

    def on_headers_complete(self) -> None:
        """The body follows, or the next request."""
        self._in_head, self._head_bytes = False, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The next request may follow."""
        self._in_head, self._head_bytes = True, 0
        super().on_message_complete()
