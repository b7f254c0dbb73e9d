"""tree_attention against the dense reference and against plain attention along each root-to-node path."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import on_cpu
from torch import Tensor

import specbranch_ext
from specbranch_ext import ancestor_mask, reference, tree_attention
from specbranch_ext.ops import _library, _tickets
from specbranch_ext.reference.tree_attention import ancestor_matrix

pytestmark = pytest.mark.usefixtures("implementation")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
VARIANTS = [
    {},
    {"scale": 0.3},
    {"softcap": 2.0},
    {"sliding_window": 5},
    {"sliding_window": 1},
    {"sliding_window": 60, "softcap": 30.0},
    {"by_position": False},
    {"sliding_window": 5, "by_position": False},
]


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are small; only the test of the bits runs with several threads, and compares with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_tree(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    parents = [-1] + [int(torch.randint(0, i, (), generator=generator)) for i in range(1, n)]
    return torch.tensor(parents)


def random_inputs(
    n: int, prefix: int, heads: tuple[int, int] = (6, 2), dims: tuple[int, int] = (32, 32), dtype=torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, keys, values; the cache has five rows more than it needs, and they hold NaN."""
    generator = torch.Generator().manual_seed(n * 1000 + prefix)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    query = normal(n, heads[0], dims[0])
    keys = normal(heads[1], prefix + n + 5, dims[0])
    values = normal(heads[1], prefix + n + 5, dims[1])
    keys[:, prefix + n :] = float("nan")
    values[:, prefix + n :] = float("nan")
    return query, keys, values


def along_paths(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    prefix: int,
    parents: Tensor,
    scale=None,
    sliding_window=None,
    softcap=None,
    by_position=True,
) -> Tensor:
    """Chain attention of each node over its own path, in float64: row r of the gathered path has position r."""
    n, heads, dim = query.shape
    output = torch.empty(n, heads, values.shape[2], dtype=torch.float64)
    for node in range(n):
        path = []
        above = node
        while above >= 0:
            path.insert(0, prefix + above)
            above = int(parents[above])
        rows = torch.tensor([*range(prefix), *path])
        if sliding_window is not None:
            rows = rows[-sliding_window:]
        for head in range(heads):
            kv_head = head // (heads // keys.shape[0])
            scores = keys[kv_head, rows].double() @ query[node, head].double()
            scores *= dim**-0.5 if scale is None else scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            output[node, head] = scores.softmax(0) @ values[kv_head, rows].double()
    return output


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(("n", "prefix"), [(1, 0), (2, 63), (9, 200), (64, 64), (65, 3), (130, 70)])
def test_each_path_is_chain_attention(n, prefix, variant):
    parents = random_tree(n)
    inputs = random_inputs(n, prefix)
    actual = tree_attention(*inputs, prefix, ancestor_mask(parents).ancestors, **variant)
    assert_close(actual, along_paths(*inputs, prefix, parents, **variant))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (14, 2), (12, 2), (8, 1), (100, 1)], ids=str)
def test_group_ratios_and_dtypes(heads, dtype):
    ancestors = ancestor_mask(random_tree(20)).ancestors
    inputs = random_inputs(20, 150, heads, (64, 64), dtype)
    for variant in VARIANTS:
        expected = reference.tree_attention(*inputs, 150, ancestors, **variant)
        assert_close(tree_attention(*inputs, 150, ancestors, **variant), expected)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "dims",
    [(32, 32), (20, 20), (33, 31), (80, 80), (96, 96), (128, 128), (256, 256), (64, 40), (1, 3), (40, 200)],
    ids=str,
)
def test_head_dims(dims, dtype):
    ancestors = ancestor_mask(random_tree(11)).ancestors
    inputs = random_inputs(11, 100, (4, 2), dims, dtype)
    actual = tree_attention(*inputs, 100, ancestors)
    assert actual.shape == (11, 4, dims[1])
    assert actual.dtype == dtype
    assert_close(actual, reference.tree_attention(*inputs, 100, ancestors))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("n", [60, 100])
def test_more_nodes_than_a_warp_has_lanes(n, dtype):
    ancestors = ancestor_mask(random_tree(n)).ancestors
    inputs = random_inputs(n, 70, (2, 2), dtype=dtype)
    for variant in VARIANTS:
        expected = reference.tree_attention(*inputs, 70, ancestors, **variant)
        assert_close(tree_attention(*inputs, 70, ancestors, **variant), expected)


