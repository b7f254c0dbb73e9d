"""The loop, the tree and every policy over a made-up language: thousands of texts, and bugs that must be found."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
from checked_loop import Case
from checked_mix import Mix, Text
from plain_tree import PlainTree
from planted import Bug, planted

from specbranch import decoding
from specbranch.core.stats import Round, Stats
from specbranch.policies.costs import Costs
from specbranch.policies.methods import METHODS

TEXTS = 100  # of every method in every mode
ONE_AFTER_ANOTHER = 10  # texts that go on with what those before them measured
OVERLAP = (False, True, None)


def decode(method: str, overlap: bool | None, seeds: range) -> Iterator[Stats]:
    costs = Costs()
    for seed in seeds:
        if seed % ONE_AFTER_ANOTHER == 0:
            costs = Costs()
        case = Case.draw(seed, method, overlap)
        try:
            yield case.run(costs)
        except AssertionError as error:
            raise AssertionError(f"{error} (text {seed % ONE_AFTER_ANOTHER} of a pair: {case})") from error


@pytest.mark.parametrize(
    "seeds",
    [
        pytest.param(range(TEXTS), id="hundred"),
        pytest.param(range(TEXTS, 30 * TEXTS), id="thousands", marks=pytest.mark.nightly),
    ],
)
@pytest.mark.parametrize("overlap", OVERLAP)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_says_what_the_target_says(method: str, overlap: bool | None, seeds: range) -> None:
    texts = list(decode(method, overlap, seeds))
    assert len(texts) == len(seeds)
    verified, accepted = sum(stats.verified for stats in texts), sum(stats.accepted for stats in texts)
    if method == "autoregressive":
        assert verified == 0
    else:
        assert 0.1 * verified < accepted < 0.9 * verified
        assert {0.0, 1.0} < {stats.accepted / stats.verified for stats in texts if stats.verified}
        assert sum(stats.hits for stats in texts) > len(texts)


@pytest.mark.parametrize("retrieval", ["beside", "alone", "scripted beside", "scripted alone"])
def test_what_is_retrieved_is_long_and_short_and_right_and_wrong(retrieval: str) -> None:
    """So that all of that is checked; without a draft it is all that is verified."""
    rounds: list[Round] = []
    for seed in range(60):
        for method in ("speculative", "specbranch"):
            case = replace(Case.draw(seed, method, None), retrieval=retrieval, left_after=None, grammar=0)
            stats = case.run(Costs())
            rounds += stats.log
            if "alone" in retrieval:
                assert (stats.draft_forwards, stats.verified) == (0, stats.retrieved)
    found = [round for round in rounds if round.retrieved]
    assert {round.retrieved_accepted == 0 for round in found} == {False, True}
    assert any(0 < round.retrieved_accepted < round.retrieved for round in found)
    assert any(1 < round.retrieved_accepted == round.retrieved for round in found)
    if "scripted" in retrieval:
        assert max(round.retrieved_accepted for round in found) > 12
        assert any(round.retrieved > round.retrieved_accepted > 6 for round in found)


LOOP, DECODING, TREE, MESSAGES, STATS = (
    "specbranch.loop",
    "specbranch.decoding",
    "plain_tree",  # the tree's definition, which decodes in its place: what is compiled has no text to plant in
    "specbranch.core.messages",
    "specbranch.core.stats",
)
POLICY, BRANCHING = "specbranch.policies.policy", "specbranch.policies.branching"
ROUNDS, READ, PLAY, EXPAND = "DecodingLoop.rounds", "DecodingLoop.read", "DecodingLoop.play", "DecodingLoop._expand"
COMMIT, CHOOSE, STATE = "Decoding.commit", "Decoding.choose_trunk", "Decoding.state"
BEGIN, TAKE, GROW, USE = "Decoding.begin", "Decoding.take", "Decoding.grow", "Decoding._use"
FORCE, FEW, END = "Decoding.force", "Decoding._offer_few", "Decoding._certain_end"
CONSTRAINED, CANNOT_STAND = "specbranch.constrained", "cannot stand"
RETRIEVE, READABLE, COUNT = "Decoding.retrieve", "Decoding._readable", "Stats.count"
UNLEARNED = "the retriever: a verdict that it never learned"
FOR_NOTHING = "a candidate is drafted for nothing behind it"
UNCOMMITTABLE = "a retrieved token that cannot be committed"
NOT_TOLD, NOT_BELIEVED = "the retriever was not told of the text", "retrieved, and the draft is not believed"
NO_TOKEN, TWICE = "a token that cannot be committed", "a token twice below one parent"

BUGS = [
    # The text
    Bug(DECODING, COMMIT, "tree.tokens(path[1:])", "tree.tokens(path[1:-1])", "a lesson about other tokens"),
    Bug(DECODING, COMMIT, "in verdict.path)", "in reversed(verdict.path))", "the target's cache is not the text"),
    Bug(DECODING, COMMIT, "child(path[-1]", "child(path[0]", "the root is not the last token"),
    Bug(
        DECODING, COMMIT, "tree.position + len(committed)", "tree.position + len(path) - 1", "the root is not the last"
    ),
    Bug(DECODING, COMMIT, "self.tree, self.forecast =", "_, self.forecast =", "the root is not the last token"),
    Bug(DECODING, COMMIT, "remaining -= len(committed)", "remaining -= 1", NO_TOKEN),
    Bug(DECODING, BEGIN, "len(prompt) - 1)", "len(prompt))", "the draft: another end of the text"),
    # What the models are told
    Bug(
        DECODING,
        COMMIT,
        "self.verifier.commit(verdict.path)",
        "self.verifier.commit(verdict.path[:-1])",
        "another path",
    ),
    Bug(DECODING, COMMIT, "self.verifier.commit(verdict.path)", "pass", "the target: no commit"),
    Bug(LOOP, PLAY, "PendingVerdicts(verify())", "(verify(), PendingVerdicts(verify()))[1]", "twice without a commit"),
    Bug(DECODING, BEGIN, "self.drafter.begin(prompt)", "self.drafter.begin(prompt[:-1])", "the root stands elsewhere"),
    Bug(DECODING, COMMIT, "survivors, committed)", "survivors, committed[:-1])", "the draft was not told of the text"),
    Bug(DECODING, COMMIT, "commit(path, survivors", "commit(path[1:], survivors", "the root is not committed"),
    Bug(DECODING, COMMIT, "commit(path, survivors", "commit(path, {}", "proposals without a row"),
    Bug(
        DECODING,
        COMMIT,
        "commit(path, survivors",
        "commit(path, {k: v + 1 for k, v in survivors.items()}",
        "another node's",
    ),
    Bug(DECODING, COMMIT, "append((tree, path", "append((rerooted, path", "a lesson about another tree"),
    Bug(DECODING, COMMIT, "self.tree, self.forecast =", "self.tree, _ =", "another forecast"),
    Bug(DECODING, "Decoding.learn", "self._lessons.clear()", "pass", "a lesson twice"),
    Bug(LOOP, EXPAND, "turn.text.learn()", "pass", "goes on before it has learned"),
    Bug(LOOP, ROUNDS, "text.learn()", "pass", "a verdict that it never learned"),
    # The trunk
    Bug(DECODING, CHOOSE, "[: self.verifier.most_rows]", "", "too many rows"),
    Bug(DECODING, STATE, "self.verifier.most_tokens(self.tree.position)", "10**6", "a trunk beyond its turn"),
    Bug(DECODING, CHOOSE, "choice.choices[:", "choice.choices[:1] + choice.choices[2 :", "a parent is missing"),
    Bug(MESSAGES, "Trunk.of", "place.get(tree.parent[node], -1)", "tree.parent[node]", "a parent is missing"),
    Bug(MESSAGES, "Trunk.of", "tree.position)", "tree.position + 1)", "the target: the root stands elsewhere"),
    Bug(POLICY, "whole_path", "[: state.remaining]", "", NO_TOKEN),
    Bug(BRANCHING, "Hedging._siblings", " and choice not in chosen", "", TWICE),
    Bug(BRANCHING, "Hedging._siblings", "or depth_of[node] + 1 >= state.remaining", "", NO_TOKEN),
    # The tree
    Bug(
        TREE, "PlainTree.reroot", "self.position + self.depth[node]", "self.position", "the root is not the last token"
    ),
    Bug(TREE, "PlainTree.reroot", "kept[self.parent[old]]", "new - 1", "a row in the draft's cache is another node's"),
    Bug(TREE, "PlainTree.reroot", "tree._keep(new,", "tree._keep(max(0, new - 1),", "proposals of another node"),
    Bug(
        TREE, "PlainTree.descend", "Choice(node, 0)", "Choice(node, 1)", "a row in the draft's cache is another node's"
    ),
    Bug(TREE, "PlainTree.branch", "if not self._is_child(node, rank)", "if True", TWICE),
    Bug(TREE, "PlainTree.untried", "if token not in known", "if True", TWICE),
    Bug(TREE, "PlainTree.undrafted", "proposals is None and", "", "runs twice over a node"),
    Bug(
        TREE,
        "PlainTree.likeliest",
        "stale = self.proposals[node] is not None",
        "stale = False",
        "runs twice over a node",
    ),
    Bug(TREE, "PlainTree.likeliest", "stale = self._is_child(node, rank)", "stale = False", TWICE),
    Bug(TREE, "PlainTree.likeliest", "self.depth[node] < depth", "self.depth[node] <= depth", NO_TOKEN),
    # Drafting
    Bug(DECODING, GROW, "drafted.proposals)", "drafted.proposals[:1])", "runs twice over a node"),
    Bug(DECODING, "Decoding.steps", "// len(expansion.choices)", "", "the draft: no room"),
    Bug(POLICY, "extend", "[path[-1]]", "[Choice(path[-1].node)]", "runs twice over a node"),
    Bug(BRANCHING, "Hedging.draft_during", ", state.remaining - 1)", ", state.remaining + 9)", NO_TOKEN),
    Bug(BRANCHING, "Hedging.draft_during", "max(1, depth - tree.deepest(choices))", "state.burst", NO_TOKEN),
    # Counts, and what was asked for
    Bug(DECODING, USE, "self.stats.drafted += len(self.tree) - size", "_ = 0", "drafted tokens are miscounted"),
    Bug(DECODING, CHOOSE, "self._use(", "self.tree.take_all(", "drafted tokens are miscounted"),
    Bug(DECODING, TAKE, "self._use(", "self.tree.take_all(", "drafted tokens are miscounted"),
    Bug(DECODING, GROW, "self.stats.drafted += len(tree) - size", "pass", "drafted tokens are miscounted"),
    Bug(DECODING, GROW, "in drafted.steps:", "in drafted.steps[:1]:", "draft steps are miscounted"),
    Bug(STATS, COUNT, "len(trunk) - 1", "len(trunk)", "verified tokens are miscounted"),
    Bug(STATS, "Stats.count", "tree.below(next_node)", "(next_node,)", "wasted tokens are miscounted"),
    Bug(STATS, "Stats.count", "next_node is not None", "len(path) > 1", "a hit is not counted"),
    # What is retrieved
    Bug(
        DECODING, READABLE, "self.tree.with_unread(wanted.choices)", "wanted.choices", "a node without its parent's row"
    ),
    Bug(DECODING, READABLE, "if alone else 1", "", TWICE),
    Bug(DECODING, RETRIEVE, "min(self.remaining - 1, trunk + longest)", "trunk + longest", UNCOMMITTABLE),
    Bug(DECODING, RETRIEVE, "deepest - len(path) + 1", "deepest", UNCOMMITTABLE),
    Bug(DECODING, RETRIEVE, "self.learn()", "pass", "the retriever: looks up before it has learned"),
    Bug(DECODING, RETRIEVE, "in path[1:] if", "in path[2:] if", "the best path is not what goes on"),
    Bug(DECODING, RETRIEVE, "[i] for i in first", "[i] for i in range(len(found))", FOR_NOTHING),
    Bug(DECODING, RETRIEVE, "drafted.append(", "bool(", "the best path is not what goes on"),
    Bug(DECODING, RETRIEVE, "tree.graft(node,", "tree.graft(0,", "retrieved behind another text"),
    Bug(DECODING, RETRIEVE, "chances, LEAST_REACH)", "chances, 0.0)", "retrieved, and hardly likely"),
    Bug(DECODING, RETRIEVE, "self.stats.drafted += len(tree) - size", "pass", "drafted tokens are miscounted"),
    Bug(DECODING, BEGIN, "self.retriever.begin(prompt)", "self.retriever.begin(prompt[:-1])", NOT_TOLD),
    Bug(DECODING, COMMIT, "self.retriever.commit(committed)", "pass", NOT_TOLD),
    Bug(DECODING, COMMIT, "or self.retriever is not None", "", UNLEARNED),
    Bug(
        DECODING, COMMIT, "self.stats.drafted += tree.use([node])", "tree.use([node])", "drafted tokens are miscounted"
    ),
    Bug(DECODING, USE, " + self.tree.use(nodes)", "", "drafted tokens are miscounted"),
    Bug(
        DECODING,
        "Decoding.learn",
        "self.retriever is not None",
        "False",
        UNLEARNED,
    ),
    Bug(STATS, COUNT, "{*tree.free_nodes()}", "set()", "wasted tokens are miscounted"),
    Bug(STATS, COUNT, " and node not in free", "", "rollback is miscounted"),
    Bug(STATS, COUNT, "for node in trunk[1:]]", "for node in path[1:]]", "retrieved tokens are miscounted"),
    Bug(STATS, COUNT, "for node in path[1:]]", "for node in trunk[1:]]", "retrieved tokens are miscounted"),
    Bug(TREE, "PlainTree.note", "chance / self.reach[child]", "self.reach[child]", NOT_BELIEVED),
    Bug(TREE, "PlainTree.note", "self.reach[child] > 0", "False", NOT_BELIEVED),
    Bug(TREE, "PlainTree._chance_after", "token in proposals.tokens", "False", NOT_BELIEVED),
    Bug(TREE, "PlainTree.graft", "free=True", "free=False", "wasted tokens are miscounted"),
    Bug(TREE, "PlainTree.best_choices", "> max(children)", "> 2", "the best path is not"),
    Bug(TREE, "PlainTree.with_unread", "if Choice(node) not in every", "", "a node twice in a step"),
    Bug(TREE, "PlainTree.with_unread", "[::-1]\n", "\n", "a node without its parent's row"),
    Bug(TREE, "PlainTree.reroot", "tree.found[new] = self.found[old]", "pass", "retrieved tokens are miscounted"),
    Bug(TREE, "PlainTree.reroot", "tree.free.add(new)", "pass", "wasted tokens are miscounted"),
    Bug(TREE, "PlainTree.likeliest", "cost != self._cost_of(node, rank) or", "False or", "a place is wanted twice"),
    Bug(
        DECODING, "Decoding.choose_overlap", "if self.overlap is None else self.overlap", "", "overlapped, and was told"
    ),
    # What a grammar says
    Bug(DECODING, COMMIT, "self.constraint.accept(committed)", "pass", "another mask than the grammar's"),
    Bug(DECODING, RETRIEVE, "self.constraint is not None", "False", CANNOT_STAND),
    Bug(DECODING, FORCE, "run[:room]", "run", "a forced token that cannot be committed"),
    Bug(DECODING, FORCE, "self._behind(node)", "self._behind(max(0, node - 1))", "forced, and free"),
    Bug(DECODING, GROW, "self.force([node, *tree.children[node]])", "pass", "forced tokens are miscounted"),
    Bug(DECODING, "Decoding._force_candidate", "self.stats.drafted += 1", "pass", "drafted tokens are miscounted"),
    Bug(DECODING, FEW, "LEAST_REACH and tree", "0.0 and tree", "offered, and hardly likely"),
    Bug(DECODING, FEW, " and tree.child(node, token) is None", "", TWICE),
    Bug(DECODING, FEW, "self.remaining - 1:", "self.remaining:", "an offered token that cannot be committed"),
    Bug(DECODING, END, "if over else []", "", "committed without a forward, and the text is not over"),
    Bug(CONSTRAINED, "Constrained._mask", "few[0]", "few[-1] ^ 1", "another mask than the grammar's"),
    Bug(CONSTRAINED, "Constrained._few", "if not place.asked:", "if True:", "asked twice about one place"),
    Bug(CONSTRAINED, "Constrained.possible", "places[parent]", "top", CANNOT_STAND),
    Bug(STATS, "_origin", '"forced" if tree.forced(node) else ', "", "forced tokens are miscounted"),
    Bug(TREE, "PlainTree.force", "self.forced_nodes.add(node)", "pass", "forced tokens are miscounted"),
    Bug(TREE, "PlainTree.force", "free=True", "free=False", "wasted tokens are miscounted"),
    Bug(TREE, "PlainTree.reroot", "tree.forced_nodes.add(new)", "pass", "forced tokens are miscounted"),
]


BEFORE, DURING, MEASURE = "DecodingLoop._draft_before", "DecodingLoop._draft_during", "DecodingLoop._measure"
BY_COSTS = "{id(turn.text.costs): turn.text.costs for turn in turns}.values()"
BY_TEXT = "[turn.text.costs for turn in turns]"
EXTEND = "if True:\n            turn.text.extend()"
SPITE, ON = "commits in spite of its error", "goes on after an error"
MORE = "more of prompts is read than is allowed"

SHARED_BUGS = [
    # Whose is what
    Bug(LOOP, PLAY, "zip(asked, results", "zip(asked[::-1], results", "another path than the verdict's"),
    Bug(LOOP, EXPAND, "asked, drafted, strict", "asked, drafted[::-1], strict", "proposals of another node"),
    Bug(LOOP, EXPAND, "min(turn.steps", "max(turn.steps", "the draft: no room"),
    Bug(DECODING, STATE, "overlapped and self.may_overlap", "overlapped", "a draft that has not read"),
    # A text that is over
    Bug(LOOP, "Turn.own_errors", "self.error = error", "raise", "one text's error ends the round of all"),
    Bug(LOOP, PLAY, "asked = _going(ready)", "asked = [each for each in turns if hasattr(each, 'state')]", "a trunk"),
    Bug(LOOP, BEFORE, "_going(wanting)", "wanting", ON),
    Bug(LOOP, DURING, "in _going(drafting)", "in turns", ON),
    Bug(LOOP, PLAY, "with turn.own_errors():\n            turn.text.extend()", EXTEND, "ends the round of all"),
    Bug(LOOP, EXPAND, "with turn.own_errors():", "if True:", "one text's error ends the round of all"),
    Bug(LOOP, "DecodingLoop._commit", "with turn.own_errors():", "if True:", "one text's error ends the round of all"),
    Bug(LOOP, PLAY, "_going(ready) if", "ready if", ON),
    Bug(LOOP, EXPAND, "turn.error = found", "raise found", "one text's error ends the round of all"),
    Bug(LOOP, "DecodingLoop._commit", "turn.error is None and", "", SPITE),
    Bug(LOOP, "DecodingLoop._commit", "turn.error = turn.error or verdict", "raise verdict", "ends the round of all"),
    # What a step costs
    Bug(LOOP, EXPAND, BY_COSTS, BY_TEXT, "the draft's steps are not recorded once"),
    Bug(LOOP, MEASURE, "id(turn.text.costs), []", "id(turn), []", "the target's step is not recorded once"),
    Bug(
        LOOP,
        MEASURE,
        "costs.mode(overlapped).target.record(step.rows, step.seconds)",
        "[costs.mode(overlapped).target.record(step.rows, step.seconds) for _ in mine]",
        "the target's step is not recorded once",
    ),
    Bug(LOOP, EXPAND, "/ len(taken)", "/ len(turns)", "other seconds than the draft's"),
    Bug(LOOP, EXPAND, "record(step.rows", "record(step.rows // len(turns)", "the draft's steps are not recorded once"),
    Bug(LOOP, MEASURE, "sum(len(turn.committed) for turn in turns)", "len(turns[0].committed)", "the round is not"),
    Bug(LOOP, MEASURE, "_shares(turns", "_shares(turns[:1] * len(turns)", "a text's share of the round"),
    Bug(LOOP, MEASURE, "and not _copied(turns)", "", "the round is not recorded once"),
    Bug(LOOP, MEASURE, "bool(drafting) and", "", "the round is not recorded once"),
    Bug(LOOP, "_copied", "2 * free", "free", "the round is not recorded once"),
    Bug(LOOP, MEASURE, "if drafting:", "if True:", "a text's share of the round"),
    Bug(LOOP, "_shares", "if has else 0.0", "", "a text's share of the round"),
    Bug(LOOP, "_shares", "more / sum(drafted)", "more / len(drafted)", "a text's share of the round"),
    Bug(DECODING, "Decoding.has_drafted", "or len(trunk) > 1", "", "a text's share of the round"),
    Bug(LOOP, BEFORE, "sharing=len(turns)", "sharing=1", "a step that others share than was said"),
    Bug(LOOP, PLAY, "for turn in ready if turn.text.may_overlap", "for turn in ready", "recorded of the other mode"),
    # Prompts that are read in chunks
    Bug(LOOP, PLAY, "if turn.ready]", "if turn.error is None]", "decodes before it has read the prompt"),
    Bug(LOOP, READ, "read_prompt(left) if left > 0 else 0", "read_prompt(left)", "the target: reads nothing"),
    Bug(
        LOOP, READ, "left -= turn.text.read_prompt", "turn.text.read_prompt", "more of prompts is read than is allowed"
    ),
    Bug(LOOP, READ, "left -= turn.text.read_draft", "turn.text.read_draft", "more of prompts is read than is allowed"),
    Bug(LOOP, READ, "sorted(turns, key=lambda turn: turn.text.read_at)", "turns", "is not read for too long"),
    Bug(DECODING, "Decoding.read_prompt", "self._unread -= count", "self._unread = 0", "decodes before it has read"),
    Bug(
        DECODING,
        "Decoding.read_draft",
        "unread(self.excerpt, end) == 0",
        "unread(self.excerpt, end) >= 0",
        "has not",
    ),
]


def mixes(seeds: range, overlap: bool | None, shared: bool = True) -> Iterator[Text]:
    for seed in seeds:
        mix = Mix.draw(seed, METHODS, overlap, shared)
        try:
            yield from mix.run()
        except AssertionError as error:
            raise AssertionError(f"{error} ({mix})") from error


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "one by one"])
@pytest.mark.parametrize(
    "seeds",
    [
        pytest.param(range(TEXTS // 2), id="fifty"),
        pytest.param(range(TEXTS // 2, 20 * TEXTS), id="thousands", marks=pytest.mark.nightly),
    ],
)
@pytest.mark.parametrize("overlap", OVERLAP)
def test_texts_that_go_together_say_what_each_says_alone(overlap: bool | None, seeds: range, shared: bool) -> None:
    """Of any methods and lengths; they come, rest and go between rounds, and some of them fail."""
    texts = list(mixes(seeds, overlap, shared))
    assert len(texts) > 3 * len(seeds)
    whole = [text for text in texts if len(text.tokens) == text.case.new_tokens]
    failed = [text for text in texts if text.fails and text not in whole]
    assert len(whole) > 0.6 * len(texts)
    assert len(failed) > 0.1 * len(texts)
    assert sum(bool(text.tokens) for text in failed) > 0.3 * len(failed)
    assert sum(text.decoding.stats.hits for text in texts) > len(texts)


def test_texts_that_go_together_share_the_time_of_their_steps() -> None:
    """Steps whose rows cost nothing: two texts take what the longer one takes alone."""
    case = Case(1, "specbranch", False, prompt=(1, 2), new_tokens=30, draft_cost=(0.1, 0.0))
    both = Mix(1, (case, case), (0, 0), (("", 0), ("", 0)), 0.0, True, math.inf).run()
    (alone,) = Mix(1, (case,), (0,), (("", 0),), 0.0, True, math.inf).run()
    for text in both:
        assert text.decoding.stats.log[-1].end == alone.decoding.stats.log[-1].end
        assert text.decoding.stats.target_forwards == alone.decoding.stats.target_forwards
        assert [step.rows for step in text.decoding.stats.log[0].draft] == [
            2 * step.rows for step in alone.decoding.stats.log[0].draft
        ]


def test_the_only_text_that_overlaps_may_fail_before_there_is_a_trunk() -> None:
    """Then nobody drafts beside the target of the others."""
    drafting = Case(1, "specbranch", True, prompt=(1, 2), new_tokens=30, draft_cost=(0.1, 0.0))
    plain = Case(1, "autoregressive", None, prompt=(1, 2), new_tokens=30, draft_cost=(0.1, 0.0))
    failed, whole = Mix(1, (drafting, plain), (0, 0), (("draft", 1), ("", 0)), 0.0, True, math.inf).run()
    assert not failed.tokens
    assert len(whole.tokens) == 30


@pytest.mark.parametrize("bug", SHARED_BUGS, ids=[f"{bug.function}-{bug.right}" for bug in SHARED_BUGS])
def test_a_planted_bug_of_rounds_together_is_found(bug: Bug) -> None:
    said = set()
    with planted(bug):
        for seed in range(2 * TEXTS):
            for overlap in OVERLAP:
                try:
                    Mix.draw(seed, METHODS[1:] if seed % 2 else METHODS, overlap).run()
                except Exception as error:
                    now = {str(error), str(error.__context__)}
                    if any(bug.symptom in each for each in now):
                        return
                    said |= now
    pytest.fail(f"not found: {bug}; found: {said}")


@pytest.mark.parametrize("bug", BUGS, ids=[f"{bug.function}-{bug.right}" for bug in BUGS])
def test_a_planted_bug_is_found(bug: Bug) -> None:
    """One of the first texts says what is wrong, and not only that something is."""
    said = set()
    with pytest.MonkeyPatch.context() as patch, planted(bug):
        if bug.module == TREE:
            patch.setattr(decoding, "Tree", PlainTree)
        for seed in range(0, 10 * TEXTS, ONE_AFTER_ANOTHER):
            for method in reversed(METHODS[1:]):
                for overlap in OVERLAP:
                    try:
                        Case.draw(seed, method, overlap).run(Costs())
                    except AssertionError as error:
                        now = {str(error), str(error.__context__)}  # what the end of the loop says hides the first
                        if any(bug.symptom in each for each in now):
                            return
                        said |= now
    pytest.fail(f"not found: {bug}; found: {said}")


def test_a_bug_that_cannot_be_planted_is_an_error() -> None:
    with (
        pytest.raises(AssertionError, match="no longer has one 'magic'"),
        planted(Bug(DECODING, COMMIT, "magic", "", "")),
    ):
        pass
