"""`specbranch bench --peers llama.cpp`: what its server is asked, how figures arrive, and that nothing is left behind.

llama.cpp itself is in no test: a script of its server's name, first on the PATH, stands for it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from specbranch import bundled
from specbranch.cli import main as cli
from specbranch.cli.bench import llama_peer, process
from specbranch.cli.bench.command import laps
from specbranch.cli.bench.llama_peer import NAMES, LlamaServer
from specbranch.text.encoding import encode

PAIR = ["--target", "bundled", "--draft", "bundled", "--threads", "1"]
GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
SERVER: dict[str, Any] = {"models": {"target": "t.gguf", "draft": "d.gguf"}, "positions": 64, "threads": 1}

FAKE = """
import http.server, json, os, socketserver, sys

FAULT = os.environ.get("FAKE_FAULT", "")

def note(**values):
    with open(os.environ["FAKE_NOTES"], "a") as notes:
        notes.write(json.dumps(values) + "\\n")

if sys.argv[1:] == ["--version"]:
    if FAULT == "broken":
        sys.exit("a library is missing")
    print("loading something\\nversion: 7 (fake)\\nbuilt with care", file=sys.stderr)
    sys.exit()

options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
variables = [name for name in os.environ if name.startswith("LLAMA_")]
note(server=os.getpid(), options=options, variables=variables)
if FAULT == "start":
    sys.exit("0.00.1 I it warms up\\n0.00.2 E load:   this is no model\\n0.00.3 E exiting due to an error")
if FAULT == "option":
    sys.exit("error: invalid argument: --fit")
asked = {"health": 0, "text": 0}

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def address_string(self):
        return "here"

    def do_GET(self):
        asked["health"] += 1
        self.answer(200 if asked["health"] > 2 and FAULT != "loads" else 503, {})

    def do_POST(self):
        asked["text"] += 1
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        note(**request)
        if FAULT == "dies" and asked["text"] == 3:  # after the warm-up and the first prompt
            print("the end has come\\n", file=sys.stderr, flush=True)
            os._exit(1)
        if FAULT == "refuses" and asked["text"] == 2:
            return self.answer(400, {"error": {"code": 400, "message": "not this\\none"}})
        read = len(request["prompt"]) - (FAULT == "remembers")
        tokens = ["5" if FAULT == "nonsense" else 5] * request["n_predict"]
        timings = {"prompt_n": read, "prompt_ms": 20.0, "predicted_ms": 10 * (len(tokens) - 1)}
        self.answer(200, {"tokens": tokens, "timings": timings})

    def answer(self, status, values):
        content = b"hello" if FAULT == "talks" and status == 200 and values else json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

