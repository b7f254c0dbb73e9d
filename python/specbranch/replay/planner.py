"""Planning: what every method is expected to give for a recorded pair, and with which settings."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from specbranch.core.stats import ratio
from specbranch.policies.branching import Hedging
from specbranch.policies.methods import METHODS, make_policy
from specbranch.replay.costs import ReplayCosts
from specbranch.replay.record import Record, RecordedText
from specbranch.replay.replayer import replay

# What is tried for each method besides its defaults.
GRIDS: Mapping[str, Mapping[str, Sequence[object]]] = {
    "speculative": {"length": (1, 2, 3, 4, 6, 8, 12)},
    "adaptive": {"stop_below": (0.2, 0.4, 0.6, 0.8), "max_length": (8, 20)},
    "pearl": {"length": (1, 2, 3, 4, 6, 8, 12)},
    "ssd": {"fan": (1, 2, 3), "length": (2, 4, 8)},
    "specbranch-paper": {"epsilon": (0.3, 0.5, 0.7, 0.9), "max_trunk": (4, 12)},
    "specbranch": {"batch": (4, 8, 16), "max_trunk": (6, 12, 20)},
}
MODES: Mapping[str, bool] = {"serial": False, "overlapped": True}


@dataclass(frozen=True)
class Expectation:
    """A method with these settings, replayed.

    tokens_per_second: in the unit of the costs. speedup: over autoregressive decoding. The other figures are as in
    Stats, over all texts. draft, retrieval: where its drafts come from, a model or earlier in the text.
    """

    method: str
    mode: str
    settings: dict[str, object]
    tokens_per_second: float
    speedup: float
    tokens_per_target_forward: float
    rollback_rate: float
    wasted_per_token: float
    draft: bool = True
    retrieval: bool = False


def expect(
    record: Record,
    costs: ReplayCosts,
    method: str,
    mode: str,
    settings: dict[str, object],
    texts: Sequence[RecordedText],
    retrieval: bool = False,
    draft: bool = True,
) -> Expectation:
    """A method replayed over some texts. retrieval: if it may. draft: False leaves the model out."""
    policy = make_policy(method, settings)
    retrieval, draft = retrieval and policy.may_retrieve, draft and policy.candidates > 0
    stats = replay(record, policy, costs, MODES[mode], texts, retrieval=retrieval, draft=draft)
    alone = 1 / costs.serial_target(1)

    tokens = sum(s.new_tokens for s in stats)
    speed = tokens / sum(s.seconds for s in stats)
    rolled_back, kept = sum(s.rolled_back for s in stats), sum(s.accepted + s.hits for s in stats)
    return Expectation(
        method,
        mode,
        settings,
        speed,
        speed / alone,
        tokens / sum(s.target_forwards for s in stats),
        ratio(rolled_back, rolled_back + kept),
        sum(s.wasted for s in stats) / tokens,
        draft,
        retrieval,
    )


def plan(
    record: Record, costs: ReplayCosts, modes: Sequence[str] = tuple(MODES), retrieval: bool = False
) -> Iterator[Expectation]:
    """Every method in every mode: with its defaults, then with the best settings of its grid where they are better.

    The grid is searched on every other text and the winner is replayed over all of them. retrieval: for the methods
    that may, and once alone, without the draft model.
    """
    sample = record.texts[::2]
    for method, mode in itertools.product(METHODS, modes):
        if MODES[mode] and not make_policy(method, {}).overlaps:
            continue
        default = expect(record, costs, method, mode, {}, record.texts, retrieval)
        yield default
        grid = GRIDS.get(method, {})
        choices: list[dict[str, object]] = [
            dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
        ]
        tried = [expect(record, costs, method, mode, settings, sample, retrieval) for settings in choices if settings]
        if tried:
            best = max(tried, key=lambda expectation: expectation.tokens_per_second)
            tuned = expect(record, costs, method, mode, best.settings, record.texts, retrieval)
            if tuned.tokens_per_second > default.tokens_per_second:
                yield tuned
    if retrieval and "serial" in modes:  # without a draft nothing runs beside the target
        yield expect(record, costs, Hedging.name, "serial", {}, record.texts, retrieval=True, draft=False)


def tasks_of(texts: Sequence[RecordedText]) -> list[str]:
    return list(dict.fromkeys(text.task for text in texts))
