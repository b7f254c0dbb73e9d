"""Bad data on a device: a kernel cannot raise without waiting for it, so it marks what is wrong and stays in bounds."""

from typing import Any

import pytest
import torch
from implementations import NAMES

from specbranch_ext import (
    advance,
    ancestor_mask,
    draft_sample,
    kv_commit,
    reference,
    rotary_commit,
    tree_attention,
    verify,
)

pytestmark = [
    pytest.mark.usefixtures("implementation"),
    pytest.mark.parametrize("implementation", NAMES[1:], indirect=True, scope="module"),
]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9}], ids=str)
def test_verify_accepts_nothing_when_a_row_cannot_be_sampled(options, value):
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(1))
    tokens, parents, positions = torch.zeros(4, dtype=torch.int64), torch.arange(4) - 1, torch.arange(4)
    clean = verify(logits, tokens, parents, positions, **options)
    logits[2, 7:] = value
    if value < 0:
        logits[2] = value
    result = verify(logits, tokens, parents, positions, **options)
    assert result.target_tokens.tolist() == [*clean.target_tokens[:2].tolist(), -1, clean.target_tokens[3].item()]
    assert result.path.tolist() == [-1] * 4
    assert (result.accepted, result.next_token) == (0, -1)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}], ids=str)
@pytest.mark.parametrize("parents", [[-1, 0, 2**40, 0], [-1, 0, 2, 0], [-1, 0, 0, 0], [7, 0, 1, 0]])
def test_verify_needs_the_rows_of_all_nodes_that_name_a_parent(options, parents):
    logits = torch.zeros(4, 10)
    logits[2] = float("nan")
    result = verify(logits, torch.zeros(4, dtype=torch.int64), torch.tensor(parents), torch.arange(4), **options)
    assert (result.target_tokens[2], result.accepted, result.next_token) == (-1, 0, -1)


def test_verify_reports_values_that_overflow_with_the_temperature():
    logits = torch.full((1, 10), 1e38)
    arguments = (torch.zeros(1, dtype=torch.int64), torch.tensor([-1]), torch.tensor([0]))
    assert verify(logits, *arguments, temperature=0.1).next_token == -1


def test_verify_walks_no_parent_out_of_order():
    logits = torch.zeros(4, 10)
    logits[:, 3] = 5.0
    tokens = torch.tensor([0, 3, 3, 3])
    for parents in ([-1, 7, -5, 2**40], [5, 5, 5, 5], [-1, 1, 2, 3], [-1, 3, 0, 1]):
        result = verify(logits, tokens, torch.tensor(parents), torch.arange(4))
        assert result.next_token == 3
        assert 0 <= result.accepted <= 3
    assert result.path.tolist() == [2, -1, -1, -1]  # node 1's parent comes later, node 3's never is on the path


@pytest.mark.parametrize("size", [1, 400])
@pytest.mark.parametrize(
    ("roots", "here"),
    [
        ([0, 2, 4], [0, 2, 4]),
        ([0, 2, 6], [0, 2, None]),
        ([0, 2**40, 2**62], [0, None, None]),
        ([-7, 0, 3], [None, 0, 3]),
        ([-(2**63), 2, -1], [None, 2, None]),
        ([0, -1, 3], [None] * 3),
        ([3, 0, 4], [None] * 3),
        ([2, 2, 4], [None] * 3),
        ([0, 3, -9], [None] * 3),
        ([9, 0, 3], [None] * 3),
    ],
)
def test_verify_marks_the_texts_of_roots_that_there_are_not(roots, here, size):
    """Each node is the child of the one before it, and accepted. `size`: so many nodes are one of the example's."""
    n = 6 * size
    logits = torch.zeros(n, 4)
    logits[:, 3] = 1.0
    tokens, parents = torch.full((n,), 3), torch.arange(n) - 1
    for root in here:
        parents[(root or 0) * size] = -1
    given = torch.tensor([root * size if 0 < root <= 6 else root for root in roots])
    result = verify(logits, tokens, parents, torch.arange(n), roots=given)
    begins = [root for root in here if root is not None]
    path = [-1] * n
    for root, accepted, next_token in zip(here, result.accepted.tolist(), result.next_token.tolist(), strict=True):
        if root is None:
            assert (accepted, next_token) == (0, -1)
            continue
        end = next((other for other in begins if other > root), 6)
        nodes = range(root * size + 1, end * size)
        assert (accepted, next_token) == (len(nodes), 3)
        path[root * size : root * size + len(nodes)] = nodes
    assert result.path.tolist() == path


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 1}], ids=str)
def test_verify_walks_to_no_node_of_another_tree(options):
    logits = torch.zeros(6, 10)
    logits[:, 3] = 5.0
    tokens, roots = torch.full((6,), 3), torch.tensor([1, 3])
    for parents in ([-1, -1, 0, -1, 2, 1], [4, 5, 4, 0, 1, 2], [2**40, -1, -5, 1, 2**62, 0]):
        result = verify(logits, tokens, torch.tensor(parents), torch.arange(6), roots=roots, **options)
        assert result.path.tolist() == [-1] * 6
        assert (result.accepted.tolist(), result.next_token.tolist()) == ([0, 0], [3, 3])
    logits[4] = float("nan")  # needed, as it names a parent
    result = verify(logits, tokens, torch.tensor([-1, -1, 1, -1, 2, -1]), torch.arange(6), roots=roots, **options)
    assert (result.accepted.tolist(), result.next_token.tolist()) == ([1, 0], [3, -1])
    assert result.path.tolist() == [-1, 2, -1, -1, -1, -1]


