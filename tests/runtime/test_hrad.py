"""H-RAD: the features it sees, the files it refuses, that it learns, and that it never changes the text."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import tiny_model
from untrained import untrained

from specbranch import SpecBranch, SpecBranchError, bundled
from specbranch.core.identity import ModelIdentity
from specbranch.core.messages import Forecast
from specbranch.replay.record import TAIL, Record, RecordedProposals, RecordedText
from specbranch.replay.recorder import record_text
from specbranch.replay.train_hrad import ALL, NONE, SOME, Examples, Split, best_epsilon, draft_run, evaluate, fit
from specbranch.runtime.hrad.predictor import PREDICTOR, HRad, load_hrad
from specbranch.text.encoding import encode

PROMPT = bundled.prompts()[0]["prompt"]


def with_hrad(engine: SpecBranch, hrad: HRad) -> SpecBranch:
    return SpecBranch(engine.target, engine.draft, tokenizer=engine.tokenizer, hrad=hrad)


def test_forecast() -> None:
    forecast = Forecast(0.2, 0.3, 0.5)
    assert forecast.likeliest == "all"
    assert Forecast(0.5, 0.3, 0.2).likeliest == "none"
    assert forecast.log_odds(0) == pytest.approx(torch.tensor(0.8).logit().item())
    assert forecast.log_odds(3) == pytest.approx(torch.tensor(0.5 / 0.8).logit().item())
    assert Forecast(0.0, 0.0, 1.0).log_odds(0) < 10  # never certain


def test_features_of_a_verdict_are_those_of_the_text(bundled_pair: SpecBranch, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the verifier reads behind a trunk, accepted or not, is what a plain pass over the text gives there."""
    seen: list[torch.Tensor] = []
    hrad = untrained(bundled_pair)
    predict = hrad.predict
    monkeypatch.setattr(hrad, "predict", lambda features: (seen.append(features), predict(features))[1])
    engine = with_hrad(bundled_pair, hrad)
    for overlap in (False, True):
        seen.clear()
        generation = engine.generate(PROMPT, max_new_tokens=40, overlap=overlap)
        ids = encode(engine.tokenizer, PROMPT)
        text = record_text(engine.pair, ids, generation.tokens, id="a", task="b", features=True)
        assert text.features is not None
        committed, compared = 0, 0
        for features, round in zip(seen, generation.stats.log, strict=True):
            committed += round.tokens
            if committed < len(text):
                torch.testing.assert_close(features, text.features[committed], rtol=1e-4, atol=1e-4)
                compared += 1
        assert compared > 5
    assert not any(module._forward_hooks for module in engine.target.modules())  # nothing stays behind


@pytest.mark.parametrize("method", ["specbranch", "specbranch-paper"])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_predictor_never_changes_the_text(bundled_pair: SpecBranch, method: str, overlap: bool) -> None:
    for seed in range(3):
        engine = SpecBranch(
            bundled_pair.target,
            bundled_pair.draft,
            tokenizer=bundled_pair.tokenizer,
            hrad=untrained(bundled_pair, seed),
        )
        plain = engine.generate(PROMPT, max_new_tokens=32, temperature=0.9, seed=seed, method="autoregressive")
        drafted = engine.generate(PROMPT, max_new_tokens=32, temperature=0.9, seed=seed, method=method, overlap=overlap)
        assert drafted.tokens == plain.tokens


