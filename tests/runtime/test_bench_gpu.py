"""The benchmark of real shapes, on tiny ones: every contender gives the trace's tokens, and the report is whole."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_gpu  # noqa: E402
from traced_model import SHAPES, Trace, fold, kv_bytes, traced_model, weight_bytes  # noqa: E402

from specbranch import METHODS  # noqa: E402
from specbranch.replay.record import Record  # noqa: E402
from specbranch.runtime.graphs.probe import why_not_captured  # noqa: E402
from specbranch.runtime.graphs.runner import VERIFY_ROWS, CapturedRunner  # noqa: E402

TRACE = ROOT / "benchmarks/records/coder_good_t0.safetensors"
CPU = torch.device("cpu")


def test_a_run_gives_the_trace_s_tokens_and_a_whole_report(tmp_path, capsys):
    out = tmp_path / "report.json"
    pair = ["--target", "tiny-target", "--draft", "tiny-draft", "--trace", str(TRACE)]
    peers = ["--peers", "greedy,static,assisted", "--peer-limit", "1"]
    bench_gpu.main([*pair, *peers, "--device", "cpu", "--dtype", "float32", "--limit", "1", "--out", str(out)])
    report = json.loads(out.read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert set(rows) == {
        *METHODS,
        "specbranch, in turn",
        *(f"transformers {peer}" for peer in ("greedy", "static", "assisted")),
    }
    assert rows["autoregressive"]["tokens_per_target_forward"] == 1
    assert rows["speculative"]["tokens_per_target_forward"] > 3  # the recorded pair's acceptance
    assert rows["pearl"]["parts"]["round"] > rows["pearl"]["parts"]["target"] > 0
    assert set(report["step_seconds"]) == {
        f"target, {VERIFY_ROWS} rows",
        *(f"draft, {n} rows" for n in bench_gpu.ROWS),
    }
    assert min(report["step_seconds"].values()) > 0
    assert report["copy_bandwidth"] is None  # no GPU: no share of it either
    assert all("bandwidth_share" not in row for row in rows.values())
    assert "specbranch, in turn" in capsys.readouterr().out


RECORDING = [
    *("--target", "tiny-target", "--draft", "tiny-draft", "--trace", str(TRACE), "--device", "recording"),
    *("--dtype", "float32", "--tokens", "12", "--peers", "none", "--no-steps"),
]


def test_contenders_that_are_to_be_captured_are(tmp_path, capsys):
    out = tmp_path / "report.json"
    bench_gpu.main([*RECORDING, "--limit", "1", "--methods", "specbranch", "--eager", "--out", str(out)])
    runners = {row["name"]: row["runners"] for row in json.loads(out.read_text())["rows"]}
    assert {name for name, each in runners.items() if each["target"] == "captured"} == {
        *("autoregressive", "specbranch", "specbranch, in turn", "autoregressive, one row")
    }
    assert runners["specbranch"]["draft"] == "captured"
    assert runners["specbranch, eager"]["target"].startswith("eager")
    table = {line[:26].strip(): line[26:36].strip() for line in capsys.readouterr().out.splitlines()}
    assert (table["specbranch"], table["specbranch, eager"]) == ("captured", "eager")


@pytest.mark.parametrize("role", ["target", "draft"])
def test_a_contender_that_runs_eagerly_instead_is_not_timed(monkeypatch, role):
    monkeypatch.setattr(CapturedRunner, "_captured", refusing(role, CapturedRunner._captured))
    with (
        pytest.warns(RuntimeWarning, match="not captured any more"),
        pytest.raises(SystemExit, match=f"the {role}'s steps are to be captured, but run eager: capture failed: no"),
    ):
        bench_gpu.main([*RECORDING, "--limit", "1", "--methods", "specbranch"])


def refusing(role, captured):
    def refuse():
        raise RuntimeError("no graph today")

    def patched(self, fits, find):
        return captured(self, fits, refuse if self.model.role == role else find)

    return patched


@pytest.mark.parametrize("shape", ["tiny-target", "tiny-draft", "qwen2.5-0.5b"])
def test_a_traced_model_s_steps_can_be_captured(shape):
    """What is asked is a twin made from the configuration, which has no trace."""
    assert why_not_captured(stand_in(shape)) is None


def test_what_was_measured_is_there_when_a_run_is_cut_off(tmp_path, monkeypatch):
    out = tmp_path / "report.json"
    check, seen = bench_gpu.check, []

    def cut_off(name, contender, run, text, expected):
        seen.append(text.id)
        if len(set(seen)) == 3:
            raise KeyboardInterrupt
        check(name, contender, run, text, expected)

    monkeypatch.setattr(bench_gpu, "check", cut_off)
    with pytest.raises(KeyboardInterrupt):
        bench_gpu.main([*RECORDING, "--limit", "3", "--methods", "speculative", "--out", str(out)])
    report = json.loads(out.read_text())
    assert [(row["name"], row["texts"]) for row in report["rows"]] == [
        *(("autoregressive", 2), ("speculative", 2), ("autoregressive, one row", 2))
    ]


def test_a_contender_that_gives_other_tokens_ends_the_run(monkeypatch):
    monkeypatch.setattr(Trace, "suggest", lambda self, logits, positions, ids: None)  # a bad draft changes no token
    pair = ["--target", "tiny-target", "--draft", "tiny-draft", "--trace", str(TRACE), "--device", "cpu"]
    options = ["--dtype", "float32", "--limit", "1", "--peers", "none"]
    bench_gpu.main([*pair, *options])
    monkeypatch.setattr(Trace, "force", lambda self, logits, positions: None)
    with pytest.raises(SystemExit, match="is not the trace's"):
        bench_gpu.main([*pair, *options])


def test_shapes_of_different_vocabularies_are_refused():
    with pytest.raises(SystemExit, match="32000 and 151936"):
        bench_gpu.check_vocabularies(*(stand_in(name) for name in ("llama-68m", "qwen2.5-0.5b")))


def stand_in(shape):
    meta = torch.device("meta")
    return traced_model(shape, Trace(4, 2, SHAPES[shape].vocab_size, meta), True, torch.float32, meta)


def test_the_draft_says_what_was_recorded():
    """Candidates in their order with their probabilities on the text, and never the text's token beside it."""
    text = Record.load(TRACE).texts[0]
    trace = Trace(text.prompt_tokens + len(text) + 1, 6, 1000, CPU)
    prompt, new = trace.load(text)
    positions = torch.arange(len(prompt) - 1, len(prompt) + len(new) - 1)
    right = torch.tensor([prompt[-1], *new[:-1]])
    logits = torch.randn(len(new), 1000)
    trace.suggest(logits, positions, right)
    tokens = torch.tensor(new)
    agrees = logits.argmax(1) == tokens
    recorded = text.proposals.tokens[:, 0] == text.tokens
    assert torch.equal(agrees, recorded)
    confidence = logits.softmax(1).max(1).values
    torch.testing.assert_close(confidence, text.proposals.agreement[:, 0].clamp(max=0.99999), rtol=1e-3, atol=1e-3)
    trace.suggest(logits, positions, (right + 1) % 1000)
    assert not (logits.topk(6).indices == tokens[:, None]).any()


def test_folding_keeps_equal_what_was_equal_and_different_what_was_different():
    assert fold([5, 7, 1005], 5, 1000) == [5, 7, 6]
    assert fold([1005, 5], 5, 1000) == [6, 5]
    assert fold([2005, 1005, 3], 1005, 1000) == [6, 5, 3]


def test_bytes_that_a_forward_reads():
    model = traced_model("tiny-target", Trace(4, 2, 1000, CPU), True, torch.bfloat16, CPU)
    everything = sum(weight.nbytes for weight in model.parameters())
    assert weight_bytes(model) == everything - 1000 * 64 * 2  # the input embedding is looked up, not read
    assert kv_bytes(model, 10) == 2 * 4 * 2 * 16 * 10 * 2
