"""Texts of Python's standard library by name: functions, docstrings and texts in variables.

They are found, not imported, and read where they are defined: what a module offers may be its twin in C, without text.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import InspectLoader

from specbranch.text.prompts import Prompt


class ChangedSource(Exception):
    """This Python's standard library lacks what a prompt is about; the message names it."""


@functools.cache
def source_of(module: str) -> str:
    """A module's text. Raises ChangedSource where only its bytecode is there, or nothing."""
    try:
        spec = importlib.util.find_spec(module)
        text = spec.loader.get_source(module) if spec and isinstance(spec.loader, InspectLoader) else None
    except ImportError:
        text = None
    if text is None:
        raise ChangedSource(f"{module}: this Python has no source of it")
    return text


def node_of(module: str, name: str) -> ast.FunctionDef | ast.ClassDef:
    """The definition with a dotted name, also where it is conditional."""
    body: Sequence[ast.stmt] = ast.parse(source_of(module)).body
    for part in name.split("."):
        found = next((node for node in definitions(body) if node.name == part), None)
        if found is None:
            raise ChangedSource(f"{module}.{name}: not there in this Python")
        body = found.body
    assert found is not None
    return found


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


def docstring_of(module: str, name: str = "") -> str:
    """A docstring without its indentation, which Python 3.13 no longer keeps."""
    text = ast.get_docstring(node_of(module, name) if name else ast.parse(source_of(module)))
    if text is None:
        raise ChangedSource(f"{module}.{name}".rstrip(".") + ": has no docstring in this Python")
    return text


def variable_of(module: str, name: str) -> str:
    """A module's variable that is a text."""
    for node in ast.parse(source_of(module)).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            return str(ast.literal_eval(node.value))
    raise ChangedSource(f"{module}.{name}: not there in this Python")


def prompts_of(task: str, makers: Sequence[Callable[[], tuple[str, str]]]) -> Iterator[Prompt]:
    """The prompts of a task; stderr says which are left out, because this Python's library has changed.

    makers: each gives a name and what is asked for.
    """
    for make in makers:
        try:
            name, text = make()
        except ChangedSource as error:
            print(f"{task}: a prompt is left out: {error}", file=sys.stderr)
        else:
            yield Prompt(f"{task}/{name}", text, True, task)