def test_the_paper_follows_its_class(bundled_pair: SpecBranch, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "None" keeps every trunk at its root, so nothing is verified but after the first round."""
    hrad = untrained(bundled_pair)
    monkeypatch.setattr(hrad, "predict", lambda features: Forecast(0.9, 0.05, 0.05))
    engine = with_hrad(bundled_pair, hrad)
    log = engine.generate(PROMPT, max_new_tokens=20, method="specbranch-paper", overlap=False).stats.log
    assert [round.verified for round in log[1:]] == [0] * (len(log) - 1)
    monkeypatch.setattr(hrad, "predict", lambda features: Forecast(0.05, 0.05, 0.9))
    log = engine.generate(PROMPT, max_new_tokens=20, method="specbranch-paper", overlap=False).stats.log
    assert all(round.verified > 0 for round in log[1:-1])


def test_saved_and_read_again(bundled_pair: SpecBranch, tmp_path: Path) -> None:
    hrad = untrained(bundled_pair).with_metrics({"accuracy": 0.5})
    hrad.save(tmp_path)
    read = load_hrad(tmp_path, bundled_pair.target, bundled_pair.draft)  # type: ignore[arg-type]
    features = torch.randn(hrad.config.features)
    assert read.predict(features) == hrad.predict(features)
    assert read.config == hrad.config
    assert SpecBranch(bundled_pair.target, bundled_pair.draft, hrad=tmp_path).hrad is not None
    in_bfloat16 = SpecBranch.from_pretrained("bundled", draft="bundled", dtype="bfloat16", hrad=tmp_path)
    assert in_bfloat16.hrad is not None  # the same checkpoint in another type


def test_a_predictor_of_another_pair_is_refused(bundled_pair: SpecBranch, tmp_path: Path) -> None:
    untrained(bundled_pair).save(tmp_path)
    other = tiny_model(vocab_size=bundled_pair.target.config.vocab_size)
    with pytest.raises(SpecBranchError, match=r"trained for the draft draft .*; the draft here is LlamaForCausalLM"):
        load_hrad(tmp_path, bundled_pair.target, other)
    with pytest.raises(SpecBranchError, match="trained for the target target"):
        load_hrad(tmp_path, other, bundled_pair.draft)  # type: ignore[arg-type]
    with pytest.raises(SpecBranchError, match="hrad predicts for a pair"):
        SpecBranch(bundled_pair.target, hrad=tmp_path)


@pytest.mark.parametrize("damage", ["missing", "truncated", "pickle", "foreign", "no directory", "weights", "old"])
def test_damaged_files_are_refused_by_name(bundled_pair: SpecBranch, tmp_path: Path, damage: str) -> None:
    directory = tmp_path / "predictor"
    untrained(bundled_pair).save(directory)
    file = directory / PREDICTOR
    culprit = PREDICTOR
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "pickle":
        file.write_bytes(pickle.dumps({"layers.1.weight": [1.0]}))
    elif damage == "foreign":
        shutil.copy(bundled.path("draft") / "model.safetensors", file)
        culprit = f"{PREDICTOR}: expected a predictor of the format"
    elif damage == "weights":
        with safe_open(file, "pt") as read:
            save_file({"mean": torch.zeros(3)}, file, read.metadata())
    elif damage == "old":
        file.unlink()
        (directory / "config.json").write_text('{"format": "specbranch-hrad-1"}')
        culprit = "a predictor of an earlier version .* train it again"
    else:
        directory = tmp_path / "elsewhere"
    with pytest.raises(SpecBranchError, match=culprit):
        load_hrad(directory, bundled_pair.target, bundled_pair.draft)  # type: ignore[arg-type]


def test_a_predictor_is_never_saved_over_something_else(bundled_pair: SpecBranch, tmp_path: Path) -> None:
    hrad = untrained(bundled_pair)
    for name in ("config.json", "model.safetensors"):  # a whole checkpoint, then what may be left of one
        model = tmp_path / name
        model.mkdir()
        shutil.copy(bundled.path("target") / name, model)
        with pytest.raises(SpecBranchError, match=f"{name} holds another model, which would be overwritten"):
            hrad.save(model)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(SpecBranchError, match=r"notes holds something else \(a.txt, …\)"):
        hrad.save(tmp_path / "notes")
    with pytest.raises(SpecBranchError, match=r"a.txt is a file; expected a directory"):
        hrad.save(tmp_path / "notes" / "a.txt")
    (tmp_path / "foreign").mkdir()
    shutil.copy(bundled.path("draft") / "model.safetensors", tmp_path / "foreign" / PREDICTOR)
    with pytest.raises(SpecBranchError, match="expected a predictor of the format"):
        hrad.save(tmp_path / "foreign")
    before = {file: file.read_bytes() for file in tmp_path.glob("*/*")}
    assert len(before) == 4
    hrad.save(tmp_path / "new" / "one")  # with parents, as before
    hrad.save(tmp_path / "new" / "one")  # over itself
    other = HRad(replace(hrad.config, target=ModelIdentity("else", "f00")))
    with pytest.raises(SpecBranchError, match=r"holds a predictor for the target target, .* by one for else"):
        other.save(tmp_path / "new" / "one")
    assert load_hrad(tmp_path / "new" / "one", bundled_pair.target, bundled_pair.draft)  # type: ignore[arg-type]
    assert {file: file.read_bytes() for file in before} == before


def test_a_predictor_s_file_is_a_function_of_what_it_holds(bundled_pair: SpecBranch, tmp_path: Path) -> None:
    """safetensors puts the metadata in a random order."""
    files = [tmp_path / str(i) / PREDICTOR for i in range(8)]
    for file in files:
        untrained(bundled_pair).save(file.parent)
    assert len({file.read_bytes() for file in files}) == 1


def recorded(right: list[bool]) -> RecordedText:
    """A text whose draft was right at these positions; confidence 0.01 * position, in tails 0.5 + 0.01 * step."""
    n = len(right)
    tokens = torch.arange(n)
    first = torch.tensor([i if ok else 1000 + i for i, ok in enumerate(right)])
    rows, steps = torch.arange(n) * 0.01, torch.arange(n * TAIL) % TAIL * 0.01 + 0.5
    said = RecordedProposals(first[:, None], rows[:, None], rows, rows)
    tails = RecordedProposals(torch.full((n * TAIL, 1), -5), steps[:, None], steps, steps)
    return RecordedText("a", "b", 3, tokens, said, tails)


def test_runs_of_the_draft() -> None:
    text = recorded([True, True, False, True, True, True, False, True])
    assert draft_run(text, 0, 2) == (2, pytest.approx([0.0, 0.01]))
    assert draft_run(text, 0, 5) == (2, pytest.approx([0.0, 0.01, 0.02, 0.5, 0.51]))
    assert draft_run(text, 2, 3) == (0, pytest.approx([0.02, 0.5, 0.51]))
    assert draft_run(text, 3, 3)[0] == 3
    assert draft_run(text, 7, 3)[0] is None  # the text ends before it is known


def synthetic(count: int, seed: int) -> Examples:
    """Classes that two features tell apart, with words that say little."""
    torch.manual_seed(seed)
    labels = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), count, replacement=True)
    features = torch.randn(count, 10)
    features[:, 0] += 3.0 * (labels == NONE)
    features[:, 1] += 3.0 * (labels == ALL)
    online = torch.full((count, 3), 1 / 3)
    return Examples(features * 50 + 7, labels, torch.rand(count, 5), online)


def test_training_beats_the_majority_and_keeps_the_classes_frequencies() -> None:
    identity = ModelIdentity("a", "b")
    train, validation, held_out = synthetic(1500, 1), synthetic(400, 2), synthetic(600, 3)
    model = fit(train, validation, identity, identity)
    scores = evaluate(model, train, held_out)
    assert scores["H-RAD"].accuracy > 0.85
    assert scores["H-RAD"].accuracy > scores["majority class"].accuracy + 0.25
    assert scores["H-RAD"].accuracy > scores["confidence alone"].accuracy + 0.25
    assert scores["H-RAD"].loss is not None
    assert scores["H-RAD"].loss < 0.45
    assert sum(map(sum, scores["H-RAD"].confusion)) == 600
    with torch.no_grad():
        frequencies = model(held_out.features).softmax(1).mean(0)
    expected = torch.bincount(held_out.labels, minlength=3) / 600
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=0.05)
    assert 0 < best_epsilon(train) < 1
    generator, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    again = fit(train, validation, identity, identity)  # a function of the seed, on any number of threads
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), generator)
    assert {SOME} <= set(held_out.labels.tolist())


def test_splits_are_by_prompt() -> None:
    identity = ModelIdentity("a", "b")
    texts = [replace(recorded([True]), id=str(i)) for i in range(12)]
    split = Split.of(Record(identity, identity, {}, texts))
    parts = [{text.id for text in part} for part in (split.train, split.validation, split.held_out)]
    assert [len(part) for part in parts] == [8, 2, 2]
    assert set.union(*parts) == {str(i) for i in range(12)}
    with pytest.raises(SpecBranchError, match="4 prompts: expected at least 5"):
        Split.of(Record(identity, identity, {}, texts[:4]))
