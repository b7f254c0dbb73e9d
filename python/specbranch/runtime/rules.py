"""Rules of transformers' `generate` beyond temperature and filters: logits processors, stopping criteria, and what a
caller wants to see of each step.

The target follows them as `generate` does: one token after the other, in the order of the text, each rule called once a
token, so that rules with a state of their own are honoured too. Of a verification only the accepted rows are walked.
The draft guesses under the rules whose result depends on their arguments alone, since it asks at texts that may never
be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation import logits_process

from specbranch.constrained import Constrained
from specbranch.core.errors import SpecBranchError
from specbranch.core.generation import TokenLogprob
from specbranch.core.messages import Trunk
from specbranch.core.sampling import Sampling
from specbranch.runtime.modes import no_grad, outside_inference
from specbranch_ext import verify

Processor = Callable[..., Tensor]
Criterion = Callable[..., Any]

# transformers' own whose scores depend on ids and scores alone. (Those that the installed version has.)
STATELESS = tuple(
    getattr(logits_process, name)
    for name in (
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "TemperatureLogitsWarper",
        "RepetitionPenaltyLogitsProcessor",
        "EncoderRepetitionPenaltyLogitsProcessor",
        "TopPLogitsWarper",
        "TopKLogitsWarper",
        "TopHLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "NoRepeatNGramLogitsProcessor",
        "EncoderNoRepeatNGramLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "NoBadWordsLogitsProcessor",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "ExponentialDecayLengthPenalty",
        "LogitNormalization",
        "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
    )
    if hasattr(logits_process, name)
)


def is_stateless(processor: object) -> bool:
    """Whether the draft may call it: one of transformers' own, or one that says `stateless = True`."""
    return type(processor) in STATELESS or getattr(processor, "stateless", False) is True


@dataclass(frozen=True, eq=False)
class Rules:
    """What a caller of `generate` handed over.

    processors: called with ids int64 [1, n] and scores float32 [1, V] before each token; what temperature and filters
    of the sampling do is not among them. warpers: which do that, for the scores that are kept. criteria: called with
    ids and scores behind each token; whether the text ends. keep_logits, keep_scores: of every token. logprobs: how
    many alternatives of each token are wanted with its log-probability; None for neither.
    """

    processors: Sequence[Processor] = ()
    warpers: Sequence[Processor] = ()
    criteria: Sequence[Criterion] = ()
    keep_logits: bool = False
    keep_scores: bool = False
    logprobs: int | None = None

    def __bool__(self) -> bool:
        return bool(self.processors or self.criteria or self.keep_scores or self.looks)

    @property
    def looks(self) -> bool:
        """Whether the logits are wanted as the model gave them."""
        return self.keep_logits or self.logprobs is not None

    @property
    def for_draft(self) -> list[Processor]:
        return [processor for processor in self.processors if is_stateless(processor)]


