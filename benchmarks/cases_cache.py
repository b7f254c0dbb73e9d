"""Cases of the ops around the KV cache: tree_attention, kv_commit, ancestor_mask."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from op_case import Case, Functions, dtypes
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from specbranch_ext import ancestor_mask, kv_commit, reference, tree_attention

# (query heads, KV heads, head dimension)
CPU_HEADS = [(14, 2, 64), (12, 2, 128)]  # Qwen2.5-Coder 0.5B and 1.5B
CUDA_HEADS = [(32, 8, 128), (14, 2, 64)]  # LLaMA 3 8B and Qwen2.5 0.5B
CPU_SIZES = [(1, 128), (1, 512), (1, 2048), (5, 512), (5, 2048), (8, 512), (8, 2048)]
CUDA_SIZES = [(n, prefix) for n in (1, 8, 16, 64) for prefix in (512, 4096, 32_768)]


def tree_attention_cases(device: str) -> Iterator[Case]:
    heads, sizes = (CPU_HEADS, CPU_SIZES) if device == "cpu" else (CUDA_HEADS, CUDA_SIZES)
    for head_counts in heads:
        for n, prefix in sizes:
            for dtype in dtypes(device):
                yield attention_case(device, *head_counts, n, prefix, dtype, chain=False)
        for n, prefix in [(256, 0), (256, 1024)]:
            for dtype in dtypes(device):
                yield attention_case(device, *head_counts, n, prefix, dtype, chain=True)


def attention_case(
    device: str, query_heads: int, kv_heads: int, dim: int, n: int, prefix: int, dtype: torch.dtype, chain: bool
) -> Case:
    """A tree of n nodes, or a chunk of a prompt; torch gets the mask and the copies for free."""
    length = prefix + n

    def build() -> Functions:
        def normal(heads: int, rows: int) -> Tensor:
            return torch.randn(1, heads, rows, dim, dtype=dtype, device=device)

        query, keys, values = normal(query_heads, n), normal(kv_heads, length), normal(kv_heads, length)
        parents = torch.tensor([-1] + [i // 2 for i in range(n - 1)], device=device)
        ancestors = None if chain else ancestor_mask(parents).ancestors
        visible = torch.ones(n, length, dtype=torch.bool, device=device).tril(prefix)
        if ancestors is not None:
            visible[:, prefix:] = (ancestors >> torch.arange(n, device=device) & 1).bool()
        rows, prefix_length = query[0].transpose(0, 1), torch.tensor(prefix, device=device)
        if device != "cpu":
            expected = scaled_dot_product_attention(query, keys, values, attn_mask=visible, enable_gqa=True)
            ours = tree_attention(rows, keys[0], values[0], prefix_length, ancestors)
            torch.testing.assert_close(ours.transpose(0, 1), expected[0], rtol=2e-2, atol=2e-2)
        functions: Functions = {
            "ours": lambda: tree_attention(rows, keys[0], values[0], prefix_length, ancestors),
            "sdpa enable_gqa": lambda: scaled_dot_product_attention(
                query, keys, values, attn_mask=visible, enable_gqa=True
            ),
        }
        if device == "cpu" or length <= 8192:
            wide_keys, wide_values = (t.repeat_interleave(query_heads // kv_heads, 1) for t in (keys, values))
            functions["sdpa on repeated K and V"] = lambda: scaled_dot_product_attention(
                query, wide_keys, wide_values, attn_mask=visible
            )
        if device != "cpu":
            functions |= cuda_peers(query, keys, values, visible)
        return functions

    rows_of = "prompt tokens" if chain else "nodes"
    return Case(
        op="tree_attention",
        what=f"{n} {rows_of}, {query_heads}/{kv_heads} heads, D {dim}, prefix {prefix}, "
        f"{str(dtype).removeprefix('torch.')}",
        build=build,
        bytes=2 * (kv_heads * length + query_heads * n) * dim * dtype.itemsize,
        flops=4 * n * query_heads * length * dim,
    )


def cuda_peers(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Functions:
    """FlexAttention and FlashInfer with the same mask, where they are installed and take these inputs."""
    candidates: Functions = {}
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        n, length = visible.shape
        block_mask = create_block_mask(
            lambda b, h, q, k: visible[q, k], None, None, n, length, device=query.device.type, BLOCK_SIZE=128
        )
        compiled = torch.compile(flex_attention, dynamic=False)
        candidates["FlexAttention"] = lambda: compiled(query, keys, values, block_mask=block_mask, enable_gqa=True)
    except ImportError:
        pass
    try:
        import flashinfer  # type: ignore[import-not-found]

        rows, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, keys, values))
        candidates["FlashInfer"] = lambda: flashinfer.single_prefill_with_kv_cache(rows, k, v, custom_mask=visible)
    except ImportError:
        pass
    return {name: function for name, function in candidates.items() if _works(function)}


def _works(function: Callable[[], Any]) -> bool:
    try:
        function()
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def kv_commit_cases(device: str) -> Iterator[Case]:
    if device == "cpu":  # the 28 layers of Qwen2.5-Coder 1.5B
        for what, rows in [
            ("5 rows in place", list(range(700, 705))),
            ("5 rows of a branch", [700, 701, 704, 707, 708]),
            ("32 rows", list(range(710, 742))),
        ]:
            yield commit_case(device, what, rows, 28, 2)
    else:
        for layers in (24, 32, 80):
            for m in (1, 4, 8):
                yield commit_case(device, f"{m} rows of a branch", [702 + 2 * i for i in range(m)], layers, 8)


def commit_case(device: str, what: str, rows: list[int], layers: int, heads: int) -> Case:
    def build() -> Functions:
        buffers = [torch.zeros(heads, 1024, 128, dtype=torch.bfloat16, device=device) for _ in range(2 * layers)]
        index, start = torch.tensor(rows, device=device), torch.tensor(700, device=device)

        def torch_gather() -> None:
            for buffer in buffers:
                buffer[:, 700 : 700 + len(rows)] = buffer[:, index]

        def ours() -> None:
            kv_commit(buffers, index, start)

        return {"ours": ours, "indexing": torch_gather}

    moved = sum(row != 700 + i for i, row in enumerate(rows))
    return Case(
        op="kv_commit",
        what=f"{what}, {layers} layers, {heads} heads, bfloat16",
        build=build,
        bytes=2 * moved * 2 * layers * heads * 128 * 2,
    )


def ancestor_mask_cases(device: str) -> Iterator[Case]:
    for n in (8, 64):
        yield mask_case(device, n)


def mask_case(device: str, n: int) -> Case:
    def build() -> Functions:
        parents = torch.tensor([-1] + [i // 2 for i in range(n - 1)], device=device)
        functions: Functions = {"ours": lambda: ancestor_mask(parents)}
        on_cpu = parents.cpu()
        functions["reference on the CPU"] = lambda: reference.ancestor_mask(on_cpu)
        return functions

    return Case("ancestor_mask", f"{n} nodes", build, 3 * n * 8)
