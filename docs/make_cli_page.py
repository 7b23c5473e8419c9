"""Write docs/cli.md from the commands' own help; `--check` says whether it is up to date.

python -m docs.make_cli_page
python -m docs.make_cli_page --check
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import typer

from clients.cli.main import app

PAGE = Path(__file__).parent / "cli.md"
_INTRODUCTION = """\
# The command `probe`

Written by `make docs` from the commands' own `--help`: change the text there.
"""


def cli_page() -> str:
    """The whole page as Markdown."""
    root = typer.main.get_command(app)
    return "\n".join([_INTRODUCTION, *_sections(root, None, "probe", level=2)]).rstrip() + "\n"


def _sections(command: Any, parent: Any, name: str, *, level: int) -> list[str]:
    context = command.context_class(command, parent=parent, info_name=name)
    pieces = " ".join(command.collect_usage_pieces(context))
    lines = [f"{'#' * level} `{context.command_path}`", ""]
    lines += ["```", f"{context.command_path} {pieces}", "```", "", command.help or "", ""]
    lines += _parameters(command, context)
    lines += _example(command.epilog or "")
    for child in getattr(command, "commands", {}).values():
        lines += _sections(child, context, child.name, level=level + 1)
    return lines


def _parameters(command: Any, context: Any) -> list[str]:
    records = [p.get_help_record(context) for p in command.get_params(context)]
    cells = [(names.strip(), " ".join(text.split())) for names, text in filter(None, records)]
    rows = [f"| `{names}` | {text} |" for names, text in _escaped(cells)]
    return ["| | |", "|---|---|", *rows, ""] if rows else []


def _escaped(cells: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(names.replace("|", "\\|"), text.replace("|", "\\|")) for names, text in cells]


def _example(epilog: str) -> list[str]:
    """The epilog's command lines; `example` put "Example:" before them."""
    _, *lines = epilog.splitlines() or [""]
    return ["```sh", *(line.strip() for line in lines), "```", ""] if lines else []


def main() -> int:
    """Write or check the page; 1 when it is out of date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    page = cli_page()
    if not parser.parse_args().check:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page:
        return 0
    sys.stderr.write(f"{PAGE.name} is out of date: run `make docs`\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
