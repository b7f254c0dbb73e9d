"""`specbranch bench --peers vllm`: what is asked of vLLM, how its figures arrive, and that nothing is left behind.

vLLM itself is in no test: a module of that name stands for it, in the processes that would run the real one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specbranch import bundled
from specbranch.cli import main as cli
from specbranch.cli.bench import process, report, vllm_peer
from specbranch.cli.bench.command import laps
from specbranch.cli.bench.vllm_peer import NAMES, PYTHON, VllmEngine
from specbranch.text.encoding import encode

PAIR = ["--target", "bundled", "--draft", "bundled", "--threads", "1"]
SETUP = {"target": "here", "draft": "there", "dtype": "float32"}
GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}

FAKE = """
import json, os, subprocess, sys, time
from types import SimpleNamespace as SamplingParams

FAULT = os.environ.get("FAKE_FAULT", "")
print("anything that a library prints")

def note(**values):
    with open(os.environ["FAKE_NOTES"], "a") as notes:
        notes.write(json.dumps(values) + "\\n")

class LLM:
    def __init__(self, model, **options):
        if FAULT == "start":
            print("(Worker pid=1) WARNING 01-01 [worker.py:1] ValueError: no tokenizer", file=sys.stderr)
            print("(Worker pid=1) ERROR 01-01 [worker.py:1] MemoryError: too little memory", file=sys.stderr)
            raise RuntimeError("Engine core initialization failed. See root cause above.")
        core = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        note(model=model, core=core.pid, preload=os.environ["LD_PRELOAD"], **options)
        self.llm_engine, self.requests = self, 0

    def add_request(self, number, prompt, sampling):
        note(prompt=prompt, **vars(sampling))
        self.requests += 1
        if FAULT == "dies" and self.requests == 3:  # after the warm-up and the first prompt
            print("the end has come\\n", file=sys.stderr, flush=True)
            os._exit(1)
        if FAULT == "refuses" and self.requests == 2:
            raise ValueError("not this\\none")
        token = 6 if sampling.temperature > 0 and (sampling.top_k != 1 or FAULT == "unfiltered") else 5
        tokens = [str(token) if FAULT == "nonsense" else token] * sampling.max_tokens
        self.steps = [tokens[:2], tokens]

    def has_unfinished_requests(self):
        return bool(self.steps)

    def step(self):
        time.sleep(0.02)
        return [SamplingParams(outputs=[SamplingParams(token_ids=self.steps.pop(0))])]
"""


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """A Python that has a vllm; what that was asked."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "vllm.py").write_text(FAKE)
    python, file = tmp_path / "other_python", tmp_path / "notes"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv(PYTHON, str(python))
    monkeypatch.setenv("FAKE_NOTES", str(file))
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # of this process
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def read() -> list[dict[str, Any]]:
        return [json.loads(line) for line in file.read_text().splitlines()]

    yield read
    if file.exists():
        wait_for_the_end_of(*(note["core"] for note in read() if "core" in note))


@pytest.fixture
def bench(tmp_path, notes):
    """A run over two prompts into out.json."""
    prompts, out = tmp_path / "some.jsonl", tmp_path / "out.json"
    prompts.write_text("".join(json.dumps(record) + "\n" for record in bundled.prompts()[:2]), encoding="utf-8")

    def run(peers: str, *more: str) -> int:
        options = ["--prompts", str(prompts), "--max-new-tokens", "8", "--methods", "autoregressive"]
        return cli.main(["bench", *PAIR, *options, "--peers", peers, "--json", str(out), *more])

    run.out = out  # type: ignore[attr-defined]
    return run


def state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def wait_for(states: str, *processes: int) -> None:
    """Signals take a moment."""
    until = time.monotonic() + 5
    while any(state(process) not in states for process in processes):
        assert time.monotonic() < until, [state(process) for process in processes]
        time.sleep(0.01)


def wait_for_the_end_of(*processes: int) -> None:
    wait_for("ZX", *processes)


def done(out: Path) -> list[tuple[int, str, str]]:
    return [(report.lap(r), r["id"], r["name"]) for r in json.loads(out.read_text())["records"]]


# ---- the run


