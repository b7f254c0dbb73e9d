"""Look-ups in texts: the longest end of a text that occurs earlier, in it or in others, and what followed it there.

Compiled (csrc/retrieval), and described in _planning.pyi.
"""

from __future__ import annotations

from specbranch.core import _planning

DEPTH = 64  # tokens by which prefixes are ordered and contexts matched

SuffixIndex = _planning.SuffixIndex
Continuations = _planning.Continuations
continuations = _planning.continuations