@pytest.mark.parametrize("variant", [{}, {"sliding_window": 700}, {"sliding_window": 40, "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("prefix", [0, 512, 1300])
def test_prompt_chunk_is_a_chain(prefix, variant):
    n = 300
    inputs = random_inputs(n, prefix)
    actual = tree_attention(*inputs, prefix, **variant)
    assert_close(actual, reference.tree_attention(*inputs, prefix, **variant))
    chain = ancestor_mask(torch.arange(-1, n - 1)).ancestors
    for by_position in (True, False):
        assert torch.equal(actual, tree_attention(*inputs, prefix, chain, **variant, by_position=by_position))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_inputs(dtype):
    n, prefix = 9, 130
    ancestors = ancestor_mask(random_tree(n)).ancestors
    query, keys, values = random_inputs(n, prefix, (6, 2), (64, 48), dtype)
    expected = tree_attention(query, keys, values, prefix, ancestors)

    transposed = query.transpose(0, 1).contiguous().unsqueeze(0)  # [1, Hq, n, D], as transformers hands it over
    wide_keys = torch.randn(2, keys.shape[1], 2, 64 + 7).to(dtype)[:, :, 1, :64]
    wide_values = torch.randn(keys.shape[1], 2, 48).to(dtype).transpose(0, 1)
    wide_keys.copy_(keys)
    wide_values.copy_(values)
    wide_ancestors = torch.full((n, 4), -1)[:, 1:2].copy_(ancestors)
    actual = tree_attention(transposed[0].transpose(0, 1), wide_keys, wide_values, prefix, wide_ancestors)
    assert torch.equal(actual, expected)


def test_queries_may_be_any_nodes_of_the_tree():
    n, prefix = 90, 40
    ancestors = ancestor_mask(random_tree(n)).ancestors
    query, keys, values = random_inputs(n, prefix)
    expected = tree_attention(query, keys, values, prefix, ancestors)
    for nodes in (torch.arange(80, 90), torch.tensor([3, 89, 17]), torch.tensor([0])):
        actual = tree_attention(query[nodes], keys, values, prefix, ancestors[nodes])
        assert torch.equal(actual, expected[nodes])


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefix", [0, 70, 1500])
@pytest.mark.parametrize("n", [8, 70])
def test_bits_depend_neither_on_other_rows_nor_on_threads(n, prefix, dtype):
    ancestors = ancestor_mask(random_tree(n)).ancestors
    query, keys, values = random_inputs(n, prefix, (14, 2), (64, 80), dtype)
    expected = tree_attention(query, keys, values, prefix, ancestors)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert torch.equal(tree_attention(query, keys, values, prefix, ancestors), expected)
        for nodes in ([0], [n - 1], [5, 2, 7], list(range(3, 8))):
            rows = tree_attention(query[nodes], keys, values, prefix, ancestors[nodes])
            assert torch.equal(rows, expected[nodes])
    # A register block mixes heads too.
    one_head = tree_attention(query[:, 3:4], keys[:1], values[:1], prefix, ancestors)
    assert torch.equal(one_head, expected[:, 3:4])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", [0, 1, 5, 66])
def test_a_hidden_row_contributes_nothing_and_a_visible_one_is_not_lost(hidden, dtype, poison):
    n, prefix = 80, 30
    parents = random_tree(n)
    ancestors = ancestor_mask(parents).ancestors
    sees = ancestor_matrix(ancestors)[:, hidden]
    query, keys, values = random_inputs(n, prefix, dtype=dtype)
    clean = tree_attention(query, keys, values, prefix, ancestors)
    for poisoned in (keys, values):
        before = poisoned[:, prefix + hidden].clone()
        poisoned[:, prefix + hidden] = poison
        actual = tree_attention(query, keys, values, prefix, ancestors)
        assert torch.equal(actual[~sees], clean[~sees])
        expected = reference.tree_attention(query, keys, values, prefix, ancestors)
        assert torch.equal(actual[sees].isnan(), expected[sees].isnan())
        assert torch.equal(actual[sees].isinf(), expected[sees].isinf())
        poisoned[:, prefix + hidden] = before


def test_rows_outside_the_window_contribute_nothing():
    n, prefix, window = 40, 700, 20
    ancestors, depths = ancestor_mask(random_tree(n))
    query, keys, values = random_inputs(n, prefix)
    clean = tree_attention(query, keys, values, prefix, ancestors, sliding_window=window)
    edge = prefix - window + 3  # the root's window starts at prefix - window + 1
    keys[:, :edge] = float("nan")
    values[:, :edge] = float("nan")
    actual = tree_attention(query, keys, values, prefix, ancestors, sliding_window=window)
    beyond = depths >= 2
    assert beyond.any()
    assert torch.equal(actual[beyond], clean[beyond])
    assert actual[~beyond].isnan().all()


def test_nan_in_one_value_element_reaches_that_element_only():
    query, keys, values = random_inputs(5, 600)
    values[1, 99, 7] = float("nan")
    bad = tree_attention(query, keys, values, 600).isnan()
    assert bad[:, 3:, 7].all()
    assert bad.sum() == 5 * 3


def test_minus_infinity_scores():
    query, keys, values = random_inputs(3, 600, (1, 1))
    query[:] = query.abs()
    keys[0, 10:590] = float("-inf")  # whole tiles without a finite score
    actual = tree_attention(query, keys, values, 600)
    assert_close(actual, reference.tree_attention(query, keys, values, 600))
    keys[0] = float("-inf")
    assert tree_attention(query, keys, values, 600).isnan().all()


def test_large_scores_neither_overflow_nor_lose_the_winner():
    query, keys, values = random_inputs(6, 900)
    parents = random_tree(6)
    actual = tree_attention(query * 50, keys, values, 900, ancestor_mask(parents).ancestors)
    torch.testing.assert_close(
        actual.double(), along_paths(query * 50, keys, values, 900, parents), rtol=1e-3, atol=1e-3
    )


def test_prefix_length_as_a_tensor_and_no_queries():
    query, keys, values = random_inputs(4, 20)
    expected = tree_attention(query, keys, values, 20)
    assert torch.equal(tree_attention(query, keys, values, torch.tensor(20)), expected)
    assert tree_attention(query[:0], keys, values, 20).shape == (0, 6, 32)


SCHEDULES = ["forward", "reverse", "shuffle:1", "shuffle:2", "shuffle:3"]
MERGES = [
    # n, capacity, heads, dims, launches
    (4, 60, (4, 2), (64, 64), 1),  # one split
    (1, 1024, (4, 2), (64, 64), 1),  # 16 splits of 2 rows
    (5, 300, (6, 1), (128, 128), 1),
    (3, 700, (2, 2), (256, 200), 1),
    (20, 150, (8, 2), (64, 64), 1),  # two splits of two or three blocks of rows, in float32
    (1, 4000, (7, 1), (20, 3), 1),  # a partial result is hardly larger than its sums
    (40, 700, (8, 1), (96, 96), 2),
    (9, 2048, (14, 2), (64, 48), 2),
]


@pytest.mark.parametrize("implementation", ["emulated"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "capacity", "heads", "dims", "launches"), MERGES, ids=str)
def test_splits_are_merged_by_the_last_one_or_by_a_second_launch(
    n, capacity, heads, dims, launches, dtype, monkeypatch
):
    """Whatever is done last, with and without splits that have no keys: the same bits, and no launch too many."""
    ancestors = ancestor_mask(random_tree(n)).ancestors
    generator = torch.Generator().manual_seed(n)
    query = torch.randn(n, heads[0], dims[0], generator=generator).to(dtype)
    keys = torch.randn(heads[1], capacity, dims[0], generator=generator).to(dtype)
    values = torch.randn(heads[1], capacity, dims[1], generator=generator).to(dtype)
    values[0, capacity - n, 1] = float("inf")  # of the tree's root: added to a partial result behind the others
    for prefix in (capacity - n, capacity // 3, 0):
        expected = reference.tree_attention(query, keys, values, prefix, ancestors)
        found = []
        for schedule in SCHEDULES:
            monkeypatch.setenv("SPECBRANCH_EMULATOR_SCHEDULE", schedule)
            before = _library.core.launches()
            found.append(tree_attention(query, keys, values, prefix, ancestors))
            assert _library.core.launches() - before == launches
            assert not _tickets._host.any()
        assert_close(found[0], expected)
        assert all(torch.equal(bits, found[0]) for bits in found)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_trees(data):
    n = data.draw(st.integers(1, 40))
    parents = torch.tensor([data.draw(st.integers(-1, i - 1)) for i in range(n)])
    prefix = data.draw(st.integers(0, 140))
    variant = {
        "sliding_window": data.draw(st.none() | st.integers(1, 150)),
        "softcap": data.draw(st.none() | st.floats(0.5, 50.0)),
        "by_position": data.draw(st.booleans()),
    }
    heads = data.draw(st.sampled_from([(1, 1), (2, 1), (6, 2)]))
    dims = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    inputs = random_inputs(n, prefix, heads, dims)
    actual = tree_attention(*inputs, prefix, ancestor_mask(parents).ancestors, **variant)
    assert_close(actual, along_paths(*inputs, prefix, parents, **variant))


def test_baseline_instruction_set():
    """The level for old processors, which a run on a new one would not touch otherwise."""
    script = (
        "import torch, specbranch_ext as s, specbranch_ext.reference\n"
        "torch.manual_seed(0)\n"
        "assert s.build_info()['isa'] == 'baseline'\n"
        "for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):\n"
        "    q, k, v = (torch.randn(a, b, 50, dtype=dtype) for a, b in ((70, 6), (2, 400), (2, 400)))\n"
        "    for options in ({}, {'sliding_window': 90, 'softcap': 3.0}):\n"
        "        a = s.tree_attention(q, k, v, 300, **options)\n"
        "        b = s.reference.tree_attention(q, k, v, 300, **options)\n"
        "        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)\n"
    )
    environment = {**os.environ, "SPECBRANCH_ISA": "baseline"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    assert "baseline" in specbranch_ext.build_info()["isa_levels"]


N, PREFIX = 4, 10


def bad(**changes):
    """The arguments of a good call with some replaced."""
    query, keys, values = random_inputs(N, PREFIX)
    arguments = {
        "query": query,
        "keys": keys,
        "values": values,
        "prefix_length": PREFIX,
        "ancestors": ancestor_mask(random_tree(N)).ancestors,
    }
    return {**arguments, **{name: change(arguments[name]) for name, change in changes.items()}}


@on_cpu
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": lambda q: q[0]}, "query: expected shape"),
        ({"query": lambda q: q.double()}, "query: expected float32"),
        ({"query": lambda q: torch.cat([q, q], -1)[..., ::2]}, "query: expected stride 1"),
        ({"query": lambda q: q[:, :5]}, "query: expected Hq to be a multiple of Hkv"),
        ({"keys": lambda k: k[..., :16]}, "keys: expected shape"),
        ({"keys": lambda k: k.bfloat16()}, "keys: expected float32, got bfloat16"),
        ({"keys": lambda k: k.to("meta")}, "keys and values: expected query's device"),
        ({"values": lambda v: v[:, :-1]}, "values: expected shape"),
        ({"values": lambda v: v[0]}, "values: expected shape"),
        ({"prefix_length": lambda p: -1}, "prefix_length: expected at least 0"),
        ({"prefix_length": lambda p: torch.tensor([p])}, "prefix_length: expected"),
        ({"prefix_length": lambda p: torch.tensor(float(p))}, "prefix_length: expected"),
        ({"prefix_length": lambda p: p + 6}, "ancestors: expected prefix_length \\+ tree rows to fit"),
        ({"prefix_length": lambda p: 2**62}, "ancestors: expected prefix_length \\+ tree rows to fit"),
        ({"prefix_length": lambda p: p + 6, "ancestors": lambda a: None}, "query: expected prefix_length \\+ tree"),
        ({"ancestors": lambda a: a * 0}, "ancestors: .* row 0 is zero"),
        ({"ancestors": lambda a: a[:, :0]}, "ancestors: .* row 0 is zero"),
        ({"ancestors": lambda a: a | 1 << 63}, "ancestors: expected prefix_length \\+ tree rows to fit"),
        ({"ancestors": lambda a: a[:3]}, "ancestors: expected shape"),
        ({"ancestors": lambda a: a.int()}, "ancestors: expected int64"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        tree_attention(**bad(**changes))


@on_cpu
@pytest.mark.parametrize(
    ("options", "message"),
    [({"sliding_window": 0}, "sliding_window"), ({"softcap": 0.0}, "softcap"), ({"softcap": float("nan")}, "softcap")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        tree_attention(**bad(), **options)


def test_registration():
    op = torch.ops.specbranch.tree_attention.default
    query, keys, values = random_inputs(N, PREFIX)
    ancestors = ancestor_mask(random_tree(N)).ancestors
    for bits in (ancestors, None):
        torch.library.opcheck(op, (query, keys, values, torch.tensor(PREFIX), bits, 0.2, 3, 5.0, True))


def test_compiles_without_graph_breaks():
    query, keys, values = random_inputs(N, PREFIX)
    compiled = torch.compile(
        lambda q, p: tree_attention(q, keys, values, p, softcap=3.0) * 2, fullgraph=True, backend="aot_eager"
    )
    expected = tree_attention(query, keys, values, PREFIX, softcap=3.0) * 2
    assert torch.equal(compiled(query, torch.tensor(PREFIX)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 100}, {"softcap": 20.0}])
@pytest.mark.parametrize("length", [7, 64, 300, 513, 1040])
def test_a_query_does_not_depend_on_how_much_of_its_text_is_committed(
    length: int, options: dict[str, float], dtype: torch.dtype
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


# ---- The order of positions: how a token was drafted leaves no trace in its bits

SHAPES = [
    # nodes, heads, dims, capacity: every kernel, with one split and with many, merged in both ways
    (32, (4, 2), (64, 64), 900),
    (32, (14, 2), (64, 40), 600),
    (4, (4, 4), (128, 128), 2100),
    (12, (12, 1), (96, 96), 500),
    (40, (4, 1), (128, 80), 300),
    (3, (2, 2), (256, 200), 400),
    (9, (8, 1), (256, 256), 330),
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
    for prefix in {capacity // 128 * 64 - 1, capacity // 64 * 64 - n // 2}:  # the next tile begins within the tree
        if prefix < 0 or prefix + n > capacity:
            continue
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
