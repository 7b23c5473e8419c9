"""Streams that end with the key they were opened with: they may be open for the days of a job."""

from collections.abc import Awaitable, Callable

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send


async def stream_while(
    still_opens: Callable[[], Awaitable[bool]],
    app: ASGIApp,
    scope: Scope,
    receive: Receive,
    send: Send,
    *,
    every_s: float,
) -> None:
    """Answer by `app`, and end its answer in order once the key opens nothing any more.

    Args:
        still_opens: Asked every `every_s` seconds.
        app: Answers the request.
        scope: Of the request, as the two that follow.
        receive: See `scope`.
        send: See `scope`.
        every_s: Seconds.
    """
    has_begun = is_whole = False

    async def noting_send(message: Message) -> None:
        nonlocal has_begun
        has_begun = True
        await send(message)

    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while await still_opens():
                await anyio.sleep(every_s)
            group.cancel_scope.cancel()

        group.start_soon(watch)
        await app(scope, receive, noting_send)
        is_whole = True
        group.cancel_scope.cancel()
    if has_begun and not is_whole:
        await send({"type": "http.response.body", "body": b"", "more_body": False})
