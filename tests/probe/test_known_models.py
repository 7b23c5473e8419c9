"""Published runs: rates from the formulas, checked against the numbers other files state."""

import math

import pytest

from probe.known_models import KNOWN_STAGES, known_revision

ONE_B, SEVEN_B = "allenai/OLMo-2-0425-1B", "allenai/OLMo-2-1124-7B"
THIRTEEN_B, THIRTY_TWO_B = "allenai/OLMo-2-1124-13B", "allenai/OLMo-2-0325-32B"
HOST = "https://olmo-checkpoints.org/ai2-llm"


def found(repo, revision):
    known = known_revision(repo, revision)
    assert known is not None
    return known


def cosine(peak, position, warmup, end):
    floor = 0.1 * peak
    return (
        floor + (peak - floor) * (1 + math.cos(math.pi * (position - warmup) / (end - warmup))) / 2
    )


@pytest.mark.parametrize(
    ("repo", "revision", "expected"),
    [
        # warm-up: a line from 0 to the peak over 8,388,608,000 tokens (2000 steps of the 7B)
        (SEVEN_B, "stage1-step0-tokens0B", 3e-4 / 2000),
        (SEVEN_B, "stage1-step150-tokens1B", 3e-4 * 151 / 2000),
        (SEVEN_B, "stage1-step1999-tokens9B", 3e-4),
        (ONE_B, "stage1-step1999-tokens5B", 4e-4 / 2),
        (
            SEVEN_B,
            "stage1-step600000-tokens2517B",
            cosine(3e-4, 600_001 * 1024 * 4096, 2000 * 1024 * 4096, 5e12),
        ),
        (THIRTY_TWO_B, "stage1-step400000-tokens3356B", cosine(6e-4, 400_001, 2000, 774_861)),
        # stage 2: a line to 0 over 50e9 tokens, in whole steps of 1024 * 4096
        (SEVEN_B, "stage2-ingredient2-step5959-tokens25B", 6.1499e-5 / 2),
        (SEVEN_B, "stage2-ingredient1-step11931-tokens50B", 0.0),
        (THIRTEEN_B, "stage2-ingredient4-step17880-tokens150B", 9e-5 / 2),
        (THIRTEEN_B, "stage2-ingredient1-step5959-tokens50B", 9e-5 / 2),
    ],
)
def test_learning_rate_of_the_update_after_a_revision(repo, revision, expected):
    assert found(repo, revision).learning_rate == pytest.approx(expected, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize(
    ("repo", "last_of_stage_1", "first_of_stage_2", "rel"),
    [
        (ONE_B, "stage1-step1907359-tokens4001B", 7.4487e-5, 1e-5),
        (SEVEN_B, "stage1-step928646-tokens3896B", 6.1499e-5, 3e-3),
        (THIRTEEN_B, "stage1-step596057-tokens5001B", 9e-5, 1e-12),
    ],
)
def test_stage_1_ends_where_the_published_stage_2_begins(
    repo, last_of_stage_1, first_of_stage_2, rel
):
    """Two files written by their authors at different times: a wrong peak or horizon shows."""
    assert found(repo, last_of_stage_1).learning_rate == pytest.approx(first_of_stage_2, rel=rel)


@pytest.mark.parametrize(
    ("repo", "revision"),
    [
        (ONE_B, "stage2-ingredient3-step23852-tokens51B"),
        (SEVEN_B, "stage2-ingredient3-step11931-tokens50B"),
        (THIRTEEN_B, "stage2-ingredient3-step11931-tokens100B"),
        (THIRTEEN_B, "stage2-ingredient4-step35773-tokens300B"),
        (THIRTY_TWO_B, "stage2-ingredient1-step11921-tokens101B"),
        (THIRTY_TWO_B, "stage2-ingredient3-step35763-tokens301B"),
    ],
)
def test_the_last_revision_of_every_stage_2_lies_at_the_end_of_its_decay(repo, revision):
    known = found(repo, revision)
    assert known.learning_rate == 0
    assert 0 <= known.step - known.stage.end <= 11  # stop_at: round(tokens / batch) + 10


@pytest.mark.parametrize(
    ("repo", "revision", "tokens"),
    [
        (SEVEN_B, "stage1-step928646-tokens3896B", 928_646 * 1024 * 4096),
        (ONE_B, "stage1-step1907359-tokens4001B", 1_907_359 * 512 * 4096),
        (THIRTEEN_B, "stage1-step596057-tokens5001B", 596_057 * 2048 * 4096),
        (THIRTY_TWO_B, "stage1-step721901-tokens6056B", 721_901 * 2048 * 4096),
    ],
)
def test_tokens_are_exact_where_the_name_rounds_up(repo, revision, tokens):
    known = found(repo, revision)
    assert known.num_tokens == tokens
    assert f"tokens{math.ceil(tokens / 10**9)}B" in revision


@pytest.mark.parametrize(
    ("repo", "revision"),
    [
        (SEVEN_B, "main"),
        (SEVEN_B, None),
        (SEVEN_B, "stage2-ingredient4-step1000-tokens5B"),
        ("someone/OLMo-2-1124-7B", "stage1-step150-tokens1B"),
    ],
)
def test_everything_else_is_not_known(repo, revision):
    assert known_revision(repo, revision) is None


@pytest.mark.parametrize(
    ("repo", "revision", "url"),
    [
        (SEVEN_B, "stage1-step150-tokens1B", f"{HOST}/peteish7/step150-unsharded/"),
        (
            THIRTEEN_B,
            "stage2-ingredient4-step1000-tokens9B",
            f"{HOST}/peteish13/stage2/olmo-13b-1124_stage2_ingredient4/step1000-unsharded/",
        ),
        (
            ONE_B,
            "stage2-ingredient2-step23852-tokens51B",
            f"{HOST}/peteish1/stage2/olmo2-1b-0425_stage2_ingredient2/step23852-unsharded/",
        ),
        (THIRTY_TWO_B, "stage1-step1000-tokens9B", None),
    ],
)
def test_where_optimizer_states_are_published(repo, revision, url):
    assert found(repo, revision).states_url == url


def test_every_stage_names_its_source():
    for stages in KNOWN_STAGES.values():
        for stage in stages:
            assert stage.source.startswith("allenai/OLMo")
            assert stage.sequence_length == 4096
