"""Files that commands write: whole or not at all, never somebody else's, and by one run at a time."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from specbranch import SpecBranchError, bundled
from specbranch.cli import main as cli
from specbranch.cli.files import check_writable, whole, write_json
from specbranch.core.files import claimed, write, write_tensors

PROMPTS = str(bundled.path("target").parent / "prompts.jsonl")
PAIR = ["--target", "bundled", "--draft", "bundled"]
MODELS = [*PAIR, "--prompts", PROMPTS]
# Every argument that names an output, and the command line before it.
WRITING = {
    "generate --trace": ["generate", *PAIR, "--prompt", "x", "--trace"],
    "bench --json": ["bench", *MODELS, "--json"],
    "bench --plot": ["bench", *MODELS, "--plot"],
    "record --out": ["record", *MODELS, "--out"],
    "train-hrad --out": ["train-hrad", *MODELS, "--out"],
    "corpus --out": ["corpus", PROMPTS, "--tokenizer", "bundled", "--out"],
    "plan --json": ["plan", "--ratio", "4", "some.safetensors", "--json"],
}
FILES = [name for name in WRITING if name != "train-hrad --out"]
RESUMED = ("bench --json", "record --out")
READ = (
    "--json-schema",
    "--grammar",
    "--llama-target",
    "--llama-draft",
    "--target",
    "--draft",
    "--prompts",
    "--prompt",
    "--chat-template",
    "--hrad",
    "--corpus",
    "--tokenizer",
)  # arguments that are no outputs, though they are names


@pytest.fixture(autouse=True)
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here gets as far as loading a model."""
    for command in ("generate", "bench.command", "record", "train_hrad"):
        monkeypatch.setattr(f"specbranch.cli.{command}.load_engine", lambda args: pytest.fail("loaded"))
    monkeypatch.setattr("specbranch.replay.record.Record.load", lambda path: pytest.fail("loaded"))
    monkeypatch.setattr("specbranch.corpus.Corpus.build", lambda *_, **__: pytest.fail("built"))


def refused(capsys: pytest.CaptureFixture[str], name: str, out: Path | str, *more: str) -> str:
    """What a command says that refuses its output: one line."""
    assert cli.main([*WRITING[name], str(out), *more]) == 1
    said = capsys.readouterr().err
    assert said.startswith("specbranch: error: ")
    assert said.count("\n") == 1
    return said


# ---- one file


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


def test_permissions_are_kept(tmp_path):
    out, new = tmp_path / "out.json", tmp_path / "new.json"
    out.write_text("old")
    out.chmod(0o640)
    write_json(out, {})
    write_json(new, {})
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(out.stat().st_mode) == 0o640
    assert new.stat().st_mode == (tmp_path / "plain").stat().st_mode  # as anyone's new file, also with safetensors


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "deep").mkdir()
    kept, link, dangling = tmp_path / "deep" / "kept.json", tmp_path / "link.json", tmp_path / "dangling.json"
    kept.write_text("old")
    link.symlink_to("deep/kept.json")
    dangling.symlink_to(tmp_path / "deep" / "new.json")
    for out in (link, dangling):
        check_writable(out)
        write_json(out, {"a": 1})
        assert out.is_symlink()
        assert json.loads(out.resolve().read_text()) == {"a": 1}
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["kept.json", "new.json"]


