"""Cases of advance: small and large bursts."""

from collections.abc import Iterator

import torch
from op_case import Built, Case, Peer

from specbranch_ext import advance, draft_sample

SLOTS, K, WORDS, PREFIX, SPARE = 16, 4, 8, 500, 4095


def advance_cases(device: str) -> Iterator[Case]:
    for rows, leaves in ((1, 1), (8, 6), (64, 40)):
        yield advance_case(device, rows, leaves, quick=rows == 8)


def advance_case(device: str, rows: int, leaves: int, quick: bool) -> Case:
    """One step of a burst. Every call begins with a copy of the same batch: else it would soon leave its memory."""

    def build() -> Built:
        real = torch.arange(rows) < leaves
        index = torch.where(real, torch.arange(rows), 0)
        ids, positions, next_positions = 10 + index, torch.full_like(index, 600), torch.full_like(index, 601)
        cache_rows, strides = torch.where(real, PREFIX + index, SPARE), torch.where(real, leaves, 0)
        bits = torch.zeros(rows, WORDS, dtype=torch.int64)
        bits[:, 0] = torch.ones_like(index) << index
        columns = [ids, positions, next_positions, cache_rows, strides, bits.flatten(), torch.tensor([PREFIX, 3])]
        batch = torch.cat(columns).to(device)

        memory, index = torch.empty_like(batch), torch.arange(max(rows, WORDS), device=device)
        ids, positions, next_positions, cache_rows, strides = memory[: 5 * rows].view(5, rows)
        ancestors = memory[5 * rows : -2].view(rows, WORDS)
        prefix, slot = memory[-2:]
        sample = draft_sample(torch.randn(rows, 100, device=device), index[:rows], K)
        buffers = [part.new_zeros(SLOTS, *part.shape) for part in sample]

        def ours() -> None:
            memory.copy_(batch)
            inputs = (ids, positions, next_positions, cache_rows, strides, ancestors, prefix, slot)
            advance(buffers, sample, *inputs, SPARE)

        def torch_advance() -> None:
            memory.copy_(batch)
            for buffer, part in zip(buffers, sample, strict=True):
                buffer.index_copy_(0, slot[None], part[None])
            real = strides > 0
            source = torch.where(real, index[:rows], 0)
            new_rows = torch.where(real, cache_rows + strides, SPARE)
            bit = new_rows[source] - prefix
            in_word = (bit // 64)[:, None] == index[:WORDS]
            new_bits = torch.where(in_word, torch.ones_like(bit)[:, None] << (bit % 64)[:, None], 0)
            ancestors.copy_(ancestors[source] | new_bits)
            ids.copy_(sample.tokens[:, 0].clamp(min=0)[source])
            positions.copy_(positions[source] + 1)
            torch.add(positions, 1, out=next_positions)
            cache_rows.copy_(new_rows)
            slot.add_(1)

        def check() -> None:
            results = []
            for function in (torch_advance, ours):
                for buffer in buffers:
                    buffer.zero_()
                function()
                results.append([part.clone() for part in (memory, *buffers)])
            for found, expected in zip(*results, strict=True):
                assert torch.equal(found, expected), "not what torch makes of it"

        return Built(ours, {"index_copy_, where, indexing": Peer(torch_advance)}, check)

    # The batch is copied, then changed; the results are copied.
    batch_bytes, results = 8 * (rows * (5 + WORDS) + 2), rows * (16 * K + 4)
    moved = 4 * batch_bytes + 2 * results
    return Case("advance", f"{leaves} leaves in {rows} rows, k {K}", build, moved, quick=quick)
