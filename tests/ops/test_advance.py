"""advance against the reference, and against batches that the host makes."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import on_cpu
from torch import Tensor

from specbranch.runtime.batch import Batch, pack
from specbranch_ext import DraftSample, advance, reference

pytestmark = pytest.mark.usefixtures("implementation")

SLOTS = 5
GUARD = 77  # what lies around


def ints(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def around(values: Tensor) -> Tensor:
    """A copy within memory that nobody may touch."""
    whole = torch.full((values.numel() + 6,), GUARD, dtype=values.dtype)
    return whole[3:-3].view(values.shape).copy_(values)


def untouched(tensor: Tensor) -> bool:
    """Whether the memory around a tensor, or around the first rows of one, is as it was."""
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    before, behind = tensor.storage_offset(), tensor.storage_offset() + tensor.numel()
    return bool((whole[:before] == GUARD).all() and (whole[behind:] == GUARD).all())


@dataclass
class Step:
    """The arguments but `sample`: what a burst keeps. Rows behind the first `leaves` are padding after a step."""

    buffers: tuple[Tensor, ...]
    ids: Tensor
    positions: Tensor
    next_positions: Tensor
    rows: Tensor
    strides: Tensor
    ancestors: Tensor
    prefix: Tensor
    slot: Tensor
    spare: int

    @staticmethod
    def of(batch: Batch, n: int, words: int, k: int = 1, rows: int | None = None, slot: int = 0) -> "Step":
        """A batch, padded to n rows with the first one."""
        count, most = n - len(batch), n if rows is None else rows
        columns = [
            [*batch.tokens, *batch.tokens[:1] * count],
            [*batch.positions, *batch.positions[:1] * count],
            [0] * n,
            [*batch.rows, *[999] * count],
            [batch.leaves] * batch.leaves + [0] * (n - batch.leaves),
        ]
        bits = pack((*batch.ancestors, *batch.ancestors[:1] * count), words)
        shapes = [(SLOTS, most, k)] * 3 + [(SLOTS, most)]
        dtypes = [torch.int64, *[torch.float32] * 3]
        buffers = [around(torch.full(shape, GUARD, dtype=d)) for shape, d in zip(shapes, dtypes, strict=True)]
        inputs = [*map(ints, columns), torch.from_numpy(bits), ints(batch.prefix), ints(slot)]
        arguments: list[Any] = [tuple(buffers), *map(around, inputs), 999]
        return Step(*arguments)

    def tensors(self) -> list[Tensor]:
        return [*self.buffers, *(value for value in vars(self).values() if isinstance(value, Tensor))]

    def copy(self) -> "Step":
        fields: dict[str, Any] = {name: around(x) if isinstance(x, Tensor) else x for name, x in vars(self).items()}
        return Step(**{**fields, "buffers": tuple(map(around, self.buffers))})

    def equals(self, other: "Step") -> bool:
        return all(torch.equal(one, two) for one, two in zip(self.tensors(), other.tensors(), strict=True))


def sample_of(tokens: list[list[int]]) -> DraftSample:
    shape = ints(tokens).shape
    return DraftSample(ints(tokens), torch.randn(shape), torch.rand(shape), torch.rand(shape[0]))


def check(step: Step, sample: DraftSample) -> None:
    """Ours and the reference's, to the bit, and nothing else is written."""
    n, slot, by_reference, before = len(step.ids), int(step.slot), step.copy(), step.copy()
    advance(sample=sample, **vars(step))
    reference.advance(sample=sample, **vars(by_reference))
    assert step.equals(by_reference)
    assert all(untouched(tensor) for tensor in step.tensors())
    for buffer, was, part in zip(step.buffers, before.buffers, sample, strict=True):
        was[slot, :n] = part
        assert torch.equal(buffer, was)
    assert torch.equal(step.prefix, before.prefix)
    assert step.slot == slot + 1
    assert torch.equal(step.strides, before.strides)


