"""The memory that captured graphs read and write: fixed addresses, for as many rows as a graph may have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specbranch.core.sampling import Sampling
from specbranch.runtime.batch import Batch, Inputs, pack
from specbranch.runtime.device import Device
from specbranch_ext import DraftSample, advance

STEPS = 16  # most draft steps in a burst
COLUMNS = 6  # of StaticInputs


class StaticInputs:
    """A batch and how it is sampled in device memory, in one buffer, so that one copy brings it there.

    ids, positions, next_positions, rows, strides, parents: int64 [R]. ancestors: int64 [R, words]. prefix, seed, slot:
    int64 []. filters: float64 [4], temperature, top-k, top-p and min-p. next_positions: of the tokens that the rows
    predict. strides: see `advance`.
    Rows without a token (padding) are the first row again, so that nothing comes of them that it has not: only their
    K/V go to the cache's last row (`spare`), and to `verify` they are unused nodes.
    """

    def __init__(self, rows: int, words: int, spare: int, device: Device, where: torch.device) -> None:
        self.spare, self.words = spare, words
        self._device = device
        size = rows * (COLUMNS + words) + 7
        self._host = device.host_memory(size)
        with device.running():
            self._buffer = torch.zeros(size, dtype=torch.int64, device=where)
        end = COLUMNS * rows
        columns = self._buffer[:end].view(COLUMNS, rows)
        self.ids, self.positions, self.next_positions, self.rows, self.strides, self.parents = columns
        self.ancestors = self._buffer[end:-7].view(rows, words)
        self.filters = self._buffer[-7:-3].view(torch.float64)
        self.prefix, self.seed, self.slot = self._buffer[-3:]
        self._columns = self._host[:end].view(COLUMNS, rows).numpy()
        self._bits = self._host[end:-7].view(rows, words).numpy()
        self._filters = self._host[-7:-3].view(torch.float64).numpy()
        self._scalars = self._host[-3:].numpy()
        self._read = device.mark()

    def fill(self, batch: Batch, parents: list[int], sampling: Sampling) -> None:
        """Enqueue the batch."""
        self._read.wait()  # the one before has left the host's memory
        n = len(batch)
        ids, positions, next_positions, rows, strides, above = self._columns
        ids[:n], positions[:n], rows[:n] = batch.tokens, batch.positions, batch.rows
        ids[n:], positions[n:], rows[n:] = batch.tokens[0], batch.positions[0], self.spare
        next_positions[:] = positions + 1
        strides[: batch.leaves], strides[batch.leaves :] = batch.leaves, 0
        above[: len(parents)], above[len(parents) :] = parents, -1
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

    def advance(self, n: int, sample: DraftSample, samples: StaticSamples) -> None:
        """On the device: keep the step's results, and make the first n rows the batch one token further. See
        Batch.below."""
        advance(
            (samples.tokens, samples.scores, samples.confidence, samples.entropy),
            sample,
            self.ids[:n],
            self.positions[:n],
            self.next_positions[:n],
            self.rows[:n],
            self.strides[:n],
            self.ancestors[:n],
            self.prefix,
            self.slot,
            self.spare,
        )


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
