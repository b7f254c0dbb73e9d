"""What specbranch refuses, and what it warns of."""

from __future__ import annotations


class SpecBranchError(ValueError):
    """Bad input or an unsupported model; the message names the thing and what was expected."""


class SpecBranchWarning(UserWarning):
    """Something was asked for that will not be as asked; the message names it."""