def test_a_circle_of_links_is_refused(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        check_writable(tmp_path / "a")


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


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
def test_an_open_stream_is_written_to(tmp_path, name):
    """Also where it is a file: behind what was printed, and before what will be."""
    (tmp_path / "link").symlink_to("/dev/stdout")
    script = f"""
import sys
from specbranch.core.files import write
print("before", flush=True)
write({name!r}, b"content\\n")
print("behind")
"""
    with (tmp_path / "printed").open("wb") as file:
        subprocess.run([sys.executable, "-c", script], stdout=file, check=True, cwd=tmp_path)
    assert (tmp_path / "printed").read_text() == "before\ncontent\nbehind\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "printed"]


def test_a_full_device_is_named():
    with pytest.raises(OSError, match=r"^/dev/full cannot be written: No space left on device$"):
        write_json("/dev/full", {"a": 1})


@pytest.mark.parametrize("kind", ["json", "tensors"])
def test_a_full_disk_leaves_what_was_there(tmp_path, kind):
    import torch
    from safetensors.torch import save

    out = tmp_path / "out"
    out.write_text("old")
    (tmp_path / "data").write_bytes(save({"a": torch.zeros(100_000)}))
    script = f"""
import resource, sys
from specbranch.core.files import write_json, write_tensors
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
data = open("data", "rb").read()
try:
    write_json("out", dict(a="x" * 100_000)) if {kind == "json"} else write_tensors("out", data)
except OSError as error:
    sys.exit(str(error))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, f"out cannot be written: {os.strerror(errno.EFBIG)}\n")
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]


KILLED_AT_EVERY_LINE = """
import json, os, signal, sys
from pathlib import Path
from specbranch.core import files

out = Path(sys.argv[1])
for line in range(10_000):
    if (child := os.fork()) == 0:
        left = line
        def trace(frame, event, argument):
            global left
            if event == "line" and frame.f_code.co_filename == files.__file__:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace
        sys.settrace(trace)
        with files.claimed(out):
            files.write_json(out, {"line": line})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    found = json.loads(out.read_text())["line"]
    assert found in (-1, line), (line, found)
    ours = {files.LOCK.format(out.name), files.PART.format(out.name)}
    assert {path.name for path in out.parent.iterdir()} - ours == {out.name, out.name + ".part"}
    with files.claimed(out):  # nothing of the killed run is in the way
        files.write_json(out, {"line": -1})
    assert {path.name for path in out.parent.iterdir()} == {out.name, out.name + ".part"}
    if status == 0:
        break
print(line)
"""


def test_a_writer_killed_at_any_line_leaves_a_whole_file_and_no_lock(tmp_path):
    out = tmp_path / "out.json"
    out.write_text('{"line": -1}')
    (tmp_path / "out.json.part").write_text("someone's notes")
    done = subprocess.run([sys.executable, "-c", KILLED_AT_EVERY_LINE, out], capture_output=True, text=True)
    assert done.stderr == ""
    assert int(done.stdout) > 50  # lines at which it was killed
    assert (tmp_path / "out.json.part").read_text() == "someone's notes"


def test_the_same_tensors_are_the_same_file(tmp_path):
    import torch
    from safetensors import safe_open
    from safetensors.torch import save

    tensors = {"b": torch.arange(3), "a": torch.ones(2, 5, dtype=torch.bfloat16)}
    metadata = {"z": "1", "ä": "ü", "a": "3", "m": "4"}
    for number in range(8):
        write_tensors(tmp_path / str(number), save(tensors, metadata))
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    with safe_open(tmp_path / "0", "pt") as file:
        assert file.metadata() == metadata
        assert all(torch.equal(file.get_tensor(name), values) for name, values in tensors.items())


def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unsupported)
    with claimed(tmp_path / "out.json"):
        write_json(tmp_path / "out.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


# ---- outputs of commands


def test_every_output_is_declared():
    """An argument that names a file or a directory is either read, or in its command's OUTPUTS, and in this file."""
    parsers = next(a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    found = set()
    for command, parser in parsers.items():
        declared = {f"{command} --{output.argument}" for output in cli.module(command).OUTPUTS}
        named = {
            f"{command} {action.option_strings[-1]}"
            for action in parser._actions
            if action.option_strings
            and any(word in str(action.metavar) for word in ("FILE", "OUT", "DIR"))
            and action.option_strings[-1] not in READ
        }
        assert named == declared
        found |= declared
    assert found == set(WRITING)


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("special", ["pipe", "/dev/null"])
def test_what_is_read_back_is_no_pipe(capsys, tmp_path, name, special):
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in refused(capsys, name, tmp_path / special)


@pytest.mark.parametrize("name", WRITING)
def test_two_runs_on_one_file(capsys, tmp_path, name):
    """The second is refused, and what it would have written stays the first one's."""
    out = tmp_path / "out.png"
    file = out / "rounds.safetensors" if name == "train-hrad --out" else out
    file.parent.mkdir(exist_ok=True)
    with claimed(file):
        write(file, b"")
        (tmp_path / "link.png").symlink_to(out)
        for path in (out, tmp_path / "link.png"):
            said = refused(capsys, name, path)
            assert said == (
                f"specbranch: error: {file} is being written by another run; wait for its end, or choose another\n"
            )
    assert file.read_bytes() == b""
    with claimed(file), pytest.raises(SpecBranchError, match="another run"), claimed(file):
        pass


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "content", [b"my notes\n", b'{"traceEvents": [{"ph": "X", "cat": "gpu"}], "displayTimeUnit": "ms"}', "checkpoint"]
)
def test_a_file_of_something_else_is_refused(capsys, tmp_path, name, content):
    out = tmp_path / "out.png"
    if content == "checkpoint":
        shutil.copy(bundled.path("draft") / "model.safetensors", out)
    else:
        out.write_bytes(content)
    before = out.read_bytes()
    for more in ([], ["--fresh"]) if name == "bench --json" else ([],):
        said = refused(capsys, name, out, *more)
        assert f"{out} is " in said
        assert "it stays as it is" in said
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


@pytest.mark.parametrize("name", FILES)
def test_a_directory_or_a_name_without_its_directory_is_refused(capsys, tmp_path, name):
    assert f"{tmp_path} is a directory; expected the name of a file" in refused(capsys, name, tmp_path)
    (tmp_path / "file").touch()
    said = refused(capsys, name, tmp_path / "file" / "out.png")
    assert f"{tmp_path / 'file'}" in said
    if name != "record --out":  # which makes it
        said = refused(capsys, name, tmp_path / "missing" / "out.png")
        assert f"No such file or directory: {tmp_path / 'missing'}" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["record --out", "train-hrad --out"])
