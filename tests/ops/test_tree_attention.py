"""tree_attention against the dense reference and against plain attention along each root-to-node path."""

import os
import subprocess
import sys

import pytest
import torch
from attention_inputs import TOLERANCE, VARIANTS, assert_close, random_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import NAMES, on_cpu
from torch import Tensor

import specbranch_ext
from specbranch_ext import ancestor_mask, reference, tree_attention
from specbranch_ext.ops import _library, _tickets
from specbranch_ext.reference.tree_attention import ancestor_matrix

pytestmark = pytest.mark.usefixtures("implementation")


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
        path: list[int] = []
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
    [
        *[(32, 32), (20, 20), (33, 31), (80, 80), (96, 96), (128, 128), (256, 256), (64, 40), (1, 3), (40, 200)],
        *[(512, 512), (320, 384), (257, 40), (40, 511)],
    ],
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


@pytest.mark.parametrize("implementation", NAMES[1:], indirect=True)
def test_the_widest_heads_on_a_device():
    for dims, name in (((513, 8), "query"), ((8, 513), "values")):
        with pytest.raises(ValueError, match=f"^{name}: expected at most 512 elements per head on CUDA"):
            tree_attention(*random_inputs(2, 3, dims=dims), 3)


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


@on_cpu
@pytest.mark.parametrize("length", [1171, 1172, 1173])  # 10 nodes x 1172 keys x (64 + 64)
def test_bits_where_threads_begin_to_pay(length):
    ancestors = ancestor_mask(random_tree(10)).ancestors
    query, keys, values = random_inputs(10, length - 10, (1, 1), (64, 64))
    expected = tree_attention(query, keys, values, length - 10, ancestors)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(tree_attention(query, keys, values, length - 10, ancestors), expected)


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
    (3, 300, (2, 2), (512, 512), 1),
    (20, 150, (8, 2), (64, 64), 1),  # two splits of two or three blocks of rows, in float32
    (1, 4000, (7, 1), (20, 3), 1),  # a partial result is hardly larger than its sums
    (40, 700, (8, 1), (96, 96), 2),
    (9, 600, (4, 1), (320, 512), 2),
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
        ({"keys": lambda k: k.to("meta")}, "keys: expected a tensor on cpu, as query is, got one on meta"),
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
    [
        ({"sliding_window": 0}, "sliding_window: expected None or at least 1, got 0"),
        ({"softcap": 0.0}, "softcap: expected None or a number from 1e-38 up, got 0.0"),
        ({"softcap": -30.0}, "softcap: expected None or a number from 1e-38 up, got -30.0"),
        ({"softcap": 1e-39}, "softcap: expected None or a number from 1e-38 up, got 1e-39"),
        ({"softcap": float("nan")}, "softcap: expected None or a number from 1e-38 up, got nan"),
        ({"scale": float("nan")}, "scale: expected a finite number, up to 1e38, got nan"),
        ({"scale": float("-inf")}, "scale: expected a finite number, up to 1e38, got -inf"),
        ({"scale": 1e39}, "scale: expected a finite number, up to 1e38, got 1e"),
    ],
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