def test_figures_arrive_and_what_was_asked_for_them(bench, capsys, notes, tmp_path, bundled_pair):
    assert bench("greedy,vllm") == 0
    result = json.loads(bench.out.read_text())
    names = ["autoregressive", "greedy", *NAMES]
    assert [row["name"] for row in result["rows"]] == names
    table = capsys.readouterr().out
    assert all(name in table for name in names)
    for row in result["rows"]:
        assert row["prompts"] == 2
        assert row["ratio_to_greedy"] > 0
        assert row["ratio_to_autoregressive"] > 0
    assert set(result["versions"]) >= {"vllm", "vllm_python"}
    theirs = [record for record in result["records"] if record["name"] in NAMES]
    assert len(theirs) == 8
    for record in theirs:
        assert record["tokens"] == [5] * 8
        assert 0.02 <= record["prefill_seconds"] < record["seconds"]
        decoding = record["seconds"] - record["prefill_seconds"]
        assert record["decode_tokens_per_second"] == pytest.approx(6 / decoding)  # the first step had two
        assert record["same_tokens"] is False
        assert record["memory_over_bytes"] is record["peak_resident_bytes"] is None

    said = notes()
    started = [note for note in said if "model" in note]
    drafts = [engine.pop("speculative_config", None) for engine in started]
    assert [draft and draft["num_speculative_tokens"] for draft in drafts] == [None, 2, 4, 6]
    assert {draft["model"] for draft in drafts if draft} == {str(bundled.path("draft"))}
    longest = max(len(encode(bundled_pair.tokenizer, record["prompt"])) for record in bundled.prompts()[:2])
    for engine in started:
        assert engine["model"] == str(bundled.path("target"))
        assert engine["generation_config"] == "vllm"
        assert engine["enable_prefix_caching"] is False
        assert engine["dtype"] == "float32"
        assert longest + 8 < engine["max_model_len"] <= longest + 8 + process.ROOM
    requests = [note for note in said if "prompt" in note]
    assert len(requests) == 4 * 3  # a warm-up each
    stop = bundled_pair.target.generation_config.eos_token_id
    for request in requests:
        assert request["ignore_eos"]
        assert request["stop_token_ids"] == ([stop] if isinstance(stop, int) else stop)
        assert (request["temperature"], request["max_tokens"]) == (0, 8)
        assert request["prompt"]["prompt_token_ids"] in [
            encode(bundled_pair.tokenizer, record["prompt"]) for record in bundled.prompts()[:2]
        ]
    assert not list(tmp_path.glob("*.log"))


def test_engines_run_one_after_the_other_each_beside_the_bases(bench):
    assert bench("vllm-4,greedy,vllm-plain") == 0
    first, bases = ["autoregressive", "greedy", "vllm-4"], ["autoregressive", "greedy", "vllm-plain"]
    expected = [(0, first), (1, bases)]
    assert sorted(done(bench.out)) == sorted(
        (lap, f"bundled/{i}", name) for lap, names in expected for i in range(2) for name in names
    )


def test_names(monkeypatch):
    def asked(peers: str, *more: str) -> list[list[str]]:
        models = ["bench", *PAIR, "--prompts", "x", "--methods", "pearl"]
        return laps(cli.build_parser().parse_args([*models, "--peers", peers, *more]))

    ours = ["pearl", "autoregressive"]
    assert asked("none") == [ours]
    assert asked("greedy") == [[*ours, "greedy"]]
    assert asked("vllm-2") == [[*ours, "vllm-2"]]
    assert asked("vllm") == asked(",".join(NAMES)) == asked("vllm,vllm-2")
    assert asked("vllm")[1:] == [["autoregressive", name] for name in NAMES[1:]]


def test_ratios_are_to_what_ran_in_the_same_lap():
    def record(name: str, lap: int, speed: float) -> report.Record:
        known = dict.fromkeys(("error", "stats", "same_tokens", "first_difference", "memory_over_bytes"))
        figures = {"tokens_per_second": speed, "decode_tokens_per_second": speed, "prefill_seconds": 1.0}
        return {"name": name, "lap": lap, "task": "t", "id": "a", "new_tokens": 3, **known, **figures}

    records = [record("autoregressive", 0, 4.0), record("vllm-plain", 0, 8.0)]
    records += [record("autoregressive", 1, 2.0), record("vllm-2", 1, 8.0)]
    rows = {row["name"]: row for row in report.summarize(records)}
    assert {name: row["ratio_to_autoregressive"] for name, row in rows.items()} == {
        "autoregressive": 1,
        "vllm-plain": 2,
        "vllm-2": 4,
    }
    assert (rows["autoregressive"]["prompts"], rows["autoregressive"]["tokens_per_second"]) == (1, 4.0)