def test_directories_made_for_an_output_go_again_when_nothing_is_in_them(capsys, tmp_path, name, monkeypatch):
    def fail(args):
        assert (tmp_path / "a" / "b").is_dir()
        raise ValueError("no such model")

    command = name.split()[0].replace("-", "_")
    monkeypatch.setattr(f"specbranch.cli.{command}.load_engine", fail)
    assert "no such model" in refused(capsys, name, tmp_path / "a" / "b" / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("name", WRITING)
def test_a_directory_that_cannot_be_written_is_named(capsys, tmp_path, name):
    tmp_path.chmod(0o500)
    said = refused(capsys, name, tmp_path / "out.png")
    assert f"{tmp_path}" in said
    assert "Permission denied" in said


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_directory_without_room_for_a_lock_is_named(capsys, tmp_path, monkeypatch, number):
    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.open", full)
    for name in WRITING:
        said = refused(capsys, name, tmp_path / "out.png")
        assert f"{tmp_path}" in said
        assert os.strerror(number) in said


# ---- what is read


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("way", ["itself", "relative", "symbolic link", "hard link"])
def test_an_output_that_is_read_too_is_refused(capsys, tmp_path, monkeypatch, name, way):
    read, out = tmp_path / "read.png", tmp_path / "read.png"
    shutil.copy(PROMPTS, read)
    monkeypatch.chdir(tmp_path)
    if way == "relative":
        (tmp_path / "sub").mkdir()
        out = Path("sub/../read.png")
    elif way == "symbolic link":
        out = tmp_path / "link.png"
        out.symlink_to("read.png")
    elif way == "hard link":
        out = tmp_path / "link.png"
        out.hardlink_to(read)
    before = read.read_bytes()
    line = [str(read) if word in (PROMPTS, "some.safetensors") else word for word in WRITING[name]]
    if name == "generate --trace":
        line[line.index("--prompt") : line.index("x") + 1] = ["--prompts", str(read)]
    assert cli.main([*line, str(out)]) == 1
    kind = {"plan --json": "records", "corpus --out": "files"}.get(name, "prompts")
    flag = name.split()[1]
    assert capsys.readouterr().err == (
        f"specbranch: error: {flag} {out} is among the {kind} that are read; choose another\n"
    )
    assert read.read_bytes() == before


def test_two_outputs_in_one_file_are_refused(capsys, tmp_path):
    out, link = tmp_path / "out.png", tmp_path / "link.png"
    link.symlink_to("out.png")
    for plot in (out, link):
        said = refused(capsys, "bench --json", out, "--plot", str(plot))
        assert f"--plot {plot} is --json too; choose another" in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *((name, role) for name in WRITING if not name.startswith(("plan", "corpus")) for role in ("target", "draft")),
        ("corpus --out", "tokenizer"),
    ],
)
def test_nothing_is_written_into_a_model_s_directory(capsys, tmp_path, name, role):
    own = bundled.path("target" if role == "tokenizer" else role)
    model = shutil.copytree(own, tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    for directory in (model, tmp_path / "link"):
        for file in ("config.json", "model.safetensors", "adapter_config.json"):  # the last is not there yet
            out = directory if name == "train-hrad --out" else directory / file
            said = refused(capsys, name, out, f"--{role}", str(model))
            assert f"the directory of --{role}, {model}" in said
    said = refused(capsys, name, own / ("" if name == "train-hrad --out" else "new.json"))
    assert f"the directory of --{role}, {own}" in said
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before


def test_a_file_where_standard_output_goes_is_refused(tmp_path):
    command = [sys.executable, "-m", "specbranch.cli", *WRITING["generate --trace"], "out"]
    with (tmp_path / "out").open("wb") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "--trace out is where standard output goes; choose another, or /dev/fd/1" in done.stderr


# ---- train-hrad's directory


@pytest.mark.parametrize("left", [("config.json", "model.safetensors"), ("config.json",), ("model.safetensors",)])
def test_train_hrad_does_not_overwrite_a_model(capsys, tmp_path, left):
    for name in left:
        shutil.copy(bundled.path("target") / name, tmp_path / name)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert f"{tmp_path} holds another model, which would be overwritten" in refused(
        capsys, "train-hrad --out", tmp_path
    )
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["notes.txt", "rounds.safetensors", "hrad.safetensors"])
def test_train_hrad_does_not_write_over_other_files(capsys, tmp_path, name):
    (tmp_path / name).write_text("my notes")
    said = refused(capsys, "train-hrad --out", tmp_path)
    assert name in said
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {name: "my notes"}
    assert "expected a directory" in refused(capsys, "train-hrad --out", tmp_path / name)
