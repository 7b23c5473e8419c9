"""Critical sharpness from forward passes only: the engine, usable without any server.

Public names resolve lazily (PEP 562), so `import probe.spec` or the server never pull in torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probe.line_search import LineSearchResult as LineSearchResult
    from probe.line_search import SearchOutcome as SearchOutcome
    from probe.line_search import find_critical_learning_rate as find_critical_learning_rate
    from probe.sharpness import critical_sharpness as critical_sharpness

__version__ = "0.1.0"

_HOME = {
    "LineSearchResult": "probe.line_search",
    "SearchOutcome": "probe.line_search",
    "critical_sharpness": "probe.sharpness",
    "find_critical_learning_rate": "probe.line_search",
}
__all__ = [
    "LineSearchResult",
    "SearchOutcome",
    "__version__",
    "critical_sharpness",
    "find_critical_learning_rate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'probe' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