@pytest.mark.parametrize("done_before", [2, 4, 6])
def test_an_interrupted_run_ends_its_engine_and_goes_on(bench, capsys, monkeypatch, notes, done_before):
    generate, calls = VllmEngine.generate, []

    def interrupted(self, ids, **options):
        calls.append(self)
        if len(calls) == {2: 3, 4: 4, 6: 6}[done_before]:  # a lap: warm-up, two prompts
            os.kill(os.getpid(), signal.SIGINT)
        return generate(self, ids, **options)

    with monkeypatch.context() as patch:
        patch.setattr(VllmEngine, "generate", interrupted)
        assert bench("vllm-plain,vllm-6") == 130
    assert f"interrupted after {done_before} of 8 measurements" in capsys.readouterr().err
    wait_for_the_end_of(*(note["core"] for note in notes() if "core" in note))
    before = json.loads(bench.out.read_text())["records"]
    assert bench("vllm-plain,vllm-6") == 0
    result = json.loads(bench.out.read_text())
    assert [r for r in result["records"] if r in before] == before
    assert len(set(done(bench.out))) == len(result["records"]) == 8
    started = len(notes())
    assert bench("vllm-plain,vllm-6") == 0  # is complete
    assert len(notes()) == started


# ---- what goes wrong


def test_one_that_dies_is_reported_and_the_others_go_on(bench, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_FAULT", "dies")
    assert bench("vllm-2,greedy") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("specbranch: error: vllm-2 on bundled/1: it ended: the end has come (its log: /")
    assert len(done(bench.out)) == 6
    log = lines[0].removesuffix(")").rpartition(" ")[2]
    assert "the end has come" in Path(log).read_text()


def test_one_that_has_died_is_not_asked_again(monkeypatch, notes):
    monkeypatch.setenv("FAKE_FAULT", "dies")
    with VllmEngine("vllm-plain", SETUP, cores=[0], stop=[]) as engine:
        for _ in range(2):
            engine.generate([1], max_new_tokens=4, **GREEDY)
        for _ in range(2):
            with pytest.raises(ChildProcessError, match="it ended: the end has come"):
                engine.generate([1], max_new_tokens=4, **GREEDY)


def test_what_vllm_refuses_is_an_error_of_that_prompt(bench, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_FAULT", "refuses")
    assert bench("vllm-2") == 1
    assert "vllm-2 on bundled/0: ValueError: not this one (its log: " in capsys.readouterr().err
    records = json.loads(bench.out.read_text())["records"]
    assert [record["error"] is None for record in records if record["name"] == "vllm-2"] == [False, True]


@pytest.mark.parametrize("lap", [0, 1])
def test_one_that_does_not_start_is_reported_and_tried_again(bench, capsys, monkeypatch, lap):
    peers = ["vllm-plain,greedy", "greedy,vllm-plain,vllm-2"][lap]
    bad = ["vllm-plain", "vllm-2"][lap]
    start = VllmEngine.__init__

    def fails(self, name, *arguments, **options):
        monkeypatch.setenv("FAKE_FAULT", "start" if name == bad else "")
        start(self, name, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(VllmEngine, "__init__", fails)
        assert bench(peers) == 1
    monkeypatch.setenv("FAKE_FAULT", "")
    captured = capsys.readouterr()
    assert captured.err.startswith(f"specbranch: error: {bad}: MemoryError: too little memory (its log: ")
    assert captured.err.count("\n") == 1
    assert "greedy" in captured.out
    assert {name for _, _, name in done(bench.out)} == {"autoregressive", *peers.split(",")} - {bad}
    assert bench(peers) == 0
    assert len(done(bench.out)) == [6, 12][lap]


def test_nonsense_is_no_answer(monkeypatch, notes):
    monkeypatch.setenv("FAKE_FAULT", "nonsense")
    engine = VllmEngine("vllm-plain", SETUP, cores=[0], stop=[])
    with engine, pytest.raises(ChildProcessError, match="its answer cannot be understood"):
        engine.generate([1], max_new_tokens=4, **GREEDY)


@pytest.mark.parametrize("line", ["hello", "[1]", '{"ready": false}', '{"ready": true'])
def test_one_that_is_no_worker_does_not_start(monkeypatch, tmp_path, line):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nread request\necho '{line}'\nsleep 100\n")
    python.chmod(0o755)
    monkeypatch.setenv(PYTHON, str(python))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ChildProcessError, match="its answer cannot be understood"):
        VllmEngine("vllm-plain", SETUP, cores=[0], stop=[])


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (None, "--peers vllm needs SPECBRANCH_VLLM_PYTHON: the Python of an environment that has vllm"),
        ("/no/such/python", "SPECBRANCH_VLLM_PYTHON: there is no program /no/such/python"),
        ("/bin/false", "SPECBRANCH_VLLM_PYTHON: /bin/false does not run as a Python: it ended with status 1"),
        ("/bin/echo", "SPECBRANCH_VLLM_PYTHON: /bin/echo does not run as a Python: it ended with status 0"),
        (sys.executable, f"SPECBRANCH_VLLM_PYTHON: {sys.executable} has no vllm"),
    ],
)
def test_no_vllm_is_said_before_anything_is_loaded(bench, capsys, monkeypatch, named, expected):
    monkeypatch.setattr("specbranch.cli.bench.command.load_engine", lambda args: pytest.fail("loaded"))
    if named is None:
        monkeypatch.delenv(PYTHON)
    else:
        monkeypatch.setenv(PYTHON, named)
    assert bench("vllm-2") == 1
    assert capsys.readouterr().err == f"specbranch: error: {expected}\n"


