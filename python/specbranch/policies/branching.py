"""Policies with branches: SpecBranch, its paper's settings, and SSD's fixed fan-out. One code, different settings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush, heapreplace

from specbranch.core.tree import Choice, Tree
from specbranch.policies.options import Options, inherited, option
from specbranch.policies.outcomes import Anywhere, AtBranchPoint, BelowTrunk, BesideTrunk, Outcomes
from specbranch.policies.policy import (
    NOTHING,
    Expansion,
    InFlight,
    State,
    TrunkChoice,
    extend,
    forced_in,
    whole_path,
)

FIRST_STEP = 1.15  # the first draft step counts 15 % more than its token: it also tells whether a second one pays


class Branching(ABC):
    """What the policies with branches share: how the draft is used while the target verifies."""

    batch: int
    max_depth: int
    min_reach: float
    overlaps = True
    may_retrieve = True

    @property
    @abstractmethod
    def outcomes(self) -> Outcomes:
        """What the draft prepares for."""

    def draft_during(self, tree: Tree, flight: InFlight, state: State) -> Expansion:
        """The likeliest outcomes that the draft has not run over, while a row for one pays."""
        depth = min(self.max_depth, state.remaining - 1)  # no deeper token can be committed
        choices: list[Choice] = []
        anywhere, step, row = self.outcomes.anywhere, state.costs.draft.of(1), state.costs.draft.per_row
        for reach, choice in self.outcomes.likeliest(tree, flight, self.batch, depth):
            # An outcome pays for one more row where it saves a step if it comes true.
            if reach < self.min_reach or (choices and anywhere and reach * step <= row):
                break
            if anywhere and not self._worth_a_row(tree, choice, choices, row / max(step, 1e-9)):
                continue
            choices.append(choice)
        return Expansion(choices, min(state.burst, max(1, depth - tree.deepest(choices))))

    def _worth_a_row(self, tree: Tree, choice: Choice, chosen: list[Choice], row: float) -> bool:
        """Whether the draft is to run over a place whose next token is retrieved: that saves a step only if the target
        goes on with another one. row: what it takes, in steps."""
        if choice.rank >= 0:
            return True
        node = choice.node
        above = tree.parent[node]
        if above >= 0 and Choice(above) not in chosen and not tree.read([Choice(above)]):
            return False  # and so what is above it would be
        child = max((tree.reach[child] for child in tree.children[node]), default=0.0)
        return child == 0.0 or tree.reach[node] - child > row

    def width(self, tree: Tree, node: int, flight: InFlight | None) -> int:
        return self.outcomes.width(tree, node, flight)


@dataclass(frozen=True)
class Hedging(Options, Branching):
    """SpecBranch (arXiv 2506.01979) and past it: while the target verifies, the draft prepares for several outcomes.

    hedge: where. "any": wherever an outcome is likely enough to pay for its row. "point": at one branch point, the
    first token with less confidence than epsilon (the paper). "fan": beside every trunk token (SSD). "none": below the
    trunk's end only.
    """

    hedge: str = option(
        "any", "where the draft branches while the target verifies", choices=("any", "point", "fan", "none")
    )
    epsilon: float = option(
        0.7,
        "confidence below which a token is unsure, for --hedge point, --no-verify-tail, --no-thrifty",
        least=0,
        most=1,
    )
    k_max: int = option(6, "most branches at a point", least=1)
    fan: int = option(2, "candidates beside each trunk token", least=1)
    batch: int = option(8, "most nodes in a draft step", least=1)
    siblings: int = option(8, "most tokens verified beside the best path", least=0)
    max_trunk: int = option(12, "most tokens drafted before the target is asked", least=1)
    max_depth: int = option(32, "deepest token drafted while the target verifies", least=1)
    verify_tail: bool = option(True, "verify what was drafted behind the branch point too")
    calibrate: bool = option(True, "correct the draft's confidence by what the verdicts say")
    thrifty: bool = option(True, "draft while a token is worth its step, by measured costs; else while it is sure")
    min_reach: float = option(
        0.0, "least probability of being accepted for a token to be drafted or verified", least=0, most=1
    )
    decide_by_forecast: bool = option(False, "let H-RAD's class choose the branch point, with --hrad")
    name = "specbranch"

    @property
    def candidates(self) -> int:
        return max(self.k_max, self.fan + 1)

    @property
    def calibrated(self) -> bool:
        return self.calibrate

    @property
    def uses_forecast(self) -> bool:
        return self.calibrate or self.decide_by_forecast

    @cached_property
    def outcomes(self) -> Outcomes:
        rules: dict[str, Outcomes] = {
            "any": Anywhere(self.k_max),
            "point": AtBranchPoint(self.k_max),
            "fan": BesideTrunk(self.fan),
            "none": BelowTrunk(),
        }
        return rules[self.hedge]

    def draft_before(self, tree: Tree, state: State) -> Expansion:
        """Draft on while the next token is worth more, by its chance to be accepted, than its step costs."""
        path = tree.best_choices()
        read = tree.read(path)
        if state.overlapped and read:
            return NOTHING  # after a hit there is a trunk: let the target start at once
        if not self.thrifty:
            return extend(tree, path, self.max_trunk, state.remaining) if self._sure(tree, path) else NOTHING
        depth = min(self.max_trunk + forced_in(tree, path), state.remaining - 1)
        ahead = path[read:]
        return Expansion(ahead[: self._worth_a_step(tree.reaches(ahead), depth - read, not read, state)])

    def choose_trunk(self, tree: Tree, state: State) -> TrunkChoice:
        """The best path as far as its rows pay, and what pays beside it."""
        path = tree.best_choices()[: state.remaining]
        if self.thrifty:
            least = self._least(state)
            path = path[: 1 + _run_length(tree.reaches(path[1:]), least)]
        point = self._branch_point(tree, path, state)
        if not self.verify_tail:
            return TrunkChoice(path[: point + 1], point)
        return TrunkChoice(path + self._siblings(tree, path, path[point].node, state), point)

    def _siblings(self, tree: Tree, path: list[Choice], branch_point: int, state: State) -> list[Choice]:
        """Outcomes beside the path and below those, likeliest first, while their rows pay: the trunk's other part."""
        found: list[tuple[float, Choice]] = []  # (-reach, choice)
        best = [self._least(state)] * self.siblings  # the greatest chances so far, the least of them first
        chosen = set(path)
        reach_of, depth_of = tree.reach, tree.depth

        def look_below(node: int) -> None:
            ranks = self.outcomes.ranks(tree, node, branch_point)
            if not ranks or reach_of[node] <= best[0] or depth_of[node] + 1 >= state.remaining:
                return
            ranks = ranks if depth_of[node] < self.max_depth else 0
            for reach, choice in tree.offers(node, ranks, best[0]):
                if reach > best[0] and choice not in chosen:
                    heappush(found, (-reach, choice))
                    heapreplace(best, reach)

        siblings: list[Choice] = []
        if self.siblings:
            for choice in path:
                if choice.rank < 0:
                    look_below(choice.node)
        while found and len(siblings) < self.siblings:
            _, choice = heappop(found)
            siblings.append(choice)
            chosen.add(choice)
            if choice.rank < 0:
                look_below(choice.node)
        return siblings

    def _branch_point(self, tree: Tree, path: list[Choice], state: State) -> int:
        """The place in the path behind which the draft is unsure."""
        if self.decide_by_forecast and state.forecast is not None:
            if state.forecast.likeliest == "none":
                return 0
            if state.forecast.likeliest == "all":
                return len(path) - 1
        return _run_length(tree.chances(path[1:]), self.epsilon)

    def _worth_a_step(self, reaches: list[float], most: int, first: bool, state: State) -> int:
        """At how many places, in order and at most so many, the next step is to be; 0 where it is not worth a step.
        reaches: of the rest of the best path, over which the draft has not run; first: nor over its root.

        A step brings a token, if the draft is right, where a retrieved one is wrong or there is none. That token takes
        a row of the target's forward; where it replaces a wrong one, the rows planned behind that are saved.
        """
        if first and (state.retry or state.losing):
            return int(state.retry and most > 0 and bool(reaches))
        row_price, last = state.costs.row_price, len(reaches) - 1
        planned = _run_length(reaches, self._least(state)) - 1  # the last place that the target is to judge
        reaches = [*reaches, 0.0]
        best, count, saved = 0.0, 0, 0.0
        for place in range(min(most, last + 1)):
            if place < last:
                saved += (reaches[place] - reaches[place + 1]) * (max(0, planned - place) - 1)
            worth = (reaches[0] - reaches[place + 1]) * state.acceptance * (FIRST_STEP if first else 1.0)
            rows = (place == last) - state.acceptance * saved
            profit = worth - state.step_price(place + 1) - row_price * rows
            if profit >= best:
                best, count = profit, place + 1
        return count

    def _sure(self, tree: Tree, path: list[Choice]) -> bool:
        return len(path) == 1 or tree.chance_of(path[-1]) >= self.epsilon

    def _least(self, state: State) -> float:
        """The least chance that is worth a row in the target's forward: what the row costs, in committed tokens."""
        return max(self.min_reach, state.costs.row_price)


