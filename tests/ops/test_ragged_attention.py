"""tree_attention over several texts in one cache: every query has the bits that it has with its own text alone."""

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from attention_inputs import TOLERANCE, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import NAMES, on_cpu
from torch import Tensor

from specbranch_ext import ancestor_mask, reference, tree_attention

pytestmark = pytest.mark.usefixtures("implementation")

VARIANTS: list[dict[str, Any]] = [
    {},
    {"by_position": False},
    {"sliding_window": 3},
    {"sliding_window": 70, "softcap": 5.0},
    {"sliding_window": 3, "by_position": False},
]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@dataclass
class Texts:
    """Texts in one cache, the rest of which is NaN.

    starts, prefixes: of each text. parents: of each text's nodes, which are its queries; chain: without ancestor bits.
    """

    starts: list[int]
    prefixes: list[int]
    parents: list[list[int]]
    chain: bool = False
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (16, 16)
    dtype: torch.dtype = torch.float32
    spare: int = 3

    def __post_init__(self) -> None:
        ends = [start + length for start, length in zip(self.starts, self.lengths, strict=True)]
        generator = torch.Generator().manual_seed(sum(ends))
        self.capacity = max(ends, default=0) + self.spare
        self.nodes = [len(parents) for parents in self.parents]
        n = sum(self.nodes)
        self.query = torch.randn(n, self.heads[0], self.dims[0], generator=generator).to(self.dtype)
        cache = []
        for dim in self.dims:
            whole = torch.full((self.heads[1], self.capacity, dim), float("nan"))
            for start, end in zip(self.starts, ends, strict=True):
                whole[:, start:end] = torch.randn(self.heads[1], end - start, dim, generator=generator)
            cache.append(whole.to(self.dtype))
        self.cache = cache[0], cache[1]
        words = [ancestor_mask(torch.tensor(parents, dtype=torch.int64)).ancestors for parents in self.parents]
        width = max((each.shape[1] for each in words), default=1)
        self.ancestors = [torch.nn.functional.pad(each, (0, width - each.shape[1])) for each in words]
        self.sequence = torch.repeat_interleave(torch.arange(len(self.nodes)), torch.tensor(self.nodes))

    @property
    def lengths(self) -> list[int]:
        return [prefix + len(parents) for prefix, parents in zip(self.prefixes, self.parents, strict=True)]

    def together(self, op: Any = tree_attention, **options: Any) -> Tensor:
        ancestors = None if self.chain else torch.cat(self.ancestors)
        placed = {"starts": torch.tensor(self.starts), "sequence": self.sequence}
        result: Tensor = op(self.query, *self.cache, torch.tensor(self.prefixes), ancestors, **placed, **options)
        return result

    def own_cache(self, q: int, rows: int) -> tuple[Tensor, Tensor]:
        """The text's rows at the start of a cache of so many, the others NaN."""
        made = []
        for whole in self.cache:
            alone = torch.full_like(whole[:, :1], float("nan")).repeat(1, rows, 1)
            alone[:, : self.lengths[q]] = whole[:, self.starts[q] : self.starts[q] + self.lengths[q]]
            made.append(alone)
        return made[0], made[1]

    def alone(self, q: int, **options: Any) -> Tensor:
        """The text's queries in a call that knows no other."""
        own, cache = self.query[self.sequence == q], self.own_cache(q, self.lengths[q])
        return tree_attention(own, *cache, self.prefixes[q], None if self.chain else self.ancestors[q], **options)

    def alone_in_these_shapes(self, q: int, **options: Any) -> Tensor:
        """The same in a call of the shapes of `together`: all queries are of the text, behind its own come others."""
        n, count = len(self.query), self.nodes[q]
        order = [*range(count), *[0] * (n - count)]
        query, ancestors = self.query[self.sequence == q][order], None if self.chain else self.ancestors[q][order]
        starts, sequence = torch.zeros(len(self.starts), dtype=torch.int64), torch.full((n,), q)
        keys, values = self.own_cache(q, self.capacity)
        prefixes = torch.tensor(self.prefixes)
        out = tree_attention(query, keys, values, prefixes, ancestors, starts=starts, sequence=sequence, **options)
        return out[:count]

    def check(self, on_cpu: bool, **options: Any) -> None:
        together = self.together(**options)
        for q, nodes in enumerate(self.nodes):
            if nodes == 0:
                continue
            alone = self.alone(q, **options) if on_cpu else self.alone_in_these_shapes(q, **options)
            assert torch.equal(bits(together[self.sequence == q]), bits(alone)), q
        assert_close(together, self.together(reference.tree_attention, **options))


