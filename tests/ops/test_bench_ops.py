"""The benchmark of the ops: what it makes of cases that fail, of limits, and of a GPU, which is made up here."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_ops  # noqa: E402
from op_case import Built, Case, Peer  # noqa: E402
from op_case_cuda import EAGER_CALLS, GRAPH_CALLS, MAX_COPIES, Gpu, measure_cuda  # noqa: E402


def fail(error: BaseException) -> Callable[[], None]:
    def function() -> None:
        raise error

    return function


class Toy:
    """A case that counts what is done with it."""

    def __init__(self, **peers: Peer) -> None:
        self.done: Counter[str] = Counter()
        self.peers = peers or {"torch": Peer(self.count("torch"))}

    def count(self, name: str) -> Callable[[], None]:
        return lambda: self.done.update([name])

    def build(self) -> Built:
        self.done["build"] += 1
        return Built(self.count("ours"), self.peers, self.count("check"))

    def case(self, what: str = "toy", build: Callable[[], Any] | None = None, **options: Any) -> Case:
        return Case("op", what, build or self.build, bytes=1, **options)


class MadeUpGpu(Gpu):
    """Its time is the number of calls since the last one; a graph's calls are those that were captured."""

    def __init__(self, toy: Toy, waits: bool = False, captures_fail: bool = False) -> None:
        self.toy, self.waits, self.captures_fail = toy, waits, captures_fail

    def synchronize(self) -> None:
        pass

    def seconds(self, work: Callable[[], object]) -> float:
        before = self.toy.done.total()
        work()
        return float(self.toy.done.total() - before)

    def check_that_it_does_not_wait(self, function: Callable[[], object]) -> None:
        if self.waits:
            raise RuntimeError("called a synchronizing operation")

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        before = self.toy.done.copy()
        work()
        if self.captures_fail:
            raise RuntimeError("no graph\nat all")
        calls = self.toy.done - before
        self.toy.done["captures"] += 1
        return lambda: self.toy.done.update(dict.fromkeys(calls, 3))  # cheaper than what was captured


def run(monkeypatch: pytest.MonkeyPatch, out: Path, cases: list[Case], *options: str) -> tuple[int, list[Any]]:
    monkeypatch.setattr(bench_ops, "CASES", {"tree_attention": None})
    monkeypatch.setattr(bench_ops, "tree_attention_cases", lambda device, flex: cases)
    monkeypatch.setattr(bench_ops, "read_bandwidth", lambda: 1e9)
    status = bench_ops.main(["--seconds", "0", "--json", str(out), "--threads", "1", *options])
    return status, read(out)


def read(out: Path) -> list[Any]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_a_case_that_fails_is_reported_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    toy = Toy()
    wrong = Built(lambda: None, toy.peers, check=fail(AssertionError("\nother tokens\nthan expected")))
    cases = [
        toy.case("out of memory", build=fail(torch.OutOfMemoryError("too much"))),
        toy.case("wrong", build=lambda: wrong),
        toy.case("fine"),
    ]
    status, (machine, *rows) = run(monkeypatch, tmp_path / "ops.jsonl", cases)
    assert status == 1
    assert {"command", "device", "machine", "versions", "threads", "bytes_per_second"} == set(machine)
    assert [row.get("error") for row in rows] == ["OutOfMemoryError: too much", "AssertionError: other tokens", None]
    assert rows[1]["details"].endswith("than expected")
    assert rows[2]["ratio"] > 0
    printed = capsys.readouterr().out
    assert "failed: AssertionError: other tokens\n" in printed
    assert "failed: 2 of 3 cases" in printed


def test_what_was_measured_is_there_after_a_crash(monkeypatch, tmp_path):
    toy = Toy()
    cases = [toy.case("first"), toy.case("second", build=fail(KeyboardInterrupt())), toy.case("third")]
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path / "ops.jsonl", cases)
    assert [row.get("case") for row in read(tmp_path / "ops.jsonl")] == [None, "first"]


def test_a_limit_says_what_it_leaves_out(monkeypatch, tmp_path, capsys):
    toy = Toy()
    status, (_, *rows) = run(
        monkeypatch, tmp_path / "ops.jsonl", [toy.case("a"), toy.case("b")], "--limit-seconds", "-1"
    )
    assert (status, rows) == (0, [{"left_out": ["op: a", "op: b"]}])
    assert not toy.done
    assert "left out, the time is over: 2 of 2 cases" in capsys.readouterr().out


def test_quick_takes_the_cases_that_are_marked(monkeypatch, tmp_path):
    toy = Toy()
    cases = [toy.case("long"), toy.case("short", quick=True)]
    _, (_, *rows) = run(monkeypatch, tmp_path / "ops.jsonl", cases, "--quick")
    assert [row["case"] for row in rows] == ["short"]
    with pytest.raises(SystemExit, match="no such case"):
        run(monkeypatch, tmp_path / "none.jsonl", cases[:1], "--quick")


