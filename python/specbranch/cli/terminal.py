"""What a terminal shows while something runs: on stderr, and nothing at all when it is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


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


class Steps:
    """A progress bar over a known number of steps."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total)

    def next(self, what: str) -> None:
        """`what` is the step that starts now."""
        self._progress.update(self._task, description=what)

    def done(self) -> None:
        """The step that started last is finished."""
        self._progress.advance(self._task)


@contextmanager
def steps(total: int, *, shown: bool = True) -> Iterator[Steps]:
    """Progress over `total` steps; `shown=False` when stdout shows text on the same terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        yield Steps(progress, total)