TREES: dict[int, list[list[int]]] = {
    0: [[]],
    1: [[-1]],
    2: [[-1, 0], [-1, -1]],
    3: [[-1, 0, 0], [-1, 0, 1], [-1, -1, 0]],
}


def test_all_small_texts(implementation: str) -> None:
    """Every share of up to four queries, with prefixes of several lengths, one behind the other or over each other."""
    number = 0
    for nodes in itertools.product(range(4), repeat=3):
        if not 1 <= sum(nodes) <= 4:
            continue
        for prefixes in ([0, 0, 0], [2, 0, 1], [1, 5, 3]):
            for starts in ([0, 9, 18], [18, 0, 9], [4, 4, 4], [0, 2, 3]):
                if implementation != "cpu" and number % 3:
                    number += 1
                    continue
                parents = [TREES[count][number % len(TREES[count])] for count in nodes]
                texts = Texts(starts, prefixes, parents, chain=number % 4 == 3)
                texts.check(implementation == "cpu", **VARIANTS[number % len(VARIANTS)])
                number += 1


@st.composite
def drawn_texts(draw: Any) -> Texts:
    count = draw(st.integers(1, 5))
    parents = []
    for _ in range(count):
        nodes = draw(st.integers(0, 9) | st.sampled_from([17, 40, 70]))
        parents.append([-1, *(draw(st.integers(-1, node - 1)) for node in range(1, nodes))][:nodes])
    return Texts(
        draw(st.lists(st.integers(0, 700), min_size=count, max_size=count)),
        [draw(st.integers(0, 9) | st.sampled_from([63, 64, 130, 500, 513])) for _ in range(count)],
        parents,
        chain=draw(st.booleans()),
        heads=draw(st.sampled_from([(1, 1), (4, 2), (6, 1), (14, 2)])),
        dims=draw(st.sampled_from([(16, 16), (64, 40), (33, 20), (128, 128), (256, 130), (300, 400)])),
        dtype=draw(st.sampled_from(list(TOLERANCE))),
        spare=draw(st.integers(0, 70)),
    )


@on_cpu
@settings(max_examples=150, deadline=None)
@given(texts=drawn_texts(), variant=st.sampled_from(VARIANTS))
def test_texts_of_all_sizes(texts: Texts, variant: dict[str, Any]) -> None:
    texts.check(on_cpu=True, **variant)


@pytest.mark.parametrize("implementation", NAMES[1:], indirect=True)
@settings(max_examples=20, deadline=None)
@given(texts=drawn_texts(), variant=st.sampled_from(VARIANTS))
def test_texts_of_all_sizes_on_a_device(texts: Texts, variant: dict[str, Any]) -> None:
    texts.check(on_cpu=False, **variant)


