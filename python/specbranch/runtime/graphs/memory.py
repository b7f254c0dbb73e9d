"""The memory that captured graphs read and write: fixed addresses, for as many rows as a graph may have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specbranch.core.sampling import Sampling
from specbranch.runtime.batch import WORD, Batch, Inputs, pack
from specbranch.runtime.device import Device

STEPS = 16  # most draft steps in a burst


class StaticInputs:
    """A batch and how it is sampled in device memory, in one buffer, so that one copy brings it there.

    ids, positions, rows, advance, parents: int64 [R]. ancestors: int64 [R, words]. prefix, seed, slot: int64 [].
    filters: float64 [4], temperature, top-k, top-p and min-p.
    Rows without a token (padding) are the first row again, so that nothing comes of them that it has not: only their
    K/V go to the cache's last row (`spare`), and to `verify` they are unused nodes.
    """

    def __init__(self, rows: int, words: int, spare: int, device: Device, where: torch.device) -> None:
        self.spare, self.words = spare, words
        self._device = device
        size = rows * (5 + words) + 7
        self._host = device.host_memory(size)
        with device.running():
            self._buffer = torch.zeros(size, dtype=torch.int64, device=where)
            self._index = torch.arange(rows, device=where)
        self.ids, self.positions, self.rows, self.advance, self.parents = self._buffer[: 5 * rows].view(5, rows)
        self.ancestors = self._buffer[5 * rows : -7].view(rows, words)
        self.filters = self._buffer[-7:-3].view(torch.float64)
        self.prefix, self.seed, self.slot = self._buffer[-3:]
        self._columns = self._host[: 5 * rows].view(5, rows).numpy()
        self._bits = self._host[5 * rows : -7].view(rows, words).numpy()
        self._filters = self._host[-7:-3].view(torch.float64).numpy()
        self._scalars = self._host[-3:].numpy()
        self._read = device.mark()

    def fill(self, batch: Batch, parents: list[int], sampling: Sampling) -> None:
        """Enqueue the batch."""
        self._read.wait()  # the one before has left the host's memory
        n = len(batch)
        columns = self._columns
        columns[0, :n], columns[1, :n], columns[2, :n] = batch.tokens, batch.positions, batch.rows
        columns[0, n:], columns[1, n:], columns[2, n:] = batch.tokens[0], batch.positions[0], self.spare
        columns[3, : batch.leaves], columns[3, batch.leaves :] = batch.leaves, 0
        columns[4, : len(parents)], columns[4, len(parents) :] = parents, -1
        self._bits[:n] = pack(batch.ancestors, self.words)
        self._bits[n:] = self._bits[0]
        self._filters[:] = sampling.filters
        self._scalars[:] = batch.prefix, sampling.seed, 0
        self._device.copy(self._buffer, self._host)
        self._read = self._device.mark()

    def clear(self) -> None:
        """Enqueue a batch of nothing but padding: what a warm-up runs over."""
        self.fill(Batch((0,), (0,), (self.spare,), (1,), 0, 0), [], Sampling())

    def of(self, n: int) -> Inputs:
        """The first n rows, as a model is called with them."""
        return Inputs(self.ids[:n], self.positions[:n], self.rows[:n], self.prefix, self.ancestors[:n])

    def go_below(self, n: int, tokens: Tensor) -> None:
        """On the device: the batch one token further, `tokens` [n] below the first n rows. See Batch.below."""
        real = self.advance[:n] > 0
        source = torch.where(real, self._index[:n], 0)
        rows = torch.where(real, self.rows[:n] + self.advance[:n], self.spare)
        place = rows[source] - self.prefix
        words = self._index[: self.words]
        own = (place // WORD)[:, None] == words
        bit = torch.ones_like(place)[:, None] << (place % WORD)[:, None]
        self.ancestors[:n] = self.ancestors[:n][source] | torch.where(own, bit, 0)
        self.ids[:n] = tokens[source]
        self.positions[:n] = self.positions[:n][source] + 1
        self.rows[:n] = rows
        self.slot.add_(1)


@dataclass(frozen=True, slots=True)
class StaticSamples:
    """`draft_sample`'s results of up to STEPS steps, in one buffer and its copy on the host.

    tokens: int64 [STEPS, R, k]. scores, confidence: float32 [STEPS, R, k]. entropy: float32 [STEPS, R].
    """

    buffer: Tensor
    tokens: Tensor
    scores: Tensor
    confidence: Tensor
    entropy: Tensor

    @staticmethod
    def within(buffer: Tensor, rows: int, k: int) -> StaticSamples:
        """Views of a buffer of int64 [words(rows, k)]."""
        count = STEPS * rows * k
        floats = buffer[count:].view(torch.float32)
        return StaticSamples(
            buffer,
            buffer[:count].view(STEPS, rows, k),
            floats[:count].view(STEPS, rows, k),
            floats[count : 2 * count].view(STEPS, rows, k),
            floats[2 * count : 2 * count + STEPS * rows].view(STEPS, rows),
        )

    @staticmethod
    def words(rows: int, k: int) -> int:
        return STEPS * rows * k * 2 + (STEPS * rows + 1) // 2

    def write(self, slot: Tensor, n: int, sample: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        """On the device: the results [n, …] of the step in `slot`."""
        place = slot[None]
        for part, values in zip((self.tokens, self.scores, self.confidence, self.entropy), sample, strict=True):
            part[:, :n].index_copy_(0, place, values[None])


class StaticCommit:
    """The rows of a commit in device memory: rows int64 [M], padded with rows that are in place, and where they go,
    start int64 []."""

    def __init__(self, rows: int, device: Device, where: torch.device) -> None:
        self._device = device
        self._host = device.host_memory(rows + 1)
        with device.running():
            self._buffer = torch.zeros(rows + 1, dtype=torch.int64, device=where)
        self.rows, self.start = self._buffer[:-1], self._buffer[-1]
        self._numbers = self._host.numpy()
        self._read = device.mark()

    def fill(self, rows: list[int], start: int) -> None:
        """Enqueue the rows."""
        self._read.wait()
        count, most = len(rows), len(self._numbers) - 1
        self._numbers[:count], self._numbers[-1] = rows, start
        self._numbers[count:-1] = range(start + count, start + most)
        self._device.copy(self._buffer, self._host)
        self._read = self._device.mark()
