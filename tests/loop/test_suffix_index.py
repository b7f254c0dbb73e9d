"""The compiled look-ups in texts against their definitions in Python, and what keeps their memory whole."""

from __future__ import annotations

import contextlib
import gc
import threading
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from plain_suffix_index import Node, PlainSuffixIndex, plain_continuations

from specbranch.core.suffix_index import DEPTH, Continuations, SuffixIndex, continuations
from specbranch.core.tree import MOST_NODES


@st.composite
def texts(draw: st.DrawFn, pieces: int = 6) -> list[int]:
    """Of few tokens, with parts that repeat themselves and each other: ties and long matches are common."""
    alphabet = draw(st.sampled_from((1, 2, 4)))
    tokens = st.integers(0, alphabet - 1).map(lambda token: token * 1000003)  # not only small ids
    text: list[int] = []
    for _ in range(draw(st.integers(0, pieces))):
        if len(text) > 0 and draw(st.booleans()):
            begin = draw(st.integers(0, len(text) - 1))
            text += text[begin : begin + draw(st.integers(1, 80))]
        else:
            piece: list[int] = draw(st.lists(tokens, min_size=1, max_size=5))
            text += piece * draw(st.sampled_from((1, 1, 2, 40)))
    return text


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "occurrences": st.sampled_from((1, 2, 5, 32, 1000)),
        "depth": st.sampled_from((1, 2, 9, 64, 100)),
        "least_match": st.sampled_from((1, 2, 5, 64)),
        "most_nodes": st.sampled_from((1, 3, 20, 1000)),
        "near": st.none() | st.tuples(st.integers(-1, 2), st.integers(-3, 12), st.integers(-3, 20)),
    },
)


def nodes(found: Continuations) -> list[Node]:
    columns = (
        *(found.token, found.parent, found.match, found.count, found.total, found.source),
        *(found.position, found.near),
    )
    assert {len(column) for column in columns} == {len(found)}
    return [Node(*row) for row in zip(*columns, strict=True)]


class Indexes(RuleBasedStateMachine):
    """A text's index and its definition, which go through the same."""

    @initialize(tokens=texts())
    def begin(self, tokens: list[int]) -> None:
        self.index, self.plain = SuffixIndex(tokens), PlainSuffixIndex(tokens)

    @rule(tokens=texts(), several=st.booleans())
    def extend(self, tokens: list[int], several: bool) -> None:
        for piece in [[token] for token in tokens] if several else [tokens]:
            self.index.extend(piece)
            self.plain.extend(piece)

    @rule()
    def read_the_order(self) -> None:
        assert self.index.order.tolist() == self.plain.order

    @rule(drafted=texts(2), others=st.lists(texts(), max_size=2), options=OPTIONS)
    def look_up(self, drafted: list[int], others: list[list[int]], options: dict[str, Any]) -> None:
        context = self.plain.tokens[-(DEPTH + 6) :] + drafted
        found = continuations([self.index, *(SuffixIndex(other) for other in others)], context, len(drafted), **options)
        plain = [self.plain, *(PlainSuffixIndex(other) for other in others)]
        assert nodes(found) == plain_continuations(plain, context, len(drafted), **options)

    @invariant()
    def it_is_whole(self) -> None:
        if hasattr(self, "index"):
            assert self.index.check()
            assert len(self.index) == len(self.plain)
            assert self.index.tokens.tolist() == self.plain.tokens


TestIndexes = Indexes.TestCase
TestIndexes.settings = settings(stateful_step_count=10, deadline=None)  # the definition is slow where a text is long


@settings(deadline=None)  # the definition is slow
@given(st.lists(texts(), min_size=1, max_size=4))
def test_however_a_text_came_its_order_is_the_same(pieces: list[list[int]]) -> None:
    whole = [token for piece in pieces for token in piece]
    at_once, grown = SuffixIndex(whole), SuffixIndex(pieces[0])
    for piece in pieces[1:]:
        grown.extend(piece)
    assert at_once.order.tolist() == grown.order.tolist() == PlainSuffixIndex(whole).order
    assert at_once.check()


