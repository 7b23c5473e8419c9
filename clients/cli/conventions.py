"""What every command shares: exit codes, errors, options, and where output goes.

Results go to stdout, everything else to stderr. Under `--json` stdout holds JSON and nothing
else. Heavy modules (httpx, rich) are imported where they are used: `probe --help` stays quick.
"""

import contextlib
import inspect
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from pydantic import BaseModel
from typer.core import TyperGroup

from probe.errors import BatchError, CheckpointError, ConfigError, ProbeError
from probe.unit_results import AnyUnitResult

if TYPE_CHECKING:
    from rich.console import Console

    from clients.http import ProbeClient

MEASURED = 0  # every point has its eta_c, or the command had nothing to measure
FAILED = 1
BAD_INPUT = 2
WITHOUT_ANSWER = 3  # it ran, but some point has no eta_c
INTERRUPTED = 130  # as shells count an end by Ctrl-C

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and line feeds
_PIPE_WIDTH = 160  # no terminal, nobody to fit to: wide enough that no table is cut

ServerOption = Annotated[
    str | None,
    typer.Option(
        "--server",
        envvar="PROBE_SERVER",
        metavar="URL",
        help="Address of the server; default: http://127.0.0.1:8765.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON to stdout, and nothing else.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a field of the file: measurement.repeats=3. Repeatable.",
    ),
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        help="Merge this entry of the file's `presets` into it; --set comes after.",
        show_default=False,
    ),
]
JobArgument = Annotated[
    str, typer.Argument(metavar="ID", help="Id of the job, or its last characters.")
]


class InputError(ConfigError):
    """An argument of the command line is wrong."""

    code = "bad_input"


class CommandError(ProbeError):
    """A command could not do its work, though its input was right."""

    code = "command_failed"


class ProbeGroup(TyperGroup):
    """The root command: turns every exception into one message and an exit code."""

    def main(self, args: Any = None, *rest: Any, **extra: Any) -> NoReturn:
        """Run a command line; ends the process. `--debug` may stand anywhere before a `--`."""
        words = list(sys.argv[1:] if args is None else args)
        own = words[: words.index("--")] if "--" in words else words
        debug = "--debug" in own
        if debug:
            words = ["--debug"] + [w for w in own if w != "--debug"] + words[len(own) :]
        extra["standalone_mode"] = False
        try:
            status = super().main(words, *rest, **extra)
        except (Exception, KeyboardInterrupt) as error:
            if debug and not isinstance(error, KeyboardInterrupt):
                import traceback

                traceback.print_exc()
            status = _report(error)
        sys.exit(status if isinstance(status, int) else MEASURED)


def _report(error: BaseException) -> int:
    """Say on stderr what went wrong; the exit code it stands for."""
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):  # `probe list | head`: the reader has seen enough
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    if isinstance(error, ProbeError):
        print(without_controls(f"error: {error}"), file=sys.stderr)
        return _exit_code(error)
    if hasattr(error, "format_message"):  # a usage error of Typer: wrong option, missing argument
        message = error.format_message()
        context = getattr(error, "ctx", None)
        hint = f"\nsee `{context.command_path} --help`" if context is not None else ""
        print(without_controls(f"error: {message}{hint}"), file=sys.stderr)
        return BAD_INPUT
    print(
        f"error: unexpected {type(error).__name__}: {error}\n"
        "this is a defect of the program; --debug shows where",
        file=sys.stderr,
    )
    return FAILED


def _exit_code(error: ProbeError) -> int:
    """2 where the caller has to change something first, else 1."""
    is_input = isinstance(error, ConfigError | BatchError | CheckpointError)
    is_refused = getattr(error, "status", None) in (400, 404, 413, 415, 422)
    return BAD_INPUT if (is_input and not error.retryable) or is_refused else FAILED


def example(*lines: str) -> str:
    """The example that ends a command's help, one command line per line."""
    return "\n".join(["Example:", *(f"  {line}" for line in lines)])


def add_command(
    app: typer.Typer,
    function: Callable[..., None],
    *examples: str,
    name: str | None = None,
    context_settings: dict[Any, Any] | None = None,
) -> None:
    """Make a function a command: its docstring is the help, the first sentence the short one."""
    text = inspect.cleandoc(function.__doc__ or "")
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    first = re.split(r"(?<=[.:;])\s", paragraphs[0])[0].rstrip(":;.")
    app.command(
        name,
        help="\n\n".join(paragraphs),
        short_help=f"{first}.",
        epilog=example(*examples),
        context_settings=context_settings,
    )(function)


def connect(server: str | None) -> "ProbeClient":
    """A client of the server that the options and the environment name."""
    from clients.http import ProbeClient

    return ProbeClient(server)


def find_job_id(client: "ProbeClient", part: str) -> str:
    """The full id of the one job with this id, or of the one recent job whose id ends so.

    Ids begin with the time, so their ends are what tells recent jobs apart.

    Raises:
        InputError: Several of the latest 100 jobs end so.
        NotFoundError: None does.
    """
    from clients.errors import NotFoundError

    try:
        return client.job(part).id
    except NotFoundError:
        recent = [job.id for job in client.jobs(limit=100).data]
        matches = [job_id for job_id in recent if part and job_id.endswith(part)]
        if len(matches) > 1:
            shown = ", ".join(matches[:5])
            raise InputError(f"{part!r} ends several job ids: {shown}") from None
        if not matches:
            raise
        return matches[0]


def print_json(value: Any) -> None:
    """Models and plain values as JSON on stdout, indented, non-ASCII kept."""
    print(json.dumps(_jsonable(value), indent=2, ensure_ascii=False))


def print_json_line(value: Any) -> None:
    """One JSON value on one line of stdout, flushed: for streams."""
    print(json.dumps(_jsonable(value), ensure_ascii=False), flush=True)


def _jsonable(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    return value


def stdout_console() -> "Console":
    """Where tables go: as wide as the terminal, or wide enough for everything in a pipe."""
    from rich.console import Console

    from clients.cli.plain_text import PlainText

    fixed = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if fixed else _PIPE_WIDTH, highlight=False)
    console.push_render_hook(PlainText())
    return console


def stderr_console() -> "Console":
    """Where progress and remarks go."""
    from rich.console import Console

    from clients.cli.plain_text import PlainText

    fixed = sys.stderr.isatty() or "COLUMNS" in os.environ
    console = Console(
        stderr=True, width=None if fixed else _PIPE_WIDTH, highlight=False, soft_wrap=not fixed
    )
    console.push_render_hook(PlainText())
    return console


def without_controls(text: str) -> str:
    """The text with a replacement character for everything a terminal would obey."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def say(message: str) -> None:
    """One line on stderr."""
    print(without_controls(message), file=sys.stderr, flush=True)


def exit_code_for(results: Iterable[AnyUnitResult]) -> int:
    """0 where every measurement has its eta_c and no run diverged, else 3."""
    return MEASURED if all(r.has_every_answer for r in results) else WITHOUT_ANSWER
