"""The task `quote`: a passage of the standard library's documentation, long parts of which are to be said again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stdlib_texts import ChangedSource, docstring_of, prompts_of, variable_of

from specbranch.text.prompts import Prompt


@dataclass(frozen=True)
class Quote:
    """A passage and what is to be done with it.

    where: `module`, `module:definition` for its docstring, `module=variable` for a text in a variable.
    first, last: how its first and its last paragraph begin; empty: those of the whole text.
    """

    name: str
    where: str
    first: str
    last: str
    request: str

    def prompt(self) -> tuple[str, str]:
        return self.name, f"Here is a passage:\n\n---\n{self.passage()}\n---\n\n{self.request}"

    def passage(self) -> str:
        text = variable_of(*self.where.split("=")) if "=" in self.where else docstring_of(*self.where.split(":"))
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
        "Quote the last two paragraphs of the passage word by word, then go on with one more paragraph in its style.",
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
        "",
        "",
        "Give the paragraphs of the passage in reverse order, the last one first, each of them word by word.",
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
        "command_conventions",
        "cmd",
        "Interpreters constructed",
        "The `completedefault'",
        "Repeat the seven numbered conventions word by word, each followed by a line that begins with `Example:` and "
        "shows it on one command.",
    ),
    Quote(
        "parser_attributes",
        "optparse:OptionParser",
        "option_groups",
        "rargs",
        "Make a Markdown table with three columns: each attribute in the passage, its type, and its description. Copy "
        "every description word by word.",
    ),
    Quote(
        "test_case",
        "unittest.case:TestCase",
        "By default, the test code",
        "When subclassing",
        "Write the passage again word by word, with every name of a class, a method or an attribute in backquotes.",
    ),
)


def quotes() -> Iterator[Prompt]:
    return prompts_of("quote", [quote.prompt for quote in QUOTES])
