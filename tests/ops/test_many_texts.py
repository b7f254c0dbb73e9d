"""Rows of several texts in one call of verify and draft_sample: each has the bits that it has alone."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
import torch
from filters import FILTERS, in_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import on_cpu, on_emulated
from torch import Tensor

from specbranch_ext import draft_sample, reference, verify

pytestmark = pytest.mark.usefixtures("implementation")


class Text(NamedTuple):
    """A tree of one text and how it is sampled: what verify takes of it alone."""

    logits: Tensor
    tokens: Tensor
    parents: Tensor
    positions: Tensor
    seed: int
    options: dict[str, Any]

    def alone(self, roots: Tensor | None = None) -> Any:
        return verify(*self[:4], seed=self.seed, roots=roots, **self.options)


def together(texts: list[Text], absent: int = 0) -> dict[str, Any]:
    """The arguments of one call for all of them and some that are not there."""
    sizes = [len(text.tokens) for text in texts]
    firsts = torch.tensor([0, *sizes]).cumsum(0)[:-1]
    return {
        "target_logits": torch.cat([text.logits for text in texts]),
        "tokens": torch.cat([text.tokens for text in texts]),
        "parents": torch.cat(
            [text.parents + (text.parents >= 0) * first for text, first in zip(texts, firsts, strict=True)]
        ),
        "positions": torch.cat([text.positions for text in texts]),
        "seed": torch.tensor([text.seed for text in texts]).repeat_interleave(torch.tensor(sizes)),
        "filters": torch.cat([in_memory(text.options).expand(len(text.tokens), 4) for text in texts]),
        "roots": torch.cat([firsts, torch.full((absent,), -1)]),
    }


def assert_equal(ours: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a, b), f"{a} instead of {b}"


def assert_each_as_alone(texts: list[Text], absent: int = 0, as_the_reference: bool = True) -> Any:
    arguments = together(texts, absent)
    result = verify(**arguments)
    if as_the_reference:
        assert_equal(result, reference.verify(**arguments))
    for text, root, accepted, next_token in zip(
        texts, arguments["roots"].tolist(), result.accepted, result.next_token, strict=False
    ):
        rows = slice(root, root + len(text.tokens))
        alone = text.alone(roots=torch.tensor([0]))
        path = result.path[rows]
        assert_equal((accepted, next_token), (alone.accepted[0], alone.next_token[0]))
        assert torch.equal(path - (path >= 0) * root, alone.path)
        assert torch.equal(result.target_tokens[rows], alone.target_tokens)
        if int(alone.next_token) >= 0:  # else the call without roots raises
            single = text.alone()
            assert_equal((alone.target_tokens, alone.path), (single.target_tokens, single.path))
            assert_equal((accepted, next_token), (single.accepted, single.next_token))
    here = len(texts)
    assert result.accepted[here:].tolist() == [0] * absent
    assert result.next_token[here:].tolist() == [-1] * absent
    return result


def random_text(n: int, vocabulary: int, seed: int, options: dict[str, Any], dtype: torch.dtype) -> Text:
    """A text whose tree has many accepted nodes: every token is its parent's target token, or the one above it."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(n, vocabulary, generator=generator) * 2).to(dtype)
    parents = torch.tensor([-1, *(int(torch.randint(max(i - 3, 0), i, (), generator=generator)) for i in range(1, n))])
    positions = torch.arange(n) + seed
    zeros = torch.zeros(n, dtype=torch.int64)
    targets = verify(logits, zeros, zeros - 1, positions, seed=seed, **options).target_tokens
    odd = torch.randint(0, 4, (n,), generator=generator) == 0
    tokens = (targets[parents.clamp(min=0)] + odd) % vocabulary
    return Text(logits, tokens, parents, positions, seed, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 7, 1001, 16_403])
def test_a_text_for_each_filter(dtype, vocabulary):
    """Greedy rows, those of any filter, and others, in one call."""
    texts = [random_text(1 + i % 4, vocabulary, i, options, dtype) for i, options in enumerate(FILTERS)]
    assert_each_as_alone(texts)
    assert_each_as_alone(texts[::-1], absent=2)