@pytest.mark.parametrize("vocabulary", [2, 50, 2**31 - 1])
def test_a_merge_of_every_size(vocabulary: int) -> None:
    """A tail of some hundreds beside a large order, and one that outweighs it."""
    random = np.random.default_rng(vocabulary)
    text = random.integers(0, vocabulary, 6000).astype(np.int32)
    index = SuffixIndex(text[:2000])
    for begin, end in ((2000, 2001), (2001, 2300), (2300, 2600), (2600, 2610), (2610, 6000)):
        index.extend(text[begin:end])
    assert index.check()
    assert index.order == SuffixIndex(text).order


@settings(deadline=None)  # the definition is slow
@given(texts(), texts(), texts(2), st.lists(texts(), max_size=2), OPTIONS)
def test_any_context_is_looked_up_as_it_is_defined(
    text: list[int], before: list[int], drafted: list[int], others: list[list[int]], options: dict[str, Any]
) -> None:
    """One that does not belong to the text too, and shorter or longer than what counts."""
    context = before + drafted
    found = continuations([SuffixIndex(each) for each in (text, *others)], context, len(drafted), **options)
    plain = plain_continuations([PlainSuffixIndex(each) for each in (text, *others)], context, len(drafted), **options)
    assert nodes(found) == plain


@settings(deadline=None)  # the definition is slow
@given(texts(), texts(2), OPTIONS)
def test_a_mapped_index_is_the_one_that_was_built(text: list[int], context: list[int], options: dict[str, Any]) -> None:
    built = SuffixIndex(text)
    mapped = SuffixIndex.mapped(array("i", text), array("i", built.order))
    assert mapped.check()
    assert (len(mapped), mapped.tokens, mapped.order) == (len(built), built.tokens, built.order)
    for indexes in ([], [SuffixIndex()]):
        first, second = (nodes(continuations([*indexes, each], context, **options)) for each in (built, mapped))
        assert first == second


def test_a_text_that_repeats_itself_is_continued_for_as_long_as_one_likes() -> None:
    index = SuffixIndex([7, 1, 2, 3, 1, 2, 3])
    found = continuations([index], [1, 2, 3, 1, 2, 3], occurrences=1, depth=200)
    assert found.token == [1, 2, 3] * 66 + [1, 2]
    assert found.parent == list(range(-1, 199))
    assert found.match == [min(DEPTH, 3 + i) for i in range(200)]
    drafted = continuations([index], [1, 2, 3, 1, 2, 3, 1, 2], 2, occurrences=1, depth=5)
    assert drafted.token == [3, 1, 2, 3, 1]
    elsewhere = continuations([SuffixIndex(), index], [1, 2, 3], occurrences=9)
    assert (elsewhere.token, elsewhere.source) == ([1, 2, 3], [1, 1, 1])  # it ends with the tokens


def test_columns_of_a_trie() -> None:
    index = SuffixIndex([5, 1, 2, 8, 5, 1, 3, 8, 6, 1, 2, 9, 5, 1])
    found = continuations([index], [5, 1], depth=2)
    # 5 1 is followed by 3 8 and by 2 8, and 6 1 by 2 9.
    assert nodes(found) == [
        Node(2, -1, 2, 2, 3, 0, 2, 0),
        Node(3, -1, 2, 1, 3, 0, 6, 0),
        Node(8, 0, 3, 1, 2, 0, 3, 0),
        Node(9, 0, 2, 1, 2, 0, 11, 0),
        Node(8, 1, 3, 1, 1, 0, 7, 0),
    ]
    # Where it was expected goes first, whatever else it has.
    near = continuations([index], [5, 1], depth=1, near=(0, 8, 9))
    assert nodes(near) == [Node(2, -1, 2, 2, 3, 0, 10, 1), Node(3, -1, 2, 1, 3, 0, 6, 0)]
    assert len(continuations([index], [])) == len(continuations([], [5, 1])) == len(continuations([index], [4])) == 0


def test_by_default_there_are_as_many_nodes_as_a_tree_may_have() -> None:
    random = np.random.default_rng(0)
    index = SuffixIndex(random.integers(0, 3, 2000))
    assert len(continuations([index], [0, 1, 2])) == MOST_NODES


