"""The task `json`: records from the standard library's tables, to be returned as objects that share their keys."""

from __future__ import annotations

import calendar
import colorsys
import csv
import html.entities
import inspect
import io
import ipaddress
import mimetypes
import operator
import token
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus

from stdlib_texts import prompts_of

from specbranch.text.prompts import Prompt

Row = tuple[object, ...]

ENTITIES = "copy reg euro pound yen sect para deg plusmn times divide infin ne le ge"
OPERATORS = "add sub mul truediv floordiv mod pow lshift rshift and_ or_ xor lt le eq ne"
ENDINGS = ".html .css .csv .txt .xml .json .pdf .zip .tar .png .jpg .gif .svg .mp3 .mp4 .mpeg"
SIGNS = "( ) [ ] : , ; + - * / | & < > = . % == !="


@dataclass(frozen=True)
class Table:
    """Records, and the keys of the objects that are to be made of them.

    pattern: of the sentence that tells a record; without one, they are CSV.
    """

    name: str
    about: str
    keys: tuple[str, ...]
    rows: Callable[[], Sequence[Row]]
    pattern: str = ""

    def prompt(self) -> tuple[str, str]:
        rows = self.rows()
        keys = ", ".join(f'"{key}"' for key in self.keys)
        return self.name, (
            f"{self.about}\n\n{self.lines(rows)}\n\nReturn these {len(rows)} records as a JSON array of objects, in "
            f"the same order. Each object has the keys {keys}. Numbers are JSON numbers, everything else is text as it "
            "stands above. Answer with the array and nothing else."
        )

    def lines(self, rows: Sequence[Row]) -> str:
        if self.pattern:
            return "\n".join(self.pattern.format(*row) for row in rows)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.keys, *rows])
        return text.getvalue().rstrip("\n")


def statuses() -> Sequence[Row]:
    codes = (200, 201, 202, 203, 204, 205, 206, 300, 301, 302, 303, 304, 307, 308)
    return [(each.value, each.phrase, each.description) for each in map(HTTPStatus, codes)]


def entities() -> Sequence[Row]:
    points = [(name, html.entities.name2codepoint[name]) for name in ENTITIES.split()]
    return [(name, point, unicodedata.name(chr(point))) for name, point in points]


def months() -> Sequence[Row]:
    year = 2024
    facts = [(month, *calendar.monthrange(year, month)) for month in range(1, 13)]
    return [(calendar.month_name[month], month, days, calendar.day_name[first]) for month, first, days in facts]


def chess() -> Sequence[Row]:
    return [(f"U+{point:04X}", chr(point), unicodedata.name(chr(point))) for point in range(0x2654, 0x2660)]


def operators() -> Sequence[Row]:
    documented = [
        (name, (getattr(operator, name).__doc__ or "").removeprefix("Same as ")) for name in OPERATORS.split()
    ]
    return [(name, expression.rstrip(".")) for name, expression in documented]


def colours() -> Sequence[Row]:
    values = {
        "black": (0, 0, 0),
        "maroon": (128, 0, 0),
        "green": (0, 128, 0),
        "navy": (0, 0, 128),
        "red": (255, 0, 0),
        "lime": (0, 255, 0),
        "blue": (0, 0, 255),
        "orange": (255, 165, 0),
        "yellow": (255, 255, 0),
        "teal": (0, 128, 128),
        "white": (255, 255, 255),
    }
    return [(name, *rgb, *hsv(*rgb)) for name, rgb in values.items()]


def hsv(red: int, green: int, blue: int) -> tuple[int, int, int]:
    """Degrees, percent, percent."""
    hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    return round(hue * 360), round(saturation * 100), round(value * 100)


def media_types() -> Sequence[Row]:
    """By the built-in table; a machine's own files do not count."""
    known = mimetypes.MimeTypes().types_map[True]
    return [(ending, *known[ending].split("/")) for ending in ENDINGS.split()]


def tokens() -> Sequence[Row]:
    return [(sign, token.tok_name[token.EXACT_TOKEN_TYPES[sign]], len(sign)) for sign in SIGNS.split()]


def networks() -> Sequence[Row]:
    names = (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.2.0/24", "192.168.0.0/16", "198.18.0.0/15", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
    )
    known = [ipaddress.IPv4Network(name) for name in names]
    return [(str(each), str(each[0]), str(each[-1]), each.num_addresses) for each in known]


def errors() -> Sequence[Row]:
    kinds: tuple[type[Exception], ...] = (
        *(ZeroDivisionError, OverflowError, IndexError, KeyError, FileExistsError),
        *(FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, TimeoutError, ConnectionError),
        *(BrokenPipeError, ConnectionResetError, RecursionError, NotImplementedError, UnicodeError),
    )
    return [(kind.__name__, kind.__mro__[1].__name__, inspect.cleandoc(kind.__doc__ or "")) for kind in kinds]


TABLES = (
    Table("statuses", "HTTP status codes:", ("code", "phrase", "description"), statuses, "{0} means {1}. {2}"),
    Table(
        "months",
        "The months of 2024:",
        ("name", "number", "days", "first_weekday"),
        months,
        "{0} is month {1}: it has {2} days and begins on a {3}.",
    ),
    Table("entities", "Some of HTML's named characters, as CSV:", ("entity", "codepoint", "unicode_name"), entities),
    Table(
        "colours",
        "Colours with their parts and their hue, saturation and value, as CSV:",
        ("name", "red", "green", "blue", "hue", "saturation", "value"),
        colours,
    ),
    Table(
        "chess", "The chess pieces in Unicode:", ("codepoint", "character", "unicode_name"), chess, "{0} {1} is the {2}"
    ),
    Table("errors", "Python's exceptions:", ("name", "base", "meaning"), errors, "{0}, a subclass of {1}: {2}"),
    Table("networks", "Networks that are set apart, as CSV:", ("network", "first", "last", "addresses"), networks),
    Table(
        "operators", "Functions of Python's module operator:", ("function", "expression"), operators, "{0} computes {1}"
    ),
    Table(
        "media_types",
        "Endings of files, and the two parts of their media type, as CSV:",
        ("ending", "type", "subtype"),
        media_types,
    ),
    Table(
        "tokens",
        "Python's tokens that are made of signs:",
        ("sign", "token", "length"),
        tokens,
        "{0} is called {1}; its length is {2}",
    ),
)


def tables() -> Iterator[Prompt]:
    return prompts_of("json", [table.prompt for table in TABLES])
