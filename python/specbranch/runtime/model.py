"""A transformers model with its branch cache: prefill, tree forwards, commit."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from math import ceil

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specbranch.core.errors import SpecBranchError
from specbranch.core.excerpt import NO_GAP
from specbranch.runtime.agreement import check_agreement
from specbranch.runtime.attach import Attachment
from specbranch.runtime.attention import TreeContext, no_mask, run_in
from specbranch.runtime.batch import Batch, Inputs
from specbranch.runtime.cache import TREE_ROWS, BranchCache
from specbranch.runtime.cache_argument import cache_argument
from specbranch.runtime.fused.probe import leave_different
from specbranch.runtime.hrad.tap import FeatureTap
from specbranch.runtime.kept import LEAST, Kept, state_of
from specbranch.runtime.modes import inference
from specbranch.runtime.packed import PackedLinear
from specbranch.runtime.rotary import context_length
from specbranch.runtime.rows.functions import is_plain
from specbranch.runtime.support import check_supported, trying
from specbranch.runtime.weights import execution_device, unwrapped

PREFILL_CHUNK = 256  # rows: enough to be bound by arithmetic, few enough to keep activations small
LARGEST_KEPT = 31 << 20  # bytes: glibc's thresholds follow no block above 32 MB
MOST_TOKENS = 2**62  # no limit


class CachedModel:
    """One of the two models, `role` "target" or "draft", with the K/V of the committed text and of tree nodes."""

    def __init__(self, model: PreTrainedModel, role: str) -> None:
        self.model = model = unwrapped(model, role)
        self.role = role
        self.device = execution_device(model)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.layers = model.config.get_text_config().num_hidden_layers
        self.vocabulary = model.config.get_text_config().vocab_size
        # Nobody asks for a prefill's logits, and a head is as large as some layers together.
        self.prefill_keeps = slice(0, 0) if head_takes_nothing(model) else slice(-1, None)
        self.cache = BranchCache.alone(self.layers, 0, self.device)
        self.cache_argument = cache_argument(type(model))
        self.granularity = 1  # of the cache's capacity: a larger one is made anew less often
        self.tap: FeatureTap | None = None  # what reads its hidden states
        self.prompt_end = -1  # the last position of what was read at once: see `begin`
        self.gap = NO_GAP  # positions of the text that have no rows
        self.kept: Kept | None = None  # of the text before
        self.support, own_logits = check_supported(model, role)
        if own_logits is not None:
            with trying(f"{role} model {type(model).__name__}"):
                leave_different(self)
                check_agreement(self, own_logits)

    def another(self, cache: BranchCache | None = None) -> CachedModel:
        """The same model for another text. cache: rows for it among those of others; None for a cache of its own."""
        fresh = copy.copy(self)
        fresh.cache = BranchCache.alone(self.layers, 0, self.device) if cache is None else cache
        fresh.tap, fresh.kept = None, None
        return fresh

    @contextmanager
    def attached(self, tap: FeatureTap | None = None) -> Iterator[None]:
        """The context in which the forwards below may run. tap: reads hidden states in every one of them."""
        self.tap = tap
        try:
            with Attachment([self.model], tap).attached():
                yield
        finally:
            self.tap = None

    @property
    def hidden(self) -> list[Tensor]:
        """What the tap saw in the newest forward; nothing without one."""
        return [] if self.tap is None else self.tap.newest

    def reset(self, tokens: int, text: Sequence[int] = ()) -> None:
        """Start a new text that takes at most `tokens` rows; the buffers are kept when they are large enough. text: how
        it begins; of that, the rows that are kept are part of the prefix already.

        Raises SpecBranchError when the model's context or the memory is too small.
        """
        self.check(tokens)
        known, self.kept = self.known(text), None
        if self.holds(tokens):
            self.cache.restart(known)
        elif self.cache.is_shared:
            raise SpecBranchError(f"the text has {self.cache.capacity} rows of the cache; expected {rows_for(tokens)}")
        else:
            rows, before = -(-rows_for(tokens) // self.granularity) * self.granularity, self.cache
            if not known:
                before.release()  # there is not always memory for both
            self.cache = BranchCache.alone(self.layers, rows, self.device)
            if known:
                self.cache.adopt(before, known, release=True)
                before.release()
        self.prompt_end, self.gap = -1, NO_GAP

    def keep(self, text: Sequence[int], prompt: int) -> None:
        """Let the rows of a text that is over, from its first token on, serve a text that begins alike. prompt: how
        many of them were read at once."""
        if self.support.by_length or self.support.rereads or len(text) != self.position:
            return  # angles that depend on the prompt's length; an end in the middle of something
        exact = self.role == "draft" or self.device.type == "cpu"
        rows = (self.gap.start if self.gap else len(text)) if exact else prompt - prompt % PREFILL_CHUNK
        self.kept = Kept(text[:rows], state_of(self.model))

    def forget_stale(self) -> None:
        """Keep nothing of another text where the model is another one since."""
        if self.kept is not None and self.kept.state != state_of(self.model):
            self.kept = None

    def known(self, text: Sequence[int]) -> int:
        """How many tokens of a text's beginning are kept."""
        if self.kept is None:
            return 0
        common = self.kept.common(text)
        if self.role == "target" and self.device.type != "cpu":
            common -= common % PREFILL_CHUNK
        return common

    def adopt(self, other: CachedModel, text: Sequence[int]) -> None:
        """Keep what another cache of this model keeps of a text."""
        known = other.known(text)
        if known >= LEAST and other.kept is not None:
            if not self.holds(known):
                self.cache.release()
                self.cache = BranchCache.alone(self.layers, other.cache.capacity, self.device)
            self.cache.adopt(other.cache, known)
            self.kept = Kept(other.kept.tokens[:known], other.kept.state)

    @property
    def joins(self) -> bool:
        """Whether texts may share a forward: not where angles depend on how long a text is."""
        return not (self.support.by_length or self.support.rereads)

    @property
    def context(self) -> int | None:
        """The positions that it is made for; None where its configuration does not say."""
        return context_length(self.model.config.get_text_config())

    def check(self, tokens: int) -> None:
        """Raises SpecBranchError for a text that the model's context is too small for."""
        if self.context is not None and tokens > self.context:
            raise SpecBranchError(
                f"prompt and new tokens together are {tokens} tokens; the {self.role} model's context holds "
                f"{self.context}"
            )

    def holds(self, tokens: int) -> bool:
        """Whether the buffers that are there are large enough for a text of so many tokens."""
        return rows_for(tokens) <= self.cache.capacity

    def prefill(self, tokens: Sequence[int]) -> None:
        """Commit a chain of tokens behind the prefix, in chunks: those before the gap and those behind it are two
        chains. Only the first copy to a device waits for it."""
        self.cache.reserve(len(tokens))
        self._read(tokens, self.cache.length)

    def begin(self, prompt: Sequence[int], gap: range = NO_GAP) -> None:
        """A text begins with `prompt`: where rotary embeddings choose by its length, they choose so for all of it.
        gap: positions that are left out; what is read has its own positions all the same."""
        self.prompt_end, self.gap = len(prompt) - 1, gap

    @property
    def position(self) -> int:
        """Of the token whose row would be the next one of the prefix."""
        return self._position(self.cache.length)

    def _position(self, row: int) -> int:
        return row if row < self.gap.start else row + len(self.gap)

    def may_skip(self, gap: range, tokens: int) -> bool:
        """Whether a text of at most so many tokens may be read without these positions.

        Windows count cache rows. So either the gap is wider than any window, and rows behind it see none before it, or
        the text is shorter than any window.
        """
        windows = self.support.window_sizes
        return not windows or windows[-1] <= len(gap) or tokens <= windows[0]

    @property
    def first_in_window(self) -> int:
        """The first row that a row behind the gap may see through a sliding window."""
        windows = self.support.window_sizes
        return self.gap.start if windows and windows[-1] <= len(self.gap) else 0

    def most_tokens(self, position: int) -> int:
        """How many more tokens a text that ends at `position` may get before `reread` is due."""
        return min(
            (length - 1 - position for length in self.support.rereads if length - 1 > position), default=MOST_TOKENS
        )

    def must_reread(self, position: int) -> bool:
        """Whether transformers reads a text anew by the time that it ends at `position`, and this one was not."""
        return any(self.prompt_end < length - 1 <= position for length in self.support.rereads)

    def reread(self, text: Sequence[int], position: int) -> None:
        """Compute the committed rows anew as transformers does then.

        The rows of tree nodes stay as they are: a draft's guesses, of which the target has none by then.
        """
        due = [length for length in self.support.rereads if length - 1 <= position]
        end = self.position
        self.begin(text[: due[-1]], self.gap)
        self._read(text[: min(self.gap.start, end)], 0)
        self._read(text[self.gap.stop : end], self.gap.start)

    def _read(self, tokens: Sequence[int], start: int) -> None:
        """Write the rows of a chain of tokens from row `start` on, which then belong to the prefix."""
        ids = torch.tensor(self._known(tokens), dtype=torch.int64, device=self.device)
        for chunk in ids.split(PREFILL_CHUNK) if tokens else ():
            behind_gap = start >= self.gap.start
            inputs = Inputs.chain(chunk, start, self._position(start), self.cache.start)
            self.forward(inputs, self.prefill_keeps, behind_gap)
            start += len(chunk)
            self.cache.length = max(self.cache.length, start)

    def place(
        self,
        nodes: Sequence[int],
        parents: Sequence[int],
        tokens: Sequence[int],
        positions: Sequence[int],
        backlog: Sequence[int] = (),
    ) -> Batch:
        """The next forward over tree nodes, whose rows in the cache it takes.

        parents: the node above each, which has a row already or stands earlier in `nodes`; -1 for the root. backlog:
        committed tokens that the cache lacks; they become part of the prefix, in the same forward, and then the root is
        among the nodes and no node has a row.
        """
        cache, prefix, position = self.cache, self.cache.length, self.position
        if backlog and (nodes[0] != 0 or cache.nodes):
            raise ValueError("a backlog can only be caught up together with the root")
        cache.reserve(len(backlog) + len(nodes))
        first = cache.used + len(backlog)
        cache.length += len(backlog)
        cache.add(nodes, parents)
        caught_up = (1 << len(backlog)) - 1
        ancestors = [caught_up | bits << len(backlog) for bits in cache.ancestors[-len(nodes) :]]
        return Batch(
            tuple(self._known([*tokens, *backlog])),
            (*positions, *range(position, position + len(backlog))),
            (*range(first, first + len(nodes)), *range(prefix, cache.length)),
            (*ancestors, *((1 << i + 1) - 1 for i in range(len(backlog)))),
            prefix,
            len(nodes),
            cache.start,
        )

    @inference
    def forward(
        self,
        inputs: Inputs,
        keep: slice | Tensor = slice(None),
        behind_gap: bool = True,
        beside: Sequence[CachedModel] = (),
    ) -> Tensor:
        """One forward; logits of the rows that `keep` selects, [n, V], in the model's dtype. behind_gap: where its rows
        are, if the text has a gap. beside: this model with the other texts that have rows in it."""
        buffers = self.cache.buffers
        buffers.rows, buffers.length = inputs.rows, self.cache.length
        # A text is the target's: a draft may be off in the last bits, and is faster so with several leaves.
        by_position = self.role == "target"
        first = tuple(each.first_in_window if behind_gap else 0 for each in (self, *beside))
        context = TreeContext(
            inputs.prefix,
            inputs.ancestors,
            by_position,
            self.support.windows,
            self.prompt_end,
            first[0] if len({*first}) == 1 else torch.tensor(first, device=inputs.prefix.device),
            inputs.starts,
            inputs.sequence,
        )
        out = run_in(
            context,
            self.model,
            input_ids=inputs.ids[None],
            position_ids=inputs.positions[None],
            attention_mask=no_mask(self.device),
            use_cache=True,
            logits_to_keep=keep,
            **{self.cache_argument: buffers},
        )
        if context.calls != self.layers:
            raise SpecBranchError(
                f"{type(self.model).__name__} called the registered attention in {context.calls} of "
                f"{self.layers} layers: specbranch cannot run it"
            )
        logits: Tensor = out.logits[0]
        return logits

    def _known(self, tokens: Sequence[int]) -> list[int]:
        """Only a draft with fewer padding ids than the target can meet a token that it lacks; it then guesses worse."""
        return [min(token, self.vocabulary - 1) for token in tokens]


@cache
def keep_freed_memory() -> None:
    """Have the allocator keep what a layer frees for the next one: glibc's raises its thresholds to the largest block
    that it has seen freed. Else a prefill's activations may come from fresh pages in every layer, which took up to a
    seventh of its time."""
    torch.empty(LARGEST_KEPT, dtype=torch.uint8)  # nobody writes to it, so that it takes no memory


def head_takes_nothing(model: PreTrainedModel) -> bool:
    """Whether a forward may give its head an input without rows; some quantised layers fail on one."""
    head = model.get_output_embeddings()
    return type(head) in (nn.Linear, PackedLinear) and all(map(is_plain, model.parameters()))


def whole_chunks(most: float, tokens: int) -> int:
    """How many of some tokens to read for at least so many: a device's rows depend on the chunks that they are in."""
    return tokens if most >= tokens else min(tokens, ceil(most / PREFILL_CHUNK) * PREFILL_CHUNK)


def rows_for(tokens: int) -> int:
    """Cache rows for a text of so many tokens and its tree."""
    return tokens + TREE_ROWS
