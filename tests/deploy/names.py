"""Names of the environment variables the program reads; any other would be ignored in silence."""

from probe import disk_cache
from server.settings import Settings

SETTINGS = {f"PROBE_{name.upper()}" for name in Settings.model_fields}
CACHE = {"PROBE_CACHE_DIR", disk_cache.LIMIT, disk_cache.HUB_LIMIT}  # read by the ranks


def unknown(given: set[str]) -> set[str]:
    """Those of ours that nothing reads."""
    return {name for name in given if name.startswith("PROBE_")} - SETTINGS - CACHE
