"""Records and replays: what is kept, what is refused, and that a replay decides as the real run did."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from specbranch import METHODS, SpecBranch, SpecBranchError, bundled
from specbranch.cli import main as cli
from specbranch.core.excerpt import ALL
from specbranch.core.identity import ModelIdentity
from specbranch.core.sampling import Sampling
from specbranch.core.stats import Stats
from specbranch.core.tree import Tree
from specbranch.decoding import COPIED, LONGEST_RUN
from specbranch.drafters.retrieval import RetrievalDrafter
from specbranch.loop import DecodingLoop
from specbranch.policies.calibration import Calibrator
from specbranch.policies.methods import make_policy
from specbranch.replay.costs import Line, ReplayCosts
from specbranch.replay.planner import plan
from specbranch.replay.record import TAIL, Record, RecordedProposals, RecordedText
from specbranch.replay.recorder import collect
from specbranch.replay.replayer import ReplayDrafter, replay
from specbranch.replay.virtual_time import VirtualTime
from specbranch.text.encoding import encode
from specbranch.text.prompts import Prompt

NEW_TOKENS = 48
PROMPTS = [Prompt(str(entry["id"]), entry["prompt"], False, "bundled") for entry in bundled.prompts()[:4]]
PAIR = ["--target", "bundled", "--draft", "bundled", "--threads", "1"]


def nothing(id: str) -> None:
    pass


@pytest.fixture(scope="module")
def recorded(bundled_pair: SpecBranch, tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, Path]:
    path = tmp_path_factory.mktemp("records") / "bundled.safetensors"
    return collect(bundled_pair, PROMPTS, Sampling(), NEW_TOKENS, path, False, nothing), path


def perfect(tokens: int, agreement: float = 0.99) -> Record:
    """One text on which the draft is always right."""
    said = RecordedProposals(
        torch.stack([torch.arange(tokens), torch.arange(tokens) + 5000], 1),
        torch.tensor([[agreement, 1 - agreement]] * tokens),
        torch.full((tokens,), 0.1),
        torch.full((tokens,), 4.0),
    )
    none = torch.full((tokens * TAIL,), torch.nan)
    tails = RecordedProposals(torch.full((tokens * TAIL, 2), -1), none[:, None].expand(-1, 2), none, none)
    identity = ModelIdentity("a", "b")
    return Record(identity, identity, {}, [RecordedText("x", "t", 3, torch.arange(tokens), said, tails)])


def copied(tokens: int = 90, prompt: int = 120, piece: int = 12, prompt_ids: bool = True) -> Record:
    """Three texts that copy pieces of their prompts, of so many tokens, on which the draft is wrong now and then. No id
    occurs twice in a prompt, nor in a text."""
    generator, k, texts = torch.Generator().manual_seed(7), 4, []

    def rows(first: torch.Tensor) -> RecordedProposals:
        others = torch.randint(3000, 4000, (len(first), k - 1), generator=generator)
        agreement = torch.rand(len(first), k, generator=generator).softmax(1).sort(1, descending=True).values
        return RecordedProposals(torch.cat([first[:, None], others], 1), agreement, agreement[:, 0], agreement[:, 1])

    for number in range(3):
        ids = torch.randperm(1000, generator=generator)[:prompt]
        pieces = [ids[start : start + piece] for start in torch.randperm(prompt // piece, generator=generator) * piece]
        text = torch.cat([torch.cat([each, torch.tensor([1000 + i])]) for i, each in enumerate(pieces)])[:tokens]
        right = torch.rand(tokens, generator=generator) < 0.7
        said = rows(torch.where(right, text, 2000 + text))
        tails = rows(torch.randint(3000, 4000, (tokens * TAIL,), generator=generator))
        tails.tokens[right.repeat_interleave(TAIL)] = -1
        for values in (tails.agreement, tails.entropy, tails.margin):
            values[right.repeat_interleave(TAIL)] = torch.nan
        kept = ids if prompt_ids else None
        texts.append(RecordedText(str(number), "copies", prompt, text, said, tails, prompt_ids=kept))
    identity = ModelIdentity("a", "b")
    return Record(identity, identity, {}, texts)


def test_lines_are_interpolated_and_go_on() -> None:
    line = Line(((1, 10.0), (2, 12.0), (4, 20.0)))
    assert [line(rows) for rows in (1, 1.5, 2, 3, 4, 6)] == [10, 11, 12, 16, 20, 28]
    assert Line(((1, 3.0),))(7) == 3.0


def test_a_record_is_read_as_it_was_written(recorded: tuple[Record, Path]) -> None:
    made, path = recorded
    read = Record.load(path)
    assert (read.target, read.draft, read.sampling) == (made.target, made.draft, made.sampling)
    for a, b in zip(made.texts, read.texts, strict=True):
        assert (a.id, a.task, a.prompt_tokens) == (b.id, b.task, b.prompt_tokens)
        assert torch.equal(a.tokens, b.tokens)
        for x, y in ((a.proposals, b.proposals), (a.tails, b.tails)):
            assert torch.equal(x.tokens, y.tokens)
            torch.testing.assert_close(x.agreement, y.agreement, rtol=2e-3, atol=1e-4, equal_nan=True)
    assert not list(path.parent.glob("*.part"))


def test_what_is_recorded_is_what_the_draft_says(bundled_pair: SpecBranch, recorded: tuple[Record, Path]) -> None:
    """Where the draft is right, a run accepts; its tail behind a wrong token is its own greedy continuation."""
    text = recorded[0].texts[0]
    assert bundled_pair.draft is not None
    alone = SpecBranch(bundled_pair.draft, tokenizer=bundled_pair.tokenizer, method="autoregressive")
    prompt = encode(bundled_pair.tokenizer, PROMPTS[0].text)
    wrong = [i for i in range(len(text) - TAIL) if text.proposals.tokens[i, 0] != text.tokens[i]]
    assert wrong
    for i in (0, 1, 5, wrong[0], wrong[-1]):
        ids: list[int] = prompt + text.tokens[:i].tolist()
        continuation = alone.generate(ids, max_new_tokens=1 + TAIL).tokens
        assert continuation[0] == text.proposals.tokens[i, 0]
        if i in wrong:
            assert continuation[1:] == text.tails.tokens[i * TAIL : (i + 1) * TAIL, 0].tolist()


def test_an_interrupted_record_goes_on(
    bundled_pair: SpecBranch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.safetensors"

    def interrupt_at(number: int) -> Callable[[str], None]:
        def before(id: str) -> None:
            if id == PROMPTS[number].id:
                raise KeyboardInterrupt

        return before

    with pytest.raises(KeyboardInterrupt):
        collect(bundled_pair, PROMPTS, Sampling(), 8, path, False, interrupt_at(2))
    assert [text.id for text in Record.load(path).texts] == [prompt.id for prompt in PROMPTS[:2]]
    generated = []
    generate = bundled_pair.generate
    monkeypatch.setattr(bundled_pair, "generate", lambda *a, **k: (generated.append(1), generate(*a, **k))[1])
    whole = collect(bundled_pair, PROMPTS, Sampling(), 8, path, False, nothing)
    assert [text.id for text in whole.texts] == [prompt.id for prompt in PROMPTS]
    assert len(generated) == 2
    with pytest.raises(SpecBranchError, match=r"another temperature \(0.0, here 1.0\)"):
        collect(bundled_pair, PROMPTS, Sampling(temperature=1.0), 8, path, False, nothing)
    with pytest.raises(SpecBranchError, match="another max_new_tokens"):
        collect(bundled_pair, PROMPTS, Sampling(), 9, path, False, nothing)
    with pytest.raises(SpecBranchError, match="another choice of features"):
        collect(bundled_pair, PROMPTS, Sampling(), 8, path, True, nothing)
    with pytest.raises(SpecBranchError, match=r"another choice of prompt ids \(False, here True\)"):
        collect(bundled_pair, PROMPTS, Sampling(), 8, path, False, nothing, prompt_ids=True)
    with pytest.raises(SpecBranchError, match=f"holds {PROMPTS[3].id} of bundled, which is not among these prompts"):
        collect(bundled_pair, PROMPTS[:3], Sampling(), 8, path, False, nothing)
    changed = [replace(PROMPTS[1], text="def other("), PROMPTS[0], *PROMPTS[2:]]
    with pytest.raises(SpecBranchError, match=f"{PROMPTS[1].id} of bundled was another prompt"):
        collect(bundled_pair, changed, Sampling(), 8, path, False, nothing)
    with pytest.raises(ValueError, match="two prompts have the id"):
        collect(bundled_pair, [*PROMPTS, PROMPTS[0]], Sampling(), 8, path, False, nothing)
    replace(whole, machine={"dtype": "bfloat16", "torch": "1.0", "cores": 1000}).save(path)
    for machine, expected in (
        ({"dtype": "float32", "torch": "1.0"}, "dtype"),
        ({"dtype": "bfloat16", "torch": "2.0"}, "torch"),
    ):
        with pytest.raises(SpecBranchError, match=f"a record with another {expected}"):
            collect(bundled_pair, PROMPTS, Sampling(), 8, path, False, nothing, machine=machine)


def test_a_record_holds_the_prompts_only_where_that_was_asked_for(
    bundled_pair: SpecBranch, recorded: tuple[Record, Path], tmp_path: Path
) -> None:
    assert all(text.prompt_ids is None for text in recorded[0].texts)
    with safe_open(recorded[1], "pt") as file:
        assert not [name for name in file.keys() if "prompt" in name]  # noqa: SIM118
    path = tmp_path / "r.safetensors"
    for prompts in (PROMPTS[:1], PROMPTS[:2]):  # the second run goes on with the first one's file
        made = collect(bundled_pair, prompts, Sampling(), 8, path, False, nothing, prompt_ids=True)
    for prompt, text, read in zip(PROMPTS[:2], made.texts, Record.load(path).texts, strict=True):
        assert text.prompt_ids is not None
        assert read.prompt_ids is not None
        assert text.prompt_ids.tolist() == read.prompt_ids.tolist() == encode(bundled_pair.tokenizer, prompt.text)
        assert (len(text.prompt_ids), read.prompt_ids.dtype) == (text.prompt_tokens, torch.int64)
    with pytest.raises(SpecBranchError, match=r"another choice of prompt ids \(True, here False\)"):
        collect(bundled_pair, PROMPTS, Sampling(), 8, path, False, nothing)


def test_no_record_of_the_repository_holds_a_prompt() -> None:
    for path in RECORD.parent.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert not [name for name in file.keys() if "prompt" in name]  # noqa: SIM118


def test_a_record_is_of_what_the_draft_reads(tmp_path: Path) -> None:
    """The text is the same; what the draft says is not, and so one file holds texts of one context."""
    made = {}
    for context in ("auto", "all", "4+2"):
        pair = SpecBranch.from_pretrained("bundled", draft="bundled", dtype="float32", draft_context=context)
        path = tmp_path / f"{context}.safetensors"
        machine = {"draft_context": str(pair.draft_excerpt)}
        made[context] = collect(pair, PROMPTS[:1], Sampling(), 16, path, False, nothing, machine=machine).texts[0]
        if context != "all":
            continue
        with pytest.raises(SpecBranchError, match=r"another draft_context \(all, here 4\+2\)"):
            collect(pair, PROMPTS[:2], Sampling(), 16, path, False, nothing, machine={"draft_context": "4+2"})
    assert torch.equal(made["all"].tokens, made["4+2"].tokens)
    assert torch.equal(made["all"].proposals.agreement, made["auto"].proposals.agreement)
    assert not torch.equal(made["all"].proposals.agreement, made["4+2"].proposals.agreement)


def test_what_is_recorded_does_not_depend_on_being_read_back(bundled_pair: SpecBranch, tmp_path: Path) -> None:
    """A resumed run holds what its file gave it, an uninterrupted one what it computed: the same bits."""
    path = tmp_path / "r.safetensors"
    made = collect(bundled_pair, PROMPTS[:2], Sampling(temperature=1.0), 12, path, True, nothing)
    read = Record.load(path)
    content = path.read_bytes()
    read.save(path)
    assert path.read_bytes() == content
    assert replace(made, texts=[]) == replace(read, texts=[])
    for a, b in zip(made.texts, read.texts, strict=True):
        assert (a.prompt, a.round_seconds) == (b.prompt, b.round_seconds) != ("", 0.0)
        assert a.features is not None
        assert b.features is not None
        assert torch.equal(a.features, b.features)
        for x, y in ((a.proposals, b.proposals), (a.tails, b.tails)):
            for name, values in vars(x).items():
                assert torch.equal(values.nan_to_num(-7), vars(y)[name].nan_to_num(-7))
    (tmp_path / "model.safetensors").write_bytes((bundled.path("draft") / "model.safetensors").read_bytes())
    with pytest.raises(SpecBranchError, match=r"model\.safetensors is not a record"):
        read.save(tmp_path / "model.safetensors")
    longer = collect(bundled_pair, [PROMPTS[2], *PROMPTS[:2]], Sampling(temperature=1.0), 12, path, True, nothing)
    assert [text.id for text in longer.texts] == [PROMPTS[2].id, PROMPTS[0].id, PROMPTS[1].id]  # as uninterrupted


@pytest.mark.parametrize("command", ["record", "bench"])
def test_a_prompt_that_cannot_be_used_does_not_end_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out"
    chat = {"id": "bad", "prompt": "x", "chat": True}  # the bundled tokenizer has no template
    prompts.write_text("".join(json.dumps(line) + "\n" for line in (chat, {"id": "good", "prompt": "def f("})))
    options = ["--prompts", str(prompts), "--max-new-tokens", "6"]
    writing = ["--out", str(out)] if command == "record" else ["--json", str(out), "--peers", "none"]
    assert cli.main([command, *PAIR, *options, *writing]) == 1
    assert "bad: " in capsys.readouterr().err
    if command == "record":
        assert [text.id for text in Record.load(out).texts] == ["good"]
    else:
        records = json.loads(out.read_text())["records"]
        assert [(r["id"], r["error"] is None) for r in records] == [("bad", False)] * 2 + [("good", True)] * 2


@pytest.mark.parametrize("damage", ["truncated", "text", "weights", "missing"])
def test_files_that_are_no_records_are_refused_by_name(
    recorded: tuple[Record, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    path = tmp_path / "bad.safetensors"
    if damage == "truncated":
        path.write_bytes(recorded[1].read_bytes()[:500])
    elif damage == "text":
        path.write_text("tokens\n")
    elif damage == "weights":
        path.write_bytes((bundled.path("draft") / "model.safetensors").read_bytes())
    with pytest.raises(SpecBranchError, match=r"bad\.safetensors"):
        Record.load(path)
    assert cli.main(["plan", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("specbranch: error: ")
    assert error.count("\n") == 1


def same_rounds(replayed: Stats, real: Stats) -> None:
    """Forward by forward."""
    assert [len(round.draft) for round in replayed.log] == [len(round.draft) for round in real.log]
    replayed_rounds, real_rounds = (
        [(r.verified, r.accepted, r.retrieved, r.retrieved_accepted, r.tokens) for r in stats.log]
        for stats in (replayed, real)
    )
    assert replayed_rounds == real_rounds
    assert (replayed.rolled_back, replayed.wasted) == (real.rolled_back, real.wasted)


@pytest.mark.parametrize("method", ["speculative", "pearl", "ssd", "specbranch-paper"])
def test_a_serial_replay_decides_as_the_real_run(
    bundled_pair: SpecBranch, recorded: tuple[Record, Path], method: str
) -> None:
    """Policies that do not steer by measured times make the same rounds, forward by forward."""
    costs = ReplayCosts.ratio(5)
    replayed = replay(Record.load(recorded[1]), make_policy(method, {}), costs, overlap=False)
    for prompt, stats in zip(PROMPTS, replayed, strict=True):
        same_rounds(
            stats, bundled_pair.generate(prompt.text, max_new_tokens=NEW_TOKENS, method=method, overlap=False).stats
        )


@pytest.mark.parametrize("draft", [True, False])
@pytest.mark.parametrize("method", ["speculative", "pearl"])
def test_a_serial_replay_retrieves_as_the_real_run(
    bundled_pair: SpecBranch, recorded: tuple[Record, Path], method: str, draft: bool
) -> None:
    record = recorded[0]
    ids = [encode(bundled_pair.tokenizer, prompt.text) for prompt in PROMPTS]
    texts = [replace(text, prompt_ids=torch.tensor(i)) for text, i in zip(record.texts, ids, strict=True)]
    replayed = replay(record, make_policy(method, {}), ReplayCosts.ratio(5), False, texts, retrieval=True, draft=draft)
    assert sum(stats.retrieved_accepted for stats in replayed) > 0
    model = bundled_pair.draft if draft else None
    engine = SpecBranch(
        bundled_pair.target, model, tokenizer=bundled_pair.tokenizer, method=method, overlap=False, retrieval=True
    )
    for prompt, stats in zip(PROMPTS, replayed, strict=True):
        same_rounds(stats, engine.generate(prompt.text, max_new_tokens=NEW_TOKENS).stats)


@pytest.mark.parametrize("draft", [True, False])
@pytest.mark.parametrize("overlap", [False, True, None])
@pytest.mark.parametrize("method", [method for method in METHODS if make_policy(method, {}).may_retrieve])
def test_a_replay_with_retrieval_gives_the_recorded_tokens(
    method: str, overlap: bool | None, draft: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[int]] = []
    rounds = DecodingLoop.rounds

    def watched(self: DecodingLoop, *asked: Any) -> Iterator[list[int]]:
        given.append([])
        for committed in rounds(self, *asked):
            given[-1] += committed
            yield committed

    monkeypatch.setattr(DecodingLoop, "rounds", watched)
    record, costs = copied(), ReplayCosts.ratio(10, 0.02, 0.02)
    stats = replay(record, make_policy(method, {}), costs, overlap, retrieval=True, draft=draft)
    assert given == [text.tokens.tolist() for text in record.texts]
    assert all((s.draft_forwards > 0) == draft for s in stats)
    assert all(s.retrieved >= s.retrieved_accepted > 0 for s in stats)
    assert all(s.retrieved == sum(round.retrieved for round in s.log) for s in stats)


@pytest.mark.parametrize("draft", [True, False])
def test_what_stands_in_the_prompt_is_retrieved_where_the_record_holds_it(draft: bool) -> None:
    """The texts copy pieces of their prompts, and never themselves."""
    policy, costs = make_policy("specbranch", {}), ReplayCosts.ratio(10, 0.02, 0.02)

    def replayed(prompt_ids: bool, retrieval: bool) -> list[Stats]:
        record = copied(prompt_ids=prompt_ids)
        return replay(record, policy, costs, False, retrieval=retrieval, draft=draft)

    with_prompts, without, off = replayed(True, True), replayed(False, True), replayed(True, False)
    assert not any(s.retrieved for s in [*without, *off])
    assert [s.target_forwards for s in without] == [s.target_forwards for s in off]
    assert sum(s.seconds for s in with_prompts) < 0.7 * sum(s.seconds for s in off)


def test_the_longest_runs_are_copied_once_enough_were_right() -> None:
    """A copy with changes goes wrong at all of them alike."""
    record, policy = copied(tokens=450, prompt=600, piece=150), make_policy("specbranch", {})
    for stats in replay(record, policy, ReplayCosts.ratio(10), False, retrieval=True, draft=False):
        right = 0
        for round in stats.log:
            assert round.retrieved <= (LONGEST_RUN if right >= COPIED else LONGEST_RUN // 2)
            right = right + round.retrieved if round.retrieved == round.retrieved_accepted else 0
        assert [round.tokens for round in stats.log].count(LONGEST_RUN + 1) == 3


def test_a_step_is_told_what_was_retrieved_after_its_nodes() -> None:
    """And one step may run over retrieved nodes above the place that is wanted."""
    record = copied()
    text, calibrator = record.texts[0], Calibrator()
    drafter = ReplayDrafter(text, VirtualTime(), ReplayCosts.ratio(5), 4, None)
    assert text.prompt_ids is not None
    prompt, tokens = text.prompt_ids.tolist(), text.tokens.tolist()
    drafter.begin(prompt)
    drafter.read(ALL, 999, math.inf)
    tree = Tree(prompt[-1], len(prompt) - 1)
    finder = RetrievalDrafter(calibrator)
    finder.begin([*prompt, *tokens[:2]])
    for i in range(2):
        tree.add(i, tokens[i], 1.0)
    tree.graft(2, *finder.find([], 6), 0.02)
    assert tree.tokens(range(3, 6)) == tokens[2:5]
    drafted = drafter.propose(tree, [0, 1, 2, 3, 4], 1)
    assert [step.rows for step in drafted.steps] == [5]
    for node, proposals in enumerate(drafted.proposals[0]):
        assert proposals.tokens[0] == text.proposals.tokens[node, 0]
        assert proposals.signals is not None
        odds = tree.retrieved_odds(node, proposals.tokens[0])
        assert (proposals.signals.retrieved, odds != 0) == (odds, node >= 2)


RECORD = Path(__file__).parents[2] / "benchmarks" / "records" / "coder_good_t1.safetensors"
REPLAYS = json.loads((Path(__file__).parent / "replays.json").read_text())


@pytest.mark.parametrize("expected", REPLAYS, ids=lambda row: f"{row['method']}-{row['overlap']}-{row['costs']}")
def test_a_committed_record_is_replayed_as_ever(expected: dict[str, Any]) -> None:
    """Whoever changes a decision on purpose writes the new figures here, and says so. Every fourth text."""
    record = Record.load(RECORD)
    costs = ReplayCosts.of(record) if expected["costs"] == "measured" else ReplayCosts.ratio(10, 0.02, 0.02)
    policy = make_policy(expected["method"], {})
    stats = replay(record, policy, costs, expected["overlap"], record.texts[::4])
    for name in ("rounds", "target_forwards", "draft_forwards", "accepted", "verified"):
        assert sum(getattr(s, name) for s in stats) == expected[name], name
    assert sum(s.seconds for s in stats) == pytest.approx(expected["seconds"], rel=1e-9)


def test_virtual_time() -> None:
    """A draft that is always right, five times as fast as the target: arithmetic that can be done by hand."""
    record, costs = perfect(60), ReplayCosts.ratio(5)

    def seconds(method: str, overlap: bool, **options: object) -> float:
        return replay(record, make_policy(method, options), costs, overlap)[0].seconds

    assert seconds("autoregressive", False) == pytest.approx(60)
    assert seconds("speculative", False, length=5) == pytest.approx(10 * (5 * 0.2 + 1))  # six tokens a round
    # PEARL: the first round verifies the root alone; then five tokens are drafted during each forward.
    assert seconds("pearl", True) == pytest.approx(13, abs=1)
    assert seconds("specbranch", True) <= seconds("pearl", True) + 1


def test_a_replay_with_overlap_never_beats_both_bounds() -> None:
    """No more than all drafted tokens a round, no less time than the target's forwards take."""
    record = perfect(80)
    for method in METHODS:
        policy = make_policy(method, {})
        for overlap in (False, True):
            stats = replay(record, policy, ReplayCosts.ratio(8, 0.02, 0.02), overlap)[0]
            assert stats.new_tokens == 80
            assert stats.seconds >= stats.target_busy - 1e-9
            assert stats.accepted + stats.rounds >= 80


