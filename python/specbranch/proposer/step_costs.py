"""What a step of the engine takes, with and without drafted tokens, by how many texts are in it.

All seconds are a text's share: those of a step over n texts, divided by n. Then one token more for one text is worth
what a step without drafts takes, and one row more costs what it adds to a step, whatever n is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from specbranch.policies.costs import Costs, ForwardCost
from specbranch.proposer.text import Text

EXACT = 8  # texts up to which every number of them has costs of its own; beyond, numbers within an eighth share some


@dataclass(frozen=True, eq=False)
class Round:
    """From a call of the engine to the next one.

    proposed: for each text in the step, how many tokens. begin, end: of the call. overlapped: the draft went on behind
    it.
    """

    proposed: Mapping[Text, int]
    costs: Costs
    begin: float
    end: float
    overlapped: bool

    def measure(self, now: float, tokens: Mapping[Text, int], accepted: Mapping[Text, int], pure: bool) -> None:
        """It is over. tokens: committed in it, by text; accepted: how many of them were proposed. pure: the step was
        over these texts alone, without a prompt of another."""
        costs, mode = self.costs, self.costs.mode(self.overlapped)
        for text, count in accepted.items():
            costs.record_verdict(count, rejected=count < self.proposed[text])
        if not pure:
            return
        texts, rows = len(self.proposed), sum(self.proposed.values())
        step, seconds = now - self.end, now - self.begin
        mode.target.record(1 + rows / texts, step / texts)
        drafted = [text for text in self.proposed if text.ready]
        if not drafted:
            costs.idle += seconds
            return
        known, plain = mode.target.known, costs.plain
        each = max(0.0, step - plain * texts) / max(rows, 1)  # of a proposed token's row
        for text in drafted:
            own = self.proposed[text]
            gain = (tokens.get(text, 1) - 1) * plain - text.spent - own * each if known else 0.0
            text.saved += gain
            text.backoff.record(text.steps > 0, gain / max(plain, 1e-9), text.retried)
        committed = sum(tokens.values())
        costs.record_drafted(seconds, committed)
        mode.record_round(seconds, committed)


class StepCosts:
    """Costs by the number of texts in a step; those of the draft are the same for all."""

    def __init__(self, size: float) -> None:
        """size: parameters of the draft's forward over those of the target's."""
        self._size = size
        self._by_number: dict[int, Costs] = {}
        self._draft_steps, self._draft_read = ForwardCost(), ForwardCost(skipped=0)

    def of(self, texts: int) -> Costs:
        number = texts
        if texts > EXACT:
            grain = 1 << (texts.bit_length() - 3)
            number = texts // grain * grain
        if number not in self._by_number:
            costs = Costs(self._size)
            costs.serial.draft, costs.draft_read = self._draft_steps, self._draft_read
            self._by_number[number] = costs
        return self._by_number[number]