@pytest.mark.parametrize(("vocabulary", "k"), [(40, 33), (5000, 5), (16_403, 1), (16_403, 4)])
def test_draft_rows_with_seeds_and_filters_of_their_own(vocabulary, k):
    rows = len(FILTERS)
    generator = torch.Generator().manual_seed(vocabulary)
    logits, positions = torch.randn(rows, vocabulary, generator=generator) * 2, torch.arange(rows) % 5 + 2**40
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    filters = torch.stack([in_memory(options) for options in FILTERS])
    sample = draft_sample(logits, positions, k, seed=seeds, filters=filters)
    assert_equal(sample[:2], reference.draft_sample(logits, positions, k, seed=seeds, filters=filters)[:2])
    for i in range(rows):
        one = slice(i, i + 1)
        alone = draft_sample(logits[one], positions[one], k, seed=int(seeds[i]), **FILTERS[i])
        assert_equal([part[one] for part in sample], alone)
    for shared in FILTERS[:2]:  # one of both for each row
        by_seed = draft_sample(logits, positions, k, seed=seeds, **shared)
        assert_equal(by_seed, draft_sample(logits, positions, k, seed=seeds, filters=in_memory(shared)))
        for seed in (seeds[3], int(seeds[3])):
            by_filters = draft_sample(
                logits, positions, k, seed=seed, filters=in_memory(shared).expand(rows, 4).contiguous()
            )
            assert_equal(by_filters, draft_sample(logits, positions, k, seed=seeds[3], **shared))


SMALL = st.sampled_from([*FILTERS, {"temperature": 1.0, "top_k": 2}, {"temperature": 0.5, "top_p": 0.6}])
SEEDS = st.integers(-(2**63), 2**63 - 1)
VALUES = st.sampled_from([-torch.inf, -1.0, 0.0, 0.5, 2.0])


def logits_of(data: st.DataObject, n: int, vocabulary: int) -> Tensor:
    row = st.lists(VALUES, min_size=vocabulary, max_size=vocabulary)
    logits = torch.tensor(data.draw(st.lists(row, min_size=n, max_size=n)))
    logits[logits.amax(dim=1) == -torch.inf] = 0.0
    for i in range(n):
        if data.draw(st.integers(0, 7)) == 0:
            logits[i, -1] = data.draw(st.sampled_from([torch.nan, torch.inf]))
    return logits


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_random_texts(data):
    vocabulary = data.draw(st.integers(1, 5))
    texts = []
    for _ in range(data.draw(st.integers(1, 5))):
        n = data.draw(st.integers(1, 5))
        tokens = torch.tensor(data.draw(st.lists(st.integers(-1, vocabulary - 1), min_size=n, max_size=n)))
        parents = torch.tensor([-1, *(data.draw(st.integers(-1, i - 1)) for i in range(1, n))])
        positions = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
        texts.append(
            Text(logits_of(data, n, vocabulary), tokens, parents, positions, data.draw(SEEDS), data.draw(SMALL))
        )
    assert_each_as_alone(texts, absent=data.draw(st.integers(0, 2)))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_rows_of_a_draft(data):
    n, vocabulary = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    logits, k = logits_of(data, n, vocabulary), data.draw(st.integers(1, vocabulary))
    positions = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    seeds = torch.tensor(data.draw(st.lists(SEEDS, min_size=n, max_size=n)))
    options = data.draw(st.lists(SMALL, min_size=n, max_size=n))
    filters = torch.stack([in_memory(each) for each in options])
    sample = draft_sample(logits, positions, k, seed=seeds, filters=filters)
    expected = reference.draft_sample(logits, positions, k, seed=seeds, filters=filters)
    assert_equal(sample[:2], expected[:2])
    torch.testing.assert_close(sample[2:], expected[2:], rtol=1e-5, atol=1e-6, equal_nan=True)
    for i in range(n):
        if logits[i].isfinite().any() and not (logits[i].isnan() | (logits[i] == torch.inf)).any():
            one = slice(i, i + 1)
            alone = draft_sample(logits[one], positions[one], k, seed=seeds[i], **options[i])
            assert_equal([part[one] for part in sample], alone)
        else:
            assert sample.tokens[i].tolist() == [-1] * k
            assert sample.scores[i].tolist() == [-torch.inf] * k
            assert sample.confidence[i].tolist() == [0.0] * k
            assert sample.entropy[i].isnan()


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_bad_row_stops_its_text_alone(value, options):
    texts = [random_text(4, 300, seed, options, torch.float32) for seed in range(5)]
    clean = assert_each_as_alone(texts)
    texts[1].logits[2] = value  # a node
    texts[3].logits[0] = value  # a root
    texts[4].parents[2:] = -1  # unused
    texts[4].logits[3] = value
    result = assert_each_as_alone(texts)
    assert (result.next_token == -1).tolist() == [False, True, False, True, False]
    assert result.accepted[[1, 3]].tolist() == [0, 0]
    assert (result.path[4:8] == -1).all()
    for good in (0, 2):
        rows = slice(4 * good, 4 * good + 4)
        assert torch.equal(result.path[rows], clean.path[rows])
    unscaled = draft_sample(torch.cat([text.logits for text in texts]), torch.arange(20), 2, seed=torch.arange(20))
    assert unscaled.entropy.isnan().nonzero().flatten().tolist() == [6, 12, 19]