@pytest.mark.parametrize("by_position", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_many_short_texts_behind_long_prefixes(dtype: torch.dtype, by_position: bool, implementation: str) -> None:
    """Several segments and splits."""
    texts = Texts(
        [1200 * q for q in range(6)],
        [1100, 30, 0, 700, 1023, 511],
        [[-1, 0, 0, 1], [-1], [-1, 0, 1, 2, 3, 4], [], [-1, 0], [-1, -1, -1]],
        heads=(6, 1),
        dims=(64, 48),
        dtype=dtype,
    )
    texts.check(implementation == "cpu", by_position=by_position)


@on_cpu
@pytest.mark.parametrize("chain", [True, False])
def test_bits_do_not_depend_on_threads(chain: bool) -> None:
    before = torch.get_num_threads()
    texts = Texts([0, 900, 950], [850, 3, 1400], [[-1, 0, 0], [-1] * 20, [-1, 0]], chain, (12, 2), (128, 128))
    try:
        torch.set_num_threads(1)
        expected = texts.together()
        for threads in (2, 3, 8, 16):
            torch.set_num_threads(threads)
            assert torch.equal(texts.together(), expected)
            texts.check(on_cpu=True)
    finally:
        torch.set_num_threads(before)


def test_one_sequence_is_a_plain_call() -> None:
    texts = Texts([0], [70], [[-1, 0, 0, 1, 2]], spare=0)
    plain = tree_attention(texts.query, *texts.cache, 70, texts.ancestors[0])
    assert torch.equal(texts.together(), plain)


def test_no_queries() -> None:
    texts = Texts([0, 4], [3, 1], [[], []])
    assert texts.together().shape == (0, 4, 16)
    nothing = torch.zeros(0, dtype=torch.int64)
    assert tree_attention(texts.query, *texts.cache, nothing, starts=nothing, sequence=nothing).shape == (0, 4, 16)


def test_a_value_that_is_not_finite_stays_in_its_text() -> None:
    for poison in (float("nan"), float("inf")):
        texts = Texts([0, 30], [20, 20], [[-1, 0, 0], [-1, 0, 0]])
        clean = texts.together()
        texts.cache[1][0, 5, 3] = texts.cache[1][1, 21, 7] = poison  # a row of the prefix, and that of node 1
        actual = texts.together()
        assert torch.equal(actual[3:], clean[3:])
        bad = torch.zeros_like(actual, dtype=torch.bool)
        bad[:3, :2, 3] = bad[1, 2:, 7] = True
        assert torch.equal(~actual.isfinite(), bad)


@on_cpu
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"starts": None}, "starts: expected a tensor, as sequence is one, got None"),
        ({"sequence": None}, "sequence: expected a tensor, as starts is one, got None"),
        ({"prefix_length": 3}, r"prefix_length: expected int64 of shape \[s\], one of each text, got 3 \(int\)"),
        ({"prefix_length": torch.tensor(3)}, r"prefix_length: expected shape \[s\] = \[2\], got \[\]"),
        ({"prefix_length": torch.tensor([3])}, r"prefix_length: expected shape \[s\] = \[2\], got \[1\]"),
        ({"prefix_length": torch.tensor([3.0, 3.0])}, "prefix_length: expected int64, got float32"),
        ({"prefix_length": torch.tensor([3, -1])}, "prefix_length: expected at least 0, got -1 of sequence 1"),
        ({"prefix_length": torch.tensor([2**62, 0])}, "ancestors: expected starts .* of sequence 0"),
        ({"starts": torch.tensor(0)}, r"starts: expected shape \[s\]"),
        ({"starts": torch.tensor([0, 1], dtype=torch.int32)}, "starts: expected int64"),
        ({"starts": torch.tensor([0, 0, 0, 0])[::2]}, "starts: expected a contiguous tensor"),
        ({"starts": torch.tensor([0, -1])}, "starts: expected 0 to 20, the rows of keys, got -1 of sequence 1"),
        ({"starts": torch.tensor([-(2**63), 0])}, "starts: expected 0 to 20"),
        ({"starts": torch.tensor([21, 0])}, "starts: expected 0 to 20, the rows of keys, got 21 of sequence 0"),
        (
            {"starts": torch.tensor([0, 15])},
            r"ancestors: expected starts \+ prefix_length \+ tree rows to fit keys' 20 rows, got 15 \+ 4 \+ 2",
        ),
        ({"starts": torch.tensor([0, 15]), "ancestors": None}, "query: expected starts"),
        ({"starts": torch.tensor([0, 17]), "sequence": torch.tensor([0, 0, 0])}, "prefix_length: expected starts"),
        (
            {"starts": torch.zeros(0, dtype=torch.int64), "prefix_length": torch.zeros(0, dtype=torch.int64)},
            "starts: expected a sequence for every query, got none",
        ),
        ({"sequence": torch.tensor([0, 1])}, r"sequence: expected shape \[n\] = \[3\], got \[2\]"),
        ({"sequence": torch.tensor([0.0, 1.0, 1.0])}, "sequence: expected int64"),
        ({"sequence": torch.tensor([0, 1, 2])}, "sequence: expected numbers from 0 to 1 .*, but row 2 is 2"),
        ({"sequence": torch.tensor([1, 0, 1])}, "sequence: expected numbers from 0 to 1 .*, but row 1 is 0"),
        ({"sequence": torch.tensor([-1, 0, 1])}, "sequence: expected numbers from 0 to 1 .*, but row 0 is -1"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    generator = torch.Generator().manual_seed(1)
    arguments: dict[str, Any] = {
        "query": torch.randn(3, 4, 8, generator=generator),
        "keys": torch.randn(2, 20, 8, generator=generator),
        "values": torch.randn(2, 20, 8, generator=generator),
        "prefix_length": torch.tensor([3, 4]),
        "ancestors": torch.tensor([[1], [1], [3]]),
        "starts": torch.tensor([0, 7]),
        "sequence": torch.tensor([0, 1, 1]),
    }
    tree_attention(**arguments)
    with pytest.raises(ValueError, match=f"^{message}"):
        tree_attention(**{**arguments, **changes})


@pytest.mark.parametrize("implementation", NAMES[1:], indirect=True)
@pytest.mark.parametrize("by_position", [True, False])
@pytest.mark.parametrize("chain", [True, False])
@pytest.mark.parametrize("dims", [(16, 16), (64, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bad_data_on_a_device(dtype: torch.dtype, dims: tuple[int, int], chain: bool, by_position: bool) -> None:
    """A query that starts, prefix_length or sequence send nowhere gets NaN, and no other."""
    texts = Texts([0, 40, 300], [30, 200, 90], [[-1, 0], [-1, 0, 0], [-1]], chain, dims=dims, dtype=dtype, spare=9)
    for buffer in texts.cache:
        buffer.nan_to_num_(1.0)
    capacity, others = texts.capacity, texts.sequence != 1
    clean, tree_rows = texts.together(by_position=by_position), torch.tensor([1, 2, 1, 2, 3, 1])

    def check_marked(wrong: Tensor) -> None:
        marked = texts.together(by_position=by_position).isnan().flatten(1)
        assert torch.equal(marked.all(1), wrong)
        assert torch.equal(marked.any(1), wrong)

    for place, values in (
        (texts.starts, [-1, 2**40, -(2**63), 2**63 - 1, *range(capacity - 204, capacity - 199), capacity + 1]),
        (texts.prefixes, [-1, 2**40, -(2**63), 2**63 - 1, *range(capacity - 44, capacity - 39)]),
    ):
        before = place[1]
        for value in values:
            place[1] = value
            start, prefix = texts.starts[1], texts.prefixes[1]
            beyond = torch.tensor([start + prefix + rows > capacity for rows in tree_rows.tolist()])
            check_marked(~others & (beyond | (min(start, prefix) < 0)))
            assert torch.equal(bits(texts.together(by_position=by_position)[others]), bits(clean[others]))
        place[1] = before
    for sequence, wrong in (
        ([0, 0, 1, 1, 1, 9], [5]),
        ([-5, 0, 1, 1, 1, 2], [0]),
        ([0, 0, 1, 0, 1, 2], [3]),
        ([2, 0, 1, 1, 1, 2], [1, 2, 3, 4]),
        ([2**62, 0, 0, 1, 1, 2], [0, 1, 2, 3, 4]),
        ([-(2**63), 2**63 - 1] * 3, [0, 1, 2, 3, 4, 5]),
    ):
        texts.sequence = torch.tensor(sequence)
        check_marked(torch.tensor([i in wrong for i in range(6)]))


def test_registration() -> None:
    texts = Texts([0, 8], [3, 2], [[-1, 0], [-1]])
    op = torch.ops.specbranch.tree_attention.default
    placed = {"starts": torch.tensor(texts.starts), "sequence": texts.sequence}
    for ancestors in (torch.cat(texts.ancestors), None):
        arguments = (texts.query, *texts.cache, torch.tensor(texts.prefixes), ancestors, 0.2, 3, 5.0, True)
        torch.library.opcheck(op, arguments, placed)