def test_vllm_is_for_a_cpu(bench, capsys):
    assert bench("vllm", "--device", "cuda") == 1
    assert "--peers vllm runs on the CPU, not with --device cuda" in capsys.readouterr().err


def test_at_a_temperature_only_one_that_samples(bench, capsys, monkeypatch):
    assert bench("vllm-2", "--temperature", "1") == 0
    records = json.loads(bench.out.read_text())["records"]
    theirs = [record for record in records if record["name"] == "vllm-2"]
    assert [(record["tokens"], record["same_tokens"]) for record in theirs] == [([6] * 8, None)] * 2
    monkeypatch.setenv("FAKE_FAULT", "unfiltered")
    assert bench("vllm-2", "--temperature", "1", "--fresh") == 1
    assert "vllm-2: this vLLM does not sample as asked; tried with --top-k 1" in capsys.readouterr().err
    assert {name for _, _, name in done(bench.out)} == {"autoregressive"}


# ---- its processes


@pytest.fixture
def engine(notes) -> Iterator[VllmEngine]:
    with VllmEngine("vllm-2", SETUP, cores=[0], stop=[]) as engine:
        yield engine


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are listed in /proc")
def test_an_idle_engine_stands_still(engine, notes):
    (core,) = [note["core"] for note in notes()]
    wait_for("T", core)
    for _ in range(3):
        assert len(engine.generate([1, 2], max_new_tokens=4, **GREEDY).tokens) == 4
        wait_for("T", core)
    engine.close()
    assert state(core) in "ZX"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are listed in /proc")
def test_a_killed_bench_leaves_nothing(notes):
    script = f"""
import os, signal
from specbranch.cli.bench.vllm_peer import VllmEngine
engine = VllmEngine("vllm-plain", {SETUP}, cores=[0], stop=[])
print(engine._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (core,) = [note["core"] for note in notes()]
    wait_for_the_end_of(core)
    os.killpg(int(done.stdout), signal.SIGKILL)  # which would wait for a core that does not end


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    assert set(vllm_peer.cores(1)) <= set(usable)
    assert sorted(vllm_peer.cores(1000)) == usable
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert vllm_peer.cores(1) == [3]
    assert vllm_peer.cores(2) == [3, 5]
