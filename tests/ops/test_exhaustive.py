"""All small cases, without a sample: every tree of up to five nodes, every token in it, every row of a grid of logits.

What a verdict depends on is the tree, which drafted tokens equal the target's, and the target's tokens. With two
tokens every pattern of equality occurs; the sampling of each row is enumerated apart, on up to four tokens. A verdict
by rejection depends on all logits of target and draft: short chains with every combination of a few rows.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from allowed_tokens import pack
from filters import in_memory
from implementations import on_cpu

from specbranch_ext import ancestor_mask, draft_sample, reference, verify, verify_rejection

pytestmark = pytest.mark.usefixtures("implementation")

FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.5, "top_k": 1},
    {"temperature": 1.0, "top_k": 2},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 2.0, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.3},
    {"temperature": 1.0, "top_k": 3, "top_p": 0.7, "min_p": 0.1},
]


def all_parents(n: int) -> Iterator[tuple[int, ...]]:
    """Every assignment of an earlier node, or none, to nodes 1 to n - 1."""
    yield from itertools.product([-1], *(range(-1, node) for node in range(1, n)))


def walk(parents: tuple[int, ...], tokens: tuple[int, ...], target: tuple[int, ...]) -> list[int]:
    """The accepted path by its definition: from the root, on to the first child that carries the target's token."""
    path: list[int] = []
    node = 0
    while True:
        matching = [i for i in range(1, len(parents)) if parents[i] == node and tokens[i] == target[node]]
        if not matching:
            return path
        node = matching[0]
        path.append(node)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_every_tree_with_every_pattern_of_equal_tokens(n, implementation):
    positions = torch.arange(n)
    targets = list(itertools.product(range(2), repeat=n))
    if implementation == "emulated" and n > 3:
        # Slower: with any one row of targets, the tokens alone give every pattern of equality.
        targets = [targets[1], targets[len(targets) // 3]]
    logits = {target: torch.eye(2)[list(target)] for target in targets}
    token_rows = [(tokens, torch.tensor(tokens)) for tokens in itertools.product([0], *[range(2)] * (n - 1))]
    for parents in all_parents(n):
        parent_row = torch.tensor(parents)
        for tokens, token_row in token_rows:
            for target, target_logits in logits.items():
                result = verify(target_logits, token_row, parent_row, positions)
                path = walk(parents, tokens, target)
                assert result.path.tolist() == path + [-1] * (n - len(path)), (parents, tokens, target)
                assert result.next_token == target[path[-1] if path else 0]
                assert result.accepted == len(path)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_every_tree_with_unused_nodes_whose_rows_hold_nothing(n):
    positions = torch.arange(n)
    for parents in all_parents(n):
        unused = [i for i in range(1, n) if parents[i] < 0]
        for tokens in itertools.product([0], *[range(2)] * (n - 1)):
            target = [i % 2 for i in range(n)]
            logits = torch.eye(2)[target]
            logits[unused] = torch.nan
            for i in unused:
                target[i] = -1
            for op in (verify, reference.verify):
                result = op(logits, torch.tensor(tokens), torch.tensor(parents), positions)
                path = walk(parents, tokens, tuple(target))
                assert result.path.tolist() == path + [-1] * (n - len(path)), (parents, tokens)
                assert result.target_tokens.tolist() == target
                assert result.next_token == target[path[-1] if path else 0]


def all_texts(n: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every choice of roots among n rows, and every assignment of an earlier node of its tree, or none, to the rows."""
    for roots in itertools.chain.from_iterable(itertools.combinations(range(n), s) for s in range(n + 1)):
        own = [max((root for root in roots if root <= row), default=row) for row in range(n)]
        for parents in itertools.product(*([-1, *range(own[row], row)] for row in range(n))):
            yield roots, parents


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_call_of_several_texts(n, implementation):
    positions = torch.arange(n)
    target = [1, 0, 1, 1][:n]  # with one row of targets the tokens alone give every pattern of equality
    for i, (roots, parents) in enumerate(all_texts(n)):
        if implementation != "cpu" and n > 3 and i % 5 != 0:
            continue  # slower
        rows = range(n)
        needed = [row for row in rows if row in roots or parents[row] >= 0]
        for tokens in itertools.product(*([0] if row in roots else [0, 1] for row in rows)):
            for bad in (None, *rows):
                logits = torch.eye(2)[target]
                if bad is not None:
                    logits[bad] = torch.nan
                given = (torch.tensor(tokens), torch.tensor(parents), positions)
                for op in (verify, reference.verify) if implementation == "cpu" else (verify,):
                    result = op(logits, *given, roots=torch.tensor(roots, dtype=torch.int64))
                    assert result.target_tokens.tolist() == [-1 if row == bad else target[row] for row in rows]
                    whole_path = [-1] * n
                    for text, (root, end) in enumerate(itertools.pairwise((*roots, n))):
                        tree = slice(root, end)
                        local = tuple(parent - root if parent >= 0 else -1 for parent in parents[tree])
                        path = [root + node for node in walk(local, tokens[tree], tuple(target[tree]))]
                        accepted, next_token = len(path), target[path[-1] if path else root]
                        if bad in needed and bad in range(root, end):
                            path, accepted, next_token = [], 0, -1
                        whole_path[root : root + len(path)] = path
                        assert (result.accepted[text], result.next_token[text]) == (accepted, next_token)
                    assert result.path.tolist() == whole_path, (roots, parents, tokens, bad)


@on_cpu  # the reference is the same for all
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_reference_walks_the_same(n):
    for parents in all_parents(n):
        for tokens in itertools.product([0], *[range(2)] * (n - 1)):
            target = tuple(hash((parents, tokens, i)) % 2 for i in range(n))
            row = (torch.eye(2)[list(target)], torch.tensor(tokens), torch.tensor(parents), torch.arange(n))
            path = walk(parents, tokens, target)
            assert reference.verify(*row).path.tolist() == path + [-1] * (n - len(path))


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 2, 3, 4])
def test_every_row_of_the_grid(vocabulary, options, implementation):
    values = [-torch.inf, -2.0, 0.0, 1.0]
    rows = [row for row in itertools.product(values, repeat=vocabulary) if max(row) > -torch.inf]
    emulated = implementation == "emulated"  # slower: fewer draws
    draws = 1 if emulated else 40
    logits = torch.tensor(rows).repeat(draws, 1)
    n = len(logits)
    unused, positions = torch.full((n,), -1), torch.arange(n) // len(rows)
    for seed in (2**40 + 1,) if emulated else (0, 2**40 + 1):
        ours = verify(logits, unused, unused, positions, seed=seed, **options)
        expected = reference.verify(logits, unused, unused, positions, seed=seed, **options)
        assert torch.equal(ours.target_tokens, expected.target_tokens)
        for k in {1, vocabulary} if emulated else range(1, vocabulary + 1):
            check_sample(logits, positions, k, seed=seed, **options)


def check_sample(logits: torch.Tensor, positions: torch.Tensor, k: int, **options: Any) -> None:
    """draft_sample gives what its reference gives."""
    sample = draft_sample(logits, positions, k, **options)
    wanted = reference.draft_sample(logits, positions, k, **options)
    assert torch.equal(sample.tokens, wanted.tokens)
    assert torch.equal(sample.scores, wanted.scores)
    torch.testing.assert_close(sample.confidence, wanted.confidence, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(sample.entropy, wanted.entropy, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 4])
def test_every_row_of_the_grid_with_all_filters_in_one_call(vocabulary, implementation):
    values = [-torch.inf, -2.0, 0.0, 1.0]
    rows = [row for row in itertools.product(values, repeat=vocabulary) if max(row) > -torch.inf]
    if implementation != "cpu":
        rows = rows[:: (1, 1, 2, 11)[vocabulary - 1]]  # slower
    logits, positions = torch.tensor(rows), torch.arange(len(rows)) // 3
    seeds = torch.arange(len(rows)) % 5 + 2**40
    filters = torch.stack([in_memory(options) for options in FILTERS])
    n, calls = len(rows), len(FILTERS)
    unused = torch.full((n * calls,), -1)
    mixed: dict[str, Any] = {"seed": seeds.repeat_interleave(calls), "filters": filters.repeat(n, 1)}
    logits_of_all, positions_of_all = logits.repeat_interleave(calls, dim=0), positions.repeat_interleave(calls)
    target_tokens = verify(logits_of_all, unused, unused, positions_of_all, **mixed).target_tokens
    samples = {k: draft_sample(logits_of_all, positions_of_all, k, **mixed) for k in {1, vocabulary}}
    for i, options in enumerate(FILTERS):
        for seed in seeds.unique().tolist():
            mine = (seeds == seed).nonzero().flatten()
            alone = (logits[mine], unused[: len(mine)], unused[: len(mine)], positions[mine])
            assert torch.equal(target_tokens[i::calls][mine], verify(*alone, seed=seed, **options).target_tokens)
            for k, sample in samples.items():
                expected = draft_sample(logits[mine], positions[mine], k, seed=seed, **options)
                for part, wanted in zip(sample, expected, strict=True):
                    assert torch.equal(part[i::calls][mine], wanted)


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 2, 3, 4])
def test_every_mask(vocabulary, options, implementation):
    """Every choice of allowed tokens, with rows of the grid: the reference's tokens and scores."""
    grid_rows = [row for row in itertools.product([-torch.inf, -2.0, 0.0, 1.0], repeat=vocabulary)]
    if implementation != "cpu":
        grid_rows = grid_rows[:: (1, 1, 2, 11)[vocabulary - 1]]  # slower
    masks = list(itertools.product([False, True], repeat=vocabulary))
    pairs = [
        (row, mask)
        for row, mask in itertools.product(grid_rows, masks)
        if any(allows and logit > -torch.inf for logit, allows in zip(row, mask, strict=True))
    ]
    logits, tokens = (torch.tensor(part) for part in zip(*pairs, strict=True))
    positions, unused, allowed = torch.arange(len(pairs)), torch.full((len(pairs),), -1), pack(tokens)
    found = verify(logits, unused, unused, positions, allowed=allowed, **options).target_tokens
    expected = reference.verify(logits, unused, unused, positions, allowed=allowed, **options).target_tokens
    assert torch.equal(found, expected)
    assert tokens.gather(1, found.unsqueeze(1)).all()
    for k in {1, vocabulary}:
        check_sample(logits, positions, k, allowed=allowed, **options)


@pytest.mark.parametrize("vocabulary", [2, 3])
def test_every_chain_under_every_mask(vocabulary, implementation):
    rows = [[0.0, 1.0, 0.5][:vocabulary], [1.0, -1.0, 0.0][:vocabulary], [0.3, 0.0, 2.0][:vocabulary]]
    target, draft = torch.tensor(rows).split([2, 1])
    masks = [mask for mask in itertools.product([False, True], repeat=vocabulary) if any(mask)]
    chains = itertools.product(masks, masks, range(-1, vocabulary), (False, True), FILTERS[1::2])
    for i, (first, second, token, block, options) in enumerate(chains):
        if implementation != "cpu" and i % 11 != 0:
            continue  # slower
        chain = (target, draft, torch.tensor([0, token]), torch.arange(2))
        given = {"block": block, "seed": i, "allowed": pack(torch.tensor([first, second])), **options}
        assert verify_rejection(*chain, **given) == reference.verify_rejection(*chain, **given), given


def grid(*values: float, vocabulary: int) -> list[tuple[float, ...]]:
    """Rows up to a constant: 0 is the largest of `values` and of each row."""
    return [row for row in itertools.product(values, repeat=vocabulary) if max(row) == 0.0]


def all_chains(
    n: int, vocabulary: int, rows: list[tuple[float, ...]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Target and draft logits of every combination of rows, with every token drafted; -1 ends a chain."""
    for logits in itertools.product(rows, repeat=2 * n - 1):
        target, draft = torch.tensor(logits).split([n, n - 1])
        for drafted in itertools.product(range(-1, vocabulary), repeat=n - 1):
            yield target, draft, torch.tensor([0, *drafted])


CHAINS = {  # rows, and what they are filtered by
    "root": (1, grid(-torch.inf, -2.0, 0.0, vocabulary=3), [{"temperature": 0.0}, *FILTERS[1:]]),
    "a token of 2": (2, grid(-torch.inf, -2.0, 0.0, vocabulary=2), [{"temperature": 0.0}, *FILTERS[1:]]),
    "a token of 3": (2, grid(-torch.inf, 0.0, vocabulary=3), FILTERS[1:2]),
    "two tokens of 2": (3, [(-torch.inf, 0.0), (0.0, 0.0), (0.0, -2.0)], FILTERS[1:2]),
}


@pytest.mark.parametrize(
    ("n", "rows", "options"),
    [
        pytest.param(n, rows, options, id=f"{name}-{options}")
        for name, (n, rows, filters) in CHAINS.items()
        for options in filters
    ],
)
def test_every_chain_of_the_grid(n, rows, options, implementation):
    vocabulary = len(rows[0])
    positions = torch.arange(n)
    for i, chain in enumerate(all_chains(n, vocabulary, rows)):
        if implementation != "cpu" and n > 1 and i % 11 != 0:
            continue  # slower; 11 divides no number of choices
        expected = None
        for block in (False, True):
            if expected is None or n > 2:  # with one token drafted both modes are the same
                expected = reference.verify_rejection(*chain, positions, block=block, seed=i, **options)
            assert verify_rejection(*chain, positions, block=block, seed=i, **options) == expected, (*chain, block)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_the_ancestors_of_every_tree(n):
    for parents in all_parents(n):
        ours, expected = ancestor_mask(torch.tensor(parents)), reference.ancestor_mask(torch.tensor(parents))
        assert torch.equal(ours.ancestors, expected.ancestors)
        assert torch.equal(ours.depths, expected.depths)