@pytest.mark.parametrize(("place", "value"), [(0, -1.0), (0, float("nan")), (1, 2.5), (2, 0.0), (3, 1.5)])
def test_filters_out_of_range_stop_their_row_alone(place, value):
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(1))
    filters = torch.tensor([[0.8, 5, 0.5, 0.01], [0, 0, 1, 0], [1, 0, 0.9, 0], [0.5, 0, 1, 0.1]], dtype=torch.float64)
    tokens, positions = torch.zeros(4, dtype=torch.int64), torch.arange(4)
    arguments: dict[str, Any] = {"parents": torch.tensor([-1, 0, -1, 2]), "roots": torch.tensor([0, 2])}
    clean = verify(logits, tokens, positions=positions, filters=filters, **arguments)
    sample = draft_sample(logits, positions, 3, filters=filters)
    bad = filters.clone()
    bad[3, place] = value
    result = verify(logits, tokens, positions=positions, filters=bad, **arguments)
    assert result.target_tokens.tolist() == [*clean.target_tokens[:3].tolist(), -1]
    assert result.next_token.tolist() == [clean.next_token[0].item(), -1]
    marked = draft_sample(logits, positions, 3, filters=bad)
    for ours, before in zip(marked, sample, strict=True):
        assert torch.equal(ours[:3], before[:3])
    assert marked.tokens[3].tolist() == [-1] * 3
    assert marked.entropy[3].isnan()


def test_draft_sample_marks_the_row():
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(1))
    clean = draft_sample(logits, torch.arange(3), 4, temperature=1.0)
    logits[1, 499] = float("nan")
    result = draft_sample(logits, torch.arange(3), 4, temperature=1.0)
    assert result.tokens[1].tolist() == [-1] * 4
    assert result.scores[1].tolist() == [-float("inf")] * 4
    assert result.confidence[1].tolist() == [0.0] * 4
    assert result.entropy[1].isnan()
    for row in (0, 2):
        for ours, before in zip(result, clean, strict=True):
            assert torch.equal(ours[row], before[row])


def test_ancestor_mask_gives_nothing_below_a_parent_that_is_not_earlier():
    result = ancestor_mask(torch.tensor([-1, 0, 2, 2, 1, -7, 99]))
    assert result.depths.tolist() == [0, 1, -1, -1, 2, -1, -1]
    assert result.ancestors.flatten().tolist() == [0b1, 0b11, 0, 0, 0b10011, 0, 0]


