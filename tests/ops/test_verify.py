"""verify: exactly the reference's tokens and path, on trees, filters, dtypes, layouts and thread counts."""

import pytest
import torch
from filters import FILTERS
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import on_cpu, on_emulated

from specbranch_ext import reference, verify

pytestmark = pytest.mark.usefixtures("implementation")

CHAIN = torch.tensor([-1, 0, 1])


def positions_of(rows: int) -> torch.Tensor:
    return torch.arange(rows) + 1000


def assert_same(logits, tokens, parents, positions, **options):
    ours = verify(logits, tokens, parents, positions, **options)
    expected = reference.verify(logits, tokens, parents, positions, **options)
    for name, a, b in zip(ours._fields, ours, expected, strict=True):
        assert torch.equal(a, b), f"{name}: {a} instead of {b}"
    return ours


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
# Below, at and above a vector, and large enough for segments and sampled brackets.
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 16, 1001, 8193, 16_403])
def test_equals_the_reference(options, dtype, vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    spreads = (0.3, 1.0, 4.0) if vocabulary < 8000 or dtype == torch.float32 else (2.0,)
    for spread in spreads:  # bfloat16 and small spreads give many exact ties
        logits = (torch.randn(3, vocabulary, generator=generator) * spread).to(dtype)
        tokens = torch.randint(0, vocabulary, (3,), generator=generator)
        assert_same(logits, tokens, CHAIN, positions_of(3), seed=vocabulary, **options)


@pytest.mark.parametrize("options", FILTERS[1:], ids=str)
def test_equals_the_reference_on_peaked_rows(options):
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(6, 20_000, generator=generator) * 2
    for row in logits:  # a few tokens hold most of the mass and the sample of the row sees almost none of them
        row[torch.randint(0, 20_000, (30,), generator=generator)] = 12 + 3 * torch.randn(30, generator=generator)
    logits[3] = -40.0
    logits[3, 17] = 0.0
    logits[4] = torch.linspace(-30, 10, 20_000)
    logits[5, ::16] += 10.0  # in step with the sample
    parents = torch.arange(6) - 1
    for seed in range(2):
        assert_same(logits, torch.zeros(6, dtype=torch.int64), parents, positions_of(6), seed=seed, **options)


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_ties_go_to_the_lowest_token_and_filters_keep_them_together(options):
    constant = torch.zeros(1, 20_000)
    blocks = torch.arange(20_000).remainder(7).to(torch.float32).unsqueeze(0)
    for logits in (constant, blocks, constant.to(torch.bfloat16)):
        result = assert_same(logits, torch.zeros(1, dtype=torch.int64), CHAIN[:1], positions_of(1), **options)
        if not options:
            assert result.next_token == logits.argmax()


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_masked_tokens_are_never_chosen(options):
    generator = torch.Generator().manual_seed(9)
    logits = torch.randn(16, 9000, generator=generator)
    allowed = torch.randint(0, 9000, (16, 3), generator=generator)
    masked = torch.full_like(logits, -torch.inf).scatter(1, allowed, logits.gather(1, allowed))
    parents = torch.arange(16) - 1
    result = assert_same(masked, torch.zeros(16, dtype=torch.int64), parents, positions_of(16), **options)
    assert (result.target_tokens.unsqueeze(1) == allowed).any(dim=1).all()


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_layout_and_threads_do_not_matter(options, implementation):
    base = torch.randn(12, 20_100, generator=torch.Generator().manual_seed(2))
    views = [base[:5, :20_000], base[::2, :20_000], base[:1, :20_000].expand(5, -1), base[:5, 99:20_099]]
    before = torch.get_num_threads()
    try:
        for view in views:
            n = len(view)
            arguments = (torch.zeros(n, dtype=torch.int64), torch.arange(n) - 1, positions_of(n))
            expected = verify(view.contiguous(), *arguments, seed=3, **options)
            for threads in (1, 2, 5) if implementation == "cpu" else (1,):
                torch.set_num_threads(threads)
                ours = verify(view, *arguments, seed=3, **options)
                assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_padded_vocabulary_changes_nothing(options):
    logits = torch.randn(8, 9000, generator=torch.Generator().manual_seed(6))
    padded = torch.nn.functional.pad(logits, (0, 123), value=-torch.inf)
    arguments = (torch.zeros(8, dtype=torch.int64), torch.arange(8) - 1, positions_of(8))
    expected = verify(logits, *arguments, seed=1, **options)
    assert torch.equal(verify(padded, *arguments, seed=1, **options).target_tokens, expected.target_tokens)


def one_hot_logits(target_tokens: list[int], vocabulary: int = 10) -> torch.Tensor:
    logits = torch.zeros(len(target_tokens), vocabulary)
    logits[torch.arange(len(target_tokens)), torch.tensor(target_tokens)] = 5.0
    return logits


@pytest.mark.parametrize(
    ("tokens", "parents", "targets", "path", "next_token"),
    [
        ([0], [-1], [4], [], 4),  # nothing drafted
        ([0, 4, 5, 6], [-1, 0, 1, 2], [4, 5, 6, 7], [1, 2, 3], 7),  # all accepted
        ([0, 4, 5, 6], [-1, 0, 1, 2], [4, 9, 6, 7], [1], 9),  # rejected in the middle; a later match is void
        ([0, 1, 4, 5], [-1, 0, 1, 2], [4, 4, 5, 6], [], 4),  # rejected at once; the grandchild equals it
        ([0, 3, 4, 5, 6], [-1, 0, 0, 2, 2], [4, 9, 6, 9, 8], [2, 4], 8),  # second child, second child
        ([0, 4, 4, 5], [-1, 0, 0, 2], [4, 5, 5, 6], [1], 5),  # equal siblings: the first one is taken
        ([0, 4, -1, -1], [-1, 0, 1, 2], [4, 5, 6, 7], [1], 5),  # padded drafts
        ([0, 4, 4, 5], [-1, -1, 0, -1], [4, 5, 5, 6], [2], 5),  # unused nodes
        ([4, 4], [-1, 0], [4, 4], [1], 4),  # the root's own token is ignored
    ],
)
def test_walk(tokens, parents, targets, path, next_token):
    n = len(tokens)
    result = assert_same(one_hot_logits(targets), torch.tensor(tokens), torch.tensor(parents), positions_of(n))
    assert result.target_tokens.tolist() == targets
    assert result.path.tolist() == path + [-1] * (n - len(path))
    assert result.accepted == len(path)
    assert result.next_token == next_token


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("vocabulary", [5, 20_000])
def test_rows_of_unused_nodes_may_hold_anything(vocabulary, options, value):
    logits = torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    parents, positions = torch.tensor([-1, 0, -1, 1, -1, -1]), positions_of(6)
    tokens = verify(logits, torch.zeros(6, dtype=torch.int64), parents, positions, **options).target_tokens
    tokens = tokens[parents]  # every node is what its parent's row gives
    clean = assert_same(logits, tokens, parents, positions, **options)
    logits[[2, 5], -1] = value
    if value < 0:
        logits[[2, 5]] = value
    result = assert_same(logits, tokens, parents, positions, **options)
    targets = clean.target_tokens.tolist()
    assert result.target_tokens.tolist() == [*targets[:2], -1, *targets[3:5], -1]
    assert result.path.tolist() == clean.path.tolist() == [1, 3, -1, -1, -1, -1]
    assert (result.accepted, result.next_token) == (2, targets[3])


def test_values_of_unused_nodes_may_overflow_with_the_temperature():
    logits = torch.tensor([[0.0, 3.0], [1e38, 0.0]])
    rows = torch.tensor([-1, -1])
    result = assert_same(logits, rows, rows, positions_of(2), temperature=1e-3)
    assert (result.target_tokens.tolist(), result.next_token) == ([1, -1], 1)


@pytest.mark.parametrize("n", [255, 256, 257, 700])
def test_more_nodes_than_the_threads_of_a_block(n):
    """A chain of every second node; the others are siblings that carry another token."""
    parents = torch.arange(n) - 1
    parents[2::2] -= 1
    targets = [i % 9 for i in range(n)]
    tokens = torch.tensor([0, *(targets[parent] for parent in parents[1:])])
    tokens[1::2] += 1
    result = assert_same(one_hot_logits(targets), tokens, parents, positions_of(n))
    assert result.accepted == (n - 1) // 2


def chain(logits, seed=0, **options):
    """Tokens of a chain that is accepted for two thirds."""
    n = len(logits)
    rows = torch.zeros(n, dtype=torch.int64)
    tokens = verify(logits, rows, rows - 1, positions_of(n), seed=seed, **options).target_tokens.roll(1)
    tokens[2 * n // 3 + 1 :] = -1
    return tokens


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}], ids=str)
@pytest.mark.parametrize(("n", "vocabulary"), [(33, 1), (33, 3), (33, 5000), (1024, 1), (1024, 40)])
def test_many_rows_and_one_call_after_another(n, vocabulary, options):
    logits = torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(n)) * 3
    tokens, parents = chain(logits, **options), torch.arange(n) - 1
    for rows in (n, 1, n):  # each call finds the tickets as the one before left them
        result = assert_same(logits[:rows], tokens[:rows], parents[:rows], positions_of(rows), **options)
        assert result.accepted == 2 * n // 3 if rows == n else result.accepted == 0


