"""A transformers model with its branch cache: prefill, tree forwards, commit."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specbranch.core.errors import SpecBranchError
from specbranch.runtime.agreement import check_agreement
from specbranch.runtime.attach import Attachment
from specbranch.runtime.attention import TreeContext, no_mask, running
from specbranch.runtime.batch import Batch, Inputs
from specbranch.runtime.cache import TREE_ROWS, BranchCache
from specbranch.runtime.hrad.tap import FeatureTap
from specbranch.runtime.rotary import context_length
from specbranch.runtime.support import check_supported, trying
from specbranch.runtime.weights import execution_device, unwrapped

PREFILL_CHUNK = 256  # rows: enough to be bound by arithmetic, few enough to keep activations small
MOST_TOKENS = 2**62  # no limit


class CachedModel:
    """One of the two models, `role` "target" or "draft", with the K/V of the committed text and of tree nodes."""

    def __init__(self, model: PreTrainedModel, role: str) -> None:
        self.model = model = unwrapped(model, role)
        self.role = role
        self.device = execution_device(model)
        self.layers = model.config.get_text_config().num_hidden_layers
        self.vocabulary = model.config.get_text_config().vocab_size
        self.cache = BranchCache(self.layers, 0, self.device)
        self.granularity = 1  # of the cache's capacity: a larger one is made anew less often
        self.tap: FeatureTap | None = None  # what reads its hidden states
        self.prompt_end = -1  # the last position of what was read at once: see `begin`
        self.support, own_logits = check_supported(model, role)
        if own_logits is not None:
            with trying(f"{role} model {type(model).__name__}"):
                check_agreement(self, own_logits)

    def another(self) -> CachedModel:
        """The same model with a cache of its own, for another text."""
        fresh = copy.copy(self)
        fresh.cache, fresh.tap = BranchCache(self.layers, 0, self.device), None
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

    def reset(self, tokens: int) -> None:
        """Start a new text of at most `tokens` tokens; the buffers are kept when they are large enough.

        Raises SpecBranchError when the model's context or the memory is too small.
        """
        limit = context_length(self.model.config.get_text_config())
        if limit is not None and tokens > limit:
            raise SpecBranchError(
                f"prompt and new tokens together are {tokens} tokens; the {self.role} model's context holds {limit}"
            )
        if not self.holds(tokens):
            self.cache.release()  # there is not always memory for both
            rows = -(-rows_for(tokens) // self.granularity) * self.granularity
            self.cache = BranchCache(self.layers, rows, self.device)
        self.cache.rollback(0)
        self.prompt_end = -1

    def holds(self, tokens: int) -> bool:
        """Whether the buffers that are there are large enough for a text of so many tokens."""
        return rows_for(tokens) <= self.cache.capacity

    def prefill(self, tokens: Sequence[int]) -> None:
        """Commit a chain of tokens behind the prefix, in chunks. Only the first copy to a device waits for it."""
        self.cache.reserve(len(tokens))
        self._read(tokens, self.cache.length)

    def begin(self, prompt: Sequence[int]) -> None:
        """A text begins with `prompt`: where rotary embeddings choose by its length, they choose so for all of it."""
        self.prompt_end = len(prompt) - 1

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
        self.begin(text[: due[-1]])
        self._read(text[: self.cache.length], 0)

    def _read(self, tokens: Sequence[int], start: int) -> None:
        """Write the rows of a chain of tokens from row `start` on, which then belong to the prefix."""
        ids = torch.tensor(self._known(tokens), dtype=torch.int64, device=self.device)
        for chunk in ids.split(PREFILL_CHUNK) if tokens else ():
            self.forward(Inputs.chain(chunk, start), keep=slice(-1, None))
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
        committed tokens that the cache lacks; they become part of the prefix, in the same forward, and then `nodes` may
        only be the root.
        """
        cache, prefix = self.cache, self.cache.length
        if backlog and (list(nodes) != [0] or cache.nodes):
            raise ValueError("a backlog can only be caught up together with the root")
        cache.reserve(len(backlog) + len(nodes))
        first = cache.used + len(backlog)
        cache.length += len(backlog)
        cache.add(nodes, parents)
        caught_up = (1 << len(backlog)) - 1
        ancestors = [caught_up | bits << len(backlog) for bits in cache.ancestors[-len(nodes) :]]
        return Batch(
            tuple(self._known([*tokens, *backlog])),
            (*positions, *range(prefix, cache.length)),
            (*range(first, first + len(nodes)), *range(prefix, cache.length)),
            (*ancestors, *((1 << i + 1) - 1 for i in range(len(backlog)))),
            prefix,
            len(nodes),
        )

    @torch.inference_mode()
    def forward(self, inputs: Inputs, keep: slice = slice(None)) -> Tensor:
        """One forward; logits of the rows that `keep` selects, [n, V], in the model's dtype."""
        self.cache.rows = inputs.rows
        # A text is the target's: a draft may be off in the last bits, and is faster so with several leaves.
        by_position = self.role == "target"
        context = TreeContext(inputs.prefix, inputs.ancestors, by_position, self.support.windows, self.prompt_end)
        with running(context):
            out = self.model(
                input_ids=inputs.ids[None],
                position_ids=inputs.positions[None],
                attention_mask=no_mask(self.device),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=keep,
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


def rows_for(tokens: int) -> int:
    """Cache rows for a text of so many tokens, its tree, and what pads a captured batch."""
    return tokens + TREE_ROWS + 1
