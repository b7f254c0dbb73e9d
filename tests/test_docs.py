"""The documentation: its links lead somewhere, its code runs, its commands parse, its messages and figures are real."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import specbranch
import specbranch_ext
from specbranch.cli.main import build_parser
from specbranch.text.generation_config import OWNER

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
RESULTS = ROOT / "benchmarks" / "results" / "README.md"
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *DOCS]}
MARKDOWN = PAGES | {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", RESULTS)
}


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


documentation: Any = load(ROOT / "scripts" / "documentation.py")


def blocks(text: str, language: str) -> list[str]:
    """Those that are not marked: <!-- not run: why -->"""
    return re.findall(rf"(?<!-->\n)^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 120


# ---- Links


def anchors(text: str) -> set[str]:
    """Of its headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", MARKDOWN)
def test_links_lead_to_files_and_headings(name: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", without_code(MARKDOWN[name])):
        if re.match(r"[a-z]+:", target):
            continue
        file = ((ROOT / name).parent / target).resolve() if target else ROOT / name
        assert file.is_file(), f"{name}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{name}: {target}#{anchor}"


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"^ +- .*: ([\w-]+\.md)$", config, re.MULTILINE)
    assert sorted(listed) == sorted([*(path.name for path in DOCS), *documentation.PAGES])


# ---- Code


@pytest.mark.parametrize("name", [name for name, text in PAGES.items() if blocks(text, "python")])
def test_python_runs(name: str) -> None:
    """The blocks of a page, one after the other."""
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks(PAGES[name], "python")):
        exec(compile(block, f"{name}, block {number}", "exec"), names)


def command_lines(text: str) -> list[str]:
    """Of `specbranch`, in the blocks of shell commands."""
    lines = "".join(blocks(text, "sh")).replace("\\\n", " ").split("\n")
    return [" ".join(line.split()) for line in lines if re.match(r"(\w+=\S+ )*specbranch ", line)]


def arguments(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    words = words[words.index("specbranch") + 1 :]
    return words[: words.index(">")] if ">" in words else words


@pytest.mark.parametrize(
    ("name", "line"), [(name, line) for name, text in MARKDOWN.items() for line in command_lines(text)]
)
def test_commands_parse(name: str, line: str) -> None:
    build_parser().parse_args(arguments(line))


def test_there_are_commands_to_parse() -> None:
    assert len(command_lines(PAGES["docs/quick-start.md"])) >= 5


QUICK = [line for line in command_lines(PAGES["docs/quick-start.md"]) if "generate --target bundled" in line]


@pytest.mark.parametrize("line", QUICK, ids=str)
def test_the_quick_start_has_a_text(line: str, tmp_path: Path) -> None:
    """The other commands on the bundled pair have tests of their own in tests/cli."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "specbranch.cli", *arguments(line)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_command_line_page_has_every_option() -> None:
    page = documentation.command_line()
    for name, parser in documentation.commands(build_parser()).items():
        section = page.partition(f"## specbranch {name}\n")[2].partition("\n## ")[0]
        groups = {group.title: group._group_actions for group in parser._action_groups}
        drafting = groups.pop("drafting", [])
        for action in (action for group in groups.values() for action in group if action.dest != "help"):
            for switch in action.option_strings:
                assert re.search(rf"`{switch}[ `]", section), f"{name} {switch}"
        assert ("switches of the methods" in section) == bool(drafting)


# ---- Names, messages, figures


@pytest.mark.parametrize("package", [specbranch, specbranch_ext], ids=lambda package: package.__name__)
def test_the_api_has_every_public_name(package: ModuleType) -> None:
    page, name = PAGES["docs/api.md"], package.__name__
    entries = re.findall(rf"^::: {name}\.(?:\w+\.)*(\w+)$", page, re.MULTILINE)
    assert set(package.__all__) <= {*entries, *re.findall(rf"`{name}\.(\w+)[`(]", page)}


def source() -> str:
    """What makes the messages, with texts that are written in several parts put together."""
    files = [*(ROOT / "python").rglob("*.py"), *(ROOT / "specbranch_ext").rglob("*.py")]
    files += [ROOT / "csrc" / "core" / "isa.cpp", *(ROOT / "cmake").glob("*.cmake")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    return re.sub(r"\"\s*\n\s*f?\"", "", text).replace("{OWNER}", OWNER)


VALUES = r"…|\btarget\b|\bdraft\b|target_|'[a-z]+'|\bllama, qwen2, qwen3\b|no CUDA compiler.*"  # what is filled in


def test_messages_are_those_of_the_source() -> None:
    made = source()
    rows = re.findall(r"^\| (`.*?|warning: .*?) \| ", PAGES["docs/errors.md"], re.MULTILINE)
    assert len(rows) > 40
    for row in rows:
        if "(transformers)" in row:
            continue
        for message in re.findall(r"`([^`]*)`", row):
            for part in re.split(VALUES, message):
                assert len(part.strip()) < 5 or part.strip(" ,:;%") in made, (message, part)


def test_what_the_door_refuses_is_said_so_there() -> None:
    section = PAGES["docs/from-transformers.md"].partition("## What is refused\n")[2].partition("\n## ")[0]
    door = (ROOT / "python" / "specbranch" / "door.py").read_text(encoding="utf-8")
    expected = [
        said
        for row in re.findall(r"^\| .* \| (`.*) \|$", section, re.MULTILINE)
        for said in re.findall(r"`(.*?)`", row)
    ]
    assert len(expected) >= 10
    assert [said for said in expected if f'"{said}"' not in door] == []


def test_the_figures_of_the_readme_are_measured_ones() -> None:
    section = PAGES["README.md"].partition("## Measured\n")[2].partition("\n## ")[0]
    results = RESULTS.read_text(encoding="utf-8")
    figures = re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", section)
    assert len(figures) >= 12
    assert [figure for figure in figures if figure not in results] == []
