"""Cases of tree_attention and kv_commit over several texts in one cache."""

from collections.abc import Callable
from functools import partial

import torch
from op_case import Built, Case, Peer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from specbranch_ext import ancestor_mask, kv_commit, tree_attention

PREFIXES = (200, 2000, 700, 1200, 400, 1500, 900, 300)
NODES = (2, 6, 3, 4, 5, 6, 2, 4)
SPARE = 20  # rows behind a text that are free


def starts() -> list[int]:
    """Where each text begins; in the end the capacity."""
    found = [0]
    for prefix, nodes in zip(PREFIXES, NODES, strict=True):
        found.append(found[-1] + prefix + nodes + SPARE)
    return found


def attention_over_texts(device: str, query_heads: int, kv_heads: int, dim: int) -> Case:
    """One call, beside a call for each text."""
    *begins, capacity = starts()
    length, n = sum(PREFIXES) + sum(NODES), sum(NODES)

    def build() -> Built:
        def normal(heads: int, rows: int) -> Tensor:
            return torch.randn(heads, rows, dim, dtype=torch.bfloat16, device=device)

        def ints(values: list[int]) -> Tensor:
            return torch.tensor(values, device=device)

        query, keys, values = (
            normal(query_heads, n).transpose(0, 1),
            normal(kv_heads, capacity),
            normal(kv_heads, capacity),
        )
        trees = [ancestor_mask(ints([-1] + [i // 2 for i in range(count - 1)])).ancestors for count in NODES]
        ancestors, prefixes, first = torch.cat(trees), ints(list(PREFIXES)), ints(begins)
        sequence = ints([q for q, count in enumerate(NODES) for _ in range(count)])
        texts = [
            (rows, keys[:, begin:], values[:, begin:], ints([prefix])[0], tree)
            for rows, begin, prefix, tree in zip(query.split(NODES), begins, PREFIXES, trees, strict=True)
        ]

        def ours() -> Tensor:
            return tree_attention(query, keys, values, prefixes, ancestors, starts=first, sequence=sequence)

        def one_by_one() -> list[Tensor]:
            return [tree_attention(*text) for text in texts]

        def by_sdpa() -> list[Tensor]:
            return [call() for call in dense]

        dense: list[Callable[[], Tensor]] = []
        for (rows, k, v, _, tree), prefix, count in zip(texts, PREFIXES, NODES, strict=True):
            mask = torch.ones(count, prefix + count, dtype=torch.bool, device=device)
            mask[:, prefix:] = (tree >> torch.arange(count, device=device) & 1).bool()
            own, own_keys, own_values = (part[None, :, : prefix + count] for part in (rows.transpose(0, 1), k, v))
            dense.append(partial(sdpa, own, own_keys, own_values, attn_mask=mask, enable_gqa=True))

        def check() -> None:
            expected = torch.cat([out[0].transpose(0, 1) for out in by_sdpa()])
            torch.testing.assert_close(ours(), expected, rtol=2e-2, atol=2e-2)

        return Built(ours, {"a call for each text": Peer(one_by_one), "sdpa for each text": Peer(by_sdpa)}, check)

    return Case(
        op="tree_attention",
        what=f"{n} nodes of {len(NODES)} texts, {query_heads}/{kv_heads} heads, D {dim}, prefixes of "
        f"{min(PREFIXES)} to {max(PREFIXES)}, bfloat16",
        build=build,
        bytes=2 * (kv_heads * length + query_heads * n) * dim * 2,
        flops=4 * query_heads * dim * sum((p + count) * count for p, count in zip(PREFIXES, NODES, strict=True)),
    )


def commit_of_texts(device: str, layers: int, heads: int) -> Case:
    """Two rows of each text, one of which is not in place; beside a call for each text."""
    *begins, capacity = starts()
    prefixes = [begin + prefix for begin, prefix in zip(begins, PREFIXES, strict=True)]
    places = [place + i for place in prefixes for i in range(2)]
    rows = [place + 2 * i for place in prefixes for i in range(2)]

    def build() -> Built:
        buffers = [torch.randn(heads, capacity, 128, dtype=torch.bfloat16, device=device) for _ in range(2 * layers)]
        index, to = torch.tensor(rows, device=device), torch.tensor(places, device=device)

        def ours() -> None:
            kv_commit(buffers, index, to)

        def one_by_one() -> None:
            for part, place in zip(index.split(2), to.split(2), strict=True):
                kv_commit(buffers, part, place[0])

        def check() -> None:
            expected = [buffer[:, index] for buffer in buffers]
            ours()
            for i, (buffer, moved) in enumerate(zip(buffers, expected, strict=True)):
                assert torch.equal(buffer[:, to], moved), f"other rows in buffer {i}"

        return Built(ours, {"a call for each text": Peer(one_by_one)}, check)

    return Case(
        op="kv_commit",
        what=f"{len(rows)} rows of {len(NODES)} texts, {layers} layers, {heads} heads, bfloat16",
        build=build,
        bytes=2 * len(NODES) * 2 * layers * heads * 128 * 2,
    )
