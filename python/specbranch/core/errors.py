"""What specbranch refuses, and what it warns of."""

from __future__ import annotations


class SpecBranchError(ValueError):
    """Bad input or an unsupported model; the message names the thing and what was expected."""


class SpecBranchWarning(UserWarning):
    """Something works, but not as one may expect; the message names it."""
