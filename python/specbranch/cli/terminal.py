"""What a terminal shows while something runs: on stderr, and nothing at all when it is not a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the parser needs no rich
    import rich.progress
    from rich.console import Console

FILE_WIDTH = 100  # columns of a table that goes to a file or a pipe, where COLUMNS says nothing else


def output_console() -> Console:
    """The console for tables on stdout: as wide as the terminal, or as COLUMNS says, or else FILE_WIDTH."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            """As for every other output: `specbranch.cli.main.main` ends quietly (rich would exit with 1)."""
            raise BrokenPipeError

    return Output(width=None if sys.stdout.isatty() else output_width())


def output_width() -> int:
    """Columns of what is printed to stdout."""
    if (columns := os.environ.get("COLUMNS", "")).isdecimal() and int(columns) > 0:
        return int(columns)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or FILE_WIDTH
    except (OSError, ValueError):  # a file, a pipe, or nothing of the operating system's
        return FILE_WIDTH


@contextmanager
def status(message: str) -> Iterator[None]:
    """A spinner with `message`."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(f"{message} …"):
            yield
    else:
        yield


class Progress:
    """A progress bar over a known number of items."""

    def __init__(self, bar: rich.progress.Progress, total: int) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=total)
        self.started = 0  # items

    def next(self, what: str) -> None:
        """An item starts; `what` is shown beside the bar."""
        self.started += 1
        self._bar.update(self._task, description=what)

    def after(self, what: str) -> None:
        """An item starts, and the one before it, if there is one, is finished."""
        if self.started:
            self.done()
        self.next(what)

    def done(self) -> None:
        """The item that started last is finished."""
        self._bar.advance(self._task)


@contextmanager
def progress(total: int, *, shown: bool = True) -> Iterator[Progress]:
    """Progress over `total` items; `shown=False` when stdout shows text on the same terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    hidden = not (shown and console.is_terminal)
    with Bar(*columns, console=console, transient=True, disable=hidden) as bar:
        yield Progress(bar, total)