@dataclass(eq=False)
class Said:
    """What a generation has said so far. logits, scores: of each token, float32 [1, V]. All but the tokens only where
    they are wanted."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)


class Ids:
    """The token ids of one text, int64, growing in place."""

    def __init__(self, ids: Tensor) -> None:
        """ids: [1, n]."""
        self._room = ids.new_empty(1, 2 * ids.shape[1] + 256)
        self.length = 0
        self.add(ids[0])

    @property
    def ids(self) -> Tensor:
        """[1, n]."""
        return self._room[:, : self.length]

    def add(self, tokens: Tensor | Sequence[int]) -> None:
        self.with_tail(tokens)
        self.length += len(tokens)

    def with_tail(self, tokens: Tensor | Sequence[int]) -> Tensor:
        """The ids with some more behind them, [1, n], which stay until the next call."""
        end = self.length + len(tokens)
        if end > self._room.shape[1]:
            grown = self._room.new_empty(1, 2 * end)
            grown[:, : self.length] = self._room[:, : self.length]
            self._room = grown
        if len(tokens):
            self._room[0, self.length : end] = torch.as_tensor(tokens, device=self._room.device)
        return self._room[:, :end]


class Walk:
    """The target's tokens, one after the other, down a trunk whose logits are there. over: whether the text has
    ended."""

    def __init__(
        self,
        rules: Rules,
        ids: Tensor,
        sampling: Sampling,
        ends: Callable[[int], bool],
        said: Said,
        constraint: Constrained | None = None,
    ) -> None:
        """ids: int64 [1, n], the prompt as it was given, padding included. ends: takes a token, and says whether it
        ends the text whatever the criteria say. constraint: which is the last processor."""
        self.constraint = constraint
        self.rules, self.sampling, self.ends, self.said = rules, sampling, ends, said
        self.over = False
        self._ids = Ids(ids)

    @no_grad
    def __call__(self, trunk: Trunk, logits: Tensor) -> tuple[tuple[int, ...], int]:
        """The accepted tokens, as places in the trunk, and the target's token behind them. logits: [n, V]."""
        children = {edge: place for place, edge in enumerate(zip(trunk.parents, trunk.tokens, strict=True))}
        place, path, tokens = 0, list[int](), list[int]()
        while True:
            token = self._take(logits[place], trunk.position + len(path) + 1, tokens)
            child = None if self.over else children.get((place, token))
            if child is None:
                return tuple(path), token
            path.append(child)
            tokens.append(token)
            place = child

    def _take(self, row: Tensor, position: int, behind: Sequence[int]) -> int:
        """The next token. row: logits [V]; position: of the token; behind: tokens that are not committed yet."""
        rules, said, ids = self.rules, self.said, self._ids
        logits = row[None].to(torch.float32, copy=True)
        scores = _process(rules.processors, ids.ids, logits.clone() if rules.looks else logits)
        if not isinstance(scores, Tensor) or scores.shape != logits.shape:
            came = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise SpecBranchError(f"logits_processor gave {came}; expected scores of {list(logits.shape)}")
        if self.constraint is not None:
            allowed = bits_of(self.constraint.allowed(behind), scores)
            scores = scores.masked_fill(~allowed, -torch.inf)
        token = self._sample(scores, position)
        if rules.keep_logits:
            said.logits.append(logits)
        if rules.keep_scores:
            said.scores.append(_process(rules.warpers, ids.ids, scores))
        if rules.logprobs is not None:
            said.logprobs.append(_logprob(logits[0], token, rules.logprobs))
        ids.add([token])
        seen = tuple(said.scores) if rules.keep_scores else None
        self.over = self.ends(token)
        for criterion in rules.criteria:  # all of them, as in transformers: each may count
            self.over |= bool(torch.as_tensor(criterion(ids.ids, seen)).all())
        return token

    def _sample(self, scores: Tensor, position: int) -> int:
        if self.sampling.temperature == 0:  # +inf is a way to force a token
            best = scores.argmax(-1)
            if scores[0, best].isnan().item() or scores[0, best].item() == -torch.inf:
                raise ValueError("target_logits: a row has NaN, or masks every token")
            return int(best)
        one = torch.zeros(1, dtype=torch.int64, device=scores.device)
        verdict = verify(scores.float(), one, one - 1, one + position, **self.sampling.op_arguments)
        token = int(verdict.next_token)
        if token < 0:  # on a device, where a kernel cannot raise
            raise ValueError("target_logits: a row has NaN or +inf, or masks every token")
        return token


def bits_of(mask: bytes, scores: Tensor) -> Tensor:
    """A mask as bool [1, V], where the scores [1, V] are."""
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=scores.shape[1], bitorder="little")
    return torch.from_numpy(bits.astype(bool)).to(scores.device)[None]


def _process(processors: Sequence[Processor], ids: Tensor, scores: Tensor) -> Tensor:
    for processor in processors:
        scores = processor(ids, scores)
    return scores


def _logprob(logits: Tensor, token: int, alternatives: int) -> TokenLogprob:
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(alternatives, len(logits)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)


class DraftRules:
    """What a draft's logits become under the rules, at texts that are guesses."""

    def __init__(self, processors: Sequence[Processor], ids: Tensor, prompt: int, vocabulary: int) -> None:
        """ids: int64 [1, n], the prompt with its padding; prompt: its tokens without. vocabulary: the target's."""
        self._processors, self._vocabulary = processors, vocabulary
        self._ids, self._padding = Ids(ids), ids.shape[1] - prompt

    @outside_inference
    def __call__(self, logits: Tensor, text: Sequence[int], tails: Sequence[Sequence[int]]) -> Tensor:
        """logits: [b, V], of rows behind the committed text and then each behind a tail of its own."""
        self._ids.add(text[self._ids.length - self._padding :])
        rows = torch.full((len(logits), self._vocabulary), -torch.inf, device=logits.device)
        rows[:, : logits.shape[1]] = logits[:, : self._vocabulary]
        for place, tail in enumerate(tails):
            row = rows[place : place + 1]
            guessed = self._guess(self._ids.with_tail(tail), row.clone())
            if guessed is not None:
                row.copy_(guessed)
        return rows

    def _guess(self, ids: Tensor, scores: Tensor) -> Tensor | None:
        """None where rules fail at a text that may never be, or allow nothing there."""
        try:
            guessed = _process(self._processors, ids, scores)
        except Exception:
            return None
        best = guessed.amax()
        return guessed if bool(best.isfinite()) else None
