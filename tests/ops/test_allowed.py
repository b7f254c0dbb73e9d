"""`allowed`: to the bit what the same call gives when the logits of all other tokens are -inf."""

import itertools
from typing import Any

import pytest
import torch
from allowed_tokens import KINDS, mask_others, of_kind, pack
from filters import FILTERS, in_memory
from implementations import NAMES, on_cpu
from torch import Tensor

from specbranch_ext import draft_sample, reference, verify, verify_rejection

pytestmark = pytest.mark.usefixtures("implementation")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Around the words of `allowed`, the vectors, the blocks of 64 and the segments of 8192.
SIZES = [1, 2, 31, 32, 33, 63, 64, 65, 100, 1000, 8193, 40_000]
REJECTION: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20, "block": True},
    {"temperature": 1.5, "top_p": 0.9, "block": True},
    {"temperature": 1.0, "top_k": 3000, "top_p": 0.9, "min_p": 0.01},
]


def rows_of(n: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 2).to(dtype)


def assert_equal(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b), f"{a} instead of {b}"


def assert_like_masked(logits: Tensor, tokens: Tensor, allowed: Tensor, options: dict[str, Any], k: int = 5) -> None:
    """verify and draft_sample with `allowed`, against the calls with masked logits."""
    n, vocabulary = logits.shape
    expected = mask_others(logits, tokens)
    tree = (expected.float().argmax(dim=1).roll(1), torch.arange(n) - 1, torch.arange(n) + 1000)
    assert_equal(verify(logits, *tree, seed=3, allowed=allowed, **options), verify(expected, *tree, seed=3, **options))
    for best in {1, min(vocabulary, k)}:
        sample = draft_sample(logits, tree[2], best, seed=3, allowed=allowed, **options)
        assert_equal(sample, draft_sample(expected, tree[2], best, seed=3, **options))


