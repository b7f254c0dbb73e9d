"""What mkdocs asks of us beyond the pages of docs/: pages that stand elsewhere in the repository, and the command line.

Links between Markdown files are those of the repository, so that they work where its files are read; on the site they
lead to the pages that are made of these files.
"""

from __future__ import annotations

import argparse
import posixpath
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {  # of the site, made of files outside docs/
    "index.md": "README.md",
    "results.md": "benchmarks/results/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
COMMANDS = "<!-- the commands, from their parsers -->"
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


# ---- mkdocs


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    name = page.file.src_uri
    markdown = "\n".join(lead_to_pages(line, PAGES.get(name, f"docs/{name}")) for line in markdown.split("\n"))
    return markdown.replace(COMMANDS, command_line()) if COMMANDS in markdown else markdown


def lead_to_pages(line: str, source: str) -> str:
    """A line of a file of the repository, with links that lead to files made links that lead to pages."""
    pages = {file: page for page, file in PAGES.items()}

    def lead(match: re.Match[str]) -> str:
        begin, target, end = match.groups()
        if re.match(r"[a-z]+:", target):
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        return f"{begin}{pages.get(file, file.removeprefix('docs/'))}{end}"

    return LINK.sub(lead, line)


# ---- The command line


def command_line() -> str:
    """Markdown for every command of the parser."""
    sys.path[:0] = [folder for folder in (str(ROOT), str(ROOT / "python")) if folder not in sys.path]
    from specbranch.cli.main import build_parser

    return "\n\n".join(_command(name, parser) for name, parser in commands(build_parser()).items())


def commands(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    (found,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return found.choices


def _command(name: str, parser: argparse.ArgumentParser) -> str:
    rows, drafting = [], False
    for group in parser._action_groups:
        if group.title == "drafting":  # one table for all commands
            drafting = True
            continue
        for action in group._group_actions:
            if not isinstance(action, argparse._HelpAction):
                rows.append(f"| {_switches(action)} | {_cell(_help(parser, action))} |")
    parts = [f"## specbranch {name}", parser.description or ""]
    if rows:
        parts.append("\n".join(["| option | what it says |", "|---|---|", *rows]))
    if drafting:
        parts.append("And the [switches of the methods](settings.md#switches-of-the-methods).")
    return "\n\n".join(parts)


def _switches(action: argparse.Action) -> str:
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        value = ""
    elif action.metavar is not None:
        value = f" {action.metavar}"
    elif action.choices is not None:
        value = f" {'|'.join(map(str, action.choices))}"
    else:
        value = f" {action.dest.upper()}"
    if not action.option_strings:
        return f"`{value.strip()}`"
    return ", ".join(f"`{switch}{value}`" for switch in action.option_strings)


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    notes = ["required"] if action.required and action.option_strings else []
    notes += ["several may follow"] if action.nargs == "+" else []
    return f"{text} ({', '.join(notes)})" if notes else text


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
