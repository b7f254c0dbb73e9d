"""Prompts made from Python's standard library: its functions, its documentation and its tables.

Every source is known by its name and is the same text from Python 3.10 to 3.13. Where another Python has changed it so
that a prompt would make no sense, that prompt is left out, and stderr says so.
"""

from __future__ import annotations

import ast
import calendar
import codecs
import colorsys
import csv
import functools
import html.entities
import importlib.util
import inspect
import io
import ipaddress
import mimetypes
import operator
import sys
import textwrap
import token
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from importlib.abc import InspectLoader

from specbranch.text.prompts import Prompt


class ChangedSource(Exception):
    """This Python's standard library lacks what a prompt is about; the message names it."""


@functools.cache
def source_of(module: str) -> str:
    """A module's text, without importing it: `this` would print."""
    spec = importlib.util.find_spec(module)
    text = spec.loader.get_source(module) if spec and isinstance(spec.loader, InspectLoader) else None
    if text is None:
        raise ChangedSource(f"{module}: this Python has no source of it")
    return text


def node_of(module: str, name: str) -> ast.FunctionDef | ast.ClassDef:
    """The definition with a dotted name, also where it is conditional."""
    scope: ast.Module | ast.FunctionDef | ast.ClassDef = ast.parse(source_of(module))
    for part in name.split("."):
        found = next((node for node in definitions(scope.body) if node.name == part), None)
        if found is None:
            raise ChangedSource(f"{module}.{name}: not there in this Python")
        scope = found
    assert not isinstance(scope, ast.Module)
    return scope


