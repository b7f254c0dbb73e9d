"""Files that commands write: whole or not at all, and nothing else is touched."""

from __future__ import annotations

import json
import os
import shutil
import threading
from contextlib import suppress

import pytest

from specbranch import bundled
from specbranch.cli import main as cli
from specbranch.cli.files import check_writable, whole, write_json

PROMPTS = str(bundled.path("target").parent / "prompts.jsonl")


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path):
    out, other = tmp_path / "out.json", tmp_path / "out.json.part"
    other.write_text("someone's notes")
    check_writable(out)
    assert sorted(tmp_path.iterdir()) == [other]
    write_json(out, {"a": 1})
    with suppress(KeyboardInterrupt), whole(out) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert json.loads(out.read_text()) == {"a": 1}
    assert other.read_text() == "someone's notes"
    assert sorted(tmp_path.iterdir()) == [out, other]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "deep").mkdir()
    kept, link = tmp_path / "deep" / "kept.json", tmp_path / "link.json"
    kept.write_text("old")
    link.symlink_to(kept)
    check_writable(link)
    write_json(link, {"a": 1})
    assert link.is_symlink()
    assert json.loads(kept.read_text()) == {"a": 1}


def test_a_pipe_is_written_to(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    check_writable(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_json(pipe, {"a": 1})
    reader.join()
    assert json.loads(read[0]) == {"a": 1}
    assert pipe.is_fifo()


def test_bench_refuses_a_pipe(capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    prompts = ["--prompts", PROMPTS, "--limit", "1"]
    assert cli.main(["bench", "--target", "x", "--draft", "x", *prompts, "--json", str(tmp_path / "pipe")]) == 1
    assert "is not a regular file" in capsys.readouterr().err


@pytest.mark.parametrize("left", [("config.json", "model.safetensors"), ("config.json",), ("model.safetensors",)])
def test_train_hrad_does_not_overwrite_a_model(capsys, tmp_path, left):
    for name in left:
        shutil.copy(bundled.path("target") / name, tmp_path / name)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    prompts = ["--prompts", PROMPTS]
    assert cli.main(["train-hrad", "--target", "bundled", "--draft", "bundled", *prompts, "--out", str(tmp_path)]) == 1
    assert f"{tmp_path} holds another model, which would be overwritten" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
