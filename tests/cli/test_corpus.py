"""`specbranch corpus`, and the commands that are given what it makes."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest

from specbranch import Corpus, bundled
from specbranch.cli import main as cli
from specbranch.cli.messages import INTERRUPTED

PROMPT = "def read_lines(path):\n    with open(path) as file:\n"
TARGET = ["--target", "bundled", "--threads", "1", "--dtype", "float32"]
NEW = ["--max-new-tokens", "32", "--json"]


def generated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert cli.main(["generate", *TARGET, "--prompt", PROMPT, *NEW, *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(arguments) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said.removeprefix("specbranch: error: ").rstrip("\n")


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "some.py"
    file.write_text("import os\n\n\ndef cwd() -> str:\n    return os.getcwd()\n", encoding="utf-8")
    return str(file)


def make(out: Path, *files: str) -> list[str]:
    return ["corpus", "--tokenizer", "bundled", "--out", str(out), *files]


def test_it_makes_a_corpus_and_says_how_large_it_is(capsys, tmp_path, text):
    out = tmp_path / "corpus.safetensors"
    for files in ([text], [text, text]):  # the second in the first one's place
        assert cli.main(make(out, *files)) == 0
        corpus, captured = Corpus.load(out), capsys.readouterr()
        assert corpus.files == ("some.py",) * len(files)
        said = rf"{re.escape(str(out))}: {len(corpus)} tokens of {len(files)} files, \d+\.\d s\n"
        assert re.fullmatch(said, captured.out)
        assert captured.err == ""
    assert sorted(file.name for file in tmp_path.iterdir()) == ["corpus.safetensors", "some.py"]


def test_one_that_is_interrupted_leaves_what_was_there(capsys, tmp_path, text, monkeypatch):
    out = tmp_path / "corpus.safetensors"
    assert cli.main(make(out, text)) == 0
    before = out.read_bytes()
    for place in ("specbranch.corpus.SuffixIndex", "specbranch.core.files._to_disk"):

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(place, interrupt)
            assert cli.main(make(out, text, text)) == INTERRUPTED
        assert capsys.readouterr().err == "specbranch: interrupted\n"
        assert out.read_bytes() == before
        assert sorted(file.name for file in tmp_path.iterdir()) == ["corpus.safetensors", "some.py"]


def test_bad_input_is_one_line(capsys, tmp_path, text):
    out, bad = tmp_path / "corpus.safetensors", tmp_path / "bad.txt"
    bad.write_bytes(b"a\0b")
    assert failure(capsys, *make(out, text, str(bad))) == f"{bad}: expected text, found a NUL byte"
    assert failure(capsys, *make(out, "no/such")) == "no/such: No such file or directory"
    assert failure(capsys, *make(out, str(tmp_path))) == f"{tmp_path}: Is a directory"
    bad.write_bytes(b"")
    assert failure(capsys, *make(out, str(bad))).startswith("the corpus is empty: expected a text, found no token in ")
    line = ["corpus", "--tokenizer", str(tmp_path / "none"), "--out", str(out), text]
    assert failure(capsys, *line) == f"tokenizer {tmp_path / 'none'}: there is no such directory"
    assert not out.exists()


def test_a_corpus_of_another_tokenizer_is_refused(capsys, tmp_path, text):
    out = tmp_path / "corpus.safetensors"
    assert cli.main(make(out, text)) == 0
    capsys.readouterr()
    data = out.read_bytes()
    found = Corpus.load(out).tokenizer.fingerprint.encode()
    out.write_bytes(data.replace(found, found[::-1]))
    line = ["generate", *TARGET, "--draft", "retrieval", "--prompt", "x", "--corpus", str(out)]
    assert failure(capsys, *line).startswith(f"corpus {out} has the tokens of target, whose vocabulary is not that of")


@pytest.mark.parametrize("sampling", [[], ["--temperature", "1", "--seed", "5"]], ids=["greedy", "sampled"])
def test_retrieval_as_a_draft_gives_the_text_of_the_target(capsys, tmp_path, sampling):
    alone = generated(capsys, "--method", "autoregressive", *sampling)
    file, out = tmp_path / "copied.py", tmp_path / "corpus.safetensors"
    file.write_text(PROMPT + alone["text"], encoding="utf-8")
    assert cli.main(make(out, str(file))) == 0
    capsys.readouterr()
    copying = ["--method", "speculative", "--corpus"]  # it goes by no measured costs
    for more in ([], ["--corpus", str(file)], [*copying, str(file)], [*copying, str(out)], copying[:2]):
        found = generated(capsys, "--draft", "retrieval", *sampling, *more)
        assert found["tokens"] == alone["tokens"]
        assert found["stats"]["draft_forwards"] == 0
        if more[:3] == copying:
            assert found["stats"]["retrieved_accepted_tokens"] > 10
    assert generated(capsys, "--retrieval", "on", *sampling)["tokens"] == alone["tokens"]
    assert generated(capsys, "--draft", "bundled", "--corpus", str(out), *sampling)["tokens"] == alone["tokens"]


def test_autoregressive_decoding_leaves_it_out_with_a_word(capsys):
    line = ["generate", *TARGET, "--prompt", "x", "--max-new-tokens", "2", "--method", "autoregressive"]
    assert cli.main([*line, "--draft", "retrieval"]) == 0
    assert capsys.readouterr().err == "specbranch: warning: no effect with --method autoregressive: --draft\n"


def test_a_chat_may_retrieve(capsys, tmp_path, monkeypatch, text):
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    monkeypatch.setattr("sys.stdin", io.StringIO("def f(x):\n"))
    line = ["chat", *TARGET, "--draft", "retrieval", "--corpus", text, "--chat-template", str(template)]
    assert cli.main([*line, "--max-new-tokens", "8", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.strip()


def test_bench_compares_retrieval(capsys, tmp_path, text):
    """A method that never retrieves decodes beside those that are asked to; what was measured with other texts in the
    corpus is not resumed."""
    prompts = str(bundled.path("target").parent / "prompts.jsonl")
    out = tmp_path / "report.json"
    line = ["bench", *TARGET, "--draft", "retrieval", "--prompts", prompts, "--limit", "1", "--max-new-tokens", "8"]
    line += ["--corpus", text, "--peers", "greedy", "--json", str(out)]
    assert cli.main(line) == 0
    capsys.readouterr()
    records = json.loads(out.read_text())["records"]
    assert {record["name"] for record in records} == {"specbranch", "autoregressive", "greedy"}
    assert all(record["same_tokens"] for record in records if record["name"] != "autoregressive")
    Path(text).write_text("something else")
    assert "was measured with other settings: " in failure(capsys, *line)


def test_bench_asks_retrieval_of_the_methods_that_can(capsys, tmp_path):
    prompts = str(bundled.path("target").parent / "prompts.jsonl")
    line = ["bench", *TARGET, "--draft", "bundled", "--prompts", prompts, "--limit", "1", "--max-new-tokens", "8"]
    assert cli.main([*line, "--methods", "specbranch-paper,speculative", "--retrieval", "on", "--peers", "none"]) == 0
    assert "specbranch-paper" in capsys.readouterr().out