socketserver.ThreadingUnixStreamServer(options["--host"], Handler).serve_forever()
"""


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """A server on the PATH; what it was asked."""
    folder, file = tmp_path / "bin", tmp_path / "notes"
    folder.mkdir()
    (folder / "fake.py").write_text(FAKE)
    server = folder / llama_peer.PROGRAM
    server.write_text(f'#!/bin/sh\nexec {sys.executable} -S {folder}/fake.py "$@"\n')
    server.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_NOTES", str(file))
    with tempfile.TemporaryDirectory() as logs:  # a short name, as sockets have no others
        monkeypatch.setattr("tempfile.tempdir", logs)

        def read() -> list[dict[str, Any]]:
            return [json.loads(line) for line in file.read_text().splitlines()]

        yield read
        assert not [path for path in Path(logs).iterdir() if path.is_dir()]  # no sockets
    if file.exists():
        wait_for_the_end_of(*(note["server"] for note in read() if "server" in note))


@pytest.fixture
def bench(tmp_path, notes):
    """A run over two prompts into out.json."""
    prompts, out = tmp_path / "some.jsonl", tmp_path / "out.json"
    prompts.write_text("".join(json.dumps(record) + "\n" for record in bundled.prompts()[:2]), encoding="utf-8")
    files = {role: tmp_path / f"{role}.gguf" for role in ("target", "draft")}
    for file in files.values():
        file.touch()

    def run(peers: str, *more: str) -> int:
        options = ["--prompts", str(prompts), "--max-new-tokens", "8", "--methods", "autoregressive"]
        models = [word for role, file in files.items() for word in (f"--llama-{role}", str(file))]
        return cli.main(["bench", *PAIR, *options, *models, "--peers", peers, "--json", str(out), *more])

    run.out, run.files = out, files  # type: ignore[attr-defined]
    return run


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for_the_end_of(*processes: int) -> None:
    until = time.monotonic() + 5
    while any(map(is_alive, processes)):
        assert time.monotonic() < until
        time.sleep(0.01)


def done(out: Path) -> list[tuple[str, str]]:
    return [(r["id"], r["name"]) for r in json.loads(out.read_text())["records"] if r["error"] is None]


# ---- the run


def test_figures_arrive_and_what_was_asked_for_them(bench, capsys, monkeypatch, notes, bundled_pair):
    monkeypatch.setenv("LLAMA_ARG_N_PARALLEL", "4")
    assert bench("greedy,llama.cpp") == 0
    result = json.loads(bench.out.read_text())
    names = ["autoregressive", "greedy", *NAMES]
    assert [row["name"] for row in result["rows"]] == names
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert all(line in printed.splitlines() for line in result["notes"])
    assert "llama.cpp: its weights are those of its own files, so its texts are not compared" in result["notes"]
    assert result["versions"]["llama.cpp"] == "version: 7 (fake)"
    theirs = [record for record in result["records"] if record["name"] in NAMES]
    assert len(theirs) == 6
    for record in theirs:
        assert record["tokens"] == [5] * 8
        assert record["prefill_seconds"] == 0.02
        assert record["seconds"] == pytest.approx(0.09)
        assert record["decode_tokens_per_second"] == pytest.approx(100)  # the first one came with the prompt
        assert record["same_tokens"] is None
        assert record["memory_over_bytes"] is record["peak_resident_bytes"] is None

    said = notes()
    servers = [note["options"] for note in said if "server" in note]
    assert not any(note["variables"] for note in said if "server" in note)
    longest = max(len(encode(bundled_pair.tokenizer, record["prompt"])) for record in bundled.prompts()[:2])
    assert [server.get("--spec-draft-n-max") for server in servers] == [None, "4", "8"]
    assert [server.get("--spec-draft-model") for server in servers] == [None, *[str(bench.files["draft"])] * 2]
    for server in servers:
        assert server["--model"] == str(bench.files["target"])
        assert server["--threads"] == server["--threads-batch"] == server["--parallel"] == "1"
        assert int(server["--ctx-size"]) == longest + 8 + process.ROOM
    requests = [note for note in said if "prompt" in note]
    assert len(requests) == 3 * 3  # a warm-up each
    prompts = [encode(bundled_pair.tokenizer, record["prompt"]) for record in bundled.prompts()[:2]]
    for request in requests:
        assert request["prompt"] in prompts
        assert (request["n_predict"], request["cache_prompt"]) == (8, False)
        assert (request["samplers"], request["top_k"]) == (["top_k"], 1)


def test_it_samples_as_asked(bench, notes):
    sampling = ["--temperature", "0.7", "--top-k", "9", "--top-p", "0.5", "--min-p", "0.1", "--seed", str(2**32 + 3)]
    assert bench("llama.cpp-8", *sampling) == 0
    expected = {"temperature": 0.7, "top_k": 9, "top_p": 0.5, "min_p": 0.1, "seed": 4}
    for request in (note for note in notes() if "prompt" in note):
        assert {name: request[name] for name in expected} == expected
        assert request["samplers"] == ["top_k", "temperature", "top_p", "min_p"]
    result = json.loads(bench.out.read_text())
    assert any("keeps a drafted token only where it draws" in note for note in result["notes"])


def parsed(*options: str) -> Any:
    models = [] if "--target" in options else PAIR
    return cli.build_parser().parse_args(["bench", *models, "--prompts", "x", *options])


def test_names():
    def asked(peers: str) -> list[list[str]]:
        return laps(parsed("--methods", "pearl", "--peers", peers))

    ours = ["pearl", "autoregressive"]
    assert asked("llama.cpp") == [[*ours, *NAMES]] == asked(",".join(NAMES))
    assert asked("llama.cpp-4,vllm-plain,vllm-2")[1:] == [["autoregressive", "vllm-2"]]


def test_its_files_are_our_models_or_named_for_it(tmp_path):
    files = [str(tmp_path / f"{name}.gguf") for name in "abc"]
    for file in files:
        Path(file).touch()
    ours = ["--target", files[0], "--draft", files[1], "--peers", "llama.cpp"]
    assert llama_peer.models(parsed(*ours)) == {"target": files[0], "draft": files[1]}
    assert llama_peer.has_our_weights(parsed(*ours))
    assert llama_peer.notes(parsed(*ours))[-1].endswith("so texts may part from ours")
    assert "other noise" in llama_peer.notes(parsed(*ours, "--temperature", "1"))[-2]
    other = parsed(*ours, "--llama-target", files[2])
    assert llama_peer.models(other) == {"target": files[2], "draft": files[1]}
    assert not llama_peer.has_our_weights(other)
    plain = parsed("--target", files[0], "--draft", "a folder", "--peers", "llama.cpp-plain")
    assert llama_peer.models(plain) == {"target": files[0]}


def test_greedy_texts_are_compared_where_the_weights_are_ours(bench, monkeypatch):
    monkeypatch.setattr(llama_peer, "has_our_weights", lambda args: True)
    assert bench("llama.cpp-plain") == 0
    records = json.loads(bench.out.read_text())["records"]
    assert {r["same_tokens"] for r in records if r["name"] == "llama.cpp-plain"} == {False}


def test_an_interrupted_run_ends_its_servers_and_goes_on(bench, capsys, monkeypatch, notes):
    generate, calls = LlamaServer.generate, []

    def interrupted(self, ids, **options):
        calls.append(self)
        if len(calls) == 4:  # two warm-ups, two of the first prompt
            os.kill(os.getpid(), signal.SIGINT)
        return generate(self, ids, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LlamaServer, "generate", interrupted)
        assert bench("llama.cpp-plain,llama.cpp-4") == 130
    assert "of 6 measurements" in capsys.readouterr().err
    wait_for_the_end_of(*(note["server"] for note in notes() if "server" in note))
    before = json.loads(bench.out.read_text())["records"]
    assert bench("llama.cpp-plain,llama.cpp-4") == 0
    result = json.loads(bench.out.read_text())
    assert [r for r in result["records"] if r in before] == before
    assert len(set(done(bench.out))) == len(result["records"]) == 6


# ---- what goes wrong


def test_one_that_dies_is_reported_and_the_others_go_on(bench, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_FAULT", "dies")
    assert bench("llama.cpp-4,greedy") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("specbranch: error: llama.cpp-4 on bundled/1: it ended: the end has come (its log: /")
    assert "the end has come" in Path(line.removesuffix(")").rpartition(" ")[2]).read_text()
    assert len(done(bench.out)) == 5


def test_one_that_has_died_is_not_asked_again(monkeypatch, notes):
    monkeypatch.setenv("FAKE_FAULT", "dies")
    with LlamaServer("llama.cpp-plain", **SERVER) as server:
        for _ in range(2):
            server.generate([1], max_new_tokens=4, **GREEDY)
        for _ in range(2):
            with pytest.raises(ChildProcessError, match="it ended: the end has come"):
                server.generate([1], max_new_tokens=4, **GREEDY)


def test_what_it_refuses_is_an_error_of_that_prompt(bench, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_FAULT", "refuses")
    assert bench("llama.cpp-4") == 1
    assert "llama.cpp-4 on bundled/0: not this one (its log: " in capsys.readouterr().err
    records = json.loads(bench.out.read_text())["records"]
    assert [record["error"] is None for record in records if record["name"] == "llama.cpp-4"] == [False, True]


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("start", "it ended: load: this is no model (its log: "),
        ("option", "it ended: error: invalid argument: --fit (its log: "),
        ("talks", "its answer cannot be understood"),
        ("nonsense", "its answer cannot be understood"),
        ("remembers", "tokens of the prompt"),
    ],
)
def test_one_that_cannot_be_used_is_reported_and_the_others_go_on(bench, capsys, monkeypatch, fault, expected):
    monkeypatch.setenv("FAKE_FAULT", fault)
    assert bench("greedy,llama.cpp-plain,llama.cpp-8") == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[2] for line in lines] == ["llama.cpp-plain", "llama.cpp-8"]
    assert all(expected in line for line in lines)
    assert {name for _, name in done(bench.out)} == {"autoregressive", "greedy"}
    monkeypatch.setenv("FAKE_FAULT", "")
    assert bench("greedy,llama.cpp-plain,llama.cpp-8") == 0
    assert len(done(bench.out)) == 8


def test_what_is_missing_is_said_before_anything_is_loaded(bench, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("specbranch.cli.bench.command.load_engine", lambda args: pytest.fail("loaded"))

    def said(*options: str) -> str:
        assert cli.main(["bench", *PAIR, "--prompts", str(tmp_path / "some.jsonl"), *options]) == 1
        return capsys.readouterr().err

    (tmp_path / "some.jsonl").write_text(json.dumps(bundled.prompts()[0]) + "\n", encoding="utf-8")
    assert said("--peers", "llama.cpp") == (
        "specbranch: error: --peers llama.cpp needs --llama-target FILE.gguf: --target bundled is no such file\n"
    )
    target = ["--llama-target", str(bench.files["target"])]
    assert "needs --llama-draft FILE.gguf" in said("--peers", "llama.cpp-4", *target)
    assert "--llama-draft: there is no file x.gguf" in said("--peers", "llama.cpp", *target, "--llama-draft", "x.gguf")
    assert "--llama-target is for --peers llama.cpp" in said("--peers", "none", *target)
    assert "runs on the CPU, not with --device cuda" in said("--peers", "llama.cpp", *target, "--device", "cuda")
    monkeypatch.setenv("FAKE_FAULT", "broken")
    assert said("--peers", "llama.cpp-plain", *target) == (
        "specbranch: error: llama-server does not run: a library is missing\n"
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    assert said("--peers", "llama.cpp-plain", *target) == (
        "specbranch: error: --peers llama.cpp needs llama.cpp's llama-server on the PATH\n"
    )


# ---- its process


@pytest.mark.parametrize("fault", ["", "loads"])
def test_a_killed_bench_leaves_nothing(monkeypatch, notes, tmp_path, fault):
    """Whether its server listens already, or is loading."""
    monkeypatch.setenv("FAKE_FAULT", fault)
    folder = tmp_path / "left"  # of a process that cannot clean up
    folder.mkdir()
    script = f"""
import os, signal, tempfile, threading, time
from specbranch.cli.bench.llama_peer import LlamaServer
tempfile.tempdir = {tempfile.gettempdir()!r}
def kill():
    while {fault!r} and not os.path.exists(os.environ["FAKE_NOTES"]):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
if {fault!r}:
    threading.Thread(target=kill).start()
server = LlamaServer("llama.cpp-plain", **{SERVER})
kill()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (server,) = [note["server"] for note in notes()]
    wait_for_the_end_of(server)
    for left in Path(tempfile.gettempdir()).glob("specbranch-*/s.sock"):
        left.unlink()
        left.parent.rmdir()