def definitions(body: Sequence[ast.stmt]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node
        elif isinstance(node, ast.If | ast.Try):
            yield from definitions([*node.body, *node.orelse])


def function_of(module: str, name: str) -> str:
    """The text of a function with its decorators, not indented."""
    node = node_of(module, name)
    first = min(each.lineno for each in (node, *node.decorator_list))
    return textwrap.dedent("\n".join(source_of(module).splitlines()[first - 1 : node.end_lineno]))


def documentation_of(module: str, name: str = "") -> str:
    """A docstring as `inspect.getdoc` gives it."""
    text = ast.get_docstring(node_of(module, name) if name else ast.parse(source_of(module)))
    if text is None:
        raise ChangedSource(f"{module}.{name}".rstrip(".") + ": has no documentation in this Python")
    return text


def constant_of(module: str, name: str) -> str:
    """A module's variable that is a text."""
    for node in ast.parse(source_of(module)).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            return str(ast.literal_eval(node.value))
    raise ChangedSource(f"{module}.{name}: not there in this Python")


def kept(task: str, make: Callable[[], tuple[str, str]]) -> Iterator[Prompt]:
    """The prompt, or none and a word on stderr."""
    try:
        name, text = make()
    except ChangedSource as error:
        print(f"{task}: a prompt is left out: {error}", file=sys.stderr)
    else:
        yield Prompt(f"{task}/{name}", text, True, task)


@dataclass(frozen=True)
class Edit:
    """A change to a function.

    concerns: what stands in the function and the change is about.
    """

    module: str
    function: str
    concerns: str
    change: str

    def prompt(self) -> tuple[str, str]:
        code = function_of(self.module, self.function)
        name = f"{self.module}.{self.function}"
        if self.concerns not in code:
            raise ChangedSource(f"{name}: {self.concerns!r} is not in it in this Python")
        return name, (
            f"Here is the function `{self.function}` of Python's module `{self.module}`:\n\n```python\n{code}\n```\n\n"
            f"Rewrite the whole function with this change: {self.change} Everything else stays as it is, comments "
            "included. Answer with the complete function in one fenced code block, and with nothing else."
        )


EDITS = (
    Edit(
        "statistics",
        "median",
        "no median for empty data",
        "add a keyword-only argument `default=None`. Where the data is empty and `default` is not None, return "
        "`default` instead of raising StatisticsError. Say so in the docstring.",
    ),
    Edit(
        "cmd",
        "Cmd.columnize",
        "def columnize(self, list,",
        "the parameter `list` hides the built-in type. Rename it to `items` wherever it is used, also in the message "
        "of the TypeError.",
    ),
    Edit(
        "shlex",
        "shlex.get_token",
        'print("shlex: popping token "',
        "replace every `print` by a call of `logger.debug` under the same condition, with the token passed as an "
        "argument for `%r` instead of being added to the text. There is a module-level `logger` already.",
    ),
    Edit(
        "colorsys",
        "yiq_to_rgb",
        "def yiq_to_rgb(y, i, q):",
        "add type hints (the parameters are floats, the result is a tuple of three floats) and a docstring of one "
        "sentence.",
    ),
    Edit(
        "graphlib",
        "TopologicalSorter.done",
        "assert False",
        "replace the `assert False` by raising a RuntimeError with the same message.",
    ),
    Edit(
        "statistics",
        "harmonic_mean",
        "def harmonic_mean(data,",
        "rename the parameter `data` to `values` wherever it is used, and where the docstring means the parameter. "
        "The messages of the errors stay as they are.",
    ),
    Edit(
        "filecmp",
        "dircmp.report",
        "print('diff', self.left, self.right)",
        "add a parameter `file=None` and pass it on to every `print` as `file=file`.",
    ),
    Edit(
        "difflib",
        "get_close_matches",
        "s.set_seq2(word)",
        "add a keyword-only argument `ignore_case=False`. If it is true, the word and the possibilities are compared "
        "in lower case, and what is returned are the possibilities as they were given. Describe the argument in the "
        "docstring as the others are described.",
    ),
    Edit(
        "ipaddress",
        "_BaseV6._compress_hextets",
        "best_doublecolon_start",
        "rename the variables: `doublecolon_start` to `start`, `doublecolon_len` to `length`, and in the same way "
        "`best_doublecolon_start`, `best_doublecolon_len` and `best_doublecolon_end` to `best_start`, `best_length` "
        "and `best_end`.",
    ),
    Edit(
        "operator",
        "length_hint",
        "type(default).__name__)",
        "write the two messages that are formatted with `%` as f-strings.",
    ),
    Edit(
        "configparser",
        "RawConfigParser.read",
        "except OSError:",
        "add a keyword-only argument `missing_ok=True`. If it is false, a file that cannot be opened is not ignored: "
        "the OSError is raised again. Describe it in the docstring.",
    ),
    Edit(
        "getopt",
        "long_has_args",
        "assert len(possibilities) == 1",
        "replace the `assert` by a check that raises a ValueError, whose message names `opt` and the possibilities.",
    ),
    Edit(
        "calendar",
        "TextCalendar.formatyear",
        "theyear, w=2, l=1, c=6, m=3",
        "give the parameters longer names: `w` becomes `width`, `l` becomes `lines`, `c` becomes `spacing` and `m` "
        "becomes `columns`. The other variables keep their names.",
    ),
    Edit(
        "html",
        "_replace_charref",
        "s = s.group(1)",
        "call the parameter `match` instead of `s` (the name `s` remains for its first group), add type hints, and "
        "a docstring that says what is returned for numeric and for named references.",
    ),
    Edit(
        "textwrap",
        "dedent",
        "if 0 and margin:",
        "remove the sanity check that never runs, with the comment above it, and add type hints for the parameter and "
        "the result.",
    ),
    Edit(
        "sched",
        "scheduler.run",
        "delayfunc(0)   # Let other threads run",
        "add a parameter `limit=None`. If it is not None, return as soon as that many actions have been run. Describe "
        "it in the docstring.",
    ),
    Edit(
        "random",
        "Random.vonmisesvariate",
        "if kappa <= 1e-6:",
        "add type hints (`mu` and `kappa` are floats, as is the result), and raise a ValueError that names the value "
        "if `kappa` is negative.",
    ),
    Edit(
        "compileall",
        "_walk_dir",
        "print('Listing {!r}...'.format(dir))",
        "replace the two calls of `print` by `logger.info` and, where the folder cannot be listed, `logger.warning`, "
        "under the same conditions and with the folder passed as an argument for `%r`. There is a module-level "
        "`logger` already.",
    ),
    Edit(
        "configparser",
        "BasicInterpolation._interpolate_some",
        'p = rest.find("%")',
        "give the variables of one letter longer names: `p` becomes `position`, `c` becomes `following`, `m` becomes "
        "`match` and `v` becomes `value`, also in the comment.",
    ),
    Edit(
        "filecmp",
        "cmp",
        "outcome = _cache.get((f1, f2, s1, s2))",
        "add a keyword-only argument `use_cache=True`. If it is false, the files are compared without looking into "
        "the cache and the outcome is not stored there. Describe it in the docstring under the arguments.",
    ),
    Edit(
        "statistics",
        "mode",
        "except IndexError:",
        "instead of catching the IndexError, raise the StatisticsError where `pairs` is empty, before it is indexed.",
    ),
    Edit(
        "xml.sax.saxutils",
        "quoteattr",
        "entities={}):",
        "the default of `entities` becomes None, which stands for no further entities, and both parameters and the "
        "result get type hints.",
    ),
    Edit(
        "heapq",
        "nsmallest",
        "top, _order, _elem = result[0]",
        "rename the variable `elem` to `item` wherever it is used, and `_elem` to `_item`.",
    ),
    Edit(
        "urllib.parse",
        "parse_qs",
        "parsed_result[name] = [value]",
        "in the loop use `setdefault` instead of asking whether the name is there already, and rename "
        "`parsed_result` to `values_of`.",
    ),
)


def edits() -> Iterator[Prompt]:
    for edit in EDITS:
        yield from kept("edit", edit.prompt)


@dataclass(frozen=True)
class Quote:
    """A passage and what of it is to be said again.

    where: `module`, `module:definition` for a docstring, `module=variable` for a text in a variable.
    first, last: how its first and its last paragraph begin; empty: those of the whole text.
    """

    name: str
    where: str
    first: str
    last: str
    task: str

    def prompt(self) -> tuple[str, str]:
        passage = self.passage()
        return self.name, f"Here is a passage:\n\n---\n{passage}\n---\n\n{self.task}"

    def passage(self) -> str:
        if "=" in self.where:
            text = constant_of(*self.where.split("=", 1))
            text = codecs.decode(text, "rot13") if self.where.startswith("this=") else text
        else:
            text = documentation_of(*self.where.split(":", 1))
        paragraphs = text.strip().split("\n\n")
        begin = self._find(paragraphs, self.first) if self.first else 0
        end = self._find(paragraphs, self.last) if self.last else len(paragraphs) - 1
        return "\n\n".join(paragraphs[begin : end + 1]).strip("\n")

    def _find(self, paragraphs: Sequence[str], beginning: str) -> int:
        for index, paragraph in enumerate(paragraphs):
            if paragraph.strip().startswith(beginning):
                return index
        raise ChangedSource(f"{self.where}: no paragraph begins with {beginning!r} in this Python")


QUOTES = (
    Quote(
        "heap_invariant",
        "heapq=__about__",
        "If this heap invariant",
        "Various structures",
        "Repeat the passage word by word, then say in one sentence what it is about.",
    ),
    Quote(
        "disk_sorts",
        "heapq=__about__",
        "Heaps are also very useful",
        "In a word",
        "Quote the first two paragraphs of the passage word by word, then say in your own words what the last says.",
    ),
    Quote(
        "zen",
        "this=s",
        "",
        "",
        "Give the passage as a numbered list with an item for each line below the title, each line word by word.",
    ),
    Quote(
        "wrapping_options",
        "textwrap:TextWrapper",
        "",
        "",
        "List every option whose default is true, each with its description, copied word by word from the passage.",
    ),
    Quote(
        "argparse_classes",
        "argparse",
        "The module contains",
        "All other classes",
        "Repeat the list of classes word by word, but as a Markdown list with the names of the classes in bold.",
    ),
    Quote(
        "shelve_cache",
        "shelve",
        "Normally, d[key]",
        "However, using keyword",
        "Extract all sentences that mention the cache or writeback, word by word and in the order of the passage.",
    ),
    Quote(
        "timeit_options",
        "timeit",
        "This module avoids",
        "Note: there is",
        "Copy the list of options exactly as it stands in the passage, and then, word by word, the two paragraphs that "
        "follow it. Then add a command line that uses three of the options.",
    ),
    Quote(
        "sequence_matcher",
        "difflib:SequenceMatcher",
        "SequenceMatcher is a flexible",
        "SequenceMatcher tries",
        "Give the passage as a Markdown quotation: the same lines, each with `> ` before it.",
    ),
    Quote(
        "doctest",
        "doctest",
        "Then running the module",
        "There are a variety",
        "Give the paragraphs of the passage in reverse order, the last one first, each of them word by word.",
    ),
    Quote(
        "logging_options",
        "logging:basicConfig",
        "This function does nothing",
        "filename  Specifies",
        "Make a Markdown table with two columns, the argument and its description, of the arguments in the passage. "
        "Copy every description word by word.",
    ),
    Quote(
        "disassembly",
        "pickletools:dis",
        "'pickle' is a file-like",
        "",
        "Correct nothing and shorten nothing: write the passage again word by word, with the name of each argument in "
        "backquotes instead of single quotes.",
    ),
    Quote(
        "scheduler",
        "sched:scheduler.run",
        "",
        "",
        "Repeat the passage word by word up to its last paragraph, and write that one anew in simpler words.",
    ),
)


def quotes() -> Iterator[Prompt]:
    for quote in QUOTES:
        yield from kept("quote", quote.prompt)


Row = tuple[object, ...]


@dataclass(frozen=True)
class Table:
    """Records that are told as lines, each by a pattern, or as CSV where there is none."""

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
    names = (
        "copy",
        "reg",
        "euro",
        "pound",
        "yen",
        "sect",
        "para",
        "deg",
        "plusmn",
        "times",
        "divide",
        "infin",
        "ne",
        "le",
        "ge",
    )
    points = [(name, html.entities.name2codepoint[name]) for name in names]
    return [(name, point, unicodedata.name(chr(point))) for name, point in points]


def months() -> Sequence[Row]:
    year = 2024
    facts = [(month, *calendar.monthrange(year, month)) for month in range(1, 13)]
    return [(calendar.month_name[month], month, days, calendar.day_name[first]) for month, first, days in facts]


def chess() -> Sequence[Row]:
    return [(f"U+{point:04X}", chr(point), unicodedata.name(chr(point))) for point in range(0x2654, 0x2660)]


def operators() -> Sequence[Row]:
    names = (
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "lshift",
        "rshift",
        "and_",
        "or_",
        "xor",
        "lt",
        "le",
        "eq",
        "ne",
    )
    documented = [(name, (getattr(operator, name).__doc__ or "").removeprefix("Same as ")) for name in names]
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
    endings = (
        ".html",
        ".css",
        ".csv",
        ".txt",
        ".xml",
        ".json",
        ".pdf",
        ".zip",
        ".tar",
        ".png",
        ".jpg",
        ".gif",
        ".svg",
        ".mp3",
        ".mp4",
        ".mpeg",
    )
    return [(ending, *known[ending].split("/")) for ending in endings]


def tokens() -> Sequence[Row]:
    signs = (
        "(",
        ")",
        "[",
        "]",
        ":",
        ",",
        ";",
        "+",
        "-",
        "*",
        "/",
        "|",
        "&",
        "<",
        ">",
        "=",
        ".",
        "%",
        "==",
        "!=",
        "<=",
        ">=",
        "~",
        "^",
    )
    return [(sign, token.tok_name[token.EXACT_TOKEN_TYPES[sign]], len(sign)) for sign in signs[:20]]


def networks() -> Sequence[Row]:
    names = (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.2.0/24", "192.168.0.0/16", "198.18.0.0/15", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
    )
    known = [ipaddress.IPv4Network(name) for name in names]
    return [(str(each), str(each[0]), str(each[-1]), each.num_addresses) for each in known]


def errors() -> Sequence[Row]:
    kinds: tuple[type[Exception], ...] = (
        *(ZeroDivisionError, OverflowError, FloatingPointError, IndexError, KeyError, FileExistsError),
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
    for table in TABLES:
        yield from kept("json", table.prompt)


TASKS: dict[str, Callable[[], Iterator[Prompt]]] = {"edit": edits, "quote": quotes, "json": tables}
