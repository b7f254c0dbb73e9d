"""kv_commit against an out-of-place gather."""

import itertools
import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import on_cpu
from torch import Tensor

from specbranch_ext import kv_commit, reference

pytestmark = pytest.mark.usefixtures("implementation")

CAPACITY = 40


def random_buffers(dtype=torch.float32) -> list[Tensor]:
    """Keys and values as caches hold them: another head size, strided heads, padded rows, rows before heads."""

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape) * 100).to(dtype)

    return [
        normal(2, CAPACITY, 8),
        normal(3, CAPACITY, 20),
        normal(4, CAPACITY, 8)[::2],
        normal(2, CAPACITY, 24)[:, :, 3:19],
        normal(CAPACITY, 2, 8).transpose(0, 1),
    ]


def gathered(buffers: list[Tensor], rows: list[int], start: int | list[int]) -> list[Tensor]:
    expected = []
    places = start if isinstance(start, list) else range(start, start + len(rows))
    for buffer in buffers:
        new = buffer.clone()
        for place, row in zip(places, rows, strict=True):
            new[:, place] = buffer[:, row]
        expected.append(new)
    return expected


def check(rows: list[int], start: int | list[int], dtype=torch.float32) -> None:
    buffers = random_buffers(dtype)
    expected = gathered(buffers, rows, start)
    by_reference = [buffer.clone() for buffer in buffers]
    places = torch.tensor(start, dtype=torch.int64)
    kv_commit(buffers, torch.tensor(rows, dtype=torch.int64), places if isinstance(start, list) else start)
    reference.kv_commit(by_reference, torch.tensor(rows, dtype=torch.int64), places)
    for actual, other, wanted in zip(buffers, by_reference, expected, strict=True):
        assert torch.equal(actual, wanted)
        assert torch.equal(other, wanted)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_rows_to_any_place(data):
    rows = data.draw(st.lists(st.integers(0, CAPACITY - 1), max_size=CAPACITY))
    check(rows, data.draw(st.integers(0, CAPACITY - len(rows))))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_rows_each_to_any_place(data):
    places = data.draw(st.lists(st.integers(0, CAPACITY - 1), max_size=CAPACITY, unique=True))
    check(data.draw(st.lists(st.integers(0, CAPACITY - 1), min_size=len(places), max_size=len(places))), places)


def test_every_exchange_of_few_rows():
    """All rows to all places, of a buffer of four: cycles, overlaps, copies and rows in place."""
    for m in range(1, 5):
        for places in itertools.permutations(range(4), m):
            for rows in itertools.product(range(4), repeat=m):
                buffer = torch.arange(4.0).reshape(1, 4, 1).repeat(1, 1, 4)
                (expected,) = gathered([buffer], list(rows), list(places))
                kv_commit([buffer], torch.tensor(rows), torch.tensor(places))
                assert torch.equal(buffer, expected)


@pytest.mark.parametrize(
    ("rows", "start"),
    [
        ([10, 11, 14, 17], 10),  # an accepted path: in order, the first rows in place
        ([12, 11, 10, 9], 9),  # reversed onto itself
        ([9, 10, 11, 12], 10),  # moved up by one
        ([11, 12, 13, 14], 10),  # moved down by one
        ([20, 20, 20], 19),  # one row three times
        ([5, 39, 7], 5),  # both ends in place
        ([39], 0),
        ([], 40),
        ([12, 14, 32, 33], [10, 11, 30, 31]),  # the paths of two texts
        ([10, 11, 33], [10, 11, 30]),  # one of them in place
        ([11, 10], [10, 11]),  # exchanged
        ([], []),
    ],
)
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.float8_e4m3fn],
    ids=str,
)
def test_overlaps_and_dtypes(rows, start, dtype):
    if dtype is not torch.float8_e4m3fn:
        check(rows, start, dtype)
        return
    buffers = [torch.randint(0, 255, (2, CAPACITY, 16), dtype=torch.uint8)]
    expected = gathered(buffers, rows, start)
    places = torch.tensor(start, dtype=torch.int64)
    kv_commit([buffers[0].view(dtype)], torch.tensor(rows, dtype=torch.int64), places)
    assert torch.equal(buffers[0], expected[0])


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_rows_in_place_move_nothing():
    # In memory that must not be written a single store would end the process.
    memory = mmap.mmap(-1, 2 * CAPACITY * 8 * 4, prot=mmap.PROT_READ)
    buffer = torch.frombuffer(memory, dtype=torch.float32).view(2, CAPACITY, 8)
    for start in (0, 7, 36):
        kv_commit([buffer], torch.arange(start, start + 4), start)
    kv_commit([buffer], torch.tensor([5, 2, 39]), torch.tensor([5, 2, 39]))
    kv_commit([buffer], torch.tensor([], dtype=torch.int64), CAPACITY)
    assert not buffer.any()


def test_many_large_buffers_and_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        buffers = [torch.randn(4, 300, 128) for _ in range(9)]
        rows = torch.randperm(300)[:200]
        expected = gathered(buffers, rows.tolist(), 50)
        kv_commit(buffers, rows, torch.tensor(50))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(buffers, expected, strict=True))