def test_plan_on_a_record(recorded: tuple[Record, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert cli.main(["plan", str(recorded[1]), "--ratio", "10", "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    result = json.loads(out.read_text())["results"][0]["expectations"]
    assert {expectation["method"] for expectation in result} == set(METHODS)
    assert all(method in shown for method in METHODS)
    alone = next(e for e in result if e["method"] == "autoregressive")
    assert (alone["speedup"], alone["rollback_rate"]) == (pytest.approx(1), 0)
    default = {(e["method"], e["mode"]): e["speedup"] for e in result if not e["settings"]}
    for tuned in (e for e in result if e["settings"]):
        assert tuned["speedup"] > default[tuned["method"], tuned["mode"]]
    assert default["specbranch", "overlapped"] > max(default["pearl", "overlapped"], default["ssd", "overlapped"])


def test_plan_with_retrieval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default where the records hold all prompts; for the methods that may, and once without a draft."""
    monkeypatch.setattr("specbranch.replay.planner.GRIDS", {"speculative": {"length": (2, 4)}})
    held, some_held, out = tmp_path / "held.safetensors", tmp_path / "not_all.safetensors", tmp_path / "plan.json"
    record = copied(40)
    record.save(held)
    replace(record, texts=[*record.texts[:2], replace(record.texts[2], prompt_ids=None)]).save(some_held)

    def planned(*arguments: object) -> dict[tuple[str, str, bool, bool], float]:
        assert cli.main(["plan", *map(str, arguments), "--ratio", "10", "--json", str(out)]) == 0
        report = json.loads(out.read_text())
        expectations = report["results"][0]["expectations"]
        assert report["retrieval"] == any(e["retrieval"] for e in expectations)
        assert ("drafts from" in capsys.readouterr().out) == report["retrieval"]
        return {(e["method"], e["mode"], e["draft"], e["retrieval"]): e["speedup"] for e in expectations[::-1]}

    retrieving = {method for method in METHODS if make_policy(method, {}).may_retrieve}
    on, off = planned(held), planned(held, "--retrieval", "off")
    assert {method for method, _, _, retrieval in on if retrieval} == retrieving
    assert {method for method, _, draft, _ in on if not draft} == {"autoregressive", "specbranch"}
    assert {key for key in on if not key[3]} <= off.keys()
    assert on["specbranch", "serial", True, True] > off["specbranch", "serial", True, False]
    assert on["specbranch", "serial", False, True] > 1
    assert off == planned(some_held)
    part = planned(some_held, "--retrieval", "on")
    assert on.keys() == part.keys()
    assert 1 < part["specbranch", "serial", False, True] < on["specbranch", "serial", False, True]


def test_plan_needs_costs_and_one_pair(
    recorded: tuple[Record, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, path = recorded
    assert cli.main(["plan", str(path)]) == 1
    assert "no measured costs" in capsys.readouterr().err
    other = tmp_path / "other.safetensors"
    replace(record, draft=ModelIdentity("someone", "f00")).save(other)
    assert cli.main(["plan", str(path), str(other), "--ratio", "4"]) == 1
    assert "other.safetensors: a record of someone" in capsys.readouterr().err


def test_record_command_measures_costs_for_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"id": p.id, "prompt": p.text}) + "\n" for p in PROMPTS[:2]))
    out = tmp_path / "deep" / "r.safetensors"
    command = ["record", *PAIR, "--prompts", str(prompts), "--out", str(out), "--max-new-tokens", "12"]
    assert cli.main([*command, "--prompt-ids"]) == 0
    assert "2 texts, 24 tokens, agreement 0." in capsys.readouterr().out
    assert cli.main(command) == 1
    assert "r.safetensors: a record with another choice of prompt ids (True, here False)" in capsys.readouterr().err
    record = Record.load(out)
    assert [len(text.prompt_ids) for text in record.texts if text.prompt_ids is not None] == [
        text.prompt_tokens for text in record.texts
    ]
    for _ in range(2):  # the second replaces the first's
        assert cli.main(["plan", str(out), "--json", str(tmp_path / "plan.json")]) == 0
    assert json.loads((tmp_path / "plan.json").read_text())["retrieval"] is True
    measured = {
        (mode, model): [rows for rows, _ in points]
        for mode in record.costs
        for model, points in record.costs[mode].items()
    }
    assert measured["serial", "target"] == measured["overlapped", "target"] == [*measured["serial", "draft"], 32, 64]
    costs = ReplayCosts.of(record)
    assert 0 < costs.serial_draft(1) < costs.serial_target(1)
    assert {e.method for e in plan(record, costs, ("serial",))} == set(METHODS)


def test_train_hrad_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(
        "".join(json.dumps({"id": e["id"], "prompt": e["prompt"]}) + "\n" for e in bundled.prompts()[:6])
    )
    out = tmp_path / "hrad"
    command = ["train-hrad", *PAIR, "--prompts", str(prompts), "--out", str(out), "--max-new-tokens", "24"]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    for words in ("H-RAD", "online calibration", "confidence alone", "majority class", "true class", "saved to"):
        assert words in shown
    assert "times its speed without H-RAD" in shown
    assert sorted(path.name for path in out.iterdir()) == ["hrad.safetensors", "rounds.safetensors"]
    with safe_open(out / "hrad.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    assert (config["target"]["name"], config["draft"]["name"]) == ("target", "draft")
    generate = ["generate", *PAIR, "--prompt", str(PROMPTS[0].text), "--max-new-tokens", "8", "--hrad", str(out)]
    assert cli.main(generate) == 0
    assert (
        cli.main(["train-hrad", *PAIR, "--prompts", str(prompts), "--out", str(tmp_path / "few"), "--limit", "2"]) == 1
    )
    assert "2 prompts: expected at least 5" in capsys.readouterr().err
