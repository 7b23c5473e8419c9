"""`python -m server.api --check`: whether the server of these settings is ready, for health checks.

For images and machines without curl.
"""

import http.client
import urllib.error
import urllib.request

from server.settings import Settings

_TIMEOUT_S = 5.0
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # where one listens, and where one asks


def what_is_wrong(settings: Settings) -> str | None:
    """One sentence about the server at the settings' host and port; None when it is ready.

    Cost: one request for /readyz, which asks the database.
    """
    host = _ANY.get(settings.host, settings.host)
    address = f"http://{f'[{host}]' if ':' in host else host}:{settings.port}/readyz"
    # No proxy: it is this machine that is asked.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=_TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        return f"{address} answers {error.code}: {error.read(500).decode(errors='replace')}"
    except (OSError, http.client.HTTPException) as error:
        return f"{address} does not answer: {error}"
