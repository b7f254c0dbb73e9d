"""Records of texts under constraints: what could not stand is not proposed, and what had to is drafted for free."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import validate

from specbranch import METHODS, Constraint, SpecBranch, SpecBranchError, bundled
from specbranch.cli import main as cli
from specbranch.constrained import Constrained, has
from specbranch.core.sampling import Sampling
from specbranch.policies.methods import make_policy
from specbranch.replay.costs import ReplayCosts
from specbranch.replay.record import Record
from specbranch.replay.recorded_matcher import RecordedMatcher, constrained
from specbranch.replay.recorder import collect
from specbranch.replay.replayer import replay
from specbranch.text.prompts import Prompt

NEW_TOKENS = 48
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "ok": {"type": "boolean"}, "size": {"enum": [1, 25]}},
    "required": ["name", "ok", "size"],
    "additionalProperties": False,
}
GIVEN = [("json_schema", SCHEMA), None, ("regex", "[0-9]{3}-[a-z]{2,5}"), ("grammar", 'start: "x = " /[0-9]+/ "\\n"')]
PROMPTS = [
    Prompt(str(entry["id"]), entry["prompt"], False, "bundled", given)
    for entry, given in zip(bundled.prompts(), GIVEN, strict=False)
]
PAIR = ["--target", "bundled", "--draft", "bundled", "--threads", "1"]
COSTS = ReplayCosts.ratio(6.0)


def collected(engine: SpecBranch, path: Path, sampling: Sampling | None = None, **options: Any) -> Record:
    prompts = options.pop("prompts", PROMPTS)
    return collect(engine, prompts, sampling or Sampling(), NEW_TOKENS, path, False, lambda id: None, **options)


@pytest.fixture(scope="module")
def record(bundled_pair: SpecBranch, tmp_path_factory: pytest.TempPathFactory) -> Record:
    path = tmp_path_factory.mktemp("records") / "r.safetensors"
    made = collected(bundled_pair, path)
    read = Record.load(path)
    for a, b in zip(made.texts, read.texts, strict=True):
        assert (a.forced is None) == (b.forced is None)
        if a.forced is not None and b.forced is not None:
            assert a.forced.dtype == b.forced.dtype == torch.bool
            assert a.forced.equal(b.forced)
    return read


def matcher(engine: SpecBranch, prompt: Prompt) -> Constrained:
    from specbranch.text.kinds import constraint_of

    assert prompt.constraint is not None
    request = engine.request(prompt.text, max_new_tokens=1, constraint=constraint_of(*prompt.constraint))
    under = request.constrained(engine.pair.vocabulary)
    assert under is not None
    return under


def test_proposals_and_forced_places_are_those_of_the_constraint(bundled_pair: SpecBranch, record: Record) -> None:
    for prompt, text in zip(PROMPTS, record.texts, strict=True):
        if prompt.constraint is None:
            assert text.forced is None
            continue
        assert text.forced is not None
        assert len(text.forced) == len(text)
        assert text.forced.any()
        under = matcher(bundled_pair, prompt)
        for place, token in enumerate(text.tokens.tolist()):
            forced = under.forced([])
            assert bool(text.forced[place]) == bool(forced)
            assert forced[:1] in ([], [token])
            offered = [each for each in text.proposals.tokens[place].tolist() if each >= 0]
            mask = under.allowed([])
            assert all(has(mask, each) for each in offered)
            under.accept([token])
        assert int(text.tokens[-1]) in under.eos or len(text) == NEW_TOKENS
    validate(json.loads(str(bundled_pair.tokenizer.decode(record.texts[0].tokens[:-1]))), SCHEMA)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, seed=3)])
def test_texts_are_those_of_plain_decoding(bundled_pair: SpecBranch, tmp_path: Path, sampling: Sampling) -> None:
    made = collected(bundled_pair, tmp_path / "r.safetensors", sampling)
    for prompt, text in zip(PROMPTS[:1], made.texts, strict=False):
        expected = bundled_pair.generate(
            prompt.text,
            max_new_tokens=NEW_TOKENS,
            **asdict(sampling),
            constraint=Constraint.json_schema(SCHEMA),
            method="autoregressive",
        )
        assert text.tokens.tolist() == expected.tokens


@pytest.mark.parametrize(
    ("method", "overlap"),
    [(name, overlap) for name in METHODS for overlap in (False, True) if make_policy(name, {}).overlaps or not overlap],
)
def test_a_replay_drafts_what_was_forced(record: Record, method: str, overlap: bool) -> None:
    policy = make_policy(method, {})
    for text, stats in zip(record.texts, replay(record, policy, COSTS, overlap), strict=True):
        assert stats.new_tokens == len(text)
        assert bool(stats.as_dict()["forced_accepted_tokens"]) == (policy.may_retrieve and text.forced is not None)


def test_a_replay_without_a_draft_has_the_forced_tokens_alone(record: Record) -> None:
    for text, stats in zip(
        record.texts, replay(record, make_policy("specbranch", {}), COSTS, False, draft=False), strict=True
    ):
        assert stats.new_tokens == len(text)
        assert stats.draft_forwards == 0
        assert (stats.target_forwards < len(text)) == (text.forced is not None)


def test_a_replay_takes_as_many_forwards_as_a_run(bundled_pair: SpecBranch, record: Record) -> None:
    """Without the draft: what may follow where there are a few is not recorded, and not drafted."""
    for prompt, text in zip(PROMPTS, record.texts, strict=True):
        if prompt.constraint is None or text.forced is None:
            continue
        (stats,) = replay(record, make_policy("specbranch", {}), COSTS, False, [text], draft=False)
        assert int((~text.forced).sum()) <= stats.target_forwards <= int((~text.forced).sum()) + 2


def test_recorded_matchers() -> None:
    under = RecordedMatcher([5, 6, 7, 8], [False, True, True, False], 40)
    assert under.forced([]) == []
    assert under.allowed([]) == b"\xff" * 8
    assert under.forced([5]) == [6, 7]
    assert under.allowed([5]) == (1 << 6).to_bytes(8, "little")
    assert under.forced([4]) == []  # off the text nothing is known
    assert under.allowed([4]) == b"\xff" * 8
    under.accept([5, 6])
    assert under.forced([]) == [7]
    assert not under.complete
    under.accept([7, 8])
    assert under.complete
    assert under.forced([]) == []


def test_a_file_is_continued_under_the_same_constraints_only(bundled_pair: SpecBranch, tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    collected(bundled_pair, path, prompts=PROMPTS[:1])
    collected(bundled_pair, path, prompts=PROMPTS)
    for options, message in (
        ({"whitespace": True}, "another json_whitespace"),
        ({"forced": False}, "another forced_tokens"),
        ({"prompts": [Prompt(PROMPTS[0].id, PROMPTS[0].text, False, "bundled", ("regex", "a"))]}, "was another prompt"),
    ):
        with pytest.raises(SpecBranchError, match=message):
            collected(bundled_pair, path, **options)


def test_without_forced_tokens_none_are_recorded(bundled_pair: SpecBranch, tmp_path: Path) -> None:
    made = collected(bundled_pair, tmp_path / "r.safetensors", forced=False)
    assert all(text.forced is None for text in made.texts)
    assert constrained(made.texts[0]) is None
    assert made.texts[0].tokens.tolist()[0] == made.texts[0].proposals.tokens[0, 0]


def test_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text(json.dumps({"id": "a", "prompt": PROMPTS[0].text}) + "\n")
    Path("s.json").write_text(json.dumps(SCHEMA))
    command = ["record", *PAIR, "--prompts", "p.jsonl", "--max-new-tokens", "40", "--out", "r.safetensors"]
    assert cli.main([*command, "--json-schema", "s.json"]) == 0
    (text,) = Record.load(Path("r.safetensors")).texts
    assert text.forced is not None
    assert cli.main(["plan", "r.safetensors", "--ratio", "5"]) == 0
    capsys.readouterr()
    assert cli.main([*command, "--json-schema", "s.json", "--json-whitespace"]) == 1
    assert "r.safetensors: a record with another json_whitespace (False, here True)" in capsys.readouterr().err
    Path("lines.jsonl").write_text("".join(json.dumps({"id": n, "prompt": "x", "regex": "a"}) + "\n" for n in range(9)))
    train = ["train-hrad", *PAIR, "--prompts", "lines.jsonl", "--out", "hrad"]
    assert cli.main(train) == 1
    assert "prompt 0: has a regex; train-hrad expects prompts without" in capsys.readouterr().err
