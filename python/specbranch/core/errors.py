"""The base class of what specbranch refuses."""

from __future__ import annotations


class SpecBranchError(ValueError):
    """Bad input or an unsupported model; the message names the thing and what was expected."""
