"""Cases of the ops around the KV cache: tree_attention, kv_commit, ancestor_mask."""

from collections.abc import Iterator

import torch
from op_case import Case
from torch.nn.functional import scaled_dot_product_attention

from specbranch_ext import ancestor_mask, kv_commit, reference, tree_attention

# (query heads, KV heads, head dimension): Qwen2.5-Coder 0.5B and 1.5B.
HEADS = [(14, 2, 64), (12, 2, 128)]


def tree_attention_cases() -> Iterator[Case]:
    for query_heads, kv_heads, dim in HEADS:
        for n, prefix in [(1, 128), (1, 512), (1, 2048), (5, 512), (5, 2048), (8, 512), (8, 2048)]:
            parents = torch.tensor([-1] + [i // 2 for i in range(n - 1)])
            for dtype in (torch.float32, torch.bfloat16):
                yield attention_case(query_heads, kv_heads, dim, n, prefix, dtype, parents)
        for n, prefix in [(256, 0), (256, 1024)]:
            for dtype in (torch.float32, torch.bfloat16):
                yield attention_case(query_heads, kv_heads, dim, n, prefix, dtype, None)


def attention_case(
    query_heads: int,
    kv_heads: int,
    dim: int,
    n: int,
    prefix: int,
    dtype: torch.dtype,
    parents: torch.Tensor | None,
) -> Case:
    """A tree of n nodes, or a chunk of a prompt without parents; torch gets the mask and the copies for free."""
    length = prefix + n
    query = torch.randn(1, query_heads, n, dim, dtype=dtype)
    keys = torch.randn(1, kv_heads, length, dim, dtype=dtype)
    values = torch.randn(1, kv_heads, length, dim, dtype=dtype)
    ancestors = None if parents is None else ancestor_mask(parents).ancestors
    visible = torch.ones(n, length, dtype=torch.bool).tril(prefix)
    if ancestors is not None:
        visible[:, prefix:] = (ancestors >> torch.arange(n) & 1).bool()
    wide_keys = keys.repeat_interleave(query_heads // kv_heads, 1)
    wide_values = values.repeat_interleave(query_heads // kv_heads, 1)
    rows, prefix_length = query[0].transpose(0, 1), torch.tensor(prefix)
    return Case(
        op="tree_attention",
        what=f"{n} {'nodes' if parents is not None else 'prompt tokens'}, {query_heads}/{kv_heads} heads, D {dim}, "
        f"prefix {prefix}, {str(dtype).removeprefix('torch.')}",
        ours=lambda: tree_attention(rows, keys[0], values[0], prefix_length, ancestors),
        peers={
            "sdpa enable_gqa": lambda: scaled_dot_product_attention(
                query, keys, values, attn_mask=visible, enable_gqa=True
            ),
            "sdpa on repeated K and V": lambda: scaled_dot_product_attention(
                query, wide_keys, wide_values, attn_mask=visible
            ),
        },
        bytes=keys.nbytes + values.nbytes + 2 * query.nbytes,
    )


def kv_commit_cases() -> Iterator[Case]:
    """The 28 layers of Qwen2.5-Coder 1.5B."""
    buffers = [torch.zeros(2, 1024, 128, dtype=torch.bfloat16) for _ in range(56)]
    for what, rows in [
        ("5 rows in place", torch.arange(700, 705)),
        ("5 rows of a branch", torch.tensor([700, 701, 704, 707, 708])),
        ("32 rows", torch.arange(710, 742)),
    ]:
        moved = int((rows != torch.arange(700, 700 + len(rows))).sum())

        def ours(rows: torch.Tensor = rows) -> None:
            kv_commit(buffers, rows, 700)

        def torch_gather(rows: torch.Tensor = rows) -> None:
            reference.kv_commit(buffers, rows, 700)

        yield Case(
            op="kv_commit",
            what=f"{what}, 56 buffers, bfloat16",
            ours=ours,
            peers={"indexing": torch_gather},
            bytes=2 * moved * len(buffers) * 2 * 128 * 2,
        )


def ancestor_mask_cases() -> Iterator[Case]:
    for n in (8, 64):
        parents = torch.tensor([-1] + [i // 2 for i in range(n - 1)])

        def ours(parents: torch.Tensor = parents) -> object:
            return ancestor_mask(parents)

        def plain(parents: torch.Tensor = parents) -> object:
            return reference.ancestor_mask(parents)

        yield Case("ancestor_mask", f"{n} nodes", ours, {"reference": plain}, 3 * parents.nbytes)
