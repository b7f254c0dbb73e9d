"""Cases of the ops around the KV cache: tree_attention, kv_commit, rotary_commit, ancestor_mask."""

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from cases_texts import attention_over_texts, commit_of_texts
from op_case import Built, Case, Peer, dtypes
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from specbranch_ext import AncestorMask, ancestor_mask, kv_commit, reference, rotary_commit, tree_attention

# (query heads, KV heads, head dimension)
CPU_HEADS = [(14, 2, 64), (12, 2, 128)]  # Qwen2.5-Coder 0.5B and 1.5B
CUDA_HEADS = [(32, 8, 128), (14, 2, 64)]  # LLaMA 3 8B and Qwen2.5 0.5B
# (nodes, prefix)
CPU_SIZES = [(1, 128), (1, 512), (1, 2048), (5, 512), (5, 2048), (8, 512), (8, 2048)]
CUDA_SIZES = [(n, prefix) for n in (1, 8, 16, 64) for prefix in (512, 4096, 32_768)]
CPU_QUICK = [(1, 512), (8, 512), (8, 2048)]
CUDA_QUICK = [(1, 4096), (8, 512), (8, 4096), (64, 4096), (64, 32_768)]


def tree_attention_cases(device: str, flex: bool = False) -> Iterator[Case]:
    """With `flex` beside FlexAttention too, which torch compiles anew for every case."""
    on_cpu = device == "cpu"
    heads, sizes, quick = (CPU_HEADS, CPU_SIZES, CPU_QUICK) if on_cpu else (CUDA_HEADS, CUDA_SIZES, CUDA_QUICK)
    for head_counts in heads:
        for n, prefix in sizes:
            for i, dtype in enumerate(dtypes(device)):
                chosen = head_counts == heads[0] and i == 0 and (n, prefix) in quick
                yield attention_case(device, *head_counts, n, prefix, dtype, flex, chain=False, quick=chosen)
                if not on_cpu and n == 8:
                    yield attention_case(device, *head_counts, n, prefix, dtype, flex, False, chosen, by_position=True)
        for n, prefix in [(256, 0), (256, 1024)]:
            for dtype in dtypes(device):
                yield attention_case(device, *head_counts, n, prefix, dtype, flex, chain=True)
        yield attention_over_texts(device, *head_counts)


def attention_case(
    device: str,
    query_heads: int,
    kv_heads: int,
    dim: int,
    n: int,
    prefix: int,
    dtype: torch.dtype,
    flex: bool,
    chain: bool,
    quick: bool = False,
    by_position: bool = False,
) -> Case:
    """A tree of n nodes, or a chunk of a prompt; torch gets the mask and the copies for free.

    In the order of rows, as the others, whose bits depend on it, or by position. The CPU knows only the latter.
    """
    length = prefix + n

    def build() -> Built:
        def normal(heads: int, rows: int) -> Tensor:
            return torch.randn(1, heads, rows, dim, dtype=dtype, device=device)

        query, keys, values = normal(query_heads, n), normal(kv_heads, length), normal(kv_heads, length)
        ancestors = None if chain else ancestor_mask(binary_tree(n, device)).ancestors
        visible = torch.ones(n, length, dtype=torch.bool, device=device).tril(prefix)
        if ancestors is not None:
            visible[:, prefix:] = (ancestors >> torch.arange(n, device=device) & 1).bool()
        rows, prefix_length = query[0].transpose(0, 1), torch.tensor(prefix, device=device)

        def ours() -> Tensor:
            return tree_attention(rows, keys[0], values[0], prefix_length, ancestors, by_position=by_position)

        def check() -> None:
            expected = scaled_dot_product_attention(query, keys, values, attn_mask=visible, enable_gqa=True)
            torch.testing.assert_close(ours().transpose(0, 1), expected[0], rtol=2e-2, atol=2e-2)

        peers = sdpa_peers(query, keys, values, visible)
        if device != "cpu":
            peers |= flashinfer_peer(query, keys, values, visible)
        if flex:
            peers |= flex_peer(query, keys, values, visible)
        return Built(ours, peers, check)

    rows_of = "prompt tokens" if chain else "nodes"
    return Case(
        op="tree_attention",
        what=f"{n} {rows_of}, {query_heads}/{kv_heads} heads, D {dim}, prefix {prefix}, "
        f"{str(dtype).removeprefix('torch.')}{', by position' if by_position else ''}",
        build=build,
        bytes=2 * (kv_heads * length + query_heads * n) * dim * dtype.itemsize,
        flops=4 * n * query_heads * length * dim,
        quick=quick,
    )


