"""The command `probe`: the groups of commands, put together.

from clients.cli.main import main
main(["list", "--json"])
"""

from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from clients.cli import (
    data,
    doctor,
    jobs,
    keys,
    prune,
    results,
    run,
    sources,
    transfer,
    up,
    watch,
    workers,
)
from clients.cli.conventions import ProbeGroup, example
from probe import __version__

_HELP = (
    "Measure the critical sharpness of language model checkpoints.\n\n"
    "Results go to stdout, progress and messages to stderr. "
    "Exit codes: 0 measured, 1 failed, 2 bad input, 3 ran but some point has no eta_c."
)

app = typer.Typer(
    cls=ProbeGroup,
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # ProbeGroup reports them
    epilog=example("probe up", "probe submit configs/demo-series.yaml --watch"),
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"probe {__version__}")
        raise typer.Exit


@app.callback(help=_HELP)
def probe(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error. May stand anywhere.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print and end."),
    ] = False,
) -> None:
    """The options of the root command; its help is `_HELP`."""


# In the order of `--help`: run the service, use it, look around.
up.register(app)
run.register(app)
jobs.register(app)
workers.register(app)
prune.register(app)
watch.register(app)
results.register(app)
transfer.register(app)
sources.register(app)
app.add_typer(data.app, name="data")
app.add_typer(keys.app, name="keys")
doctor.register(app)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line and end the process with its exit code."""
    command = typer.main.get_command(app)
    command.main(None if arguments is None else list(arguments), prog_name="probe")
    raise AssertionError("ProbeGroup.main ends the process")


if __name__ == "__main__":
    main()
