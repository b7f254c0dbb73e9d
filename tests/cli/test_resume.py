"""`specbranch bench --json`: an interrupted run goes on, a finished one stays, and no other file is overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specbranch import bundled
from specbranch.cli import main as cli
from specbranch.cli.bench.bench import Bench

PAIR = ["--target", "bundled", "--draft", "bundled", "--threads", "1"]
NAMES = ["specbranch", "autoregressive", "greedy"]


@pytest.fixture
def bench(tmp_path):
    """A run of nine measurements into out.json, with more options if wanted."""
    prompts, out = tmp_path / "some.jsonl", tmp_path / "out.json"
    prompts.write_text("".join(json.dumps(record) + "\n" for record in bundled.prompts()[:3]), encoding="utf-8")

    def run(*more: str) -> int:
        options = ["--prompts", str(prompts), "--max-new-tokens", "6", "--peers", "greedy", "--json", str(out)]
        return cli.main(["bench", *PAIR, *options, *more])

    run.out, run.prompts = out, prompts  # type: ignore[attr-defined]
    return run


@pytest.fixture
def no_models(monkeypatch):
    monkeypatch.setattr("specbranch.cli.bench.command.load_engine", lambda args: pytest.fail("loaded"))


def fail_after(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException) -> None:
    """So many measurements pass, then comes `error`."""
    calls: list[Any] = []
    measure = Bench._measure_one

    def measured(self, *arguments):
        if len(calls) == count:
            raise error
        calls.append(arguments)
        return measure(self, *arguments)

    monkeypatch.setattr(Bench, "_measure_one", measured)


def figures(out: Path) -> dict[tuple[str, str], float]:
    """What each measurement took: the mark by which it is known again."""
    return {(record["id"], record["name"]): record["seconds"] for record in json.loads(out.read_text())["records"]}


# ---- going on


@pytest.mark.parametrize("done", [0, 1, 3, 7, 8])
def test_an_interrupted_run_goes_on_where_it_stopped(bench, capsys, monkeypatch, done):
    with monkeypatch.context() as patch:
        fail_after(patch, done, KeyboardInterrupt())
        assert bench() == 130
    before = figures(bench.out)
    assert len(before) == done
    capsys.readouterr()

    fail_after(monkeypatch, 9 - done, RuntimeError("measured again"))
    assert bench() == 0
    result = json.loads(bench.out.read_text())
    after = figures(bench.out)
    assert set(after) == {(f"bundled/{i}", name) for i in range(3) for name in NAMES}
    assert len(result["records"]) == 9
    assert {key: after[key] for key in before} == before
    assert all(record["same_tokens"] is True for record in result["records"])  # also where the reference came later
    assert (result["interrupted"], result["resumed"]) == (False, 1)
    assert [row["prompts"] for row in result["rows"]] == [3, 3, 3]
    assert f"going on after {done} of 9 measurements" in capsys.readouterr().err


def test_what_a_killed_run_had_written_is_kept(bench, monkeypatch):
    with monkeypatch.context() as patch:
        fail_after(patch, 4, SystemExit())  # in the second prompt; the file has the first
        patch.setattr("specbranch.cli.bench.command._show", lambda *_: pytest.fail("ended in order"))
        with pytest.raises(SystemExit):
            bench()
    before = figures(bench.out)
    assert list(before) == [("bundled/0", name) for name in NAMES]
    assert bench() == 0
    after = figures(bench.out)
    assert len(after) == 9
    assert {key: after[key] for key in before} == before


def test_a_failed_measurement_is_not_tried_again(bench, capsys, monkeypatch):
    def failing(self, contender, prompt, ids):
        return {"name": contender.name, "task": prompt.task, "id": prompt.id, "error": "it broke", "comparable": False}

    with monkeypatch.context() as patch:
        patch.setattr(Bench, "_measure_one", failing)
        assert bench() == 1
    monkeypatch.setattr("specbranch.cli.bench.command.load_engine", lambda args: pytest.fail("loaded"))
    assert bench() == 1
    assert "is complete" in capsys.readouterr().err


# ---- a finished file


def test_a_finished_file_is_shown_and_left_as_it_is(bench, capsys, monkeypatch):
    assert bench() == 0
    shown, content = capsys.readouterr().out, bench.out.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("specbranch.cli.bench.command.load_engine", lambda args: pytest.fail("loaded"))
        assert bench() == 0
    captured = capsys.readouterr()
    assert captured.out == shown
    assert captured.err == f"specbranch: {bench.out} is complete; --fresh measures again\n"
    assert bench.out.read_bytes() == content
    before = figures(bench.out)
    assert bench("--fresh") == 0
    after = figures(bench.out)
    assert before.keys() == after.keys()
    assert all(before[key] != after[key] for key in before)
    assert json.loads(bench.out.read_text())["resumed"] == 0


def test_a_run_stopped_after_its_last_measurement_is_complete(bench, monkeypatch):
    assert bench() == 0
    report = json.loads(bench.out.read_text())
    bench.out.write_text(json.dumps(report | {"interrupted": True}))
    monkeypatch.setattr("specbranch.cli.bench.command.load_engine", lambda args: pytest.fail("loaded"))
    assert bench() == 0
    assert json.loads(bench.out.read_text()) == report


# ---- other settings, other files


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--max-new-tokens", "7"], "--max-new-tokens was 6, is 7"),
        (["--temperature", "1", "--seed", "3"], "--temperature was 0.0, is 1.0; --seed was 0, is 3"),
        (["--methods", "pearl"], "--methods was specbranch,autoregressive, is pearl"),
        (["--peers", "none"], "--peers was greedy, is "),
        (["--limit", "2"], "--limit was not set, is 2; the prompts have other texts"),
        (["--epsilon", "0.5"], "--epsilon was not set, is 0.5"),
    ],
)
def test_other_settings_are_named_and_the_file_stays(bench, capsys, monkeypatch, more, expected):
    fail_after(monkeypatch, 0, KeyboardInterrupt())
    assert bench() == 130
    content = bench.out.read_bytes()
    capsys.readouterr()
    monkeypatch.setattr("specbranch.cli.bench.command.load_engine", lambda args: pytest.fail("loaded"))
    assert bench(*more) == 1
    error = capsys.readouterr().err
    assert f"{bench.out} was measured with other settings: {expected}" in error
    assert error.endswith("choose another file, or --fresh to measure anew\n")
    assert error.count("\n") == 1
    assert bench.out.read_bytes() == content


def test_other_prompts_versions_and_machines_are_other_settings(bench, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        fail_after(patch, 0, KeyboardInterrupt())
        assert bench() == 130
    report = json.loads(bench.out.read_text())
    report["request"]["versions"]["torch"] = "1.0"
    report["request"]["machine"] |= {"cores": 1000, "core_isa": "none"}
    bench.out.write_text(json.dumps(report))
    bench.prompts.write_text(bench.prompts.read_text().replace("def count_words", "def count_lines"))
    capsys.readouterr()
    assert bench() == 1
    error = capsys.readouterr().err
    for part in ("the prompts have other texts", "cores was 1000, is ", "core_isa was none, is ", "torch was 1.0, is "):
        assert part in error
    assert bench("--fresh") == 0
    assert len(figures(bench.out)) == 9


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is no complete JSON file"),
        ('{"command": "specbranch bench", "records": [{"na', "is no complete JSON file"),
        ("\xff", "is no complete JSON file"),
        ('{"name": "another tool", "version": 1}', "is no report of specbranch bench"),
        ("[1, 2]", "is no report of specbranch bench"),
        ('{"interrupted": true, "settings": {}, "records": [3]}', "is no report of specbranch bench"),
        ('{"interrupted": true, "settings": {}, "records": [], "request": 1}', "is no report of specbranch bench"),
    ],
)
def test_a_truncated_or_foreign_file_is_never_overwritten(bench, capsys, no_models, content, expected, fresh):
    bench.out.write_text(content, encoding="latin-1")
    assert bench(*fresh) == 1
    assert f"{bench.out} {expected}" in capsys.readouterr().err
    assert bench.out.read_text(encoding="latin-1") == content


def test_a_report_that_does_not_say_its_settings_needs_fresh(bench, capsys):
    bench.out.write_text('{"interrupted": false, "settings": {}, "records": []}')
    assert bench() == 1
    assert "does not say all of its settings; choose another file, or --fresh" in capsys.readouterr().err
    assert bench("--fresh") == 0


def test_fresh_needs_a_file(bench, capsys, no_models):
    assert cli.main(["bench", *PAIR, "--prompts", str(bench.prompts), "--fresh"]) == 1
    assert "--fresh needs --json" in capsys.readouterr().err