def test_every_case_is_made_without_inputs_and_some_of_most_ops_are_quick(monkeypatch):
    monkeypatch.setattr(torch, "randn", fail(AssertionError("inputs before the case runs")))
    for device in ("cpu", "cuda"):
        options = argparse.Namespace(op=None, flex=False, quick=False, device=device)
        cases = bench_ops.choose(options)
        assert len({(case.op, case.what) for case in cases}) == len(cases) > 100
        options.quick = True
        quick = Counter(case.op for case in bench_ops.choose(options))
        assert quick["verify"] == (3 if device == "cpu" else 6)
        assert quick["draft_sample"] == quick["ancestor_mask"] == 2
        assert quick["tree_attention"] == (3 if device == "cpu" else 7)
        assert quick["kv_commit"] == quick["rotary_commit"] == quick["advance"] == 1
        assert quick["rms_norm"] == quick["gated_activation"] == 2
        assert quick["linear"] == (4 if device == "cpu" else 0)
        assert quick.total() < 28


@pytest.mark.parametrize("op", [op for op in bench_ops.CASES if op not in ("verify_rejection", "linear")])
def test_a_quick_case_of_every_op_is_right_and_a_wrong_one_is_found(op, monkeypatch):
    case = next(case for case in bench_ops.CASES[op]("cpu") if case.quick)
    built = case.build()
    built.check()
    for peer in built.peers.values():
        peer.run()
    module = sys.modules[case.build.__module__]
    right = getattr(module, op)
    monkeypatch.setattr(module, op, lambda *arguments, **options: spoil(right(*arguments, **options), arguments))
    with pytest.raises(AssertionError):
        built.check()


def spoil(result: Any, arguments: tuple[Any, ...]) -> Any:
    """One more everywhere; the results of an op that works in place are its buffers."""
    if result is None:
        arguments[0][-1].add_(1)
        return None
    if isinstance(result, torch.Tensor):
        return result + 1
    return type(result)(*(value + 1 for value in result))


def test_the_first_of_many_copies_is_checked():
    toy = Toy()
    measure_cuda(toy.case(), 0.0, MadeUpGpu(toy))
    assert (toy.done["build"], toy.done["check"]) == (MAX_COPIES, 1)


def test_on_a_gpu_calls_from_python_and_graphs_are_timed():
    toy = Toy()
    timings = measure_cuda(toy.case(), 0.0, MadeUpGpu(toy))
    assert list(timings) == ["ours", "torch"]
    assert toy.done["captures"] == 2
    for timing in timings.values():
        assert timing.eager.median == 1.0
        assert timing.graph is not None
        assert timing.graph.median == 3 / GRAPH_CALLS
        assert not timing.no_graph_because


def test_a_peer_that_must_not_be_captured_never_is_and_is_compared_as_called():
    toy = Toy()
    toy.peers = {"host": Peer(toy.count("host"), never_captured="it runs on the host")}
    captured = MadeUpGpu(toy)
    row = bench_ops.cuda_row(toy.case(), 0.0, captured)
    assert toy.done["captures"] == 1  # ours
    assert toy.done["host"] == 3 + 5 * EAGER_CALLS
    assert (row["in_graph"], row["ratio_of_graphs"], row["ratio"]) == (True, False, 1.0)
    assert row["peers"]["host"] == {
        "eager_seconds": 1.0,
        "graph_seconds": None,
        "no_graph_because": "it runs on the host",
    }


def test_the_peers_that_wait_or_run_on_the_host_are_marked():
    for op, name in (("verify", "softmax, sort, cumsum, noise"), ("ancestor_mask", "reference on the CPU")):
        cases = [case for case in bench_ops.CASES[op]("cpu") if "texts" not in case.what]
        for case in cases:
            assert case.build().peers[name].never_captured


def test_what_waits_all_the_same_is_not_captured():
    toy = Toy()
    row = bench_ops.cuda_row(toy.case(), 0.0, MadeUpGpu(toy, waits=True))
    assert toy.done["captures"] == 0
    assert row["no_graph_because"] == "RuntimeError: called a synchronizing operation"


def test_the_peer_that_does_best_against_ours_is_the_one_that_counts():
    toy = Toy()

    def twice() -> None:
        toy.done.update(["twice", "twice"])

    toy.peers = {"slow": Peer(twice, never_captured="no"), "good": Peer(toy.count("good"))}
    row = bench_ops.cuda_row(toy.case(), 0.0, MadeUpGpu(toy))
    assert (row["torch"], row["ratio"], row["ratio_of_graphs"]) == ("good", 1.0, True)


def test_a_capture_that_fails_leaves_what_was_timed_before():
    toy = Toy()
    row = bench_ops.cuda_row(toy.case(), 0.0, MadeUpGpu(toy, captures_fail=True))
    assert row["seconds"] == row["eager_seconds"] == 1.0
    assert row["no_graph_because"] == row["peers"]["torch"]["no_graph_because"] == "RuntimeError: no graph"
    assert "not captured: RuntimeError: no graph" in bench_ops.line(
        {"op": "op", "case": "toy"} | bench_ops.row_or_error(toy.case(), lambda case: row, 1e9)
    )


def test_a_peer_that_cannot_run_is_left_out_and_ours_is_not():
    toy = Toy()
    toy.peers = {"broken": Peer(fail(ImportError("no nvcc")))}
    row = bench_ops.cuda_row(toy.case(), 0.0, MadeUpGpu(toy))
    assert (row["torch"], row["ratio"]) == (None, None)
    assert row["peers"] == {"broken": {"error": "ImportError: no nvcc"}}
    broken = Built(fail(RuntimeError("a kernel")), toy.peers, lambda: None)
    with pytest.raises(RuntimeError, match="a kernel"):
        measure_cuda(toy.case(build=lambda: broken), 0.0, MadeUpGpu(toy))
