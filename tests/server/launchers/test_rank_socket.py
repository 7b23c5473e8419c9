"""Who is heard on a TCP socket, and who is sent anything: those that said the gang's token."""

import asyncio
import contextlib
import json
import secrets
from collections.abc import Awaitable, Callable

import pytest

from probe.errors import ConfigError, ParallelismError
from probe.worker_link import TOKEN, TOKEN_BYTES, connect_to_worker, tcp_address
from server.worker import rank_socket
from server.worker.rank_socket import Endpoint, RankSocket

READY = {"type": "ready", "rank": 1, "device": "d"}
JOB = {"type": "job", "spec": {"secret": "plan"}}
FAR_S = 30.0  # only a failing test waits so long

Scene = Callable[[RankSocket, Endpoint], Awaitable[None]]


@pytest.fixture
def on_tcp():
    """Plays a scene on an open socket."""

    async def play(scene: Scene) -> None:
        ranks = RankSocket("127.0.0.1")
        try:
            async with asyncio.timeout(FAR_S):
                await scene(ranks, await ranks.listen())
        finally:
            ranks.close()
            await asyncio.sleep(0)

    return lambda scene: asyncio.run(play(scene))


async def knock(endpoint: Endpoint, said: bytes) -> tuple[asyncio.StreamReader, object]:
    host, _, port = endpoint.where.removeprefix("tcp://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(said)
    with contextlib.suppress(ConnectionError):
        await writer.drain()
    return reader, writer


async def all_it_is_sent(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()  # to the end of the connection
    except ConnectionError:
        return b""


def line(message: dict) -> bytes:
    return json.dumps(message).encode() + b"\n"


def other_token(endpoint: Endpoint) -> str:
    last = "0" if endpoint.token[-1] != "0" else "1"
    return endpoint.token[:-1] + last


@pytest.mark.parametrize(
    "said",
    [
        lambda e: other_token(e).encode() + b"\n" + line(READY),
        lambda e: e.token.upper().encode() + b"\n" + line(READY),
        lambda e: e.token.encode() + line(READY),  # no line of its own
        lambda e: line({"token": e.token}) + line(READY) * 9,
        lambda e: b"\x00" * (TOKEN_BYTES + 1),
        lambda e: b"\xff" * 100_000,
        lambda e: b"GET / HTTP/1.1\r\nHost: worker\r\nUser-Agent: a browser of some age\r\n\r\n",
    ],
)
def test_who_does_not_know_the_token_is_not_heard_and_sent_nothing(on_tcp, said):
    async def scene(ranks: RankSocket, endpoint: Endpoint) -> None:
        stranger, strangers_end = await knock(endpoint, said(endpoint))
        _, rank = await knock(endpoint, endpoint.token.encode() + b"\n" + line(READY))
        heard = await ranks.receive()
        assert (heard.kind, heard.rank) == ("ready", 1)
        await ranks.send(JOB)
        assert await all_it_is_sent(stranger) == b""
        strangers_end.close()
        rank.close()
        heard = await ranks.receive()
        assert (heard.kind, heard.rank) == ("end", 1)  # and nothing of the stranger

    on_tcp(scene)


def test_who_says_nothing_is_sent_nothing_and_cut_off_in_time(on_tcp, monkeypatch):
    monkeypatch.setattr(rank_socket, "_TOKEN_S", 0.2)

    async def scene(ranks: RankSocket, endpoint: Endpoint) -> None:
        silent, end = await knock(endpoint, endpoint.token.encode()[:20])
        await ranks.send(JOB)
        assert await all_it_is_sent(silent) == b""
        end.close()

    on_tcp(scene)


def test_closing_cuts_off_those_that_have_said_nothing_yet(on_tcp):
    async def scene(ranks: RankSocket, endpoint: Endpoint) -> None:
        silent, end = await knock(endpoint, b"")
        while not ranks._strangers:
            await asyncio.sleep(0)
        ranks.close()
        assert await all_it_is_sent(silent) == b""
        end.close()

    on_tcp(scene)


def test_every_gang_has_a_token_of_its_own_and_none_is_shown():
    async def tokens() -> list[Endpoint]:
        sockets = [RankSocket("127.0.0.1") for _ in range(2)]
        endpoints = [await ranks.listen() for ranks in sockets]
        for ranks in sockets:
            ranks.close()
        await asyncio.sleep(0)
        return endpoints

    first, second = asyncio.run(tokens())
    assert len(first.token) == len(second.token) == TOKEN_BYTES
    assert first.token != second.token
    assert first.token not in repr(first)


def test_a_rank_is_heard_and_its_token_gone_from_the_environment(on_tcp, monkeypatch):
    async def scene(ranks: RankSocket, endpoint: Endpoint) -> None:
        monkeypatch.setenv(TOKEN, endpoint.token)
        connection = await asyncio.to_thread(connect_to_worker, endpoint.where)
        with connection:
            connection.sendall(line(READY))
            heard = await ranks.receive()
            assert (heard.kind, heard.message) == ("ready", READY)
            await ranks.send(JOB)
            with connection.makefile() as lines:
                assert json.loads(await asyncio.to_thread(lines.readline)) == JOB
        with pytest.raises(ConfigError, match=f"{TOKEN} is not set"):
            connect_to_worker(endpoint.where)

    on_tcp(scene)


def test_an_address_at_which_nobody_listens_names_the_setting(monkeypatch):
    with pytest.raises(ParallelismError, match="PROBE_RAY_LISTEN_HOST"):
        connect_to_worker(tcp_address("127.0.0.1", 1), secrets.token_hex())
    monkeypatch.setenv(TOKEN, "0")
    with pytest.raises(ConfigError, match="expected tcp://HOST:PORT"):
        connect_to_worker("tcp://7000")


def test_an_address_of_another_machine_cannot_be_listened_on():
    with pytest.raises(OSError, match="assign"):
        asyncio.run(RankSocket("198.51.100.1").listen())
