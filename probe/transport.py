"""Whether a failure is the network's, so that trying again can help (torch-free).

The hub's libraries have used requests, httpx and httpx2, and wrap each other's errors; so an
error is judged with everything that caused it, and by the family name of its class.
"""

import socket
import ssl

_TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
_FAMILIES = {"TransportError", "ClientConnectionError", "LocalEntryNotFoundError", "Timeout"}
_LIBRARIES = {"httpx", "httpx2", "httpcore", "requests", "urllib3", "aiohttp", "huggingface_hub"}


def is_transport_failure(error: BaseException) -> bool:
    """True for connections that failed, time-outs and a server that is busy or broken.

    Args:
        error: Judged together with its causes; an answer of the server decides before them.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        status = status_code(link)
        if status is not None:
            return status in _TRANSIENT_STATUS
    return any(_is_network(link) for link in chain)


def status_code(error: BaseException) -> int | None:
    """HTTP status of the answer an error carries; None where there was no answer."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_network(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError | socket.gaierror | ssl.SSLError):
        return True
    return any(
        base.__name__ in _FAMILIES and base.__module__.partition(".")[0] in _LIBRARIES
        for base in type(error).__mro__
    )