def assert_like_masked_chain(logits: Tensor, tokens: Tensor, allowed: Tensor, options: dict[str, Any]) -> None:
    """verify_rejection of a chain that the masked draft may well have drawn."""
    n = len(logits)
    draft = logits[:-1] * 0.9
    expected = mask_others(logits, tokens), mask_others(draft, tokens[:-1])
    chain = (expected[1].float().argmax(dim=1), torch.arange(n) + 1000)
    chain = (torch.cat([torch.tensor([0]), chain[0]]), chain[1])
    verdict = verify_rejection(logits, draft, *chain, seed=3, allowed=allowed, **options)
    assert_equal(verdict, verify_rejection(*expected, *chain, seed=3, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocabulary", SIZES)
def test_equal_to_masked_logits(vocabulary, kind, dtype, implementation):
    n = 3 if vocabulary < 1000 or implementation == "cpu" else 2 if vocabulary < 8193 else 1
    logits, tokens = rows_of(n, vocabulary, dtype), of_kind(kind, n, vocabulary)
    allowed = pack(tokens)
    # The emulator is slow: each of its cases takes some of the options.
    step = 1 if vocabulary < 1000 or implementation == "cpu" else 4
    first = (KINDS.index(kind) + DTYPES.index(dtype)) % step
    for options in FILTERS[first::step]:
        assert_like_masked(logits, tokens, allowed, options)
    for options in REJECTION[first::step]:
        assert_like_masked_chain(logits, tokens, allowed, options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocabulary", [1, 33, 100, 1000, 5000])
def test_the_reference_says_the_same(vocabulary, kind):
    logits, tokens = rows_of(3, vocabulary), of_kind(kind, 3, vocabulary, seed=1)
    allowed = pack(tokens)
    chosen = mask_others(logits, tokens).argmax(dim=1)
    tree = (chosen.roll(1), torch.arange(3) - 1, torch.arange(3) + 7)
    for options in FILTERS:
        given = {"seed": 5, "allowed": allowed, **options}
        assert_equal(verify(logits, *tree, **given), reference.verify(logits, *tree, **given))
        sample = draft_sample(logits, tree[2], min(vocabulary, 4), **given)
        expected = reference.draft_sample(logits, tree[2], min(vocabulary, 4), **given)
        assert_equal(sample[:2], expected[:2])
        torch.testing.assert_close(tuple(sample[2:]), tuple(expected[2:]), rtol=1e-5, atol=1e-5)
    for options in REJECTION:
        chain = (logits, logits[:-1] * 0.9, tree[0], tree[2])
        given = {"seed": 5, "allowed": allowed, **options}
        assert_equal(verify_rejection(*chain, **given), reference.verify_rejection(*chain, **given))


@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize("vocabulary", [1, 31, 33, 100, 8193])
def test_bits_behind_the_vocabulary_and_strides(vocabulary, behind):
    """Rows of `allowed` may lie anywhere; of what lies between them, nothing counts."""
    tokens = of_kind("half", 3, vocabulary, seed=2)
    allowed = pack(tokens, behind)
    apart = torch.full((3, allowed.shape[1] + 3), -behind, dtype=torch.int32)
    apart[:, 1:-2] = allowed
    one_row = allowed[1:2].expand(3, -1)
    upside_down = torch.stack([allowed[2], allowed[1], allowed[0]])
    joined = torch.cat([upside_down, upside_down])[1:4]  # begins in the middle of its memory
    logits = rows_of(3, vocabulary)
    for options in (FILTERS[0], FILTERS[3], FILTERS[8]):
        assert_like_masked(logits, tokens, apart[:, 1:-2], options)
        assert_like_masked(logits, tokens[1:2].expand(3, -1), one_row, options)
        assert_like_masked(logits, tokens[[1, 0, 2]], joined, options)
    for options in REJECTION:
        assert_like_masked_chain(logits, tokens, apart[:, 1:-2], options)
        assert_like_masked_chain(logits, tokens[1:2].expand(3, -1), one_row, options)


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("vocabulary", [33, 1000, 9000])
def test_what_is_not_allowed_may_hold_anything(vocabulary, options):
    clean, tokens = rows_of(4, vocabulary), of_kind("half", 4, vocabulary, seed=3)
    logits = clean.clone()
    for i, value in enumerate((torch.nan, torch.inf, 3e38, -torch.inf)):
        logits[i, ~tokens[i]] = value
    allowed = pack(tokens)
    for temperature in {options.get("temperature", 0.0), 1e-3 if options else 0.0}:
        given = {**options, "temperature": temperature}
        assert_like_masked(logits, tokens, allowed, given)
        assert_like_masked_chain(logits, tokens, allowed, given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_token(dtype, implementation):
    """One row for each token of a vocabulary that ends within a word: the one that is allowed is the token."""
    vocabulary = 77
    logits, tokens = rows_of(vocabulary, vocabulary, dtype), torch.eye(vocabulary, dtype=torch.bool)
    unused = torch.full((vocabulary,), -1)
    for options in FILTERS if implementation == "cpu" else FILTERS[:4:3]:
        given = {"allowed": pack(tokens), **options}
        found = verify(logits, unused, unused, torch.arange(vocabulary), **given).target_tokens
        assert torch.equal(found, torch.arange(vocabulary))
        sample = draft_sample(logits, torch.arange(vocabulary), 2, **given)
        assert torch.equal(sample.tokens, torch.stack([found, unused], 1))
        assert torch.equal(sample.confidence, torch.tensor([1.0, 0.0]).expand(vocabulary, 2))
        assert torch.equal(sample.entropy, torch.zeros(vocabulary))


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_several_texts_with_filters_and_seeds_of_their_own(options):
    vocabulary, n = 3000, 7
    logits, tokens = rows_of(n, vocabulary), of_kind("half", n, vocabulary, seed=4)
    tokens[2:4] = of_kind("ten", 2, vocabulary)
    expected, allowed = mask_others(logits, tokens), pack(tokens)
    filters = torch.stack([in_memory(FILTERS[i % len(FILTERS)]) for i in range(n)])
    filters[1::2] = in_memory(options)
    seeds, roots = torch.arange(n) * 3, torch.tensor([0, 3, -1])
    tree = (expected.argmax(dim=1).roll(1), torch.tensor([-1, 0, 1, -1, 3, 4, 4]), torch.arange(n) + 50)
    given: dict[str, Any] = {"seed": seeds, "filters": filters}
    assert_equal(
        verify(logits, *tree, **given, roots=roots, allowed=allowed), verify(expected, *tree, **given, roots=roots)
    )
    sample = draft_sample(logits, tree[2], 6, **given, allowed=allowed)
    assert_equal(sample, draft_sample(expected, tree[2], 6, **given))
    # One set of filters in memory for all rows.
    given = {"seed": 1, "filters": in_memory(options)}
    assert_equal(verify(logits, *tree, **given, allowed=allowed), verify(expected, *tree, **given))
    assert_equal(
        draft_sample(logits, tree[2], 6, **given, allowed=allowed), draft_sample(expected, tree[2], 6, **given)
    )


@pytest.mark.parametrize("threads", [1, 3])
def test_many_rows(threads, implementation):
    sizes = [(9, 20_000), (70, 500)]
    if implementation != "cpu":  # slower, and threads do not matter there
        sizes = [(5, 5000)] if threads == 1 else [(70, 70)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for n, vocabulary in sizes:
            logits, tokens = rows_of(n, vocabulary), of_kind("half", n, vocabulary)
            tokens[::3] = of_kind("ten", n, vocabulary)[::3]
            for options in (FILTERS[0], FILTERS[3], FILTERS[6]):
                assert_like_masked(logits, tokens, pack(tokens), options)
            for options in REJECTION[1:4]:
                assert_like_masked_chain(logits, tokens, pack(tokens), options)
    finally:
        torch.set_num_threads(before)


@on_cpu
@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 2.0}], ids=str)
@pytest.mark.parametrize("vocabulary", [2, 4])
def test_the_law_is_the_masked_softmax(vocabulary, options):
    """Every choice of allowed tokens: how often each is drawn, at as many positions."""
    draws = 4_000
    logits = rows_of(1, vocabulary).expand(draws, -1)
    positions, unused = torch.arange(draws), torch.full((draws,), -1)
    for mask in itertools.product([False, True], repeat=vocabulary):
        if not any(mask):
            continue
        tokens = torch.tensor([mask])
        allowed = pack(tokens).expand(draws, -1)
        found = verify(logits, unused, unused, positions, allowed=allowed, seed=11, **options).target_tokens
        law = (mask_others(logits[:1], tokens)[0].double() / options["temperature"]).softmax(0)
        counts = torch.bincount(found, minlength=vocabulary)
        deviation = (law * (1 - law) * draws).sqrt()
        assert ((counts - law * draws).abs() <= 5 * deviation).all(), (mask, counts, law)
        sample = draft_sample(logits[:1], positions[:1], vocabulary, allowed=allowed[:1], seed=11, **options)
        found_law = torch.zeros(vocabulary).scatter_add(0, sample.tokens[0].clamp(min=0), sample.confidence[0])
        torch.testing.assert_close(found_law, law.float(), rtol=1e-5, atol=1e-6)


# ---- Rows without a token.


def without_tokens(vocabulary: int, row: int, how: str) -> tuple[Tensor, Tensor]:
    """Logits and `allowed` of four rows, one of which has no token."""
    logits, tokens = rows_of(4, vocabulary), of_kind("half", 4, vocabulary, seed=5)
    if how == "none is allowed":
        tokens[row] = False
    else:
        logits[row, tokens[row]] = -torch.inf
    return logits, pack(tokens, behind=1)


@on_cpu
@pytest.mark.parametrize("how", ["none is allowed", "all allowed are -inf"])
@pytest.mark.parametrize("vocabulary", [1, 40, 9000])
def test_a_row_without_tokens_raises(vocabulary, how):
    says = r"only -inf among the tokens that allowed allows \(every token is masked\); expected finite logits, or -inf"
    for row, options in itertools.product((0, 2, 3), FILTERS[:4]):
        logits, allowed = without_tokens(vocabulary, row, how)
        tree = (torch.zeros(4, dtype=torch.int64), torch.arange(4) - 1, torch.arange(4))
        with pytest.raises(ValueError, match=f"^target_logits: row {row} has {says}"):
            verify(logits, *tree, allowed=allowed, **options)
        with pytest.raises(ValueError, match=f"^draft_logits: row {row} has {says}"):
            draft_sample(logits, tree[2], 1, allowed=allowed, **options)
        with pytest.raises(ValueError, match=f"^target_logits: row {row} has {says}"):
            verify_rejection(logits, rows_of(3, vocabulary), tree[0], tree[2], allowed=allowed, **options)
        if how == "all allowed are -inf" and row < 3:
            with pytest.raises(ValueError, match=f"^draft_logits: row {row} has {says}"):
                verify_rejection(rows_of(4, vocabulary), logits[:3], tree[0], tree[2], allowed=allowed, **options)
    with pytest.raises(ValueError, match=r"row 1 has only -inf \(every token is masked\);"):
        verify(rows_of(2, 5) - torch.tensor([[0.0], [torch.inf]]), *(part[:2] for part in tree))


@on_cpu
def test_nan_of_an_allowed_token_raises():
    logits, tokens = rows_of(3, 100), of_kind("half", 3, 100)
    logits[1, tokens[1].nonzero()[-1]] = torch.nan
    with pytest.raises(ValueError, match=r"^draft_logits: row 1 has NaN; expected finite"):
        draft_sample(logits, torch.arange(3), 1, allowed=pack(tokens))


@pytest.mark.parametrize("options", FILTERS[:4], ids=str)
@pytest.mark.parametrize("how", ["none is allowed", "all allowed are -inf"])
@pytest.mark.parametrize("vocabulary", [1, 40, 9000])
def test_a_row_without_tokens_is_marked_among_several_texts(vocabulary, how, options):
    logits, allowed = without_tokens(vocabulary, 2, how)
    tree = (torch.zeros(4, dtype=torch.int64), torch.tensor([-1, 0, -1, 2]), torch.arange(4))
    given: dict[str, Any] = {"filters": in_memory(options).expand(4, 4).contiguous(), "allowed": allowed}
    result = verify(logits, *tree, roots=torch.tensor([0, 2]), **given)
    alone = verify(logits[:2], *(part[:2] for part in tree), allowed=allowed[:2], **options)
    assert result.target_tokens[:2].tolist() == alone.target_tokens.tolist()
    assert result.target_tokens[2] == -1
    assert (result.accepted[0], result.next_token[0]) == (alone.accepted, alone.next_token)
    assert (result.accepted[1], result.next_token[1]) == (0, -1)
    sample = draft_sample(logits, tree[2], 1, **given)
    assert (sample.tokens[:, 0] < 0).tolist() == [False, False, True, False]
    assert (sample.scores[2, 0], sample.confidence[2, 0]) == (-torch.inf, 0.0)
    assert sample.entropy.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("options", FILTERS[:4], ids=str)
def test_unused_nodes_may_have_no_token(options):
    logits, tokens = rows_of(3, 500), of_kind("half", 3, 500)
    tokens[1] = False
    tree = (torch.zeros(3, dtype=torch.int64), torch.tensor([-1, -1, 0]), torch.arange(3))
    result = verify(logits, *tree, allowed=pack(tokens), **options)
    assert result.target_tokens[1] == -1
    assert (result.target_tokens[::2] >= 0).all()


@pytest.mark.parametrize("implementation", NAMES[1:], indirect=True)
@pytest.mark.parametrize("options", FILTERS[:4], ids=str)
def test_a_row_without_tokens_is_marked_on_a_device(options):
    logits, allowed = without_tokens(2000, 2, "none is allowed")
    tree = (torch.zeros(4, dtype=torch.int64), torch.arange(4) - 1, torch.arange(4))
    result = verify(logits, *tree, allowed=allowed, **options)
    assert (result.target_tokens >= 0).tolist() == [True, True, False, True]
    assert (result.accepted, result.next_token) == (0, -1)
    sample = draft_sample(logits, tree[2], 2, allowed=allowed, **options)
    assert sample.tokens[2].tolist() == [-1, -1]
    assert sample.entropy.isnan().tolist() == [False, False, True, False]
    for block in (False, True):
        chain = (logits, rows_of(3, 2000), tree[0], tree[2])
        verdict = verify_rejection(*chain, block=block, allowed=allowed, **options)
        assert (verdict.accepted, verdict.next_token) == (0, -1)


# ---- Bad arguments.


def bad_allowed() -> list[tuple[str, Tensor, str]]:
    good = torch.full((3, 4), -1, dtype=torch.int32)  # 100 tokens
    shape = r"expected shape \[n, ceil\(V / 32\)\] = \[3, 4\], got "
    return [
        ("int64", good.long(), "expected int32, got int64"),
        ("float32", good.float(), "expected int32, got float32"),
        ("bool", torch.ones(3, 100, dtype=torch.bool), shape + r"\[3, 100\]"),
        ("bool words", torch.ones(3, 4, dtype=torch.bool), "expected int32, got another dtype"),
        ("few words", good[:, :3], shape + r"\[3, 3\]"),
        ("many words", torch.cat([good, good], 1), shape + r"\[3, 8\]"),
        ("few rows", good[:2], shape + r"\[2, 4\]"),
        ("many rows", torch.cat([good, good]), shape + r"\[6, 4\]"),
        ("one dimension", good[0], shape + r"\[4\]"),
        ("no words", good[:, :0], shape + r"\[3, 0\]"),
        ("columns", good.T.contiguous().T, "expected stride 1 in the last dimension, got 3"),
        ("a step", good.repeat(1, 2)[:, ::2], "expected stride 1 in the last dimension, got 2"),
    ]


@pytest.mark.parametrize(
    ("name", "allowed", "says"), bad_allowed(), ids=lambda value: value if type(value) is str else ""
)
def test_bad_allowed(name, allowed, says):
    logits, positions = rows_of(3, 100), torch.arange(3)
    tokens = torch.zeros(3, dtype=torch.int64)
    for call in (
        lambda: verify(logits, tokens, positions - 1, positions, allowed=allowed),
        lambda: draft_sample(logits, positions, 2, allowed=allowed),
        lambda: verify_rejection(logits, logits[1:], tokens, positions, allowed=allowed),
    ):
        with pytest.raises(ValueError, match=f"^allowed: {says}"):
            call()


@on_cpu
def test_allowed_is_a_tensor_on_the_device_of_the_logits():
    logits, positions = rows_of(3, 100), torch.arange(3)
    words: Any = [[1, 2]]
    with pytest.raises(TypeError, match=r"^allowed: expected a tensor or None, got list"):
        draft_sample(logits, positions, 2, allowed=words)
    elsewhere = torch.empty(3, 4, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match=r"^allowed: expected a tensor on cpu, as draft_logits is, got one on meta"):
        draft_sample(logits, positions, 2, allowed=elsewhere)


@on_cpu
def test_compiled_and_checked_by_torch():
    logits, allowed = rows_of(3, 100), pack(of_kind("half", 3, 100))
    tree = (torch.zeros(3, dtype=torch.int64), torch.arange(3) - 1, torch.arange(3))
    options = (1.0, 10, 0.9, 0.01)
    ops = torch.ops.specbranch
    torch.library.opcheck(ops.verify.default, (logits, *tree, torch.tensor(1), *options, None, None, allowed))
    torch.library.opcheck(ops.verify.default, (logits, *tree, torch.tensor(1), *options), {"allowed": allowed})
    torch.library.opcheck(ops.draft_sample.default, (logits, tree[2], 3, torch.tensor(1), *options, None, allowed))
    chain = (logits, logits[1:], tree[0], tree[2], torch.tensor(1))
    torch.library.opcheck(ops.verify_rejection.default, (*chain, *options, True, allowed))

    def step(logits: Tensor, allowed: Tensor) -> Tensor:
        return verify(logits * 2, *tree, temperature=1.0, allowed=allowed).next_token + 1

    assert torch.compile(step, fullgraph=True, backend="eager")(logits, allowed) == step(logits, allowed)
