"""Bad data on a device: a kernel cannot raise without waiting for it, so it marks what is wrong and stays in bounds."""

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
