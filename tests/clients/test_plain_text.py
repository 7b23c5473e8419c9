"""What a server tells is shown, never obeyed."""

import pytest
from rich.table import Table
from rich.text import Text

from clients.cli.conventions import say, stderr_console, stdout_console

# Set the title, write the clipboard, clear the screen, go back over the line, an 8-bit CSI.
EVIL = "name\x1b]0;title\x07\x1b]52;c;ZXZpbA==\x07\x1b[2J\r\x9b31m\x08end"


@pytest.mark.parametrize("make_console", [stdout_console, stderr_console])
def test_no_escape_sequence_of_a_name_reaches_the_terminal(make_console, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    console = make_console()
    table = Table("one")
    table.add_row(Text(EVIL))
    console.print(table)
    console.print(Text(EVIL), EVIL)
    written = "".join(capsys.readouterr())
    assert written.count("end") == 3
    assert not set(written) & set("\x07\x08\r\x1b\x9b")


def test_our_own_styles_stay(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    stdout_console().print(Text("\x1b[31mname", style="bold"))
    assert capsys.readouterr().out.startswith("\x1b[1m\N{REPLACEMENT CHARACTER}[31mname\x1b[0m")


def test_remarks_and_errors_are_plain_too(capsys):
    say(EVIL)
    assert not set(capsys.readouterr().err) & set("\x07\x08\r\x1b\x9b")
