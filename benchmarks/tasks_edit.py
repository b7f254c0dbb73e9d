"""The task `edit`: a function of the standard library, to be written again as a whole with one change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stdlib_texts import ChangedSource, function_of, prompts_of

from specbranch.text.prompts import Prompt


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
    return prompts_of("edit", [edit.prompt for edit in EDITS])