@pytest.mark.parametrize("period", [1, 2, 1000])
def test_a_text_that_repeats_itself_takes_no_longer(period: int) -> None:
    """Comparing its prefixes as they are would not end."""
    size = 200_000
    text = np.arange(size, dtype=np.int32) % period
    index = SuffixIndex(text)
    assert index.check()
    for begin in range(0, 10_000, 10):
        index.extend(text[begin : begin + 10])
    assert index.check()
    assert len(index.order) == size + 10_000
    for _ in range(1000):
        found = continuations([index], text[size - DEPTH :])
    assert found.token[:3] == [0, 1 % period, 2 % period]


def test_it_is_built_beside_other_threads() -> None:
    text, built = [3, 1, 4, 1, 5] * 1000, []
    threads = [threading.Thread(target=lambda: built.append(SuffixIndex(text))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 4
    assert all(index.order == built[0].order and index.check() for index in built)


# ---- Memory


@pytest.mark.parametrize("name", ["tokens", "order"])
def test_a_view_keeps_the_index_as_it_is(name: str) -> None:
    index = SuffixIndex([3, 1, 2])
    index.extend([9])  # waits in the tail
    view = getattr(index, name)
    expected = {"tokens": [3, 1, 2, 9], "order": [1, 2, 0, 3]}[name]
    assert (view.format, view.readonly, view.contiguous, view.shape) == ("i", True, True, (4,))
    part = np.asarray(view)[1:]
    assert not part.flags.writeable
    for change in ([4], []):
        with pytest.raises(BufferError, match="still in use"):
            index.extend(change)
    assert index.order.tolist() == [1, 2, 0, 3]  # another view may be had, which is gone by now
    view.release()
    with pytest.raises(BufferError):
        index.extend([4])
    del part, view
    gc.collect()
    index.extend([4])
    assert index.tokens.tolist() == [3, 1, 2, 9, 4]
    view = getattr(index, name)
    del index
    gc.collect()
    SuffixIndex(range(1000))
    assert view.tolist()[: len(expected) - 1] == expected[:-1]


def test_views_of_nothing() -> None:
    index = SuffixIndex()
    assert (len(index), index.tokens.tolist(), index.order.tolist(), index.check()) == (0, [], [], True)
    assert len(SuffixIndex.mapped(index.tokens, index.order)) == 0


def test_a_mapped_index_keeps_its_buffers() -> None:
    tokens, order = bytearray(array("i", [4, 4])), bytearray(array("i", [0, 1]))
    index = SuffixIndex.mapped(memoryview(tokens).cast("i"), memoryview(order).cast("i"))
    with pytest.raises(BufferError):
        tokens.extend(b"more")
    assert continuations([SuffixIndex(), index], [4]).token == [4]
    del index
    gc.collect()
    tokens.extend(b"more")


# ---- Arguments


def test_tokens_of_every_kind() -> None:
    expected = SuffixIndex([5, 0, 2**31 - 2])
    for tokens in (
        (5, 0, 2**31 - 2),
        np.array([5, 0, 2**31 - 2]),
        np.array([5, 0, 2**31 - 2], dtype=np.int32),
        np.array([5, 9, 0, 9, 2**31 - 2, 9])[::2],
        np.array([5, 0, 2**31 - 2], dtype=np.uint32),
        array("q", [5, 0, 2**31 - 2]),
        expected.tokens,
    ):
        assert SuffixIndex(tokens).order == expected.order
    assert SuffixIndex(b"ab").tokens.tolist() == [97, 98]


RANGE = r"expected ids from 0 to 2147483646, got "


@pytest.mark.parametrize("make", [list, lambda tokens: np.array(tokens)])
@pytest.mark.parametrize("token", [-1, 2**31 - 1, -(2**63)])
def test_tokens_that_are_none_are_refused(make: Callable[[list[int]], Any], token: int) -> None:
    index = SuffixIndex([1, 2])
    tokens = make([1, token])
    with pytest.raises(ValueError, match=f"tokens: {RANGE}{token}$"):
        SuffixIndex(tokens)
    with pytest.raises(ValueError, match=f"tokens: {RANGE}{token}$"):
        index.extend(tokens)
    with pytest.raises(ValueError, match=f"context: {RANGE}{token}$"):
        continuations([index], tokens)
    assert index.tokens.tolist() == [1, 2]


def test_what_is_no_token_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match=f"tokens: {RANGE}{10**30}$"):
        SuffixIndex([10**30])
    for tokens in ([1.5], ["a"], 3, None, [None]):
        with pytest.raises(TypeError):
            SuffixIndex(tokens)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="indexes: expected a SuffixIndex"):
        continuations([[1, 2]], [1])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"drafted": -1}, "drafted: expected at least 0, got -1"),
        ({"drafted": 3}, "drafted: expected at most the 2 tokens of context, got 3"),
        ({"occurrences": 0}, "occurrences: expected at least 1, got 0"),
        ({"depth": 0}, "depth: expected at least 1, got 0"),
        ({"least_match": 0}, "least_match: expected 1 to 64, got 0"),
        ({"least_match": 65}, "least_match: expected 1 to 64, got 65"),
        ({"most_nodes": 0}, "most_nodes: expected 1 to 2147483646, got 0"),
    ],
)
def test_limits_that_are_none_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        continuations([SuffixIndex([1, 2])], [1, 2], **options)