@on_emulated
@pytest.mark.parametrize("schedule", ["forward", "reverse", *(f"shuffle:{seed}" for seed in range(1, 9))])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}], ids=str)
def test_the_order_of_blocks_does_not_matter(options, schedule, monkeypatch):
    logits = torch.randn(9, 9000, generator=torch.Generator().manual_seed(5)) * 2
    tokens, parents = chain(logits, **options), torch.arange(9) - 1
    monkeypatch.setenv("SPECBRANCH_EMULATOR_SCHEDULE", schedule)
    for _ in range(2):
        assert assert_same(logits, tokens, parents, positions_of(9), **options).accepted == 6


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_trees(data):
    n = data.draw(st.integers(1, 12))
    vocabulary = data.draw(st.integers(1, 5))
    parents = [-1] + [data.draw(st.integers(-1, i - 1)) for i in range(1, n)]
    tokens = data.draw(st.lists(st.integers(-1, vocabulary - 1), min_size=n, max_size=n))
    values = st.sampled_from([-torch.inf, -1.0, 0.0, 0.5, 2.0])
    rows = data.draw(st.lists(st.lists(values, min_size=vocabulary, max_size=vocabulary), min_size=n, max_size=n))
    logits = torch.tensor(rows)
    logits[logits.amax(dim=1) == -torch.inf] = 0.0
    options = data.draw(st.sampled_from(FILTERS))
    seed = data.draw(st.integers(-(2**63), 2**63 - 1))
    result = assert_same(logits, torch.tensor(tokens), torch.tensor(parents), positions_of(n), seed=seed, **options)
    node = 0
    for step in result.path[: int(result.accepted)].tolist():
        assert parents[step] == node
        assert tokens[step] == result.target_tokens[node]
        node = step
    assert result.next_token == result.target_tokens[node]
    children = [tokens[i] for i in range(1, n) if parents[i] == node]
    assert int(result.next_token) not in children


