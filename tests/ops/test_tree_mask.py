"""tree_mask against the reference's dense mask, and torch's attention with it against tree_attention."""

import re
from typing import Any

import pytest
import torch
from attention_inputs import assert_close, random_inputs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from specbranch_ext import ancestor_mask, tree_attention, tree_mask
from specbranch_ext.reference.tree_attention import visible_keys


@st.composite
def trees(draw: st.DrawFn) -> Tensor:
    """Parents, int64 [n], over one to three words of bits."""
    n = draw(st.integers(1, 12) | st.integers(60, 140))
    return torch.tensor([draw(st.integers(max(-1, i - 6), i - 1)) for i in range(n)])


def test_a_small_tree_by_hand() -> None:
    # 0 ─┬─ 1 ── 3     behind a prefix of 2
    #    └─ 2
    ancestors = ancestor_mask(torch.tensor([-1, 0, 0, 1])).ancestors
    expected = [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0], [1, 1, 1, 1, 0, 1]]
    assert tree_mask(ancestors, 2).int().tolist() == expected
    near = [[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 1, 0, 1, 0], [0, 0, 0, 1, 0, 1]]
    assert tree_mask(ancestors, 2, sliding_window=2).int().tolist() == near
    assert tree_mask(ancestors[3:], 2, tree_rows=4).int().tolist() == expected[3:]


@given(parents=trees(), prefix=st.integers(0, 9), window=st.none() | st.integers(1, 20))
def test_it_is_the_mask_of_the_reference(parents: Tensor, prefix: int, window: int | None) -> None:
    ancestors = ancestor_mask(parents).ancestors
    expected, rows = visible_keys(len(parents), prefix, ancestors, window)
    assert rows == len(parents)
    mask = tree_mask(ancestors, prefix, sliding_window=window)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, expected)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        added = tree_mask(ancestors, prefix, sliding_window=window, dtype=dtype)
        assert added.dtype == dtype
        assert torch.equal(added, torch.where(expected, 0.0, -torch.inf).to(dtype))


@given(
    parents=trees(),
    prefix=st.integers(0, 9),
    window=st.none() | st.integers(1, 20),
    dtype=st.sampled_from([torch.bool, torch.float32]),
    data=st.data(),
)
def test_sdpa_with_it_is_tree_attention(
    parents: Tensor, prefix: int, window: int | None, dtype: torch.dtype, data: st.DataObject
) -> None:
    n = len(parents)
    first = data.draw(st.integers(0, n - 1))  # the queries are the nodes from here on: a step of a growing tree
    query, keys, values = random_inputs(n, prefix)
    ancestors = ancestor_mask(parents).ancestors[first:]
    expected = tree_attention(query[first:], keys, values, prefix, ancestors, sliding_window=window)
    used = prefix + n
    out = scaled_dot_product_attention(
        query[first:].transpose(0, 1)[None],
        keys[None, :, :used],
        values[None, :, :used],
        attn_mask=tree_mask(ancestors, prefix, tree_rows=n, sliding_window=window, dtype=dtype),
        enable_gqa=True,
    )
    assert_close(out[0].transpose(0, 1), expected)


def test_no_nodes() -> None:
    assert tree_mask(torch.empty(0, 0, dtype=torch.int64), 3).shape == (0, 3)


BITS = ancestor_mask(torch.tensor([-1, 0])).ancestors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ancestors": BITS[0]}, ValueError, "ancestors: expected int64 of shape [n, words], got int64 of shape [1]"),
        ({"ancestors": BITS.int()}, ValueError, "ancestors: expected int64 of shape [n, words], got int32 of shape"),
        ({"ancestors": BITS * 0}, ValueError, "ancestors: expected every row to have its node's own bit"),
        ({"ancestors": [1, 3]}, TypeError, "ancestors: expected a tensor, got list"),
        ({"tree_rows": 1}, ValueError, "ancestors: expected no bit behind the 1 tree rows"),
        ({"tree_rows": 65}, ValueError, "tree_rows: expected 0 to 64, the bits of ancestors, got 65"),
        ({"prefix_length": -1}, ValueError, "prefix_length: expected at least 0, got -1"),
        ({"prefix_length": 1.5}, TypeError, "prefix_length: expected an int, got 1.5 (float)"),
        ({"sliding_window": 0}, ValueError, "sliding_window: expected None or at least 1, got 0"),
        ({"dtype": torch.int64}, ValueError, "dtype: expected torch.bool or a floating-point dtype, got torch.int64"),
        ({"dtype": float}, TypeError, "dtype: expected a torch.dtype, got type"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        tree_mask(**{"ancestors": BITS, "prefix_length": 2, **arguments})
