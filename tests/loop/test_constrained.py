"""What a text's constraint says of the nodes of its tree, and what the policies make of tokens that must follow."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from language import Grammar, advance, state_of

from specbranch.constrained import Constrained, has, tokens_of
from specbranch.core.errors import SpecBranchError
from specbranch.core.tree import Choice, Proposals, Tree
from specbranch.policies.costs import ModeCosts
from specbranch.policies.methods import make_policy
from specbranch.policies.policy import State, forced_in

V = 70  # a word and a half


class Script:
    """A matcher by a table of paths: which tokens may follow each; else all. runs: what `forced` says."""

    def __init__(
        self, allowed: dict[tuple[int, ...], set[int]], runs: dict[tuple[int, ...], list[int]] | None = None
    ) -> None:
        self.sets, self.runs = allowed, runs or {}
        self.text: list[int] = []
        self.asked: list[tuple[int, ...]] = []

    def allowed(self, path: Sequence[int]) -> bytes:
        text = (*self.text, *path)
        self.asked.append(text)
        return sum(1 << token for token in self.sets.get(text, range(V))).to_bytes(12, "little")

    def forced(self, path: Sequence[int]) -> list[int]:
        return self.runs.get((*self.text, *path), [])

    def accept(self, tokens: Sequence[int]) -> None:
        self.text += tokens

    @property
    def complete(self) -> bool:
        return False


def constrained(matcher: Script, eos: frozenset[int] = frozenset()) -> Constrained:
    return Constrained(matcher, V, eos)


def tokens_in(mask: bytes) -> set[int]:
    found = tokens_of(mask, 8 * len(mask))
    assert found is not None
    return {*found}


@given(st.sets(st.integers(0, 95)), st.integers(0, 6))
def test_the_tokens_of_a_mask(tokens: set[int], most: int) -> None:
    mask = sum(1 << token for token in tokens).to_bytes(12, "little")
    assert tokens_of(mask, most) == (sorted(tokens) if len(tokens) <= most else None)
    assert [token for token in range(-3, 120) if has(mask, token)] == sorted(tokens)


@given(st.integers(0, 50), st.integers(0, 10**6))
def test_a_tree_s_masks_are_the_grammar_s_and_no_place_is_asked_about_twice(seed: int, walk: int) -> None:
    """Whatever is asked, in any order, while the text goes on; the matcher itself fails for a second question."""
    chance, grammar = Random(walk), Grammar(seed, V, [1])
    asked = Constrained(grammar, V, frozenset())
    text: list[int] = [1]
    for _ in range(8):
        paths: list[list[int]] = [[]]
        for _ in range(12):
            path = [*chance.choice(paths), chance.randrange(V)]
            paths.append(path)
        for path in chance.sample(paths, len(paths)):
            stands = all(token in grammar.after(state_of([*text, *path[:depth]])) for depth, token in enumerate(path))
            after = grammar.after(state_of([*text, *path]))
            if chance.random() < 0.5:
                assert tokens_in(asked.allowed(path)) == ({*after} if stands else {*range(96)})
            elif stands:
                run, state = list[int](), state_of([*text, *path])
                while len(grammar.after(state)) == 1 and len(run) < 200:
                    run += grammar.after(state)
                    state = advance(state, run[-1])
                assert len(run) == 200 or asked.forced(path) == run
        token = chance.choice(sorted(grammar.after(state_of(text))))
        asked.accept([token])
        text.append(token)


def test_what_must_follow_needs_no_mask() -> None:
    script = Script({(): {1}, (1,): {2}, (1, 2): {3}, (1, 2, 3): {4, 5}}, {(): [1, 2, 3]})
    asked = constrained(script)
    assert asked.forced([]) == [1, 2, 3]
    assert script.asked == [(1, 2, 3)]
    assert tokens_in(asked.allowed([1])) == {2}
    assert tokens_in(asked.allowed([])) == {1}
    assert script.asked == [(1, 2, 3)]
    asked.accept([1, 2, 3])
    assert tokens_in(asked.allowed([])) == {4, 5}
    assert script.asked == [(1, 2, 3)]


def test_nothing_follows_the_end() -> None:
    script = Script({(): {7}, (7,): {9}, (7, 9): {9}})
    asked = constrained(script, eos=frozenset([9]))
    assert asked.forced([]) == [7, 9]
    assert tokens_in(asked.allowed([7, 9])) == {*range(96)}
    assert tokens_in(asked.allowed([7, 9, 3, 4])) == {*range(96)}
    assert asked.forced([7, 9]) == []
    asked.accept([7, 9, 50, 51])  # what the round committed behind it counts for nobody
    assert script.text == [7, 9]


def test_a_dead_end_is_an_error_once_the_text_is_there() -> None:
    asked = constrained(Script({(): {1, 2}, (1,): set(), (2,): {3}}))
    assert tokens_in(asked.allowed([1])) == {*range(96)}
    assert asked.forced([1]) == []
    assert asked.few([1]) == []
    asked.accept([1])
    with pytest.raises(SpecBranchError, match="no token may follow the text"):
        asked.allowed([])
    with pytest.raises(SpecBranchError, match="no token may follow the text"):
        asked.accept([5])


def test_a_matcher_s_own_words_for_a_dead_end() -> None:
    script = Script({})

    def allowed(path: Sequence[int]) -> bytes:
        raise SpecBranchError("the grammar is stuck")

    script.allowed = allowed  # type: ignore[method-assign]
    asked = constrained(script)
    with pytest.raises(SpecBranchError, match="the grammar is stuck"):
        asked.allowed([])


def test_a_token_that_is_not_allowed_is_never_accepted() -> None:
    asked = constrained(Script({(): {1, 2}}))
    with pytest.raises(SpecBranchError, match="went on with token 3, which is not allowed"):
        asked.accept([3])


def test_a_mask_of_another_size_is_refused() -> None:
    script = Script({})
    script.allowed = lambda path: bytes(4)  # type: ignore[method-assign]
    with pytest.raises(SpecBranchError, match="a mask has 4 bytes; expected 12"):
        constrained(script).allowed([])


def test_a_handful_is_as_likely_as_it_came_before() -> None:
    again = {tuple([4] * count): {3, 4} for count in range(9)}
    asked = constrained(Script({**again, (4,) * 9: {*range(5)}}))
    assert asked.few([]) == [(3, 0.5), (4, 0.5)]
    asked.accept([4] * 8)
    assert asked.few([]) == [(4, 0.9), (3, 0.1)]
    asked.accept([4])
    assert asked.few([]) == []  # five are too many


def test_retrieved_tokens_that_cannot_stand_have_no_chance() -> None:
    asked = constrained(Script({(): {1, 2}, (1,): {5}, (2,): {6, 7}}))
    tokens, parents = [1, 2, 9, 5, 6, 8, 4], [-1, -1, -1, 0, 1, 1, 5]
    chances = [0.5, 0.3, 0.1, 0.6, 0.7, 0.2, 0.9]
    assert asked.possible([], tokens, parents, chances, 0.0) == [0.5, 0.3, 0.0, 1.0, 0.7, 0.0, 0.0]
    assert asked.possible([], tokens, parents, chances, 0.4) == [0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert asked.possible([2], [6], [-1], [0.25], 0.0) == [0.25]
    assert asked.possible([9], [6], [-1], [0.25], 0.0) == [0.0]


def test_the_draft_and_the_target_may_ask_at_once() -> None:
    """The matcher is asked by one at a time, and about each place once."""
    for seed in range(20):
        asked, errors = Constrained(Grammar(seed, V, [1]), V, frozenset()), list[BaseException]()

        def walk(seed: int, asked: Constrained = asked, errors: list[BaseException] = errors) -> None:
            chance = Random(seed)
            try:
                for _ in range(50):
                    path: list[int] = []
                    for _ in range(4):
                        asked.forced(path[:2])
                        mask = asked.allowed(path)
                        path.append(chance.choice(sorted(tokens_in(mask))) % V)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=walk, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors


# ---- What policies make of tokens that must follow


def state(remaining: int = 40) -> State:
    """Whose draft takes a hundredth of the target's time; rows cost nothing."""
    costs = ModeCosts(size=0.01)
    for rows in (1, 8):
        costs.target.record(rows, 1.0)
        costs.draft.record(rows, 0.01)
    costs.record_round(1.0, 3)
    return State(False, costs, 0.9, remaining)