@st.composite
def batches(draw: Any, words: int, most: int = 6) -> Batch:
    """Leaves of any tree and rows that catch up, with room for five more steps among the bits."""
    leaves, others = draw(st.integers(1, most)), draw(st.integers(0, 3))
    n, prefix = leaves + others, draw(st.integers(0, 2**40))
    used = draw(st.integers(0, 64 * words - n - 5 * leaves))
    # Rows that catch up lie before the leaves in the cache, and behind them in the batch.
    places = [*range(used + others, used + n), *range(used, used + others)]
    numbers = st.lists(st.integers(0, 2**40), min_size=n, max_size=n)
    return Batch(
        tuple(draw(numbers)),
        tuple(draw(numbers)),
        tuple(prefix + place for place in places),
        tuple(draw(st.integers(0, 2**place)) | 1 << place for place in places),
        prefix,
        leaves,
    )


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_burst_goes_on_as_the_host_does(data: st.DataObject) -> None:
    words, k = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    batch = data.draw(batches(words))
    leaves, n = batch.leaves, len(batch) + data.draw(st.integers(0, 4))
    step = Step.of(batch, n, words, k, rows=n + data.draw(st.integers(0, 3)), slot=data.draw(st.integers(0, 2)))
    for _ in range(3):
        sample = sample_of(
            data.draw(st.lists(st.lists(st.integers(-1, 99), min_size=k, max_size=k), min_size=n, max_size=n))
        )
        check(step, sample)
        batch = batch.below([max(0, first) for first, *_ in sample.tokens[:leaves].tolist()])
        padding = n - leaves
        assert step.ids.tolist() == [*batch.tokens, *batch.tokens[:1] * padding]
        assert step.positions.tolist() == [*batch.positions, *batch.positions[:1] * padding]
        assert step.next_positions.tolist() == [position + 1 for position in step.positions.tolist()]
        assert step.rows.tolist() == [*batch.rows, *[999] * padding]
        assert step.ancestors.tolist() == pack((*batch.ancestors, *batch.ancestors[:1] * padding), words).tolist()


def chain(leaves: int, prefix: int = 7) -> Batch:
    """Leaves without anything above them."""
    rows = range(leaves)
    return Batch(
        tuple(10 + i for i in rows),
        tuple(100 + i for i in rows),
        tuple(prefix + i for i in rows),
        tuple(1 << i for i in rows),
        prefix,
        leaves,
    )


