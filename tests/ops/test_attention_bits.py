"""tree_attention by position: how a token was drafted, and what is committed, leaves no trace in its bits."""

import math
from typing import Any

import pytest
import torch
from attention_inputs import TOLERANCE, VARIANTS, assert_close, random_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specbranch_ext import reference, tree_attention

pytestmark = pytest.mark.usefixtures("implementation")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 100}, {"softcap": 20.0}])
@pytest.mark.parametrize("length", [7, 64, 300, 513, 1040])
def test_a_query_does_not_depend_on_how_much_of_its_text_is_committed(
    length: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """The same text as prefix and one row, as a chain, and as a path among other branches: the same bits."""
    torch.manual_seed(length)
    capacity, heads, kv_heads, dim = length + 80, 6, 2, 48
    text_keys, text_values = torch.randn(2, kv_heads, length, dim)
    query = torch.randn(1, heads, dim).to(dtype) * 2
    one = torch.tensor([[1]])

    def attend(prefix: int, places: list[int], ancestors: torch.Tensor) -> torch.Tensor:
        """The text's rows behind the prefix lie at tree rows `places`; rows of other branches hold noise."""
        keys, values = (torch.randn(kv_heads, capacity, dim) for _ in range(2))
        rows = torch.tensor([*range(prefix), *(prefix + place for place in places)])
        keys[:, rows], values[:, rows] = text_keys, text_values
        return tree_attention(query, keys.to(dtype), values.to(dtype), prefix, ancestors, **options)

    expected = attend(length - 1, [0], one)
    for tail in (2, 5, 6):
        prefix = length - tail
        chain = torch.tensor([[(1 << tail) - 1]])
        assert torch.equal(attend(prefix, list(range(tail)), chain), expected)
        scattered = sorted(torch.randperm(70)[:tail].tolist())
        words = torch.zeros(1, 2, dtype=torch.int64)
        for place in scattered:
            bit = place % 64
            words[0, place // 64] += 1 << bit if bit < 63 else -(1 << 63)
        assert torch.equal(attend(prefix, scattered, words), expected)


SHAPES = [
    # nodes, heads, dims, capacity: every kernel, with one split and with many, merged in both ways
    (32, (4, 2), (64, 64), 900),
    (32, (14, 2), (64, 40), 600),
    (4, (4, 4), (128, 128), 2100),
    (12, (12, 1), (96, 96), 500),
    (40, (4, 1), (128, 80), 300),
    (3, (2, 2), (256, 200), 400),
    (9, (8, 1), (256, 256), 330),
    (9, (5, 1), (512, 300), 200),
    (5, (3, 1), (20, 33), 60),
    (4, (44, 44), (32, 32), 700),
    (20, (45, 45), (16, 16), 700),
]
SHARP = {"scale": math.log(2)}


def words_of(sets: list[int]) -> Tensor:
    """Ancestors as Python integers, as int64 [n, words]."""
    count = -(-max(sets).bit_length() // 64)
    words = [[bits >> 64 * w & 2**64 - 1 for w in range(count)] for bits in sets]
    return torch.tensor([[word - (word >> 63 << 64) for word in row] for row in words])


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


class Text:
    """Queries, keys and values of a tree whose nodes may lie in any tree rows; all else in the cache is NaN.

    padding: rows of a call that repeat the first one.
    """

    def __init__(
        self,
        parents: list[int],
        prefix: int,
        heads: tuple[int, int],
        dims: tuple[int, int],
        capacity: int,
        dtype,
        padding: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(1000 * len(parents) + prefix)
        self.parents, self.prefix, self.capacity, self.padding = parents, prefix, capacity, padding
        count = prefix + len(parents)
        self.keys, self.values = (torch.randn(heads[1], count, d, generator=generator).to(dtype) for d in dims)
        self.query = 2 * torch.randn(len(parents), heads[0], dims[0], generator=generator).to(dtype)

    def sharpened(self) -> "Text":
        """With weights that are powers of two, and values of the prefix that cancel: the last bits of the sums show
        in 16 bits too. Takes scale = log(2)."""
        prefix = self.prefix
        self.keys[:, :, 0] = -self.keys[:, :, 0].abs().ceil()
        self.keys[:, :, 1:] = 0
        self.query[:, :, 0] = 1
        weights = self.keys[:, :prefix, :1].double().exp2()
        self.values[:, :prefix] *= 64
        self.values[:, max(prefix - 3, 0) : prefix] = 0
        for row in range(max(prefix - 3, 0), prefix):
            left = (weights * self.values[:, :prefix].double()).sum(1)
            self.values[:, row] = -(left / weights[:, row]).to(self.values.dtype)
        return self

    def path(self, node: int) -> list[int]:
        return [] if node < 0 else [*self.path(self.parents[node]), node]

    def cache(self, rows: list[int], items: list[int]) -> tuple[Tensor, Tensor]:
        """Keys and values with `items` in `rows`."""
        made = []
        for source in (self.keys, self.values):
            whole = source.new_full((source.shape[0], self.capacity, source.shape[2]), float("nan"))
            whole[:, rows] = source[:, items]
            made.append(whole)
        return made[0], made[1]

    def in_tree(self, rows: list[int], **options) -> Tensor:
        """All nodes in one call, node i in tree row rows[i]."""
        nodes = [*range(len(rows)), *[0] * self.padding]
        ancestors = words_of([sum(1 << rows[above] for above in self.path(node)) for node in nodes])
        prefix = [*range(self.prefix)]
        everything = [*prefix, *(self.prefix + row for row in range(len(rows)))]
        cache = self.cache([*prefix, *(self.prefix + row for row in rows)], everything)
        return tree_attention(self.query[nodes], *cache, self.prefix, ancestors, **options)

    def one_by_one(self, node: int, **options) -> Tensor:
        """The node alone, its ancestors committed; the other rows of the call repeat it, as padding does."""
        path = self.path(node)
        items = [*range(self.prefix), *(self.prefix + above for above in path)]
        n = len(self.parents) + self.padding
        query, ancestors = self.query[node].repeat(n, 1, 1), torch.ones(n, 1, dtype=torch.int64)
        return tree_attention(query, *self.cache([*range(len(items))], items), len(items) - 1, ancestors, **options)[0]

    def assert_no_trace(self, rows: list[int], nodes: list[int], **options) -> None:
        together = self.in_tree(rows, **options)
        for node in nodes:
            assert torch.equal(bits(together[node]), bits(self.one_by_one(node, **options))), node


def new_text(parents, prefix, heads, dims, capacity, dtype, variant) -> Text:
    text = Text(parents, prefix, heads, dims, capacity, dtype)
    return text.sharpened() if variant is SHARP else text


@pytest.mark.parametrize("variant", [{}, SHARP, {"sliding_window": 70, "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("n", "heads", "dims", "capacity"), SHAPES, ids=str)
def test_a_tree_has_the_bits_of_decoding_one_by_one(n, heads, dims, capacity, dtype, variant):
    """A trunk, a tree in a row for each node, and one that is scattered over several words of rows."""
    generator = torch.Generator().manual_seed(n)
    # The next tile begins within the tree, where there is room for two.
    for prefix in {max(capacity // 128 * 64 - 1, 0), min(max(capacity // 64 * 64 - n // 2, 0), capacity - n)}:
        scattered = torch.randperm(min(150, capacity - prefix), generator=generator)[:n].sort().values.tolist()
        for parents, rows in (
            ([*range(-1, n - 1)], [*range(n)]),
            (
                [-1] + [max(node - int(torch.randint(1, 4, (), generator=generator)), 0) for node in range(1, n)],
                scattered,
            ),
        ):
            text = new_text(parents, prefix, heads, dims, capacity, dtype, variant)
            text.assert_no_trace(rows, [0, n // 2, n - 1], **variant)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_random_trees_have_the_bits_of_decoding_one_by_one(data):
    """In rows of three words, with padding, at the border of a tile."""
    n = data.draw(st.integers(1, 32))
    parents = [-1, *(data.draw(st.integers(max(node - 4, 0), node - 1)) for node in range(1, n))]
    prefix = max(64 * data.draw(st.integers(0, 3)) - data.draw(st.integers(-3, 20)), 0)
    rows = sorted(data.draw(st.lists(st.integers(0, 139), min_size=n, max_size=n, unique=True)))
    variant = {
        "sliding_window": data.draw(st.none() | st.integers(1, 150)),
        "softcap": data.draw(st.none() | st.floats(0.5, 50.0)),
    }
    heads = data.draw(st.sampled_from([(1, 1), (2, 1), (8, 2)]))
    dims = data.draw(st.sampled_from([(16, 16), (64, 40), (80, 96), (128, 128), (256, 130)]))
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    text = Text(parents, prefix, heads, dims, 400, dtype, data.draw(st.integers(0, 4)))
    text.assert_no_trace(rows, data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=4)), **variant)


def test_any_set_of_rows_is_honoured():
    """What is no path in a tree: a row sees its bits, at the positions of their order."""
    generator = torch.Generator().manual_seed(1)
    sets = [int(torch.randint(1, 2**40, (), generator=generator)) for _ in range(12)] + [
        1 << 100,
        1 << 3,
        (1 << 70) - 1,
    ]
    ancestors = words_of(sets)
    for dtype in TOLERANCE:
        query, keys, values = random_inputs(len(sets), 90, dtype=dtype)
        keys, values = (torch.randn(2, 200, 32, generator=generator).to(dtype) for _ in range(2))
        for variant in VARIANTS:
            together = tree_attention(query, keys, values, 90, ancestors, **variant)
            assert_close(together, reference.tree_attention(query, keys, values, 90, ancestors, **variant))
