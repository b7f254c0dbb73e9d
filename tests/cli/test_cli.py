"""The command line as a user meets it: texts, errors on one line, a closed pipe, Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from specbranch import METHODS, SpecBranch, bundled
from specbranch.cli import doctor
from specbranch.cli import main as cli
from specbranch.text.prompts import Prompt, PromptFileError, read_prompts
from specbranch.together import Together

PAIR = ["--target", "bundled", "--draft", "bundled", "--threads", "1"]
ALONE = ["--target", "bundled", "--method", "autoregressive", "--threads", "1"]
PROMPT = bundled.prompts()[0]["prompt"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "SPECBRANCH_DEBUG"}


def start(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "specbranch.cli.main", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)


def write_prompts(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def usage_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    return one_error_line(capsys)


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(arguments) == 1
    return one_error_line(capsys)


def one_error_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("specbranch: error: ")
    assert captured.err.count("\n") == 1
    return captured.err.rstrip("\n")


# ---- generate


def test_text_on_stdout_is_what_the_python_api_gives(capsys):
    assert cli.main(["generate", *PAIR, "--prompt", PROMPT, "--max-new-tokens", "24"]) == 0
    captured = capsys.readouterr()
    engine = SpecBranch.from_pretrained("bundled", draft="bundled", threads=1)
    assert captured.out == engine.generate(PROMPT, max_new_tokens=24).text + "\n"
    assert captured.err == ""  # not a terminal: no progress, no summary


@pytest.mark.parametrize("method", METHODS)
def test_json_has_one_object_a_prompt(capsys, tmp_path, method):
    file = write_prompts(tmp_path / "two.jsonl", *bundled.prompts()[:3])
    options = ["--prompts", str(file), "--limit", "2", "--max-new-tokens", "12", "--json", "--method", method]
    sampling = ["--temperature", "0.8", "--top-k", "50", "--top-p", "0.9", "--min-p", "0.01", "--seed", "3"]
    assert cli.main(["generate", *PAIR, *options, *sampling]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["id"] for record in records] == ["bundled/0", "bundled/1"]
    for record in records:
        assert record["stats"]["method"] == method
        assert record["stats"]["new_tokens"] == len(record["tokens"]) <= 12
        assert isinstance(record["text"], str)
        for key in (
            "seconds",
            "tokens_per_second",
            "target_forwards",
            "tokens_per_target_forward",
            "acceptance_rate",
            "hit_rate",
            "rollback_rate",
            "wasted_tokens",
            "bubble_seconds",
        ):
            assert key in record["stats"]


def test_autoregressive_needs_no_draft_and_gives_the_same_text(capsys):
    options = ["--prompt", PROMPT, "--max-new-tokens", "24", "--dtype", "float32"]
    assert cli.main(["generate", *PAIR[:2], *options, "--threads", "1", "--method", "autoregressive"]) == 0
    plain = capsys.readouterr().out
    assert cli.main(["generate", *PAIR, *options, "--overlap", "on", "--threads", "2"]) == 0
    assert capsys.readouterr().out == plain


@pytest.mark.parametrize("given", [f"{PROMPT}\n", f"{PROMPT}\r\n", f"{PROMPT}\n\n", PROMPT])
def test_a_prompt_of_standard_input_is_all_of_it_but_a_newline_at_its_end(capsys, monkeypatch, given):
    prompt = f"{PROMPT}\n" if given.endswith("\n\n") else PROMPT
    options = ["--max-new-tokens", "8", "--json"]
    assert cli.main(["generate", *PAIR, "--prompt", prompt, *options]) == 0
    expected = json.loads(capsys.readouterr().out)["tokens"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    assert cli.main(["generate", *PAIR, "--prompt", "-", *options]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (b"", "standard input: is empty; expected the prompt"),
        (b"\n", "standard input: is empty; expected the prompt"),
        (None, "standard input: is empty; expected the prompt"),
        (b"a\xff", "standard input: not UTF-8 (invalid start byte at byte 1)"),
    ],
)
def test_standard_input_that_is_no_prompt_is_refused_before_anything_is_loaded(capsys, monkeypatch, given, expected):
    monkeypatch.setattr("specbranch.cli.generate.load_engine", lambda args: pytest.fail("loaded"))
    monkeypatch.setattr("sys.stdin", None if given is None else io.TextIOWrapper(io.BytesIO(given)))
    assert failure(capsys, "generate", *PAIR, "--prompt", "-") == f"specbranch: error: {expected}"


def test_without_a_command_there_is_help(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: specbranch ")
    assert all(command in shown for command in cli.COMMANDS)
    done = subprocess.run([sys.executable, "-m", "specbranch"], capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stdout, done.stderr) == (0, shown, "")
    assert "the following arguments are required: COMMAND" in usage_error(capsys, "--threads=2")


def test_stop_text_ends_the_output(capsys):
    assert cli.main(["generate", *PAIR, "--prompt", PROMPT, "--max-new-tokens", "24"]) == 0
    whole = capsys.readouterr().out
    stop = whole[10:13]
    assert cli.main(["generate", *PAIR, "--prompt", PROMPT, "--max-new-tokens", "24", "--stop", stop]) == 0
    assert capsys.readouterr().out == whole[: whole.index(stop)] + "\n"


def test_a_prompt_that_is_too_long_is_named_and_the_others_go_on(capsys, tmp_path):
    long = {"id": "long", "prompt": "word " * 20_000}
    file = write_prompts(tmp_path / "p.jsonl", long, {"id": "short", "prompt": PROMPT})
    assert cli.main(["generate", *PAIR, "--prompts", str(file), "--max-new-tokens", "4", "--json"]) == 1
    captured = capsys.readouterr()
    assert [json.loads(line)["id"] for line in captured.out.splitlines()] == ["short"]
    assert captured.err.startswith("specbranch: error: prompt long: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({"prompt": "half a pair: \ud83d"}, "the prompt cannot be tokenized: "),
        ({"prompt": "x", "chat": True}, "the chat template cannot be applied: no such role"),
    ],
)
def test_a_prompt_that_cannot_be_encoded_is_named_and_the_others_go_on(capsys, tmp_path, bad, expected):
    shutil.copytree(bundled.path("target"), tmp_path / "target")
    (tmp_path / "target" / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    file = write_prompts(tmp_path / "p.jsonl", {"id": "bad", **bad}, {"id": "good", "prompt": PROMPT})
    pair = ["--target", str(tmp_path / "target"), "--method", "autoregressive", "--threads", "1"]
    assert cli.main(["generate", *pair, "--prompts", str(file), "--max-new-tokens", "2", "--json"]) == 1
    captured = capsys.readouterr()
    assert [json.loads(line)["id"] for line in captured.out.splitlines()] == ["good"]
    assert captured.err.startswith(f"specbranch: error: prompt bad: {expected}")
    assert captured.err.count("\n") == 1


def test_a_prompt_that_fails_half_way_is_named_and_the_others_go_on(capsys, monkeypatch, tmp_path):
    """Whatever it fails of: memory, for example."""
    file = write_prompts(tmp_path / "p.jsonl", *({"id": id, "prompt": PROMPT} for id in "abc"))
    verify, calls = Together.verify, iter(range(100))

    def failing(self, texts):
        if next(calls) in (0, 2):  # the first prompt's first round, and the second round of the second
            raise RuntimeError("not enough memory")
        return verify(self, texts)

    monkeypatch.setattr(Together, "verify", failing)
    assert cli.main(["generate", *ALONE, "--prompts", str(file), "--max-new-tokens", "4", "--json"]) == 1
    captured = capsys.readouterr()
    records = [json.loads(line) for line in captured.out.splitlines()]
    assert [(record["id"], record["finish_reason"]) for record in records] == [("b", "error"), ("c", "length")]
    assert [line.split(": ")[2] for line in captured.err.splitlines()] == ["prompt a", "prompt b"]
    assert captured.err.count("not enough memory") == 2


def test_chat_messages_in_a_file(capsys, tmp_path):
    shutil.copytree(bundled.path("target"), tmp_path / "target")
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (tmp_path / "target" / "chat_template.jinja").write_text(template)
    parts = [{"role": "user", "content": PROMPT[:9]}, {"role": "assistant", "content": PROMPT[9:]}]
    lines = [{"id": "chat", "messages": parts}, {"id": "bad", "messages": [{"role": 5}]}, {"id": "t", "prompt": PROMPT}]
    file = write_prompts(tmp_path / "p.jsonl", *lines)
    options = ["--target", str(tmp_path / "target"), *ALONE[2:], "--max-new-tokens", "6", "--json"]
    assert cli.main(["generate", *options, "--prompts", str(file)]) == 1
    captured = capsys.readouterr()
    chat, plain = [json.loads(line) for line in captured.out.splitlines()]
    assert (chat["id"], chat["tokens"]) == ("chat", plain["tokens"])
    assert captured.err.startswith("specbranch: error: prompt bad: prompt[0] is {'role': 5}; expected a message like")


def test_a_setting_that_specbranch_lacks_is_one_line_on_stderr(tmp_path):
    shutil.copytree(bundled.path("target"), tmp_path / "target")
    (tmp_path / "target" / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.1, "num_beams": 4}))
    file = write_prompts(tmp_path / "p.jsonl", *bundled.prompts()[:2])
    options = ["--target", str(tmp_path / "target"), *ALONE[2:], "--max-new-tokens", "2", "--prompts", str(file)]
    process = start("generate", *options)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    assert errors.decode() == (
        "specbranch: warning: the checkpoint's generation_config has num_beams 4, which "
        "specbranch does not have: the text will differ from that of transformers' generate\n"
    )


def test_filters_without_a_temperature_are_warned_of(capsys):
    options = ["--prompt", PROMPT, "--max-new-tokens", "2"]
    assert cli.main(["generate", *ALONE, *options, "--top-p", "0.5", "--top-k", "3"]) == 0
    assert capsys.readouterr().err == "specbranch: warning: no effect at temperature 0: --top-k, --top-p\n"


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prompt", ""], "--prompt: must not be empty"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens: must be at least 1, found 0"),
        (["--prompt", "x", "--method", "magic"], "--method: invalid choice: 'magic'"),
        (["--prompt", "x", "--num-beams", "2"], "unrecognized arguments: --num-beams 2"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature: must be at least 0, found -1"),
        (["--prompt", "x", "--temperature", "nan"], "--temperature: must be at least 0, found nan"),
        (["--prompt", "x", "--top-p", "0"], "--top-p: must be above 0 and at most 1, found 0"),
        (["--prompt", "x", "--min-p", "2"], "--min-p: must be at least 0 and at most 1, found 2"),
        (["--prompt", "x", "--top-k", "many"], "--top-k: must be a whole number, found 'many'"),
        (["--prompt", "x", "--threads", "0"], "--threads: must be at least 1, found 0"),
        (["--prompt", "x", "--device", "tpu"], "--device: must be cpu or cuda, found 'tpu'"),
        (["--prompt", "x", "--seed", str(2**63)], f"--seed: must be at least 0 and at most {2**63 - 1}, found {2**63}"),
        ([], "one of the arguments --prompt --prompts is required"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(capsys, arguments, expected):
    assert expected in usage_error(capsys, "generate", *PAIR, *arguments)


def test_unknown_method_or_peer_of_bench(capsys):
    bench = ["bench", *PAIR, "--prompts", "p.jsonl"]
    assert "unknown name 'magic'" in usage_error(capsys, *bench, "--methods", "specbranch,magic")
    assert "unknown name 'none'" in usage_error(capsys, *bench, "--peers", "greedy,none")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--target", "bundled", "--prompt", "x"], "--method specbranch needs --draft"),
        ([*PAIR, "--prompt", "word " * 20_000], "context"),
        (["--target", "no/such/folder", "--draft", "bundled", "--prompt", "x"], "no/such/folder"),
        ([*PAIR, "--prompts", "no-such-file.jsonl"], "no-such-file.jsonl: No such file or directory"),
        ([*PAIR, "--prompts", "no-such-file.jsonl", "--chat"], "--chat has no effect with --prompts"),
        ([*PAIR, "--prompt", "x", "--limit", "2"], "--limit has no effect with --prompt; it is for --prompts"),
    ],
)
def test_what_cannot_run_fails_on_one_line(capsys, arguments, expected):
    assert expected in failure(capsys, "generate", *arguments)


def test_a_draft_with_another_vocabulary_is_refused_by_name(capsys, tmp_path):
    shutil.copytree(bundled.path("draft"), tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    words = {index: word for word, index in vocabulary.items()}
    vocabulary[words[100]], vocabulary[words[101]] = 101, 100
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    options = ["--target", "bundled", "--draft", str(tmp_path / "other"), "--prompt", "x"]
    message = failure(capsys, "generate", *options)
    assert "the draft has another vocabulary than the target: 2 ids differ" in message
    assert "100 (" in message


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("SPECBRANCH_DEBUG", "1")
    with pytest.raises(PromptFileError):
        cli.main(["generate", *PAIR, "--prompts", "no-such-file.jsonl"])


def test_a_warning_is_one_line(monkeypatch, capsys):
    """That steps are not captured any more, for example."""

    def run(args):
        warnings.warn("draft: no\n graphs", RuntimeWarning, stacklevel=2)
        return 0

    def show(*given):  # as Python does where pytest does not collect them
        sys.stderr.write(warnings.formatwarning(*given[:4]))

    monkeypatch.setattr(doctor, "run", run)
    before = warnings.formatwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().err == "specbranch: warning: draft: no graphs\n"
    assert warnings.formatwarning is before


def test_help_loads_neither_torch_nor_transformers():
    code = """
