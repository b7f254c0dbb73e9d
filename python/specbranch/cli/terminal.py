"""What a terminal shows while something runs: on stderr, and nothing at all when it is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn


class _Output(Console):
    def on_broken_pipe(self) -> None:
        """As for every other output: `specbranch.cli.main.main` ends quietly (rich would exit with 1)."""
        raise BrokenPipeError


def output_console() -> Console:
    """The console for tables on stdout; 100 columns wide when it is not a terminal."""
    return _Output(width=None if sys.stdout.isatty() else 100)


@contextmanager
def status(message: str) -> Iterator[None]:
    """A spinner with `message`."""
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

    def next(self, what: str) -> None:
        """An item starts; `what` is shown beside the bar."""
        self._bar.update(self._task, description=what)

    def done(self) -> None:
        """The item that started last is finished."""
        self._bar.advance(self._task)


@contextmanager
def progress(total: int, *, shown: bool = True) -> Iterator[Progress]:
    """Progress over `total` items; `shown=False` when stdout shows text on the same terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    hidden = not (shown and console.is_terminal)
    with rich.progress.Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        yield Progress(bar, total)