@pytest.mark.parametrize("n", [1, 2, 64, 127, 128, 129, 300])
@pytest.mark.parametrize("real", ["one", "half", "all"])
def test_any_number_of_rows(n: int, real: str) -> None:
    """More than a block has threads too."""
    leaves = {"one": 1, "half": (n + 1) // 2, "all": n}[real]
    step = Step.of(chain(leaves), n, words=2 * n // 64 + 1, k=3, rows=n + 1)
    check(step, sample_of([[i, -1, 5] for i in range(n)]))
    assert step.ids.tolist() == [*range(leaves), *[0] * (n - leaves)]


def test_bits_at_the_ends_of_words() -> None:
    for place in (0, 62, 63, 64, 127, 128, 191):
        step = Step.of(Batch((1,), (5,), (20 + place - 1,), (0,), 20, 1), 2, words=3)
        check(step, sample_of([[4], [8]]))
        assert step.ancestors.tolist() == [pack([1 << place], 3)[0].tolist()] * 2


@pytest.mark.parametrize("row", [7 + 62, 4, 2**40, -(2**40), 2**63 - 1])
def test_a_cache_row_beyond_the_words_gets_no_bit(row: int) -> None:
    """The last step of a burst may fill the tree: nobody runs the batch behind it."""
    step = Step.of(Batch((1, 2), (20, 21), (row, 8), (1, 2), 7, 2), 3, words=1)
    check(step, sample_of([[5], [6], [7]]))
    assert step.ancestors.tolist() == [[1], [2 + 8], [1]]
    assert step.rows.tolist() == [(row + 2 + 2**63) % 2**64 - 2**63, 10, 999]
    assert step.ids.tolist() == [5, 6, 5]


def beside_each_other(steps: list[Step]) -> Step:
    """The rows of several texts, each with its prefix."""
    names = ("ids", "positions", "next_positions", "rows", "strides", "ancestors")
    joined = {name: torch.cat([vars(step)[name] for step in steps]) for name in names}
    joined["prefix"] = torch.cat([step.prefix.expand(len(step.ids)) for step in steps])
    joined = {name: around(column) for name, column in joined.items()}
    n = len(joined["ids"])
    buffers = [around(torch.full((SLOTS, n, 1), GUARD, dtype=d)) for d in (torch.int64, *[torch.float32] * 2)]
    buffers.append(around(torch.full((SLOTS, n), GUARD, dtype=torch.float32)))
    return Step(buffers=tuple(buffers), **joined, slot=around(ints(1)), spare=999)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_of_several_texts_go_on_as_each_text_does(data: st.DataObject) -> None:
    words = data.draw(st.integers(1, 3))
    texts = data.draw(st.lists(batches(words, most=3), min_size=1, max_size=4))
    rows = [len(text) + data.draw(st.integers(0, 2)) for text in texts]
    step = beside_each_other([Step.of(text, n, words) for text, n in zip(texts, rows, strict=True)])
    for _ in range(3):
        n = len(step.ids)
        sample = sample_of([[token] for token in data.draw(st.lists(st.integers(-1, 99), min_size=n, max_size=n))])
        check(step, sample)
        first = 0
        for q, (text, count) in enumerate(zip(texts, rows, strict=True)):
            own, padding = slice(first, first + count), count - text.leaves
            tokens = sample.tokens[first : first + text.leaves, 0].clamp(min=0).tolist()
            texts[q] = text = text.below(tokens)
            assert step.ids[own].tolist() == [*text.tokens, *text.tokens[-1:] * padding]
            assert step.positions[own].tolist() == [*text.positions, *text.positions[-1:] * padding]
            assert step.rows[own].tolist() == [*text.rows, *[999] * padding]
            bits = pack((*text.ancestors, *text.ancestors[-1:] * padding), words)
            assert step.ancestors[own].tolist() == bits.tolist()
            first += count


def test_padding_of_several_texts_without_a_row_to_copy() -> None:
    step = Step.of(chain(4), 4, words=1)
    step.prefix, step.strides = ints([7, 7, 9, 9]), around(ints([0, 0, 2, 0]))
    step.rows[2] = 12
    check(step, sample_of([[1], [2], [3], [4]]))
    assert step.ids.tolist() == [1, 1, 3, 3]
    assert step.rows.tolist() == [999, 999, 14, 999]
    assert step.ancestors.flatten().tolist() == [1, 1, 4 | 1 << 5, 4 | 1 << 5]


def test_rows_do_not_depend_on_their_number() -> None:
    few, many = Step.of(chain(3), 3, words=2), Step.of(chain(3), 64, words=2)
    sample = sample_of([[i] for i in range(64)])
    advance(sample=sample, **vars(many))
    advance(sample=[part[:3] for part in sample], **vars(few))
    for one, other in zip(few.tensors()[4:-2], many.tensors()[4:-2], strict=True):
        assert torch.equal(one, other[:3])


def test_nothing_but_padding_sees_no_other_row() -> None:
    """As a warm-up runs: the spare row lies anywhere."""
    step = Step.of(Batch((3,), (9,), (999,), (1,), 0, 0), 4, words=1)
    check(step, sample_of([[5]] * 4))
    assert step.rows.tolist() == [999] * 4
    assert step.ancestors.tolist() == [[1]] * 4
    assert (step.ids.tolist(), step.positions.tolist()) == ([5] * 4, [10] * 4)


def test_no_rows() -> None:
    step = Step.of(Batch((), (), (), (), 0, 0), 0, words=1, rows=2)
    check(step, DraftSample(ints([]).view(0, 1), torch.zeros(0, 1), torch.zeros(0, 1), torch.zeros(0)))


def test_the_first_rows_of_a_larger_memory() -> None:
    """As a burst of fewer rows than there may be: views of columns and of the ancestors' rows."""
    whole = Step.of(chain(8), 8, words=2)
    before = whole.copy()
    columns = {name: value[:3] for name, value in vars(whole).items() if isinstance(value, Tensor) and value.dim()}
    sample = sample_of([[40], [41], [42]])
    advance(sample=sample, **{**vars(whole), **columns})
    assert whole.ids.tolist() == [40, 41, 42, *before.ids.tolist()[3:]]
    for one, other in zip(whole.tensors()[4:-2], before.tensors()[4:-2], strict=True):
        assert torch.equal(one[3:], other[3:])
    assert torch.equal(whole.buffers[1][0, :3], sample.scores)
    assert bool((whole.buffers[1][0, 3:] == GUARD).all())


@on_cpu
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slot": ints(SLOTS)}, "slot: expected one of the 5 of buffers\\[0\\], got 5"),
        ({"slot": ints(-1)}, "slot: expected one of the 5 of buffers\\[0\\], got -1"),
    ],
)
def test_slots_out_of_range(changes: dict[str, Tensor], message: str) -> None:
    step = Step.of(chain(2), 2, words=1)
    step = Step(**{**vars(step), **changes})
    before = step.copy()
    for function in (advance, reference.advance):
        with pytest.raises(ValueError, match=message if function is advance else message.split(":")[0]):
            function(sample=sample_of([[1], [2]]), **vars(step))
        assert step.equals(before)


