"""Text from elsewhere on a terminal: names, errors and logs must not steer it.

A job's name or a rank's last words may hold escape sequences, which would set a terminal's title or
clipboard, or draw over what else is said. Rich's own styles are made after this, and stay.
"""

from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.measure import Measurement
from rich.segment import Segment

from clients.cli.conventions import without_controls

if TYPE_CHECKING:
    from rich.console import RenderableType


class _Plain:
    def __init__(self, renderable: "RenderableType") -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._renderable, options):
            is_ours = segment.control is not None
            yield segment if is_ours else Segment(without_controls(segment.text), segment.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self._renderable)


class PlainText(RenderHook):
    """A render hook for `Console.push_render_hook`."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """The same, with plain text in them."""
        return [_Plain(renderable) for renderable in renderables]
