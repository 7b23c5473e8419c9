"""Reads docker-compose.yml as `docker compose config` does, as far as this file goes.

Anchors and merges by YAML, then `${NAME}`, `${NAME:-default}`, `${NAME:?message}` and `$$`. That it
agrees with the real command is a test of its own, where that command is installed.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docker-compose.yml"
_VARIABLE = re.compile(r"\$(?:(\$)|\{(\w+)(?:(:-|:\?)([^}]*))?\})")


class UnsetError(Exception):
    """A variable that must be set is not."""


def required() -> dict[str, str]:
    """Variables without which nothing starts, and what is said then."""
    found = _VARIABLE.findall(FILE.read_text())
    return {name: text for _, name, how, text in found if how == ":?"}


def variables() -> set[str]:
    """Every variable the file reads, those handed through by name included."""
    names = {name for _, name, _, _ in _VARIABLE.findall(FILE.read_text()) if name}
    loaded = yaml.safe_load(FILE.read_text())
    handed_on = {
        name
        for service in loaded["services"].values()
        for name, value in service.get("environment", {}).items()
        if value is None
    }
    return names | handed_on


def read_env(text: str) -> dict[str, str]:
    """An .env file of NAME=value lines."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def services(environment: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The services with every variable filled in.

    Raises:
        UnsetError: A required variable is missing or empty.
    """
    loaded = yaml.safe_load(FILE.read_text())
    found: dict[str, dict[str, Any]] = _fill(loaded["services"], environment)
    for service in found.values():
        variables = service.get("environment", {})
        given = {name: environment.get(name) for name, value in variables.items() if value is None}
        variables.update(given)
        for name in [name for name, value in variables.items() if value is None]:
            del variables[name]
    return found


def _fill(value: Any, environment: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _fill(item, environment) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(item, environment) for item in value]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        dollar, name, how, text = match.groups()
        found = "$" if dollar else environment.get(name, "")
        if found == "" and how == ":?":
            raise UnsetError(f"{name}: {text}")
        return text if found == "" and how == ":-" else found

    return _VARIABLE.sub(fill, value)