@dataclass(frozen=True)
class Paper(Hedging):
    """SpecBranch as its paper describes it: one branch point, the trunk ends there, confidences as the draft says."""

    hedge: str = inherited(Hedging, "hedge", "point")
    verify_tail: bool = inherited(Hedging, "verify_tail", False)
    calibrate: bool = inherited(Hedging, "calibrate", False)
    thrifty: bool = inherited(Hedging, "thrifty", False)
    decide_by_forecast: bool = inherited(Hedging, "decide_by_forecast", True)
    name = "specbranch-paper"
    may_retrieve = False


@dataclass(frozen=True)
class Ssd(Options, Branching):
    """SSD (Saguaro, arXiv 2603.03251): a fixed number of candidates beside every trunk token.

    Without overlap nothing grows beside the trunk, and it drafts `length` tokens first.
    """

    fan: int = option(2, "candidates beside each trunk token", least=1)
    length: int = option(5, "tokens drafted a round", least=1)
    batch: int = option(24, "most nodes in a draft step", least=1)
    max_depth: int = option(32, "deepest token drafted while the target verifies", least=1)
    name = "ssd"
    calibrated = False
    thrifty = False
    uses_forecast = False
    min_reach = 0.0

    @property
    def candidates(self) -> int:
        return max(Hedging().candidates, self.fan + 1)  # confidence is among the candidates: as many as SpecBranch's

    @cached_property
    def outcomes(self) -> Outcomes:
        return BesideTrunk(self.fan)

    def draft_before(self, tree: Tree, state: State) -> Expansion:
        path = tree.best_choices()
        if state.overlapped and len(path) > 1:
            return NOTHING
        return extend(tree, path, self.length, state.remaining, state.burst)

    def choose_trunk(self, tree: Tree, state: State) -> TrunkChoice:
        return whole_path(tree, state)


def _run_length(chances: list[float], least: float) -> int:
    """How many of the first ones are at least so much."""
    return next((i for i, chance in enumerate(chances) if not chance >= least), len(chances))
