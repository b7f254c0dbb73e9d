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

    tokens, positions: of each row. rows: the cache row that its K/V are written to. ancestors: bit j is set where it
    sees cache row prefix + j, its own included. prefix: committed cache rows. leaves: how many of the rows, the first
    ones, are asked for; the others only catch up with the text.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    rows: tuple[int, ...]
    ancestors: tuple[int, ...]
    prefix: int
    leaves: int

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
        )


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a model is called with: ids, positions, rows int64 [n], prefix int64 [], and ancestors int64 [n, words] or,
    for a chain of new rows, None."""

    ids: Tensor
    positions: Tensor
    rows: Tensor
    prefix: Tensor
    ancestors: Tensor | None

    @staticmethod
    def of(batch: Batch, device: torch.device) -> Inputs:
        words = (max(batch.ancestors).bit_length() + WORD - 1) // WORD
        return Inputs(
            torch.tensor(batch.tokens, device=device),
            torch.tensor(batch.positions, device=device),
            torch.tensor(batch.rows, device=device),
            torch.tensor(batch.prefix, device=device),
            torch.from_numpy(pack(batch.ancestors, words)).to(device),
        )

    @staticmethod
    def chain(ids: Tensor, prefix: int, position: int) -> Inputs:
        """Tokens of the text itself, int64 [n], behind the prefix; the first stands at `position`."""
        rows = torch.arange(prefix, prefix + len(ids), device=ids.device)
        positions = rows if position == prefix else rows + (position - prefix)
        return Inputs(ids, positions, rows, torch.full((), prefix, device=ids.device), ancestors=None)


def pack(ancestors: Sequence[int], words: int) -> NDArray[np.int64]:
    """Bits as Python integers to int64 [n, words], the lowest bits in the first word, as `tree_attention` reads
    them."""
    data = b"".join(bits.to_bytes(8 * words, "little") for bits in ancestors)
    return np.frombuffer(bytearray(data), dtype="<i8").reshape(len(ancestors), words)
