"""Bugs planted in the source: a function is compiled again with one piece of its text replaced."""

from __future__ import annotations
import __future__

import inspect
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest


class Bug(NamedTuple):
    """In `function` (a module's, or "Class.method"), `right` becomes `wrong`; then a check says `symptom`."""

    module: str
    function: str
    right: str
    wrong: str
    symptom: str

    @property
    def name(self) -> str:
        return f"{self.function.strip('_')}: {self.symptom}"


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """The package with this bug in it, wherever the function is known by name."""
    module = sys.modules[bug.module]
    owner_name, _, name = bug.function.rpartition(".")
    owner: Any = getattr(module, owner_name) if owner_name else module
    source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    assert source.count(bug.right) == 1, f"{bug.function} no longer has one {bug.right!r}: plant the bug elsewhere"
    source = source.replace(bug.right, bug.wrong)
    made: dict[str, Any] = {}
    flags = __future__.annotations.compiler_flag
    exec(compile(source, f"<{bug.function} with a bug>", "exec", flags=flags), vars(module), made)
    with pytest.MonkeyPatch.context() as patch:
        if owner_name:
            patch.setattr(owner, name, made[name])
        else:
            right = getattr(module, name)
            for each in list(sys.modules.values()):
                if each.__name__.startswith("specbranch.") and vars(each).get(name) is right:
                    patch.setattr(each, name, made[name])
        yield
