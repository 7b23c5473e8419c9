"""The load generator, a process of its own: kept-alive clients on plain sockets, one loop.

`python load.py` reads one JSON object from standard input (see `_main`) and prints one. It parses
no more than a status line and a length, so that it takes a small part of what the server takes;
its own CPU seconds are in the answer.
"""

import collections
import json
import random
import selectors
import socket
import sys
import time
from typing import Any

_READ = 1 << 18


class _Client:
    """One connection, at most one request under way."""

    def __init__(self, host: str, port: int, selector: selectors.BaseSelector) -> None:
        self._address, self._selector = (host, port), selector
        self._connect()
        self.request = b""
        self.received = bytearray()
        self.missing: int | None = None  # bytes of the body still to come
        self.due = 0.0  # of the request under way: when it should have been sent
        self.waiting: collections.deque[float] = collections.deque()
        self.busy = False
        self.status = 0

    def _connect(self) -> None:
        self.socket = socket.create_connection(self._address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self._selector.register(self.socket, selectors.EVENT_READ, self)

    def send(self, request: bytes, due: float) -> None:
        self.request = request
        self.busy, self.due, self.missing = True, due, None
        sent = self.socket.send(request)
        assert sent == len(request), "a request larger than the socket's buffer"

    def answered(self) -> bool:
        """Read what is there; whether the answer is complete."""
        try:
            data = self.socket.recv(_READ)
        except ConnectionResetError:
            data = b""
        if not data:
            # A server closes what has been idle for seconds; a request may have crossed that.
            if self.received or self.missing is not None:
                raise ConnectionError("the server closed a connection within an answer")
            self._selector.unregister(self.socket)
            self.socket.close()
            self._connect()
            if self.busy:
                self.send(self.request, self.due)
            return False
        if self.missing is not None:
            self.missing -= len(data)
            return self.missing == 0
        self.received += data
        end = self.received.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = bytes(self.received[:end]).lower()
        self.status = int(head[9:12])
        length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        self.missing = length - (len(self.received) - end - 4)
        self.received.clear()
        return self.missing == 0


def drive(
    host: str,
    port: int,
    requests: list[bytes],
    *,
    num_clients: int,
    duration_s: float,
    rate_per_s: float | None,
) -> dict[str, Any]:
    """Send the requests, in turn, for so long.

    Args:
        host: Of the server.
        port: Of the server.
        requests: Complete, as bytes; taken round and round.
        num_clients: Connections.
        duration_s: How long requests are begun.
        rate_per_s: Of all clients together, at random times (exponential gaps) that do not wait
            for answers: an answer's time counts from when its request was due. None: every client
            sends as soon as it has its answer.
    """
    selector = selectors.EpollSelector()
    clients = [_Client(host, port, selector) for _ in range(num_clients)]
    chosen = random.Random(7)
    seconds: list[float] = []
    statuses: collections.Counter[int] = collections.Counter()
    turn = 0
    cpu = time.process_time()
    begin = time.perf_counter()
    end = begin + duration_s
    next_due = begin

    def begin_request(client: _Client, due: float) -> None:
        nonlocal turn
        client.send(requests[turn % len(requests)], due)
        turn += 1

    if rate_per_s is None:
        for client in clients:
            begin_request(client, time.perf_counter())
    while True:
        now = time.perf_counter()
        if rate_per_s is not None:
            while next_due <= now and next_due < end:
                client = chosen.choice(clients)
                if client.busy:
                    client.waiting.append(next_due)
                else:
                    begin_request(client, next_due)
                next_due += chosen.expovariate(rate_per_s)
        if now >= end and not any(client.busy for client in clients):
            break
        wait = 0.05 if rate_per_s is None or next_due >= end else max(0.0, next_due - now)
        for key, _ in selector.select(wait):
            client = key.data
            if not client.answered():
                continue
            arrived = time.perf_counter()
            seconds.append(arrived - client.due)
            statuses[client.status] += 1
            client.busy, client.missing = False, None
            if client.waiting:
                begin_request(client, client.waiting.popleft())
            elif rate_per_s is None and arrived < end:
                begin_request(client, arrived)
    elapsed = time.perf_counter() - begin
    for client in clients:
        client.socket.close()
    return {
        "num_requests": len(seconds),
        "per_s": len(seconds) / elapsed,
        "ms": [round(value * 1000, 3) for value in sorted(seconds)],
        "statuses": {str(status): number for status, number in statuses.items()},
        "cpu_s": time.process_time() - cpu,
        "elapsed_s": elapsed,
    }


def watch(host: str, port: int, paths: list[str], deadline_s: float) -> dict[str, Any]:
    """Follow an event stream per path until each ends; the ids each got, and the delays.

    A delay is from the event's own time, the database's clock on this machine, to its arrival.
    """
    selector = selectors.EpollSelector()
    streams: list[dict[str, Any]] = []
    for path in paths:
        connection = socket.create_connection((host, port))
        connection.sendall(get(path, "Accept: text/event-stream\r\n"))
        connection.setblocking(False)
        stream = {"socket": connection, "path": path, "rest": b"", "ids": [], "status": 0}
        streams.append(stream)
        selector.register(connection, selectors.EVENT_READ, stream)
    print("watching", file=sys.stderr, flush=True)
    delays: list[float] = []
    deadline = time.monotonic() + deadline_s
    open_streams = len(streams)
    while open_streams and time.monotonic() < deadline:
        for key, _ in selector.select(0.2):
            stream = key.data
            data = stream["socket"].recv(_READ)
            now = time.time()
            lines = (stream["rest"] + data).split(b"\r\n")
            stream["rest"] = lines.pop()
            ended = not data
            for line in lines:
                if line.startswith(b"HTTP/1.1 "):
                    stream["status"] = int(line[9:12])
                elif line.startswith(b"id: "):
                    stream["ids"].append(int(line[4:]))
                elif line.startswith(b"data: "):
                    delays.append(now - _time_of(json.loads(line[6:])["at"]))
                elif line == b"0":  # the last chunk
                    ended = True
            if ended:
                selector.unregister(stream["socket"])
                stream["socket"].close()
                open_streams -= 1
    return {
        "streams": [{k: s[k] for k in ("path", "ids", "status")} for s in streams],
        "ms": [round(value * 1000, 3) for value in sorted(delays)],
        "num_open": open_streams,
    }


def get(path: str, headers: str = "") -> bytes:
    """A request for a path."""
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n".encode()


def post(path: str, body: bytes) -> bytes:
    """A request with a JSON body."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _time_of(text: str) -> float:
    import datetime as dt

    return dt.datetime.fromisoformat(text).timestamp()


def _main() -> None:
    asked = json.loads(sys.stdin.read())
    if asked.pop("what") == "watch":
        print(json.dumps(watch(**asked)))
        return
    asked["requests"] = [request.encode("latin-1") for request in asked["requests"]]
    print(json.dumps(drive(**asked)))


if __name__ == "__main__":
    _main()
