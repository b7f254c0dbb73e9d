"""verify_rejection: exactly the reference's verdict on chains, filters, dtypes, layouts and thread counts.

That the verdicts have the target's law is test_law_rejection.py's subject.
"""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import on_cpu
from torch import Tensor

from specbranch_ext import reference, verify_rejection
from specbranch_ext.reference.noise import noise_words
from specbranch_ext.reference.verify_rejection import ACCEPT, RESIDUAL, weights

pytestmark = pytest.mark.usefixtures("implementation")

FILTERS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.0, "top_p": 0.95},
    {"temperature": 1.5, "top_p": 0.3},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 3000, "top_p": 0.9},
    {"temperature": 1.2, "top_k": 200, "top_p": 0.5, "min_p": 0.01},
]
MODES = [False, True]


def positions_of(rows: int) -> Tensor:
    return torch.arange(rows) + 1000


def drawn_from(draft_logits: Tensor, seed: int, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> Tensor:
    """A chain's tokens, [n], drawn from the draft's rows; the root's is 0."""
    generator = torch.Generator().manual_seed(seed)
    weight, _ = weights(draft_logits, temperature, top_k, top_p, min_p)
    drafted = torch.multinomial(weight, 1, generator=generator)[:, 0] if len(weight) else torch.empty(0)
    return torch.cat([torch.zeros(1), drafted]).to(torch.int64)


def chain(n: int, vocabulary: int, seed: int, spread: float = 1.5, distance: float = 0.5) -> tuple[Tensor, Tensor]:
    """Logits of a target, [n, V], and of a draft not far from it, [n - 1, V]."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(n, vocabulary, generator=generator) * spread
    return target, target[:-1] + distance * torch.randn(n - 1, vocabulary, generator=generator)


def assert_same(target, draft, tokens, positions, **options):
    ours = verify_rejection(target, draft, tokens, positions, **options)
    expected = reference.verify_rejection(target, draft, tokens, positions, **options)
    assert tuple(map(int, ours)) == tuple(map(int, expected))
    return ours


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
# Below, at and above a vector, and large enough for segments and sampled brackets.
@pytest.mark.parametrize("vocabulary", [1, 2, 65, 1001, 16_403])
def test_equals_the_reference(implementation, options, dtype, vocabulary):
    quick = implementation == "emulated"
    if quick and vocabulary > 8000 and dtype != torch.float32:
        pytest.skip("slow under the emulator")
    for n in (1, 4):
        target, draft = (logits.to(dtype) for logits in chain(n, vocabulary, vocabulary + n))
        for seed in range(1 if quick or vocabulary > 8000 else 3):
            tokens = drawn_from(draft, seed, **options)
            for block in MODES:
                assert_same(target, draft, tokens, positions_of(n), seed=seed, block=block, **options)


def test_every_outcome_occurs():
    """The chains of the test above are not all accepted or all rejected."""
    target, draft = chain(4, 301, 0)
    for block in MODES:
        counts = torch.zeros(4)
        for seed in range(40):
            tokens = drawn_from(draft, seed)
            counts[assert_same(target, draft, tokens, positions_of(4), seed=seed, block=block).accepted] += 1
        assert (counts >= 2).all()


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_equals_the_reference_on_peaked_rows(options):
    """A few tokens hold most of the mass, one holds all of it, none stands out; rows in step with a sample of them."""
    generator = torch.Generator().manual_seed(4)
    target, draft = chain(6, 9000, 1)
    for rows in (target, draft):
        for row in rows:
            row[torch.randint(0, 9000, (30,), generator=generator)] = 12 + 3 * torch.randn(30, generator=generator)
    target[1] = -40.0
    target[1, 17] = 0.0
    draft[2] = torch.linspace(-30, 10, 9000)
    groups = torch.arange(1024) * 2250 // 1024
    target[3].view(2250, 4)[groups] += 10.0
    draft[3].view(2250, 4)[groups] -= 10.0
    target[4] = 0.0
    tokens = drawn_from(draft, 0, **options)
    assert_same(target, draft, tokens, positions_of(6), block=True, **options)
    for row in range(5):  # each as the first one, which token by token is always looked at
        arguments = (target[row : row + 2], draft[row : row + 1], drawn_from(draft[row : row + 1], 5, **options))
        assert_same(*arguments, positions_of(2), seed=5, **options)


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_equals_the_reference_on_ties(options):
    """More equal tokens than a list holds."""
    target, draft = torch.zeros(2, 20_000), torch.zeros(1, 20_000)
    draft[0, ::2] = 0.5
    for block in MODES:
        assert_same(target, draft, drawn_from(draft, 3, **options), positions_of(2), block=block, **options)


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_layout_does_not_matter(options):
    target, draft = chain(4, 8290, 2)
    wide = torch.full((8, 8290), torch.nan)
    wide[::2], wide[1:6:2] = target, draft
    for columns in (slice(0, 8192), slice(97, 8289)):  # aligned or not
        tokens = drawn_from(draft[:, columns], 3, **options)
        views = (wide[::2, columns], wide[1:6:2, columns], tokens, positions_of(4))
        assert_same(*views, seed=3, block=True, **options)


@on_cpu
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_threads_do_not_matter(options):
    target, draft = chain(5, 20_000, 2)
    tokens = drawn_from(draft, 1, **options)
    before = torch.get_num_threads()
    try:
        for block in MODES:
            verdicts = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                verdict = verify_rejection(target, draft, tokens, positions_of(5), seed=3, block=block, **options)
                verdicts.append(tuple(map(int, verdict)))
            assert len(set(verdicts)) == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_padded_vocabulary_changes_nothing(options):
    target, draft = chain(3, 4097, 6)
    wide_target, wide_draft = (torch.nn.functional.pad(x, (0, 123), value=-torch.inf) for x in (target, draft))
    tokens = drawn_from(draft, 1, **options)
    for block in MODES:
        for seed in range(2):
            expected = verify_rejection(target, draft, tokens, positions_of(3), seed=seed, block=block, **options)
            more = {"seed": seed, "block": block, **options}
            assert verify_rejection(wide_target, wide_draft, tokens, positions_of(3), **more) == expected


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_chains(data):
    n = data.draw(st.integers(1, 6))
    vocabulary = data.draw(st.integers(1, 5))
    values = st.sampled_from([-torch.inf, -40.0, -1.0, 0.0, 0.5, 2.0])
    row = st.lists(values, min_size=vocabulary, max_size=vocabulary)
    logits = torch.tensor(data.draw(st.lists(row, min_size=2 * n - 1, max_size=2 * n - 1)))
    logits[logits.amax(dim=1) == -torch.inf] = 0.0
    target, draft = logits[:n], logits[n:]
    tokens = torch.tensor(data.draw(st.lists(st.integers(-1, vocabulary), min_size=n, max_size=n)))
    options = data.draw(st.sampled_from(FILTERS))
    seed = data.draw(st.integers(-(2**63), 2**63 - 1))
    positions = torch.tensor(data.draw(st.lists(st.integers(0, 2**62), min_size=n, max_size=n)))
    block = data.draw(st.booleans())
    result = assert_same(target, draft, tokens, positions, seed=seed, block=block, **options)
    kept = int(result.accepted)
    assert all(target[i, tokens[i + 1]] > -torch.inf for i in range(kept))
    assert target[kept, result.next_token] > -torch.inf


# ---- The walk at temperature 0, where everything is certain.


def one_hot_logits(tokens: list[int], vocabulary: int = 10) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(tokens, dtype=torch.int64), vocabulary) * 5.0


@pytest.mark.parametrize("block", MODES)
@pytest.mark.parametrize(
    ("tokens", "targets", "drafts", "accepted", "next_token"),
    [
        ([0], [4], [], 0, 4),  # nothing drafted
        ([0, 4, 5, 6], [4, 5, 6, 7], [4, 5, 6], 3, 7),  # all accepted
        ([0, 4, 5, 6], [4, 9, 6, 7], [4, 5, 6], 1, 9),  # rejected in the middle; a later match is void
        ([0, 1, 4, 5], [4, 4, 5, 6], [1, 4, 5], 0, 4),  # rejected at once
        ([0, 4, -1, -1], [4, 5, 6, 7], [4, 5, 6], 1, 5),  # padded drafts
        ([0, -1, 5, 6], [4, 5, 6, 7], [4, 5, 6], 0, 4),  # nothing counts behind padding
        ([0, 4, 10, 6], [4, 5, 6, 7], [4, 5, 6], 1, 5),  # a token outside the vocabulary ends the chain like padding
        ([0, 4, 5, 6], [4, 5, 6, 7], [4, 8, 6], 1, 5),  # the draft cannot have drawn the second token
        ([4, 4], [4, 4], [4], 1, 4),  # the root's own token is ignored
    ],
)
def test_greedy_walk(tokens, targets, drafts, accepted, next_token, block):
    arguments = (one_hot_logits(targets), one_hot_logits(drafts), torch.tensor(tokens), positions_of(len(tokens)))
    assert tuple(map(int, assert_same(*arguments, temperature=0.0, block=block))) == (accepted, next_token)
    # One logit far above the others is the same at any temperature.
    sharp = (arguments[0] * 20, arguments[1] * 20, *arguments[2:])
    assert tuple(map(int, assert_same(*sharp, temperature=1.0, block=block))) == (accepted, next_token)


@pytest.mark.parametrize("block", MODES)
def test_greedy_takes_the_lowest_of_equal_logits(block):
    target, draft = torch.zeros(2, 9000), torch.zeros(1, 9000)
    assert assert_same(target, draft, torch.tensor([0, 0]), positions_of(2), temperature=0.0, block=block).accepted == 1
    assert assert_same(target, draft, torch.tensor([0, 1]), positions_of(2), temperature=0.0, block=block).accepted == 0


# ---- What others got wrong.


@cache
def extreme_position(purpose: int, largest: bool) -> int:
    """Of 2^18 positions, the one whose first 64-bit integer (of seed 0) is the smallest or the largest."""
    word = noise_words(torch.arange(2**18), 1, 0, purpose)[:, 0]
    return int(word.argmax() if largest else word.argmin())


@pytest.mark.parametrize("block", MODES)
def test_a_coin_near_0_accepts_what_is_unlikely_and_never_what_is_impossible(block):
    position = extreme_position(ACCEPT, largest=False)
    positions = torch.tensor([position, position + 1])
    draft = torch.tensor([[0.0, -torch.inf]])
    tokens = torch.tensor([0, 0])
    for logit, accepted in ((-torch.inf, 0), (-30.0, 0), (-11.0, 1), (-25.0, 0)):  # exp(-11) > 2^-16
        target = torch.tensor([[logit, 0.0], [0.0, 0.0]])
        assert assert_same(target, draft, tokens, positions, block=block).accepted == accepted


@pytest.mark.parametrize("block", MODES)
def test_a_coin_near_1_rejects_what_is_not_certain(block):
    position = extreme_position(ACCEPT, largest=True)
    positions = torch.tensor([position, position + 1])
    draft, tokens = torch.tensor([[0.0, -torch.inf]]), torch.tensor([0, 0])
    for logit, accepted in ((-torch.inf, 1), (-10.0, 0)):
        target = torch.tensor([[0.0, logit], [0.0, 0.0]])
        assert assert_same(target, draft, tokens, positions, block=block).accepted == accepted


@pytest.mark.parametrize("vocabulary", [5, 64, 1000, 9000])
def test_the_last_token_is_not_a_fallback(vocabulary):
    """The largest uniform integer draws the last token with weight, not the end of the vocabulary."""
    position = extreme_position(RESIDUAL, largest=True)
    target = torch.zeros(1, vocabulary)
    target[0, vocabulary // 2 :] = -torch.inf
    empty, root = torch.empty(0, vocabulary), torch.tensor([0])
    assert assert_same(target, empty, root, torch.tensor([position])).next_token == vocabulary // 2 - 1
    position = extreme_position(RESIDUAL, largest=False)
    target = target.flip(1)
    first = vocabulary - vocabulary // 2
    assert assert_same(target, empty, root, torch.tensor([position])).next_token == first


def test_coins_and_draws_are_independent():
    """The residual's token does not tell the coin: after a rejection the next token is not tied to a large coin."""
    position = extreme_position(ACCEPT, largest=True)  # a coin near 1; the same word would draw the last token
    target, draft = torch.zeros(2, 1000), torch.zeros(1, 1000)
    draft[0, 0] = 20.0
    verdict = assert_same(target, draft, torch.tensor([0, 0]), torch.tensor([position, position + 1]))
    assert verdict.accepted == 0
    assert 0 < verdict.next_token < 990
    coins = noise_words(positions_of(1), 64, 0, ACCEPT)
    draws = noise_words(positions_of(1), 64, 0, RESIDUAL)
    assert not (coins == draws).any()
    assert len(coins.unique()) == 64  # each token of a chain has its own


@pytest.mark.parametrize("block", MODES)
def test_padding_ends_the_chain_and_what_follows_is_not_read(block):
    target, draft = chain(3, 1000, 5)
    tokens = drawn_from(draft, 5)
    expected = verify_rejection(target, draft, tokens, positions_of(3), seed=5, block=block)
    garbage = torch.full((4, 1000), torch.nan)
    for padding in (-1, 1000, -(2**63), 2**63 - 1):
        padded = verify_rejection(
            torch.cat([target, garbage]),
            torch.cat([draft, garbage]),
            torch.cat([tokens, torch.tensor([padding, 3, -1, 4])]),
            positions_of(7),
            seed=5,
            block=block,
        )
        assert tuple(map(int, padded)) == tuple(map(int, expected))


@pytest.mark.parametrize("block", MODES)
def test_a_token_that_the_draft_cannot_have_drawn_is_rejected(block):
    """What follows is drawn from the target itself, so it may be that token."""
    target, draft = torch.zeros(3, 4), torch.zeros(2, 4)
    draft[1, 2] = -torch.inf
    next_tokens = set()
    for seed in range(40):
        verdict = assert_same(target, draft, torch.tensor([0, 1, 2]), positions_of(3), seed=seed, block=block)
        assert verdict.accepted == 1
        next_tokens.add(int(verdict.next_token))
    assert next_tokens == {0, 1, 2, 3}


@pytest.mark.parametrize("block", MODES)
def test_equal_models_accept_everything(block):
    target, _ = chain(9, 2000, 8)
    for seed in range(5):
        tokens = drawn_from(target[:-1], seed)
        assert assert_same(target, target[:-1], tokens, positions_of(9), seed=seed, block=block).accepted == 8


@pytest.mark.parametrize("block", MODES)
def test_a_long_chain(block):
    target, draft = chain(70, 50, 8, distance=0.1)
    for seed in range(3):
        assert_same(target, draft, drawn_from(draft, seed), positions_of(70), seed=seed, block=block)


def test_a_long_chain_of_long_rows():
    """So many rows that a CUDA block draws from more of its row than its threads read at once."""
    target, draft = chain(140, 6000, 8, distance=0.02)
    for seed in range(2):
        assert_same(target, draft, drawn_from(draft, seed), positions_of(140), seed=seed, block=True)


# ---- Arguments.


def bad(**changes):
    arguments = {
        "target_logits": torch.zeros(3, 8),
        "draft_logits": torch.zeros(2, 8),
        "tokens": torch.zeros(3, dtype=torch.int64),
        "positions": positions_of(3),
    }
    return {**arguments, **changes}


def with_value(value: float, rows: int, token: int | slice = 5) -> Tensor:
    logits = torch.zeros(rows, 8)
    logits[1, token] = value
    return logits


BAD_SHAPES = [
    (bad(target_logits=torch.zeros(3)), "target_logits: expected shape"),
    (bad(target_logits=torch.zeros(3, 0)), "target_logits: expected at least one row"),
    (bad(target_logits=torch.zeros(3, 8, dtype=torch.float64)), "target_logits: expected float32, bfloat16"),
    (bad(target_logits=torch.zeros(8, 3).t()), "target_logits: expected stride 1"),
    (bad(target_logits=torch.zeros(1, 1).expand(3, 2**22 + 1)), "target_logits: expected"),
    (bad(draft_logits=torch.zeros(3, 8)), "draft_logits: expected shape"),
    (bad(draft_logits=torch.zeros(2, 9)), "draft_logits: expected shape"),
    (bad(draft_logits=torch.zeros(2, 8, dtype=torch.bfloat16)), "draft_logits: expected float32, got bfloat16"),
    (bad(draft_logits=torch.zeros(8, 2).t()), "draft_logits: expected stride 1"),
    (bad(tokens=torch.zeros(2, dtype=torch.int64)), "tokens: expected shape"),
    (bad(tokens=torch.zeros(3)), "tokens: expected int64"),
    (bad(tokens=torch.zeros(6, dtype=torch.int64)[::2]), "tokens: expected a contiguous"),
    (bad(positions=positions_of(4)), "positions: expected shape"),
    (bad(positions=positions_of(6)[::2]), "positions: expected a contiguous"),
    (bad(seed=torch.zeros(1, dtype=torch.int64)), "seed: expected"),
    (bad(seed=2**63), "seed: expected"),
    (bad(temperature=-1.0), "temperature: expected"),
    (bad(temperature=torch.nan), "temperature: expected"),
    (bad(top_k=-1), "top_k: expected"),
    (bad(top_p=0.0), "top_p: expected"),
    (bad(min_p=-0.1), "min_p: expected"),
]
BAD_VALUES = [
    (bad(target_logits=with_value(torch.nan, 3)), "target_logits: row 1 has NaN"),
    (bad(target_logits=with_value(torch.inf, 3)), r"target_logits: row 1 has \+inf"),
    (bad(target_logits=with_value(-torch.inf, 3, slice(None))), "target_logits: row 1 has only -inf"),
    (bad(draft_logits=with_value(torch.nan, 2)), "draft_logits: row 1 has NaN"),
    (bad(draft_logits=with_value(torch.inf, 2)), r"draft_logits: row 1 has \+inf"),
    (bad(draft_logits=with_value(-torch.inf, 2, slice(None))), "draft_logits: row 1 has only -inf"),
    (bad(temperature=1e-37, draft_logits=with_value(1e5, 2)), "draft_logits: row 1 has values that overflow"),
]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"block": True}], ids=str)
@pytest.mark.parametrize(("arguments", "message"), BAD_SHAPES)
def test_bad_shapes_and_options_are_named(options, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        verify_rejection(**{**options, **arguments})


@on_cpu
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"block": True}], ids=str)
@pytest.mark.parametrize(("arguments", "message"), BAD_VALUES)
def test_bad_values_are_named(options, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        verify_rejection(**{**options, **arguments})


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        pytest.param(options, arguments, id=f"{options}-{message}")
        for options in ({}, {"temperature": 0.0}, {"block": True}, {"top_p": 0.5})
        for arguments, message in BAD_VALUES
        if not options.keys() & arguments.keys()
    ],
)
def test_bad_values_on_a_device_give_no_token(implementation, options, arguments):
    if implementation == "cpu":
        pytest.skip("raises instead")
    assert tuple(map(int, verify_rejection(**{**options, **arguments}))) == (0, -1)


