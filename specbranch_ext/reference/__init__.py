"""The ops again, in plain torch: readable, slow, and the definition that every kernel must reproduce.

Each op's is the function of its name in the module of its name, with the same arguments and results.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .. import ops

if TYPE_CHECKING:
    from ..ops import *  # noqa: F403

for _op in (name for name in ops.__all__ if name.islower()):
    globals()[_op] = getattr(import_module(f".{_op}", __name__), _op)