def test_no_buffers_and_empty_buffers():
    rows = torch.tensor([3, 1])
    kv_commit([], rows, 0)
    assert rows.tolist() == [3, 1]
    # Views of no heads and of no columns: nothing of the memory behind them may change, but the full one goes along.
    behind = torch.randn(2, 5, 4)
    full = torch.randn(2, 5, 4)
    before, (expected,) = behind.clone(), gathered([full], [3, 1], 0)
    kv_commit([behind[:0], full, behind[..., :0]], rows, 0)
    assert torch.equal(behind, before)
    assert torch.equal(full, expected)


@on_cpu
@pytest.mark.parametrize(
    ("rows", "start", "message"),
    [
        ([3, -1], 0, "rows: expected rows of buffers\\[0\\], 0 to 39, got -1"),
        ([40], 0, "rows: expected rows of buffers\\[0\\], 0 to 39, got 40"),
        ([1, 2], 39, "start: expected start \\+ m to fit the 40 rows of buffers\\[0\\], got 39 \\+ 2"),
        ([1], 2**62, "start: expected start"),
        ([1], -1, "start: expected at least 0"),
    ],
)
def test_rows_and_start_out_of_range(rows, start, message):
    buffers = random_buffers()
    before = [buffer.clone() for buffer in buffers]
    with pytest.raises(ValueError, match=message):
        kv_commit(buffers, torch.tensor(rows), start)
    assert all(torch.equal(a, b) for a, b in zip(buffers, before, strict=True))
    if start != 2**62:
        with pytest.raises(ValueError, match=message.split(":")[0]):
            reference.kv_commit(buffers, torch.tensor(rows), start)


@on_cpu
def test_nothing_moves_when_a_later_buffer_is_too_small():
    buffers = [torch.randn(2, CAPACITY, 8), torch.randn(2, 10, 8)]
    before = [buffer.clone() for buffer in buffers]
    with pytest.raises(ValueError, match="rows: expected rows of buffers\\[1\\], 0 to 9, got 12"):
        kv_commit(buffers, torch.tensor([12]), 3)
    assert all(torch.equal(a, b) for a, b in zip(buffers, before, strict=True))


@on_cpu
@pytest.mark.parametrize(
    ("buffer", "rows", "message"),
    [
        (torch.zeros(4, 8), torch.tensor([1]), "buffers\\[0\\]: expected shape \\[Hkv, C, D\\]"),
        (torch.zeros(2, 4, 8)[..., ::2], torch.tensor([1]), "buffers\\[0\\]: expected stride 1"),
        (torch.zeros(2, 4, 8), torch.tensor([[1]]), "rows: expected shape"),
        (torch.zeros(2, 4, 8), torch.tensor([1], dtype=torch.int32), "rows: expected int64"),
        (torch.zeros(2, 4, 8), torch.tensor([1, 2, 3])[::2], "rows: expected a contiguous"),
    ],
)
def test_bad_input(buffer, rows, message):
    with pytest.raises(ValueError, match=message):
        kv_commit([buffer], rows, 0)


@on_cpu
@pytest.mark.parametrize(
    ("start", "message"),
    [
        (torch.tensor([1]), r"expected shape \[\] or \[m\] = \[2\], got \[1\]"),
        (torch.tensor([[1, 2]]), r"expected shape \[\] or \[m\] = \[2\], got \[1, 2\]"),
        (torch.tensor(1.0), "expected int64, got float32"),
        (torch.tensor([1.0, 2.0]), "expected int64, got float32"),
        (torch.tensor([1, 2, 3])[::2], "expected a contiguous tensor"),
        (torch.tensor([1, -1]), r"expected rows of buffers\[0\], 0 to 3, got -1"),
        (torch.tensor([4, 0]), r"expected rows of buffers\[0\], 0 to 3, got 4"),
        (torch.tensor([3, 3]), "expected another place for each row, got 3 twice"),
    ],
)
def test_bad_start(start, message):
    buffer = torch.randn(2, 4, 8)
    before = buffer.clone()
    with pytest.raises(ValueError, match=f"^start: {message}"):
        kv_commit([buffer], torch.tensor([1, 2]), start)
    assert torch.equal(buffer, before)


@on_cpu
def test_a_place_named_twice_is_an_error_wherever_it_stands():
    for places in itertools.product(range(4), repeat=4):
        buffer = torch.randn(1, 4, 2)
        if len(set(places)) == 4:
            kv_commit([buffer], torch.arange(4), torch.tensor(places))
            continue
        for op in (kv_commit, reference.kv_commit):
            with pytest.raises(ValueError, match=r"^start: expected another place for each row"):
                op([buffer], torch.arange(4), torch.tensor(places))


def test_registration():
    buffers = [torch.randn(2, 6, 4), torch.randn(2, 6, 4)]
    for start in (torch.tensor(1), torch.tensor([1, 5])):
        torch.library.opcheck(torch.ops.specbranch.kv_commit.default, (buffers, torch.tensor([4, 2]), start))