def test_kv_commit_moves_no_row_out_of_range():
    buffer = torch.arange(10.0).reshape(1, 10, 1).repeat(2, 1, 8)
    guard = buffer.clone()
    kv_commit([buffer], torch.tensor([5, -1, 10, 2**40, 6]), 2)
    assert buffer[0, :, 0].tolist() == [0, 1, 5, 3, 4, 5, 6, 7, 8, 9]  # the last one is in place already
    for start in (-3, 9, 2**40, -(2**40)):
        buffer.copy_(guard)
        kv_commit([buffer], torch.tensor([5, 4]), start)
        expected = guard.clone()
        for i, row in enumerate((5, 4)):
            if 0 <= start + i < 10:
                expected[:, start + i] = guard[:, row]
        assert torch.equal(buffer, expected)
    buffer.copy_(guard)
    kv_commit([buffer], torch.tensor([5, 4, -1, 10, 7, 8]), torch.tensor([4, 2**40, 6, 7, -1, -(2**63)]))
    assert buffer[0, :, 0].tolist() == [0, 1, 2, 3, 5, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dim", [64, 6])
def test_rotary_commit_writes_no_row_out_of_range(dim, normed):
    query, key, value = torch.randn(6, 3, dim), torch.randn(6, 2, dim), torch.randn(6, 2, dim)
    cos, sin = torch.randn(2, 6, dim)
    norms = torch.randn(2, dim) if normed else (None, None)
    keys, values = torch.full((2, 2, 10, dim), 7.0)
    around = torch.tensor([3, -1, 10, 2**40, 0, -(2**62)])
    result = rotary_commit(query, key, value, cos, sin, around, keys, values, *norms)
    expected_keys, expected_values = torch.full((2, 2, 10, dim), 7.0)
    all_keys, all_values = torch.zeros(2, 2, 6, dim)
    cache = all_keys, all_values
    expected = reference.rotary_commit(query, key, value, cos, sin, torch.arange(6), *cache, *norms)
    for i in (0, 4):
        expected_keys[:, around[i]], expected_values[:, around[i]] = all_keys[:, i], all_values[:, i]
    assert torch.equal(result, expected)
    assert torch.equal(keys, expected_keys)
    assert torch.equal(values, expected_values)


def test_advance_writes_nothing_without_a_slot():
    columns = torch.tensor([[1, 2, 1], [20, 21, 20], [21, 22, 21], [7, 8, 99], [2, 2, 0]])
    ids, positions, next_positions, rows, strides = columns
    ancestors, prefix, slot = torch.tensor([[1], [2], [1]]), torch.tensor(7), torch.tensor(0)
    buffers = [torch.full((4, 3, 1), 9), torch.ones(4, 3, 1), torch.ones(4, 3, 1), torch.ones(4, 3)]
    sample = (torch.tensor([[5], [6], [7]]), *torch.zeros(2, 3, 1), torch.zeros(3))
    before = [tensor.clone() for tensor in (columns, ancestors, *buffers)]
    for value in (-1, 4, 2**40, -(2**63), 2**63 - 1):
        slot.fill_(value)
        advance(buffers, sample, ids, positions, next_positions, rows, strides, ancestors, prefix, slot, 99)
        assert (prefix, slot) == (7, value)
        assert all(torch.equal(a, b) for a, b in zip((columns, ancestors, *buffers), before, strict=True))


@pytest.mark.parametrize("by_position", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [2, 20])
def test_tree_attention_reads_no_row_beyond_the_cache(n, dtype, by_position):
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(n, 4, 64, generator=generator).to(dtype)
    keys, values = torch.randn(2, 2, 40, 64, generator=generator).to(dtype)
    bits = torch.full((n, 1), -1)
    for prefix in (30, 39, 40, 41, 2**40, -1, -(2**40)):  # the tree's bits go on behind the cache
        assert tree_attention(query, keys, values, prefix, bits, by_position=by_position).isnan().all()
    bits[0] = 1  # the others do not matter to it
    assert not tree_attention(query, keys, values, 39, bits, by_position=by_position)[0].isnan().any()


@pytest.mark.parametrize("by_position", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tree_attention_marks_the_rows_that_leave_the_cache_and_no_other(dtype, by_position):
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(40, 2, 64, generator=generator).to(dtype)
    keys, values = torch.randn(2, 1, 200, 64, generator=generator).to(dtype)
    bits = torch.randint(-(2**63), 2**63 - 1, (40, 3), generator=generator)
    bits[::2, 2] = 0
    bits[::4, 1] &= 255
    bits[8] = 0
    highest = torch.tensor(
        [max((64 * w + (int(x) % 2**64).bit_length() for w, x in enumerate(b) if x), default=0) for b in bits]
    )
    for prefix in (0, 90, 128):
        result = tree_attention(query, keys, values, prefix, bits, by_position=by_position)
        inside = prefix + highest <= 200
        assert torch.equal(result.isnan().flatten(1).any(1), ~inside)
        assert result[~inside].isnan().all()
        seen = inside & (highest > 0)
        expected = reference.tree_attention(query[seen], keys, values, prefix, bits[seen])
        torch.testing.assert_close(result[seen], expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [2, 20])
def test_a_query_that_sees_nothing_gets_zeros(n, dtype):
    query, keys, values = (torch.randn(n, 2, 64).to(dtype), *torch.randn(2, 2, 40, 64).to(dtype))
    result = tree_attention(query, keys, values, 0, torch.zeros(n, 1, dtype=torch.int64))
    assert not result.any()
