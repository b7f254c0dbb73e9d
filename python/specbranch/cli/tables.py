"""Tables that fit: names fold, figures never do; a table that is too wide goes on below, under the same names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the parser needs no rich
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table

GAP = 2
LEAST_KEY, LEAST_TEXT = 16, 22  # columns for what may fold, where all of it needs more; a method fits
FEWEST = 4  # of them beside a figure that leaves no room


@dataclass(frozen=True)
class Column:
    """least: the narrowest that it may become; None for figures, which stay whole."""

    heading: str
    cells: list[str]
    least: int | None = None

    @property
    def natural(self) -> int:
        from rich.cells import cell_len

        return max(cell_len(line) for text in (self.heading, *self.cells) for line in text.split("\n"))

    @property
    def narrowest(self) -> int:
        return self.natural if self.least is None else min(self.least, self.natural)


@dataclass(frozen=True)
class FoldedTable:
    """keys: name the rows, and are repeated where the table goes on. sections: rows with a line above them. bold: rows
    that stand out."""

    title: str
    keys: list[Column]
    columns: list[Column]
    sections: Collection[int] = ()
    bold: Collection[int] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        yield Text(self.title, style="table.title", overflow="fold")
        for number, columns in enumerate(self.parts(options.max_width)):
            if number:
                yield ""
            yield self._part([*self.keys, *columns], options.max_width)

    def parts(self, width: int) -> list[list[Column]]:
        """The columns beside the keys, of each table that is shown."""
        room = width - sum(key.narrowest + GAP for key in self.keys) + GAP
        parts: list[list[Column]] = [[]]
        left = room
        for column in self.columns:
            left -= column.narrowest + GAP
            if left < 0 and parts[-1]:
                parts.append([])
                left = room - column.narrowest - GAP
            parts[-1].append(column)
        return parts

    def _part(self, columns: Sequence[Column], width: int) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        view = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
        for column, share in zip(columns, _shares(columns, width), strict=True):
            view.add_column(
                Text(column.heading), justify="left" if column.least else "right", overflow="fold", width=share
            )
        for row, cells in enumerate(zip(*(column.cells for column in columns), strict=True)):
            if row in self.sections:
                view.add_section()
            view.add_row(*map(Text, cells), style="bold" if row in self.bold else None)
        return view


def key(heading: str, cells: Iterable[str]) -> Column:
    return Column(heading, list(cells), LEAST_KEY)


def text(heading: str, cells: Iterable[str]) -> Column:
    return Column(heading, list(cells), LEAST_TEXT)


def figures(heading: str, cells: Iterable[str]) -> Column:
    return Column(heading, list(cells))


def _shares(columns: Sequence[Column], width: int) -> list[int]:
    """How wide each is shown: what there is beyond the narrowest goes to those that fold, the first one first, and what
    is lacking comes from them."""
    shares = [column.narrowest for column in columns]
    left = width - sum(shares) - GAP * (len(columns) - 1)
    for place, column in enumerate(columns):
        if column.least is not None:
            share = min(max(shares[place] + left, min(FEWEST, shares[place])), column.natural)
            left -= share - shares[place]
            shares[place] = share
    return shares
