"""Published training runs whose learning rates are known at every step (torch-free).

Read off the files each `Stage` names: the configs of github.com/allenai/OLMo (1B, 7B, 13B) and
the official scripts of github.com/allenai/OLMo-core (32B). Checks between files: the cosines of
1B, 7B and 13B pass through the rates their stage 2 begins with (7.4487e-5, 6.1499e-5 within
0.3 %, and 9e-5), and the last revision of every stage 2 lies at the end of its decay. `main` is
an average of weights, no step of a run.

Both trainers count a step before they set its rate, so the update that follows step s takes the
rate of step s + 1. Stage 2 counts its steps from 0 again.
"""

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

_STAGE_1 = r"stage1-step(?P<step>\d+)-tokens\d+B"
_STAGE_2 = r"stage2-ingredient(?P<ingredient>{})-step(?P<step>\d+)-tokens\d+B"
_SEQUENCE = 4096
_HOST = "https://olmo-checkpoints.org/ai2-llm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of a run: its schedule, its batch, and where its optimizer states are."""

    revisions: str  # regex of the hub's revisions, with groups `step` and `ingredient`
    source: str  # the file the numbers are from
    batch_sequences: int
    shape: Literal["cosine", "linear"] = "linear"
    peak: float
    final: float = 0.0
    warmup: int = 0  # linear from 0; in tokens where `in_tokens`, else in steps
    end: int = 0  # of the decay; likewise
    in_tokens: bool = False
    states: str | None = None  # directory of a step's optimizer state

    @property
    def batch_tokens(self) -> int:
        """Tokens of one step."""
        return self.batch_sequences * _SEQUENCE

    @property
    def sequence_length(self) -> int:
        """Tokens of one sequence."""
        return _SEQUENCE

    def learning_rate(self, step: int) -> float:
        """Rate of the update that follows `step`; 0 after the decay's end where it ends at 0.

        Linear from 0 to the peak; then half a cosine, or a line, to `final`.
        """
        position = (step + 1) * (self.batch_tokens if self.in_tokens else 1)
        if position < self.warmup:
            return self.peak * position / self.warmup
        if position >= self.end:
            return self.final
        done = (position - self.warmup) / (self.end - self.warmup)
        left = (1 + math.cos(math.pi * done)) / 2 if self.shape == "cosine" else 1 - done
        return self.final + (self.peak - self.final) * left


@dataclass(frozen=True)
class KnownRevision:
    """One revision of a published run."""

    stage: Stage
    step: int
    ingredient: str

    @property
    def num_tokens(self) -> int:
        """Tokens of this stage seen so far, exactly; the revision's name rounds them."""
        return self.step * self.stage.batch_tokens

    @cached_property
    def learning_rate(self) -> float:
        """Rate of the update that follows."""
        return self.stage.learning_rate(self.step)

    @property
    def states_url(self) -> str | None:
        """Directory that may hold the optimizer state of this step."""
        if self.stage.states is None:
            return None
        return self.stage.states.format(step=self.step, ingredient=self.ingredient)


def known_revision(repo: str, revision: str | None) -> KnownRevision | None:
    """What is known of a hub revision; None for other repositories, and for `main`."""
    for stage in KNOWN_STAGES.get(repo, ()):
        match = re.fullmatch(stage.revisions, revision or "")
        if match is not None:
            groups = match.groupdict()
            return KnownRevision(stage, int(groups["step"]), groups.get("ingredient") or "")
    return None


def _cosine_stage(source: str, run: str, peak: float, batch_sequences: int) -> Stage:
    """Stage 1 of the first trainer: every size has the same warm-up and horizon in tokens."""
    return Stage(
        revisions=_STAGE_1,
        source=f"allenai/OLMo configs/{source}",
        batch_sequences=batch_sequences,
        shape="cosine",
        peak=peak,
        final=0.1 * peak,
        warmup=8_388_608_000,
        end=5_000_000_000_000,
        in_tokens=True,
        states=f"{_HOST}/{run}/step{{step}}-unsharded/",
    )


def _anneal_stage(
    source: str, states: str, peak: float, batch_sequences: int, tokens: int, ingredients: str
) -> Stage:
    """Stage 2 of the first trainer: a line to 0, whose end is rounded down to whole steps."""
    return Stage(
        revisions=_STAGE_2.format(ingredients),
        source=f"allenai/OLMo configs/{source}",
        batch_sequences=batch_sequences,
        peak=peak,
        end=tokens // (batch_sequences * _SEQUENCE),
        states=f"{_HOST}/{states}_stage2_ingredient{{ingredient}}/step{{step}}-unsharded/",
    )


def _stages_32b() -> tuple[Stage, ...]:
    """OLMo-core rounds its horizons up to whole steps; stage 2 begins where stage 1 stopped."""
    source, batch = "allenai/OLMo-core src/scripts/official/OLMo2/OLMo-2-0325-32B", 2048
    batch_tokens = batch * _SEQUENCE
    first = Stage(
        revisions=_STAGE_1,
        source=f"{source}-train.py",
        batch_sequences=batch,
        shape="cosine",
        peak=6e-4,
        final=0.1 * 6e-4,
        warmup=2000,
        end=math.ceil(6_500_000_000_000 / batch_tokens),
    )
    # The script takes the rate the optimizer was saved with, that of the last step taken.
    left_off = first.learning_rate(721_901 - 1)
    return (
        first,
        *(
            Stage(
                revisions=_STAGE_2.format(ingredients),
                source=f"{source}-anneal.py",
                batch_sequences=batch,
                peak=left_off,
                end=math.ceil(tokens / batch_tokens),
            )
            for ingredients, tokens in (("[12]", 100_000_000_000), ("3", 300_000_000_000))
        ),
    )


KNOWN_STAGES: dict[str, tuple[Stage, ...]] = {
    "allenai/OLMo-2-0425-1B": (
        _cosine_stage("official-0425/OLMo2-1B-stage1.yaml", "peteish1", 4e-4, 512),
        _anneal_stage(
            "official-0425/OLMo2-1B-stage2-seed*.yaml",
            "peteish1/stage2/olmo2-1b-0425",
            7.4487e-5,
            512,
            50_000_000_000,
            "[123]",
        ),
    ),
    "allenai/OLMo-2-1124-7B": (
        _cosine_stage("official-1124/OLMo2-7B-stage1.yaml", "peteish7", 3e-4, 1024),
        _anneal_stage(
            "official-1124/OLMo2-7B-stage2-seed*.yaml",
            "peteish7/stage2/olmo-7b-1124",
            6.1499e-5,
            1024,
            50_000_000_000,
            "[123]",
        ),
    ),
    "allenai/OLMo-2-1124-13B": (
        # The config's own peak, 3e-4, was overridden by the launch script.
        _cosine_stage(
            "official-1124/OLMo2-13B-stage1.yaml, scripts/augusta/peteish13-highlr-launch.sh",
            "peteish13",
            9e-4,
            2048,
        ),
        _anneal_stage(
            "official-1124/OLMo2-13B-stage2-seed*-100B.yaml",
            "peteish13/stage2/olmo-13b-1124",
            9e-5,
            2048,
            100_000_000_000,
            "[123]",
        ),
        _anneal_stage(
            "official-1124/OLMo2-13B-stage2-seed2662-300B.yaml",
            "peteish13/stage2/olmo-13b-1124",
            9e-5,
            2048,
            300_000_000_000,
            "4",
        ),
    ),
    "allenai/OLMo-2-0325-32B": _stages_32b(),
}