def test_rows_before_the_first_root_and_texts_that_are_not_there():
    logits = torch.eye(5)[[1, 2, 3, 4, 0, 1, 2]]
    tokens, parents = torch.tensor([0, 2, 0, 4, 0, 0, 2]), torch.tensor([-1, -1, -1, 2, 3, -1, 5])
    positions = torch.arange(7)
    for ended in ([], [-1], [-1] * 40):
        result = verify(logits, tokens, parents, positions, roots=torch.tensor([2, 5, *ended]))
        assert result.target_tokens.tolist() == [1, 2, 3, 4, 0, 1, 2]
        assert result.path.tolist() == [-1] * 7
        assert result.accepted.tolist() == [0, 0] + [0] * len(ended)
        assert result.next_token.tolist() == [3, 1, *ended]
    tokens[[3, 6]] = torch.tensor([3, 1])
    result = verify(logits, tokens, parents, positions, roots=torch.tensor([2, 5]))
    assert result.path.tolist() == [-1, -1, 3, -1, -1, 6, -1]
    assert (result.accepted.tolist(), result.next_token.tolist()) == ([1, 1], [4, 2])
    for roots in ([], [-1, -1]):
        nobody = torch.tensor(roots, dtype=torch.int64)
        result = verify(logits, tokens, torch.full((7,), -1), positions, roots=nobody)
        assert_equal(result, reference.verify(logits, tokens, torch.full((7,), -1), positions, roots=nobody))
        assert result.next_token.tolist() == roots


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}], ids=str)
@pytest.mark.parametrize(
    "sizes", [[1] * 300, [700, 324], [33, 32, 31, 65], [600, 1, 600, 30]], ids=lambda sizes: f"{len(sizes)} texts"
)
def test_many_texts_and_long_ones(sizes, options):
    texts = [random_text(n, 9, seed, options, torch.float32) for seed, n in enumerate(sizes)]
    result = assert_each_as_alone(texts, absent=1, as_the_reference=False)
    assert result.accepted.sum() > 0 or max(sizes) == 1
    texts[-1].logits[-1] = torch.nan
    assert assert_each_as_alone(texts, as_the_reference=False).next_token[-1] == -1


@on_emulated
@pytest.mark.parametrize("schedule", ["forward", "reverse", *(f"shuffle:{seed}" for seed in range(1, 5))])
def test_the_order_of_blocks_does_not_matter(schedule, monkeypatch):
    texts = [random_text(3, 9000, i, options, torch.float32) for i, options in enumerate(FILTERS[:5])]
    monkeypatch.setenv("SPECBRANCH_EMULATOR_SCHEDULE", schedule)
    for _ in range(2):
        assert_each_as_alone(texts)


def test_one_tensor_filled_anew_in_between():
    """As a captured graph has it: the same shapes in all calls, everything else is data."""
    arguments = together([random_text(3, 200, i, FILTERS[i], torch.float32) for i in range(4)], absent=1)
    for first in range(3):
        texts = [random_text(3, 200, first + 7 * i, FILTERS[first + i], torch.float32) for i in range(5 - first % 2)]
        given = together(texts, absent=first % 2)
        for name, tensor in arguments.items():
            if name != "roots" and len(given[name]) < len(tensor) + 3:
                given[name] = torch.cat([given[name], given[name][:3]])
        given["parents"][12 + 3 * (1 - first % 2) :] = -1
        assert_equal(verify(**given), reference.verify(**given))


def bad(**changes: Any) -> dict[str, Any]:
    rows = torch.arange(5)
    arguments = {
        "target_logits": torch.zeros(5, 8),
        "tokens": rows,
        "parents": torch.tensor([-1, 0, -1, 2, 2]),
        "positions": rows,
        "roots": torch.tensor([0, 2]),
    }
    return {**arguments, **changes}


def filters_with(row: int, **options: float) -> Tensor:
    filters = in_memory({"temperature": 1.0}).repeat(5, 1)
    filters[row] = in_memory({"temperature": 1.0, **options})
    return filters


