"""benchmarks/make_tasks.py: its files can be read, and what is to be copied stands in the standard library."""

import ast
import importlib
import inspect
import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import make_tasks
import tasks_edit
from stdlib_texts import ChangedSource, function_of, source_of
from tasks_json import TABLES
from tasks_quote import QUOTES

from specbranch.text.prompts import read_prompts

LEAST = {"edit": 12, "quote": 8, "json": 8}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks") / "new" / "folder"
    assert make_tasks.main(["--out", str(folder)]) == 0
    return folder


@pytest.fixture
def data(tmp_path):
    """Three prompts of every task."""
    folder = tmp_path / "data"
    folder.mkdir()
    tasks = {**{name: (name,) for name in make_tasks.DATA}, "spec_bench": make_tasks.SPEC_BENCH}
    for file, names in tasks.items():
        lines = [
            json.dumps({"task": name, "id": f"{name}/{i}", "prompt": f"ünder {i}", "chat": i > 0}, ensure_ascii=False)
            for i in range(3)
            for name in names
        ]
        (folder / f"{file}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_the_files_hold_the_chats_of_their_task(made):
    assert {file.name for file in made.iterdir()} == {f"{task}.jsonl" for task in LEAST}
    for task, least in LEAST.items():
        prompts = read_prompts(made / f"{task}.jsonl")  # which checks that ids are unique
        assert len(prompts) >= least
        assert len({prompt.text for prompt in prompts}) == len(prompts)
        assert all(prompt.chat and prompt.task == task and prompt.id.startswith(f"{task}/") for prompt in prompts)
        assert all(500 < len(prompt.text) < 4000 for prompt in prompts)


def test_the_same_bytes_are_made_again(made, tmp_path):
    assert make_tasks.main(["--out", str(tmp_path)]) == 0
    for file in made.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_functions_are_those_of_their_modules(made):
    prompts = {prompt.id: str(prompt.text) for prompt in read_prompts(made / "edit.jsonl")}
    for edit in tasks_edit.EDITS:
        text = prompts.pop(f"edit/{edit.module}.{edit.function}")
        (code,) = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
        (function,) = ast.parse(code).body
        assert isinstance(function, ast.FunctionDef)
        assert function.name == edit.function.rpartition(".")[2]
        assert 20 <= len(code.splitlines()) <= 60
        whole = inspect.getsource(importlib.import_module(edit.module))
        assert [line.strip() for line in code.splitlines()] in runs(whole, len(code.splitlines()))
        assert edit.concerns in code
        assert edit.change in text
    assert not prompts


def runs(text, length):
    """All sequences of so many lines."""
    lines = [line.strip() for line in text.splitlines()]
    return [lines[begin : begin + length] for begin in range(len(lines) - length + 1)]


def test_passages_are_documentation(made):
    prompts = {prompt.id: str(prompt.text) for prompt in read_prompts(made / "quote.jsonl")}
    for quote in QUOTES:
        module, *rest = re.split("[:=]", quote.where)
        found = importlib.import_module(module)
        for name in rest:
            found = getattr(found, name)
        whole = found if isinstance(found, str) else inspect.getdoc(found) or ""
        text = prompts.pop(f"quote/{quote.name}")
        assert len(quote.passage()) > 1000
        assert quote.passage() in whole
        assert quote.passage() in text
        assert text.endswith(quote.request)
    assert not prompts


def test_records_and_their_keys_are_told(made):
    prompts = {prompt.id: str(prompt.text) for prompt in read_prompts(made / "json.jsonl")}
    for table in TABLES:
        text, rows = prompts.pop(f"json/{table.name}"), table.rows()
        assert 8 <= len(rows) <= 20
        assert f"these {len(rows)} records" in text
        assert all(f'"{key}"' in text for key in table.keys)
        assert {len(row) for row in rows} == {len(table.keys)}
        assert all(str(value) and str(value) in text for row in rows for value in row)
    assert not prompts


def test_data_is_copied_and_spec_bench_split(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert make_tasks.main(["--out", str(out), "--data", str(data)]) == 0
    for task in (*make_tasks.DATA, *make_tasks.SPEC_BENCH):
        copied = (out / f"{task}.jsonl").read_text(encoding="utf-8")
        assert [json.loads(line)["id"] for line in copied.splitlines()] == [f"{task}/{i}" for i in range(3)]
    assert (out / "gsm8k.jsonl").read_bytes() == (data / "gsm8k.jsonl").read_bytes()
    assert f"{out / 'rag.jsonl'}: 3 prompts" in capsys.readouterr().out


def test_the_limit_is_of_each_task_of_the_data(made, data, tmp_path):
    assert make_tasks.main(["--out", str(tmp_path), "--data", str(data), "--limit", "2"]) == 0
    for task in (*make_tasks.DATA, *make_tasks.SPEC_BENCH):
        assert len(read_prompts(tmp_path / f"{task}.jsonl")) == 2
    assert (tmp_path / "edit.jsonl").read_bytes() == (made / "edit.jsonl").read_bytes()


def test_missing_data_is_named_and_nothing_written(data, tmp_path, capsys):
    out = tmp_path / "out"
    (data / "mt_bench.jsonl").unlink()
    assert make_tasks.main(["--out", str(out), "--data", str(data)]) == 1
    assert capsys.readouterr().err == f"{data / 'mt_bench.jsonl'}: No such file or directory\n"
    assert not out.exists()


def test_a_task_that_spec_bench_lacks_is_named(data, tmp_path, capsys):
    file = data / "spec_bench.jsonl"
    file.write_text("".join(line for line in file.open() if '"rag"' not in line))
    assert make_tasks.main(["--out", str(tmp_path), "--data", str(data)]) == 1
    assert capsys.readouterr().err == f"{file}: holds no prompts of the task 'rag'\n"


def test_an_output_folder_that_cannot_be_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert make_tasks.main(["--out", str(tmp_path / "file")]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.parametrize(("options", "reason"), [(["--limit", "0"], "1 or more, not 0"), (["--limit", "1"], "--data")])
def test_a_limit_that_means_nothing_is_refused(options, reason, tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_tasks.main(["--out", str(tmp_path), *options])
    assert reason in capsys.readouterr().err.splitlines()[-1]


def test_what_another_library_has_changed_is_left_out_and_said(monkeypatch, tmp_path, capsys):
    kept, *_ = tasks_edit.EDITS
    gone = [
        tasks_edit.Edit("statistics", "median", "not in there", ""),
        tasks_edit.Edit("statistics", "NormalDist.gone", "", ""),
        tasks_edit.Edit("no_such_module", "gone", "", ""),
        tasks_edit.Edit("no.such.module", "gone", "", ""),
    ]
    monkeypatch.setattr(tasks_edit, "EDITS", [*gone, kept])
    assert make_tasks.main(["--out", str(tmp_path)]) == 0
    assert len(read_prompts(tmp_path / "edit.jsonl")) == 1
    assert capsys.readouterr().err.splitlines() == [
        "edit: a prompt is left out: statistics.median: 'not in there' is not in it in this Python",
        "edit: a prompt is left out: statistics.NormalDist.gone: not there in this Python",
        "edit: a prompt is left out: no_such_module: this Python has no source of it",
        "edit: a prompt is left out: no.such.module: this Python has no source of it",
    ]
    monkeypatch.setattr(tasks_edit, "EDITS", gone[:1])
    assert make_tasks.main(["--out", str(tmp_path)]) == 1
    assert "edit: this Python's standard library has nothing for it" in capsys.readouterr().err


def test_sources_are_read_where_python_defines_them():
    assert function_of("operator", "length_hint").startswith("def length_hint(obj, default=0):\n")  # C's has no text
    assert function_of("ipaddress", "_BaseV6._compress_hextets").startswith("@classmethod\ndef ")
    with pytest.raises(ChangedSource, match="sys: this Python has no source"):
        source_of("sys")
