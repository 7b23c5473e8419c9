"""What a stock loader says of a checkpoint, turned into errors of ours."""

from pathlib import Path
from typing import Any

from probe.errors import CheckpointError


def check_report(where: Path, report: dict[str, Any]) -> None:
    """Turn what transformers only warns about into errors.

    Args:
        where: For messages.
        report: What `from_pretrained` gives with `output_loading_info`.

    Raises:
        CheckpointError: A weight is missing, superfluous or of the wrong shape.
    """
    mismatched = sorted(report.get("mismatched_keys") or [])
    if mismatched:
        key, found, expected = mismatched[0][:3]
        raise CheckpointError(
            f"{where}: key {key!r} has shape {list(found)}, expected {list(expected)} "
            f"({len(mismatched)} keys of the wrong shape)"
        )
    missing = sorted(report.get("missing_keys") or [])
    if missing:
        raise CheckpointError(
            f"{where}: {len(missing)} weights the model needs are missing, the first is "
            f"{missing[0]!r}; they would be random. Is config.json of another model?"
        )
    superfluous = sorted(
        key
        for key in report.get("unexpected_keys") or []
        if not key.endswith((".exp_avg", ".exp_avg_sq", ".step"))
    )
    if superfluous:
        raise CheckpointError(
            f"{where}: {len(superfluous)} stored weights have no place in the model, the first "
            f"is {superfluous[0]!r}. Is config.json of another model?"
        )
    errors = [str(error) for error in report.get("error_msgs") or []]
    if errors:
        raise CheckpointError(f"{where}: {errors[0]}")


def first_line(error: BaseException) -> str:
    """The first lines of an error's message, as one; its class where it says nothing."""
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines[:3])