def forced_tree(count: int) -> Tree:
    tree = Tree(1, 0)
    tree.force(0, list(range(10, 10 + count)))
    return tree


@pytest.mark.parametrize("method", ["speculative", "adaptive", "pearl", "ssd", "specbranch"])
def test_no_limit_counts_tokens_that_must_follow(method: str) -> None:
    """A draft step behind them is worth what it is worth without them."""
    tree = forced_tree(30)
    policy = make_policy(method, {})
    expansion = policy.draft_before(tree, state())
    assert expansion.choices[-1] == Choice(30)
    assert forced_in(tree, tree.best_choices()) == 30
    assert not policy.draft_before(tree, state(remaining=31)).choices  # no deeper token can be committed
    trunk = policy.choose_trunk(tree, state())
    assert [choice.node for choice in trunk.choices] == list(range(31))


def test_a_forced_token_is_as_likely_as_the_one_before() -> None:
    tree = Tree(1, 0)
    tree.note(0, Proposals((5, 6), (0.5, 0.25)))
    node = tree.take(Choice(0, 0))
    last = tree.force(node, [7, 8])
    assert [tree.reach[each] for each in tree.path(last)] == [1.0, 0.5, 0.5, 0.5]
    tree.note(last, Proposals((9,), (0.8,)))
    assert tree.best_choices()[-1] == Choice(last, 0)
    tree.note(node, Proposals((7,), (0.3,)))  # what a draft's calibration makes of what is no choice
    assert tree.reach[last] == 0.5