GOOD = array("i", [0, 1])


@pytest.mark.parametrize(
    ("tokens", "order", "said"),
    [
        ([0, 1], GOOD, "tokens: expected a contiguous buffer of int32"),
        (GOOD, [0, 1], "order: expected a contiguous buffer of int32"),
        (array("q", GOOD), GOOD, "tokens: expected a contiguous buffer of int32"),
        (array("f", GOOD), GOOD, "tokens: expected a contiguous buffer of int32"),
        (GOOD, np.zeros((2, 1), np.int32), "order: expected a contiguous buffer of int32"),
        (GOOD, np.zeros(4, np.int32)[::2], "order: expected a contiguous buffer of int32"),
        (GOOD, np.zeros(2, np.uint32), "order: expected a contiguous buffer of int32"),
        (GOOD, np.zeros(3, np.int32), "order: expected a position for each of 2 tokens, got 3"),
    ],
)
def test_buffers_that_cannot_be_mapped_are_refused(tokens: Any, order: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SuffixIndex.mapped(tokens, order)


def test_a_mapped_index_does_not_grow() -> None:
    index = SuffixIndex.mapped(GOOD, GOOD)
    with pytest.raises(ValueError, match="extend: a mapped index cannot grow"):
        index.extend([1])


@pytest.mark.parametrize("wrong", [-1, 100, 2**31 - 1, -(2**31)])
def test_an_order_out_of_range_is_found_when_it_is_read(wrong: int) -> None:
    index = SuffixIndex.mapped(np.zeros(100, np.int32), np.full(100, wrong, np.int32))
    assert not index.check()
    with pytest.raises(ValueError, match=f"order: entry .* is {wrong}, expected a position from 0 to 99"):
        continuations([index], [0])


@settings(deadline=None)  # the definition is slow
@given(st.lists(st.integers(-2, 12), min_size=10, max_size=10), st.lists(st.integers(0, 1), min_size=10, max_size=10))
def test_any_order_is_read_with_care(order: Sequence[int], tokens: Sequence[int]) -> None:
    index = SuffixIndex.mapped(array("i", tokens), array("i", order))
    assert index.check() == (list(order) == PlainSuffixIndex(tokens).order)
    with contextlib.suppress(ValueError):
        assert set(continuations([index], [0, 1]).token) <= {0, 1}


def test_a_mapped_token_that_is_none_is_found_when_it_is_read() -> None:
    index = SuffixIndex.mapped(array("i", [3, -7, 3]), array("i", [1, 0, 2]))
    assert not index.check()
    with pytest.raises(ValueError, match="tokens: -7 at 1 is no token id"):
        continuations([index], [3])