def test_a_device_takes_1024_rows(implementation):
    if implementation == "cpu":
        pytest.skip("takes any number")
    for n in (1024, 1025):
        arguments = (torch.zeros(n, 2), torch.zeros(n - 1, 2), torch.zeros(n, dtype=torch.int64), positions_of(n))
        if n == 1024:
            assert verify_rejection(*arguments).accepted == 1023
        else:
            with pytest.raises(ValueError, match=r"^target_logits: expected at most 1024 rows on a CUDA device"):
                verify_rejection(*arguments)


@on_cpu
def test_opcheck():
    arguments = (*chain(3, 40, 0), torch.zeros(3, dtype=torch.int64), positions_of(3), torch.tensor(3))
    torch.library.opcheck(torch.ops.specbranch.verify_rejection.default, (*arguments, 1.0, 10, 0.9, 0.01, True))


@on_cpu
def test_torch_compile():
    def decode(target, draft, tokens, positions, seed):
        result = verify_rejection(target * 2, draft, tokens, positions, seed=seed, top_p=0.9)
        return result.next_token + 1, result.accepted

    arguments = (*chain(3, 40, 0), torch.zeros(3, dtype=torch.int64), positions_of(3), torch.tensor(3))
    compiled = torch.compile(decode, backend="aot_eager", fullgraph=True)
    for ours, expected in zip(compiled(*arguments), decode(*arguments), strict=True):
        assert torch.equal(ours, expected)