import sys
from contextlib import suppress
from specbranch.cli import main as cli
for command in ([], *([name] for name in cli.COMMANDS)):
    with suppress(SystemExit):
        cli.main([*command, "--help"])
    loaded = {"torch", "transformers", "numpy"} & set(sys.modules)
    assert not loaded, (command, loaded)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    for name in cli.COMMANDS:
        assert f"usage: specbranch {name} " in done.stdout


# ---- prompt files


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"{oops", "not JSON"),
        (b"[1]", "expected an object"),
        (b'{"id": "a"}', '"prompt" is missing'),
        (b'{"prompt": 3}', '"prompt" must be text, found a number'),
        (b'{"prompt": ""}', '"prompt" is empty'),
        (b'{"prompt": "x", "chat": "yes"}', '"chat" must be true or false, found text'),
        (b'{"prompt": "x", "messages": []}', 'has both "prompt" and "messages"'),
        (b'{"messages": []}', '"messages" is empty'),
        (b'{"messages": "x"}', '"messages" must be an array of objects'),
        (b'{"messages": ["x"]}', '"messages" must be an array of objects'),
        (b'{"messages": [{"role": "user"}], "chat": false}', '"messages" are a chat, but "chat" is false'),
        (b'{"prompt": "x", "id": null}', '"id" must be text or an integer, found null'),
        (b'{"prompt": "x", "task": []}', '"task" must be text, found an array'),
        (b'{"prompt": "x", "id": "first"}', "id 'first' is already used on line 1"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_broken_line_is_named_by_file_and_number(capsys, tmp_path, line, expected):
    file = tmp_path / "broken.jsonl"
    file.write_bytes(b'{"prompt": "x", "id": "first"}\n\n' + line + b"\n")
    message = failure(capsys, "generate", *PAIR, "--prompts", str(file))
    assert f"{file}, line 3: " in message
    assert expected in message


def test_prompt_files_are_read_as_documented(tmp_path):
    file = tmp_path / "some.jsonl"
    lines = [
        '\ufeff{"prompt": "a\\u2028b", "extra": 1}',
        "",
        '{"id": 7, "prompt": "c", "chat": true, "task": "t"}',
        '{"id": 8, "messages": [{"role": "user", "content": "d"}]}',
    ]
    file.write_text("\r\n".join(lines), encoding="utf-8")
    assert read_prompts(file) == [
        Prompt("some/1", "a\u2028b", chat=False, task="some"),
        Prompt("7", "c", chat=True, task="t"),
        Prompt("8", [{"role": "user", "content": "d"}], chat=True, task="some"),
    ]
    assert len(read_prompts(file, limit=1)) == 1
    file.write_text("\n\n")
    with pytest.raises(PromptFileError, match="holds no prompts"):
        read_prompts(file)


# ---- processes


def test_a_closed_output_pipe_ends_quietly(tmp_path):
    file = write_prompts(tmp_path / "p.jsonl", *bundled.prompts())
    process = start("generate", *PAIR, "--prompts", str(file), "--max-new-tokens", "64")
    assert process.stdout.readline() == b"=== bundled/0\n"
    process.stdout.close()
    assert process.wait(timeout=120) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_a_table_into_a_closed_pipe_ends_quietly(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        assert cli.main(["doctor"]) == 141
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)  # so that closing it succeeds


@pytest.mark.parametrize("form", ["text", "json"])
def test_ctrl_c_keeps_the_partial_text(tmp_path, form):
    file = write_prompts(tmp_path / "p.jsonl", *bundled.prompts())
    options = ["--prompts", str(file), "--max-new-tokens", "300"]
    process = start("generate", *ALONE, *options, *(["--json"] if form == "json" else []))
    first = process.stdout.readline()  # the first heading, or the first whole answer
    begun = process.stdout.read(1) if form == "text" else b""
    time.sleep(0.1)  # well into a generation
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.startswith(b"specbranch: interrupted after ")
    assert errors.count(b"\n") == 1
    if form == "text":
        assert first == b"=== bundled/0\n"
        assert begun
        assert rest.endswith(b"\n")
    else:
        records = [json.loads(line) for line in (first + rest).splitlines()]
        assert records[-1]["finish_reason"] == "interrupted"
        assert records[-1]["stats"]["new_tokens"] == len(records[-1]["tokens"]) < 300


# ---- demo


def test_demo_shows_both_methods_and_that_the_tokens_are_the_same(capsys):
    assert cli.main(["demo", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "autoregressive" in out
    assert "SpecBranch" in out
    assert "tokens/s" in out
    assert "acceptance" in out
    assert out.endswith("same tokens: yes\n")