@on_cpu
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"buffers": [torch.zeros(1)] * 3},
            "buffers: expected 4 tensors \\(tokens, scores, confidence, entropy\\), got 3",
        ),
        ({"sample": [ints([[1], [2]])]}, "sample: expected 4 tensors .*, got 1"),
        ({"sample": [ints([1, 2])] * 4}, "sample\\[0\\]: expected shape \\[n, k\\]"),
        ({"sample": [ints([[], []])] * 4}, "sample\\[0\\]: expected at least one candidate, got shape \\[2, 0\\]"),
        ({"sample": (*sample_of([[1, 2]] * 2)[:3], torch.zeros(2))}, "buffers\\[0\\]: expected shape \\[S, R, k\\]"),
        ({"sample": (ints([[1], [2]]), *[torch.zeros(2, 1)] * 3)}, "sample\\[3\\]: expected shape \\[n\\]"),
        ({"sample": (torch.zeros(2, 1), *sample_of([[1], [2]])[1:])}, "sample\\[0\\]: expected int64, got float32"),
        ({"sample": sample_of([[1]] * 3)}, "buffers\\[0\\]: expected at least n = 3 rows"),
        ({"ids": ints([1])}, "ids: expected shape \\[n\\] = \\[2\\], got \\[1\\]"),
        ({"positions": ints([1, 2]).int()}, "positions: expected int64"),
        ({"next_positions": ints([1, 2, 3, 4])[::2]}, "next_positions: expected a contiguous"),
        ({"rows": ints([[1, 2]])}, "rows: expected shape \\[n\\]"),
        ({"strides": ints(2)}, "strides: expected shape \\[n\\]"),
        ({"ancestors": ints([1, 2])}, "ancestors: expected shape \\[n, words\\]"),
        ({"ancestors": ints([[1, 2, 3, 4]] * 2)[:, :2]}, "ancestors: expected a contiguous"),
        ({"prefix": ints([7])}, "prefix: expected shape \\[\\] or \\[n\\] = \\[2\\], got \\[1\\]"),
        ({"prefix": ints([[7, 8]])}, "prefix: expected shape \\[\\] or \\[n\\]"),
        ({"prefix": ints([7, 8, 9])[::2]}, "prefix: expected a contiguous"),
        ({"prefix": torch.tensor([7.0, 8.0])}, "prefix: expected int64, got float32"),
        ({"slot": torch.tensor(0.0)}, "slot: expected int64, got float32"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    step = Step.of(chain(2), 2, words=1)
    before = step.copy()
    with pytest.raises(ValueError, match=message):
        advance(**{"sample": sample_of([[1], [2]]), **vars(step), **changes})
    assert step.equals(before)


def test_registration() -> None:
    step = vars(Step.of(chain(2), 3, words=1))
    arguments = (list(step.pop("buffers")), list(sample_of([[1], [2], [3]])), *step.values())
    torch.library.opcheck(torch.ops.specbranch.advance.default, arguments)