def binary_tree(n: int, device: str) -> Tensor:
    return torch.tensor([-1] + [i // 2 for i in range(n - 1)], device=device)


def sdpa_peers(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> dict[str, Peer]:
    sdpa = partial(scaled_dot_product_attention, query, attn_mask=visible)
    peers = {"sdpa enable_gqa": Peer(partial(sdpa, key=keys, value=values, enable_gqa=True))}
    if keys.is_cpu or keys.shape[2] <= 8192:
        wide = [tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (keys, values)]
        peers["sdpa on repeated K and V"] = Peer(partial(sdpa, key=wide[0], value=wide[1]))
    return peers


def flashinfer_peer(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> dict[str, Peer]:
    """Where it is installed."""
    try:
        import flashinfer  # type: ignore[import-not-found]
    except ImportError:
        return {}
    rows, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, keys, values))
    return {"FlashInfer": Peer(lambda: flashinfer.single_prefill_with_kv_cache(rows, k, v, custom_mask=visible))}


def flex_peer(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> dict[str, Peer]:
    from torch.nn.attention.flex_attention import create_block_mask

    n, length = visible.shape
    mask = create_block_mask(
        lambda b, h, q, k: visible[q, k], None, None, n, length, device=query.device.type, BLOCK_SIZE=128
    )
    attention = compiled_flex_attention()
    return {"FlexAttention": Peer(lambda: attention(query, keys, values, block_mask=mask, enable_gqa=True))}


@cache
def compiled_flex_attention() -> Callable[..., Tensor]:
    """An error, instead of the slow way through eager operations, when torch would rather compile no more shapes."""
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import flex_attention

    config.recompile_limit = config.accumulated_recompile_limit = 1000
    config.fail_on_recompile_limit_hit = True
    return torch.compile(flex_attention, dynamic=False)


def kv_commit_cases(device: str) -> Iterator[Case]:
    if device == "cpu":  # the 28 layers of Qwen2.5-Coder 1.5B
        for what, rows in [
            ("5 rows in place", list(range(700, 705))),
            ("5 rows of a branch", [700, 701, 704, 707, 708]),
            ("32 rows", list(range(710, 742))),
        ]:
            yield commit_case(device, what, rows, 28, 2, quick="branch" in what)
    else:
        for layers in (24, 32, 80):
            for m in (1, 4, 8):
                rows = [702 + 2 * i for i in range(m)]
                yield commit_case(device, f"{m} rows of a branch", rows, layers, 8, quick=(layers, m) == (32, 8))
    yield commit_of_texts(device, *((28, 2) if device == "cpu" else (32, 8)))


def commit_case(device: str, what: str, rows: list[int], layers: int, heads: int, quick: bool) -> Case:
    target = slice(700, 700 + len(rows))

    def build() -> Built:
        buffers = [torch.randn(heads, 1024, 128, dtype=torch.bfloat16, device=device) for _ in range(2 * layers)]
        index, start = torch.tensor(rows, device=device), torch.tensor(target.start, device=device)

        def torch_gather() -> None:
            for buffer in buffers:
                buffer[:, target] = buffer[:, index]

        def ours() -> None:
            kv_commit(buffers, index, start)

        def check() -> None:
            expected = [buffer[:, index] for buffer in buffers]
            ours()
            for i, (buffer, moved) in enumerate(zip(buffers, expected, strict=True)):
                assert torch.equal(buffer[:, target], moved), f"other rows in buffer {i}"

        return Built(ours, {"indexing": Peer(torch_gather)}, check)

    moved = sum(row != target.start + i for i, row in enumerate(rows))
    return Case(
        op="kv_commit",
        what=f"{what}, {layers} layers, {heads} heads, bfloat16",
        build=build,
        bytes=2 * moved * 2 * layers * heads * 128 * 2,
        quick=quick,
    )


def rotary_commit_cases(device: str) -> Iterator[Case]:
    for heads in CPU_HEADS if device == "cpu" else CUDA_HEADS:
        for n in (1, 8, 256):
            quick = (heads, n) == ((14, 2, 64), 8)
            yield rotary_case(device, *heads, n, normed=False, quick=quick)
            yield rotary_case(device, *heads, n, normed=True, quick=False)


def rotary_case(device: str, query_heads: int, kv_heads: int, dim: int, n: int, normed: bool, quick: bool) -> Case:
    """One layer's, of a joined product; beside the modules of transformers and a copy to the rows."""
    heads = query_heads + 2 * kv_heads

    def build() -> Built:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.bfloat16, device=device)

        query, key, value = normal(n, heads, dim).split([query_heads, kv_heads, kv_heads], 1)
        cos, sin, rows = normal(n, dim), normal(n, dim), torch.arange(700, 700 + n, device=device)
        cache, other = normal(2, kv_heads, 1024, dim), normal(2, kv_heads, 1024, dim)
        query_norm, key_norm = (normal(dim) if normed else None for _ in range(2))

        def ours() -> Tensor:
            return rotary_commit(query, key, value, cos, sin, rows, cache[0], cache[1], query_norm, key_norm)

        def modules() -> Tensor:
            by_heads = (x.transpose(0, 1).unsqueeze(0) for x in (norm(query, query_norm), norm(key, key_norm)))
            embedded: tuple[Tensor, Tensor] = apply_rotary_pos_emb(*by_heads, cos.unsqueeze(0), sin.unsqueeze(0))
            other[0].index_copy_(1, rows, embedded[1][0])
            other[1].index_copy_(1, rows, value.transpose(0, 1))
            return embedded[0][0].transpose(0, 1)

        def check() -> None:
            torch.testing.assert_close(ours(), modules(), rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(cache[:, :, rows], other[:, :, rows], rtol=2e-2, atol=2e-2)

        return Built(ours, {"modules": Peer(modules)}, check)

    return Case(
        op="rotary_commit",
        what=f"{n} rows, {query_heads}/{kv_heads} heads, D {dim}, bfloat16{', normed' if normed else ''}",
        build=build,
        bytes=2 * n * (heads + 1) * dim * 2,
        quick=quick,
    )


def norm(x: Tensor, weight: Tensor | None) -> Tensor:
    """As Qwen3RMSNorm does it."""
    if weight is None:
        return x
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def ancestor_mask_cases(device: str) -> Iterator[Case]:
    for n in (8, 64):
        yield mask_case(device, n)


def mask_case(device: str, n: int) -> Case:
    def build() -> Built:
        parents = binary_tree(n, device)
        on_cpu = parents.cpu()

        def ours() -> AncestorMask:
            return ancestor_mask(parents)

        def check() -> None:
            for found, expected in zip(ours(), reference.ancestor_mask(on_cpu), strict=True):
                assert torch.equal(found.cpu(), expected), "not the reference's mask and depths"

        peer = Peer(lambda: reference.ancestor_mask(on_cpu), never_captured="it runs on the host")
        return Built(ours, {"reference on the CPU": peer}, check)

    return Case("ancestor_mask", f"{n} nodes", build, 3 * n * 8, quick=True)
