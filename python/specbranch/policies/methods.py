"""All methods by name."""

from __future__ import annotations

from specbranch.core.errors import SpecBranchError
from specbranch.policies.branching import PaperSpecBranch, SpecBranch, Ssd
from specbranch.policies.chain import Adaptive, Autoregressive, Pearl, Speculative
from specbranch.policies.policy import Policy

POLICIES: dict[str, type] = {
    policy.name: policy for policy in (Autoregressive, Speculative, Adaptive, Pearl, Ssd, PaperSpecBranch, SpecBranch)
}
METHODS = tuple(POLICIES)


def make_policy(method: str, options: dict[str, object]) -> Policy:
    """The policy of a method, with those of `options` that it takes.

    Raises SpecBranchError for an unknown method or an option that no method takes.
    """
    if method not in POLICIES:
        raise SpecBranchError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    known = {name for policy in POLICIES.values() for name in getattr(policy, "__dataclass_fields__", ())}
    if unknown := sorted(set(options) - known):
        raise SpecBranchError(f"unknown option {unknown[0]!r}; expected one of {', '.join(sorted(known))}")
    fields = getattr(POLICIES[method], "__dataclass_fields__", ())
    policy: Policy = POLICIES[method](**{name: value for name, value in options.items() if name in fields})
    return policy
