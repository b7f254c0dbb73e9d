"""What vLLM does with a proposer, without vLLM: rows of a batch that come, move, wait and go; a target that is right.

The target's greedy texts are known beforehand, so that a verification is a comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import nn

from specbranch import bundled
from specbranch.integrations.vllm import SpecBranchProposer

POSITIONS = 1024


def vllm_config(most: int = 8, **options: Any) -> Any:
    """As much of a VllmConfig as a proposer looks at, with the bundled pair."""
    path = str(bundled.path("target"))
    model = SimpleNamespace(
        model=path, tokenizer=path, trust_remote_code=False, max_model_len=POSITIONS, get_vocab_size=lambda: 2048
    )
    return SimpleNamespace(
        model_config=model,
        speculative_config=SimpleNamespace(num_speculative_tokens=most),
        parallel_config=SimpleNamespace(world_size=1),
        additional_config={"specbranch": {"draft": "bundled", **options}},
    )


def make_proposer(most: int = 8, **options: Any) -> SpecBranchProposer:
    """Loaded. It drafts while it is sure, whatever a step takes on this machine, if nothing else is said."""
    options = {"overlap": "off", "policy": {"thrifty": False}, **options}
    proposer = SpecBranchProposer(vllm_config(most, **options))
    proposer.load_model(nn.Linear(1, 1))
    return proposer


class Request:
    """prompt, and the text that the target gives it. tokens: committed. drafted, taken: proposed tokens, and those of
    them that were right."""

    def __init__(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        self.whole, self.tokens, self.prompt = [*prompt, *answer], list(prompt), len(prompt)
        self.proposal: list[int] = []
        self.drafted, self.taken, self.steps = 0, 0, 0

    @property
    def over(self) -> bool:
        return len(self.tokens) >= len(self.whole)

    def verify(self) -> list[int]:
        """What a step gives: the proposed tokens as far as they are right, and one more."""
        ahead = self.whole[len(self.tokens) :]
        right = 0
        while right < min(len(self.proposal), len(ahead) - 1) and self.proposal[right] == ahead[right]:
            right += 1
        self.drafted, self.taken, self.steps = self.drafted + len(self.proposal), self.taken + right, self.steps + 1
        sampled = ahead[: right + 1]
        self.tokens += sampled
        return sampled


class FakeVllm:
    """Steps over all of `rows` that are not waiting. during: called while the target computes."""

    def __init__(self, proposer: SpecBranchProposer, during: Callable[[int], None] = lambda rows: None) -> None:
        self.proposer, self.during = proposer, during
        self.rows: list[Request] = []
        self._buffer = np.zeros((64, POSITIONS), dtype=np.int32)
        self._lengths = np.zeros(64, dtype=np.int32)

    def step(self, reading: Sequence[Request] = ()) -> list[list[int]]:
        """One step, and what was proposed behind it. reading: rows whose prompts are not read to their ends yet."""
        self.during(sum(1 + len(row.proposal) for row in self.rows))
        sampled = [[] if row in reading else row.verify() for row in self.rows]
        for i, row in enumerate(self.rows):
            self._buffer[i] = -1
            self._buffer[i, : len(row.tokens)] = row.tokens
            self._lengths[i] = len(row.tokens)
        proposals = self.proposer.propose(sampled, self._lengths, self._buffer, slot_mappings=None)
        assert len(proposals) == len(self.rows)
        for row, proposal in zip(self.rows, proposals, strict=True):
            row.proposal = proposal
        self.rows = [row for row in self.rows if not row.over]
        return proposals

    def run(self) -> None:
        while self.rows:
            self.step()
