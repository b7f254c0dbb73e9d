"""The rows of one forward: as plain lists on the host, and as the tensors that a model is called with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WORD = 64  # ancestor bits in an int64


@dataclass(frozen=True, slots=True)
class Batch:
    """n rows of one forward over new nodes behind a committed prefix.

    tokens, positions: of each row. rows: the row of the text's cache that its K/V are written to. ancestors: bit j is
    set where it sees row prefix + j, its own included. prefix: committed rows. leaves: how many of the rows, the first
    ones, are asked for; the others only catch up with the text. start: the buffers' row where the text's cache begins.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    rows: tuple[int, ...]
    ancestors: tuple[int, ...]
    prefix: int
    leaves: int
    start: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def below(self, tokens: Sequence[int]) -> Batch:
        """The batch one token further: `tokens` below the leaves, in the cache rows behind theirs."""
        count = self.leaves
        rows = tuple(row + count for row in self.rows[:count])
        return Batch(
            tuple(tokens),
            tuple(position + 1 for position in self.positions[:count]),
            rows,
            tuple(bits | 1 << (row - self.prefix) for bits, row in zip(self.ancestors, rows, strict=False)),
            self.prefix,
            count,
            self.start,
        )


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a model is called with: ids, positions, rows (of the buffers) int64 [n], prefix int64 [], and ancestors
    int64 [n, words] or, for a chain of new rows, None.

    Of several texts, or one that is not the first in its buffers: prefix and starts int64 [s], and which text a row
    belongs to, sequence int64 [n], in ascending order.
    """

    ids: Tensor
    positions: Tensor
    rows: Tensor
    prefix: Tensor
    ancestors: Tensor | None
    starts: Tensor | None = None
    sequence: Tensor | None = None

    @staticmethod
    def of(batches: Sequence[Batch], device: torch.device) -> Inputs:
        """Text after text."""
        first = batches[0]
        ancestors = [bits for batch in batches for bits in batch.ancestors]
        words = (max(ancestors).bit_length() + WORD - 1) // WORD
        joined = len(batches) > 1 or first.start > 0
        prefix = [batch.prefix for batch in batches]
        places = [place for place, batch in enumerate(batches) for _ in batch.rows]
        return Inputs(
            torch.tensor([token for batch in batches for token in batch.tokens], device=device),
            torch.tensor([position for batch in batches for position in batch.positions], device=device),
            torch.tensor([batch.start + row for batch in batches for row in batch.rows], device=device),
            torch.tensor(prefix if joined else prefix[0], device=device),
            torch.from_numpy(pack(ancestors, words)).to(device),
            torch.tensor([batch.start for batch in batches], device=device) if joined else None,
            torch.tensor(places, device=device) if joined else None,
        )

    @staticmethod
    def chain(ids: Tensor, prefix: int, position: int, start: int = 0) -> Inputs:
        """Tokens of the text itself, int64 [n], behind the prefix; the first stands at `position`."""
        rows, device = torch.arange(prefix, prefix + len(ids), device=ids.device), ids.device
        positions = rows if position == prefix else rows + (position - prefix)
        if not start:
            return Inputs(ids, positions, rows, torch.full((), prefix, device=device), ancestors=None)
        before, starts = torch.full((1,), prefix, device=device), torch.full((1,), start, device=device)
        return Inputs(ids, positions, rows + start, before, None, starts, torch.zeros_like(ids))


def pack(ancestors: Sequence[int], words: int) -> NDArray[np.int64]:
    """Bits as Python integers to int64 [n, words], the lowest bits in the first word, as `tree_attention` reads
    them."""
    data = b"".join(bits.to_bytes(8 * words, "little") for bits in ancestors)
    return np.frombuffer(bytearray(data), dtype="<i8").reshape(len(ancestors), words)