@on_cpu
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (bad(roots=torch.tensor([0, 5])), "roots: expected a row above 0 and below n = 5 or -1 for text 1, got 5"),
        (bad(roots=torch.tensor([-2, 0])), "roots: expected a row above -1 and below n = 5 or -1 for text 0, got -2"),
        (bad(roots=torch.tensor([2, 0])), "roots: expected a row above 2 and below n = 5 or -1 for text 1, got 0"),
        (bad(roots=torch.tensor([2, 2])), "roots: expected a row above 2 and below n = 5 or -1 for text 1, got 2"),
        (bad(roots=torch.tensor([0, -1, 2])), "roots: expected -1, as before it, for text 2, got 2"),
        (bad(roots=torch.tensor([0, -1, -3])), "roots: expected -1, as before it, for text 2, got -3"),
        (bad(roots=torch.tensor([[0, 2]])), "roots: expected shape"),
        (bad(roots=torch.tensor(0)), "roots: expected shape"),
        (bad(roots=torch.tensor([0.0, 2.0])), "roots: expected int64"),
        (bad(roots=torch.tensor([0, 1, 2])[::2]), "roots: expected a contiguous"),
        (
            bad(parents=torch.tensor([-1, 0, -1, 1, 2])),
            "parents: expected one of its tree, from row 2 on, or -1 for node 3, got 1",
        ),
        (
            bad(parents=torch.tensor([-1, 0, 1, 2, 2])),
            "parents: expected one of its tree, from row 2 on, or -1 for node 2, got 1",
        ),
        (bad(parents=torch.tensor([-1, 0, 3, 2, 2])), "parents: expected an earlier node or -1 for node 2, got 3"),
        (
            bad(parents=torch.tensor([-1, 0, -1, 2, 2]), roots=torch.tensor([2])),
            "parents: expected -1, as no root comes before, for node 1, got 0",
        ),
        (bad(seed=torch.zeros(4, dtype=torch.int64)), r"seed: expected .* of shape \[\] or \[5\], as positions has"),
        (bad(seed=torch.zeros(5)), "seed: expected"),
        (bad(seed=torch.zeros(5, 1, dtype=torch.int64)), "seed: expected"),
        (bad(seed=torch.zeros(10, dtype=torch.int64)[::2]), "seed: expected a contiguous"),
        (bad(filters=filters_with(3, temperature=-1.0)), "filters: row 3: temperature: expected .*, got -1$"),
        (bad(filters=filters_with(0, top_k=2.5)), "filters: row 0: top_k: expected"),
        (bad(filters=filters_with(4, top_p=0.0)), "filters: row 4: top_p: expected"),
        (bad(filters=filters_with(2, min_p=torch.nan)), "filters: row 2: min_p: expected"),
        (bad(filters=filters_with(0)[:4]), "filters: expected shape"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        verify(**arguments)


@on_cpu
def test_a_bad_filter_of_a_draft_is_named_and_so_is_a_row_of_one_text():
    logits, rows = torch.zeros(5, 8), torch.arange(5)
    with pytest.raises(ValueError, match=r"^filters: row 3: top_p: expected a number above 0"):
        draft_sample(logits, rows, 2, filters=filters_with(3, top_p=-1.0))
    with pytest.raises(ValueError, match=r"^seed: expected an int or an int64 tensor of shape"):
        draft_sample(logits, rows, 2, seed=rows[:3])
    logits[2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"^draft_logits: row 2 has NaN"):
        draft_sample(logits, rows, 2, filters=in_memory({}))
    arguments = bad(target_logits=logits, seed=rows)
    del arguments["roots"]
    arguments["parents"] = rows - 1
    with pytest.raises(ValueError, match=r"^target_logits: row 2 has NaN"):
        verify(**arguments)


def test_opcheck():
    given = together([random_text(2, 40, i, FILTERS[i], torch.float32) for i in range(3)], absent=1)
    filters, roots = given.pop("filters"), given.pop("roots")
    torch.library.opcheck(torch.ops.specbranch.verify.default, (*given.values(), 0.0, 0, 1.0, 0.0, filters, roots))
    logits, _, _, positions, seeds = given.values()
    torch.library.opcheck(
        torch.ops.specbranch.draft_sample.default, (logits, positions, 3, seeds, 0.0, 0, 1.0, 0.0, filters)
    )


def test_torch_compile():
    def decode(given):
        result = verify(**given)
        sample = draft_sample(
            given["target_logits"], given["positions"], 2, seed=given["seed"], filters=given["filters"]
        )
        return result.accepted + 1, result.path, sample.tokens

    given = together([random_text(2, 40, i, FILTERS[i], torch.float32) for i in range(3)])
    assert_equal(torch.compile(decode, backend="aot_eager", fullgraph=True)(given), decode(given))
