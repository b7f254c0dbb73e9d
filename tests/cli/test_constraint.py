"""`--json-schema`, `--regex`, `--grammar`, and what lines of prompt files say: texts, and all that is refused."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import validate

from specbranch import Constraint, SpecBranch, bundled
from specbranch.cli import main as cli
from specbranch.cli.bench.bench import Bench

TARGET = ["--target", "bundled", "--dtype", "float32", "--threads", "1"]
PAIR = [*TARGET, "--draft", "bundled"]
PROMPT = bundled.prompts()[0]["prompt"]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "ok": {"type": "boolean"}, "size": {"enum": [1, 25]}},
    "required": ["name", "ok", "size"],
    "additionalProperties": False,
}
GRAMMAR = 'start: "x = " /[0-9]{1,5}/ "\\n"'
LINES: list[dict[str, Any]] = [
    {"id": "json", "prompt": PROMPT, "json_schema": SCHEMA},
    {"id": "regex", "prompt": PROMPT, "regex": "[0-9]{3}-[a-z]{2,5}"},
    {"id": "grammar", "prompt": PROMPT, "grammar": GRAMMAR},
]
KINDS = [
    (["--json-schema", "schema.json"], Constraint.json_schema(SCHEMA)),
    (["--regex", "[0-9]{3}-[a-z]{2,5}"], Constraint.regex("[0-9]{3}-[a-z]{2,5}")),
    (["--grammar", "x.lark"], Constraint.lark(GRAMMAR)),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the files of these names are."""
    monkeypatch.chdir(tmp_path)
    Path("schema.json").write_text(json.dumps(SCHEMA), encoding="utf-8-sig")
    Path("x.lark").write_text(GRAMMAR)
    Path("lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    Path("plain.jsonl").write_text("".join(json.dumps({"id": n, "prompt": PROMPT[n:]}) + "\n" for n in range(2)))
    Path("mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*LINES, {"id": "p", "prompt": "x"}]))
    Path("empty").write_text(" \n")
    Path("latin").write_bytes(b"\xff")
    Path("list.json").write_text("[1]")
    Path("guided.json").write_text('{"x-guidance": {}}')


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specbranch.cli.loading.load_pair", lambda *args, **options: pytest.fail("loaded"))


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command says that fails, in one line."""
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("specbranch: error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("specbranch: error: ").rstrip("\n")


def generated(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert cli.main(["generate", *arguments, "--max-new-tokens", "40", "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# ---- generate


@pytest.mark.parametrize(("switch", "constraint"), KINDS)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 3}])
def test_a_switch_is_the_constraint_of_the_python_api(
    capsys, bundled_pair: SpecBranch, switch: list[str], constraint: Constraint, sampling: dict[str, Any]
):
    expected = bundled_pair.generate(PROMPT, max_new_tokens=40, constraint=constraint, **sampling)
    given = [word for name, value in sampling.items() for word in (f"--{name}", str(value))]
    for pair in (PAIR, TARGET, [*TARGET, "--method", "autoregressive"], [*PAIR, "--no-forced-tokens"]):
        (found,) = generated(capsys, *pair, "--prompt", PROMPT, *switch, *given)
        assert found["tokens"] == expected.tokens
        assert (found["text"], found["finish_reason"]) == (expected.text, "stop")
        assert found["stats"]["draft_forwards"] == 0 or "--draft" in pair
    assert found["stats"]["forced_tokens"] == 0
    assert cli.main(["generate", *TARGET, "--prompt", PROMPT, *switch, "--max-new-tokens", "40", *given]) == 0
    assert capsys.readouterr().out == expected.text + "\n"


@pytest.mark.parametrize("at_once", ["1", "4"])
def test_a_line_has_its_own(capsys, bundled_pair: SpecBranch, at_once: str):
    found = generated(capsys, *PAIR, "--prompts", "mixed.jsonl", "--max-requests", at_once)
    validate(json.loads(found[0]["text"]), SCHEMA)
    constraints = [*(constraint for _, constraint in KINDS), None]
    prompts = [PROMPT, PROMPT, PROMPT, "x"]
    expected = bundled_pair.generate(prompts, max_new_tokens=40, constraint=constraints)
    assert [each["tokens"] for each in found] == [each.tokens for each in expected]


def test_without_a_draft_each_prompt_needs_one(capsys, no_models):
    error = failure(capsys, "generate", *TARGET, "--prompts", "mixed.jsonl")
    assert error == "--method specbranch needs --draft"


def test_without_a_draft_prompts_of_a_file_are_drafted_freely(capsys):
    found = generated(capsys, *TARGET, "--prompts", "lines.jsonl")
    assert [each["stats"]["draft_forwards"] for each in found] == [0, 0, 0]
    assert found[0]["stats"]["forced_accepted_tokens"] > 0


def test_whitespace(capsys, bundled_pair: SpecBranch):
    (found,) = generated(capsys, *TARGET, "--prompt", PROMPT, "--json-schema", "schema.json", "--json-whitespace")
    constraint = Constraint.json_schema(SCHEMA, whitespace=True)
    assert found["tokens"] == bundled_pair.generate(PROMPT, max_new_tokens=40, constraint=constraint).tokens
    assert found["tokens"] != bundled_pair.generate(PROMPT, max_new_tokens=40, constraint=KINDS[0][1]).tokens


def test_a_prompt_of_standard_input_is_read_last(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert "regex has" not in failure(capsys, "generate", *TARGET, "--prompt", "-", "--regex", "a+")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    (found,) = generated(capsys, *TARGET, "--prompt", "-", "--regex", "ab?c{2}")
    assert found["text"] in ("acc", "abcc")


# ---- what is refused before a model is loaded


@pytest.mark.parametrize("command", ["generate", "bench", "record"])
@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        (["--json-schema", "none.json"], "--json-schema none.json: No such file or directory"),
        (["--json-schema", "."], "--json-schema .: Is a directory"),
        (["--grammar", "none.lark"], "--grammar none.lark: No such file or directory"),
        (["--json-schema", "empty"], "--json-schema empty is empty"),
        (["--grammar", "empty"], "--grammar empty is empty"),
        (["--grammar", "latin"], "--grammar latin: not UTF-8: "),
        (
            ["--json-schema", "x.lark"],
            "--json-schema x.lark: json_schema is not JSON: Expecting value, line 1, column 1",
        ),
        (["--json-schema", "list.json"], "--json-schema list.json: json_schema is [1]; expected a JSON object, true"),
        (["--json-schema", "guided.json"], "--json-schema guided.json: json_schema has x-guidance: expected no option"),
        (["--regex", "a", "--json-whitespace"], "--json-whitespace has no effect with --regex; it is for --json-sche"),
        (["--json-whitespace"], "--json-whitespace has no effect without a JSON schema; it is for --json-schema"),
        (["--no-forced-tokens"], "--no-forced-tokens has no effect without --json-schema, --regex, --grammar"),
    ],
)
def test_bad_files_and_switches_without_effect(capsys, no_models, command, switches, expected):
    more = {"generate": [], "bench": [], "record": ["--out", "r.safetensors"]}[command]
    assert failure(capsys, command, *PAIR, "--prompts", "plain.jsonl", *switches, *more).startswith(expected)


@pytest.mark.parametrize("command", ["generate", "bench", "record"])
def test_two_for_one_prompt_are_refused_by_its_name(capsys, no_models, command):
    more = ["--out", "r.safetensors"] if command == "record" else []
    error = failure(capsys, command, *PAIR, "--prompts", "mixed.jsonl", "--regex", "a", *more)
    assert error == "prompt json: has a json_schema of its own, and there is --regex; expected one"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--method", "specbranch-paper", "--regex", "a"], "--method specbranch-paper needs --draft"),
        (["--regex", "a", "--no-forced-tokens"], "--method specbranch needs --draft"),
        (
            ["--method", "autoregressive", "--regex", "a", "--no-forced-tokens"],
            "--no-forced-tokens has no effect with autoregressive; it is for speculative, adaptive, pearl, ssd, spec",
        ),
        (["--regex", "a", "--draft-context", "all"], "--draft-context has no effect without --draft"),
    ],
)
def test_methods_without_a_draft(capsys, no_models, arguments, expected):
    assert failure(capsys, "generate", *TARGET, "--prompt", "x", *arguments).startswith(expected)


def test_one_switch_at_a_time(capsys, no_models):
    with pytest.raises(SystemExit):
        cli.main(["generate", *PAIR, "--prompt", "x", "--regex", "a", "--grammar", "x.lark"])
    assert "argument --grammar: not allowed with argument --regex" in capsys.readouterr().err


def test_a_schema_of_a_line_is_looked_at_before_anything_is_loaded(capsys, no_models):
    Path("bad.jsonl").write_text(json.dumps({"id": "q", "prompt": "x", "json_schema": {"x-guidance": {}}}) + "\n")
    error = failure(capsys, "generate", *PAIR, "--prompts", "bad.jsonl")
    assert error == "prompt q: json_schema has x-guidance: expected no options for llguidance in the schema"


def test_llguidance_is_missing(capsys, no_models, monkeypatch):
    monkeypatch.setattr("specbranch.core.extras._is_there", lambda package: package != "llguidance")
    for switches in (["--prompts", "plain.jsonl", "--regex", "a"], ["--prompts", "lines.jsonl"]):
        error = failure(capsys, "generate", *PAIR, *switches)
        assert error == "a constraint needs llguidance: pip install 'specbranch[grammar]'"


# ---- what only the tokenizer can tell


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        (["--regex", "("], "--regex (: regex cannot be used: unclosed group"),
        (["--grammar", "bad.lark"], "--grammar bad.lark: lark cannot be used: line 1, column 8: unknown name"),
        (["--json-schema", "not.json"], "--json-schema not.json: json_schema has keywords that are not supported: not"),
        (["--json-schema", "false.json"], "--json-schema false.json: json_schema: no text satisfies it: schema is fal"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "bench"])
def test_what_cannot_be_followed_is_one_line_before_any_forward(capsys, monkeypatch, command, switches, expected):
    Path("bad.lark").write_text("start: x")
    Path("not.json").write_text('{"not": {}}')
    Path("false.json").write_text("false")
    for name in ("prefill", "verify", "draft"):
        monkeypatch.setattr(f"specbranch.runtime.runner.Runner.{name}", lambda *_, **__: pytest.fail("a model ran"))
    peers = ["--peers", "none"] if command == "bench" else []
    assert failure(capsys, command, *PAIR, "--prompts", "plain.jsonl", *switches, *peers).startswith(expected)


@pytest.mark.parametrize("at_once", ["1", "3"])
def test_a_line_that_cannot_be_followed_leaves_the_others(capsys, at_once):
    bad = {"id": "bad", "prompt": "x", "json_schema": {"not": {}}}
    Path("bad.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [bad, *LINES[1:]]))
    options = ["--prompts", "bad.jsonl", "--max-requests", at_once, "--json", "--max-new-tokens", "20"]
    assert cli.main(["generate", *TARGET, *options]) == 1
    captured = capsys.readouterr()
    assert captured.err == "specbranch: error: prompt bad: json_schema has keywords that are not supported: not\n"
    assert [json.loads(line)["id"] for line in captured.out.splitlines()] == ["regex", "grammar"]


# ---- bench


def bench(*arguments: str) -> int:
    options = ["--max-new-tokens", "24", "--json", "out.json", "--peers", "greedy,assisted,prompt-lookup"]
    return cli.main(["bench", *PAIR, *options, *arguments])


def test_methods_and_transformers_have_the_same_texts(capsys):
    assert bench("--prompts", "mixed.jsonl", "--methods", "specbranch,specbranch-paper,speculative") == 0
    result = json.loads(Path("out.json").read_text())
    assert {record["id"]: record["constraint"] for record in result["records"]} == {
        "json": "json_schema",
        "regex": "regex",
        "grammar": "grammar",
        "p": None,
    }
    names = {record["name"] for record in result["records"]}
    assert names == {"specbranch", "specbranch-paper", "speculative", "autoregressive", "greedy", "assisted"} | {
        "prompt-lookup"
    }
    assert all(record["same_tokens"] for record in result["records"])
    for row in result["rows"]:
        assert row["constraint"] == "grammar, json_schema, regex"
    forced = {record["name"]: record["stats"] for record in result["records"] if record["id"] == "json"}
    assert forced["specbranch"]["forced_accepted_tokens"] > 0
    assert forced["specbranch-paper"]["forced_tokens"] == 0


def test_several_prompts_at_once_and_sampling_peers(capsys, bundled_pair: SpecBranch):
    options = ["--temperature", "0.8", "--max-requests", "3"]
    assert bench("--prompts", "lines.jsonl", "--methods", "specbranch", *options) == 0
    result = json.loads(Path("out.json").read_text())
    for record in result["records"]:
        assert record["same_tokens"] in ((True,) if record["comparable"] else (None,))
        if record["id"] == "regex":  # whoever samples
            text = bundled_pair.tokenizer.decode(record["tokens"], skip_special_tokens=True)
            assert re.fullmatch(LINES[1]["regex"], str(text))


def test_without_a_draft(capsys):
    options = ["--prompts", "lines.jsonl", "--max-new-tokens", "24", "--json", "out.json", "--peers", "greedy"]
    assert cli.main(["bench", *TARGET, *options]) == 0
    result = json.loads(Path("out.json").read_text())
    assert all(record["same_tokens"] for record in result["records"])
    assert result["settings"]["draft"] is None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prompts", "mixed.jsonl"], "--methods specbranch needs --draft"),
        (["--prompts", "plain.jsonl", "--methods", "pearl"], "--methods pearl needs --draft"),
        (["--prompts", "lines.jsonl", "--methods", "specbranch-paper"], "--methods specbranch-paper needs --draft"),
        (["--prompts", "lines.jsonl", "--no-forced-tokens"], "--methods specbranch needs --draft"),
        (
            ["--prompts", "plain.jsonl", "--retrieval", "on", "--methods", "pearl,specbranch-paper"],
            "--methods specbranch-paper needs --draft",
        ),
        (["--prompts", "lines.jsonl", "--peers", "assisted"], "--peers assisted needs a draft model; there is none"),
    ],
)
def test_bench_without_the_draft_that_it_needs(capsys, no_models, arguments, expected):
    assert failure(capsys, "bench", *TARGET, *arguments) == expected


def test_peers_that_cannot_follow_one_are_refused_by_name(capsys, no_models, monkeypatch):
    monkeypatch.setattr("specbranch.cli.bench.resume.request", lambda *_: pytest.fail("asked for versions"))
    for peer in ("llama.cpp-plain", "vllm-2"):
        error = failure(capsys, "bench", *PAIR, "--prompts", "plain.jsonl", "--regex", "a", "--peers", f"greedy,{peer}")
        assert error == f"--peers {peer} cannot follow --regex; expected some of greedy, assisted, prompt-lookup"
    error = failure(capsys, "bench", *PAIR, "--prompts", "lines.jsonl", "--peers", "vllm-2")
    assert error.startswith("--peers vllm-2 cannot follow --json-schema, --regex, --grammar; expected")


def test_a_resumed_run_notices_another_constraint(capsys, monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    options = ["--prompts", "plain.jsonl", "--json-schema", "schema.json"]
    with monkeypatch.context() as patch:
        patch.setattr(Bench, "_measure_one", stop)
        assert bench(*options) == 130
    capsys.readouterr()
    monkeypatch.setattr("specbranch.cli.bench.command.load_engine", lambda args: pytest.fail("loaded"))
    for change, expected in (
        (["--json-whitespace"], "--json-whitespace was False, is True"),
        (["--no-forced-tokens"], "--no-forced-tokens was False, is True"),
    ):
        assert bench(*options, *change) == 1
        assert f"out.json was measured with other settings: {expected}; choose" in capsys.readouterr().err
    assert bench("--prompts", "plain.jsonl", "--regex", "a") == 1
    error = capsys.readouterr().err
    assert (
        "--json-schema was schema.json, is not set; --regex was not set, is a; the prompts have other texts or" in error
    )
    Path("schema.json").write_text(json.dumps({**SCHEMA, "title": "another"}))
    assert bench(*options) == 1
    assert "other settings: the prompts have other texts or constraints; choose" in capsys.readouterr().err


def test_a_schema_that_cannot_be_followed_fails_that_prompt(capsys):
    bad = {"id": "bad", "prompt": "x", "json_schema": {"not": {}}}
    Path("bad.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [bad, LINES[1]]))
    assert bench("--prompts", "bad.jsonl") == 1
    records = json.loads(Path("out.json").read_text())["records"]
    assert {record["error"] for record in records if record["id"] == "bad"} == {
        "json_schema has keywords that are not supported: not"
    }
    assert all(record["error"] is None for record in records if record["id"] == "regex")


def test_files_that_are_read_are_not_written(capsys, no_models):
    error = failure(capsys, "bench", *PAIR, "--prompts", "plain.jsonl", "--grammar", "x.lark", "--json", "x.lark")
    assert error.startswith("--json x.lark is among the grammar that are read")
