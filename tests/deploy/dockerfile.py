"""Reads the Dockerfile as far as the tests need it: stages, and what each image is set to."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Stage:
    """One stage: the stage or image it builds on, and its instructions in order."""

    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def last(self, word: str) -> str | None:
        """The argument of the last such instruction, which is the one that counts."""
        return next((text for found, text in reversed(self.instructions) if found == word), None)


def instructions(text: str) -> list[tuple[str, str]]:
    """(word, argument) of every instruction; comments dropped, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = [line.strip().partition(" ") for line in joined.splitlines() if line.strip()]
    return [(word.upper(), argument.strip()) for word, _, argument in found]


def stages() -> dict[str, Stage]:
    """Every named stage of the Dockerfile."""
    found: dict[str, Stage] = {}
    for word, argument in instructions((ROOT / "Dockerfile").read_text()):
        if word == "FROM":
            base, _, name = argument.partition(" AS ")
            found[name] = Stage(name, base)
        elif found:
            found[next(reversed(found))].instructions.append((word, argument))
    return found


def image(target: str) -> Stage:
    """A final image with the instructions of all stages it builds on, oldest first."""
    every = stages()
    stage = every[target]
    result = Stage(target, stage.base, list(stage.instructions))
    while result.base in every:
        below = every[result.base]
        result = Stage(target, below.base, below.instructions + result.instructions)
    return result


def environment(target: str) -> dict[str, str]:
    """Variables that a container of this image starts with, PATH aside."""
    pairs: dict[str, str] = {}
    for word, argument in image(target).instructions:
        if word == "ENV":
            pairs |= dict(pair.split("=", 1) for pair in argument.split())
    pairs.pop("PATH")
    return pairs


def command(target: str) -> list[str]:
    """What a container of this image runs, the init aside."""
    return list(json.loads(image(target).last("CMD") or ""))


def health_check(target: str) -> list[str]:
    """What its HEALTHCHECK runs."""
    return list(json.loads((image(target).last("HEALTHCHECK") or "").partition("CMD ")[2]))