def test_noise_depends_on_seed_and_position_only():
    logits = torch.randn(1, 5000).expand(6, -1)
    positions = torch.tensor([3, 3, 4, 3, 5, 4])
    arguments = (torch.zeros(6, dtype=torch.int64), torch.arange(6) - 1, positions)
    tokens = verify(logits, *arguments, seed=1, temperature=1.0).target_tokens
    assert torch.equal(tokens, verify(logits, *arguments, seed=1, temperature=1.0).target_tokens)
    assert tokens[0] == tokens[1] == tokens[3]
    assert tokens[2] == tokens[5]
    assert len({int(tokens[0]), int(tokens[2]), int(tokens[4])}) == 3
    assert tokens[0] != verify(logits, *arguments, seed=2, temperature=1.0).target_tokens[0]


def bad(**changes):
    arguments = {
        "target_logits": torch.zeros(3, 8),
        "tokens": torch.zeros(3, dtype=torch.int64),
        "parents": CHAIN,
        "positions": positions_of(3),
    }
    return {**arguments, **changes}


def with_value(value: float, token: int | slice = 5) -> torch.Tensor:
    logits = torch.zeros(3, 8)
    logits[1, token] = value
    return logits


@on_cpu
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}], ids=str)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (bad(target_logits=with_value(torch.nan)), "target_logits: row 1 has NaN"),
        (bad(target_logits=with_value(torch.inf)), r"target_logits: row 1 has \+inf"),
        (bad(target_logits=with_value(-torch.inf, slice(None))), "target_logits: row 1 has only -inf"),
        (bad(target_logits=torch.zeros(3)), "target_logits: expected shape"),
        (bad(target_logits=torch.zeros(3, 0)), "target_logits: expected at least one row"),
        (
            bad(target_logits=torch.zeros(3, 8, dtype=torch.float64)),
            "target_logits: expected float32, bfloat16",
        ),
        (bad(target_logits=torch.zeros(8, 3).t()), "target_logits: expected stride 1"),
        (bad(tokens=torch.zeros(2, dtype=torch.int64)), "tokens: expected shape"),
        (bad(tokens=torch.zeros(3)), "tokens: expected int64"),
        (bad(parents=torch.tensor([-1, 1, 0])), "parents: expected an earlier node or -1 for node 1, got 1"),
        (
            bad(parents=torch.tensor([-1, 0, -2])),
            "parents: expected an earlier node or -1 for node 2, got -2",
        ),
        (bad(parents=torch.tensor([0, 0, 1])), "parents: expected an earlier node or -1 for node 0, got 0"),
        (bad(positions=positions_of(4)), "positions: expected shape"),
        (bad(positions=positions_of(6)[::2]), "positions: expected a contiguous"),
        (bad(seed=torch.zeros(1, dtype=torch.int64)), "seed: expected"),
        (bad(seed=2**63), "seed: expected"),
        (bad(temperature=-1.0), "temperature: expected"),
        (bad(temperature=torch.nan), "temperature: expected"),
        (bad(temperature=1e-39), "temperature: expected"),
        (
            bad(temperature=1e-37, target_logits=with_value(1e5)),
            "target_logits: row 1 has values that overflow",
        ),
        (bad(top_k=-1), "top_k: expected"),
        (bad(top_p=0.0), "top_p: expected"),
        (bad(top_p=1.5), "top_p: expected"),
        (bad(min_p=-0.1), "min_p: expected"),
        (bad(min_p=torch.nan), "min_p: expected"),
    ],
)
def test_bad_input_is_named(options, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        verify(**{**options, **arguments})


@on_cpu
@pytest.mark.parametrize("vocabulary", [9, 20_000])
@pytest.mark.parametrize("where", [0, 7, 8, -1])
def test_one_nan_is_found_anywhere(vocabulary, where):
    logits = torch.zeros(3, vocabulary, dtype=torch.bfloat16)
    logits[2, where] = torch.nan
    with pytest.raises(ValueError, match=r"^target_logits: row 2 has NaN"):
        verify(**bad(target_logits=logits))


def test_opcheck():
    arguments = (
        torch.randn(3, 40),
        torch.zeros(3, dtype=torch.int64),
        CHAIN,
        positions_of(3),
        torch.tensor(3),
    )
    torch.library.opcheck(torch.ops.specbranch.verify.default, (*arguments, 1.0, 10, 0.9, 0.01))


def test_torch_compile():
    def decode(logits, tokens, parents, positions, seed):
        result = verify(logits * 2, tokens, parents, positions, seed=seed, temperature=1.0, top_p=0.9)
        return result.target_tokens + 1, result.accepted

    arguments = (
        torch.randn(3, 40),
        torch.zeros(3, dtype=torch.int64),
        CHAIN,
        positions_of(3),
        torch.tensor(3),
    )
    compiled = torch.compile(decode, backend="aot_eager", fullgraph=True)
    for ours, expected in zip(compiled(*arguments), decode(*arguments), strict=True):
        assert torch.equal(ours, expected)
