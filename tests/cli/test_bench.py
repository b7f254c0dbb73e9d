"""`specbranch bench`: what it counts, what it compares, and that transformers' own generation is a fair peer."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specbranch import SpecBranch, bundled
from specbranch.cli import main as cli
from specbranch.cli.bench import memory, report
from specbranch.cli.bench.bench import Contenders, top_two_gap
from specbranch.cli.bench.command import PEERS
from specbranch.cli.bench.intervals import ratio_interval
from specbranch.cli.bench.masked import Asked
from specbranch.cli.bench.peers import Peers, PeerText
from specbranch.cli.terminal import output_console
from specbranch.core.stats import CAUSES
from specbranch.runtime.packed import weight_format

PAIR = ["--target", "bundled", "--draft", "bundled", "--threads", "1"]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in bundled.prompts()[:3]), encoding="utf-8")
    return str(file)


def tiny_llama(layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval()


# ---- the run


def test_rows_and_records_of_a_run(capsys, tmp_path, prompts):
    out = tmp_path / "out.json"
    options = ["--limit", "2", "--max-new-tokens", "16", "--json", str(out)]
    methods = ["--methods", "specbranch,pearl,speculative"]  # autoregressive comes by itself
    assert cli.main(["bench", *PAIR, "--prompts", prompts, *methods, *options]) == 0
    result = json.loads(out.read_text())

    names = ["specbranch", "pearl", "speculative", "autoregressive", "greedy", "assisted", "prompt-lookup"]
    assert [row["name"] for row in result["rows"]] == names
    for row in result["rows"]:
        assert row["task"] == "bundled"
        assert row["prompts"] == 2
        assert row["tokens_per_second"] > 0
        assert row["ratio_to_greedy"] > 0
        assert row["prefill_seconds"] > 0
        ours = row["name"] not in PEERS
        assert row["same_tokens"] is True or not ours
        assert (row["tokens_per_target_forward"] is not None) == ours
        if row["name"] != "specbranch":  # which may find that the draft does not pay
            assert (row["acceptance_rate"] is not None) == (ours and row["name"] != "autoregressive")
    greedy = result["rows"][names.index("greedy")]
    assert greedy["ratio_to_greedy"] == greedy["median_prompt_ratio"] == 1
    assert greedy["same_tokens"] is True

    assert not result["interrupted"]
    assert result["command"].startswith("specbranch bench --target bundled")
    assert result["settings"]["threads"] == 1
    assert result["settings"]["dtype"] == "float32"
    assert result["machine"]["cores"] >= 1
    assert result["versions"]["torch"] == torch.__version__
    assert result["memory"]["weight_bytes"] > 0

    assert len(result["records"]) == 2 * len(names)
    second = [record["name"] for record in result["records"] if record["id"] == "bundled/1"]
    assert second == names[1:] + names[:1]  # the order rotates
    for record in result["records"]:
        assert record["new_tokens"] == len(record["tokens"]) <= 16

    for row in result["rows"]:
        assert row["ratio_to_autoregressive"] > 0
        assert (row["ratio_to_greedy_interval"] is None) == (row["name"] == "greedy")
        assert (row["ratio_to_autoregressive_interval"] is None) == (row["name"] == "autoregressive")
        own = [record["stats"] for record in result["records"] if record["name"] == row["name"]]
        if row["acceptance_rate"] is None:
            assert row["wasted_per_token"] is None
        else:
            assert row["wasted_per_token"] == sum(s["wasted_tokens"] for s in own) / row["new_tokens"]
            assert sum(row[f"{cause}_per_token"] for cause in CAUSES) == pytest.approx(row["wasted_per_token"])

    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 100
    assert all(name in table for name in names)
    assert "float32, threads: 1, new tokens: 16, greedy" in table


def test_sampling_peers_are_not_compared(tmp_path, prompts):
    out = tmp_path / "out.json"
    options = ["--limit", "1", "--max-new-tokens", "8", "--temperature", "1", "--top-p", "0.9", "--top-k", "40"]
    peers = ["--peers", "greedy,prompt-lookup"]
    assert cli.main(["bench", *PAIR, "--prompts", prompts, *options, *peers, "--json", str(out)]) == 0
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["specbranch"]["same_tokens"] is True
    assert rows["greedy"]["same_tokens"] is None
    assert rows["prompt-lookup"]["same_tokens"] is None


def test_ctrl_c_keeps_what_is_measured(capsys, monkeypatch, tmp_path, prompts):
    generate, calls = Peers.generate, []

    def interrupted(self, peer, ids, **options):
        calls.append(peer)
        if len(calls) == 3:  # warm-up, first prompt, second prompt
            raise KeyboardInterrupt
        return generate(self, peer, ids, **options)

    monkeypatch.setattr(Peers, "generate", interrupted)
    out = tmp_path / "out.json"
    options = ["--max-new-tokens", "8", "--peers", "greedy", "--json", str(out)]
    assert cli.main(["bench", *PAIR, "--prompts", prompts, *options]) == 130
    result = json.loads(out.read_text())
    assert result["interrupted"] is True
    done = [(record["id"], record["name"]) for record in result["records"]]
    first = [("bundled/0", name) for name in ("specbranch", "autoregressive", "greedy")]
    assert done == [*first, ("bundled/1", "autoregressive")]
    captured = capsys.readouterr()
    assert "greedy" in captured.out
    assert captured.err == ("specbranch: interrupted after 4 of 9 measurements; the same command goes on from there\n")


def test_a_contender_that_fails_is_reported_and_the_others_go_on(capsys, monkeypatch, tmp_path, prompts):
    def broken(self, peer, ids, **options):
        if len(ids) and options["max_new_tokens"] == 24:  # not in the warm-up, which is shorter
            raise RuntimeError("it broke")
        return PeerText([], 0, 0.0)

    monkeypatch.setattr(Peers, "generate", broken)
    out = tmp_path / "out.json"
    options = ["--limit", "1", "--max-new-tokens", "24", "--peers", "assisted", "--json", str(out)]
    assert cli.main(["bench", *PAIR, "--prompts", prompts, *options]) == 1
    assert capsys.readouterr().err == "specbranch: error: assisted on bundled/0: RuntimeError: it broke\n"
    records = {record["name"]: record for record in json.loads(out.read_text())["records"]}
    assert records["assisted"]["error"] == "RuntimeError: it broke"
    assert records["specbranch"]["same_tokens"] is True


def test_an_output_that_cannot_be_written_is_refused_before_the_run(capsys, tmp_path, prompts):
    out = tmp_path / "missing" / "out.json"
    assert cli.main(["bench", *PAIR, "--prompts", prompts, "--json", str(out)]) == 1
    assert "No such file or directory" in capsys.readouterr().err


# ---- peers


def test_greedy_peer_is_the_plain_argmax_loop_whatever_the_checkpoint_asks_for():
    target, draft = tiny_llama(), tiny_llama(layers=1, seed=1)
    target.generation_config.repetition_penalty = 5.0
    ids = [5, 9, 13]
    expected: list[int] = []
    with torch.inference_mode():
        while len(expected) < 20 and 2 not in expected:
            logits = target(torch.tensor([ids + expected])).logits[0, -1]
            expected.append(int(logits.argmax()))
    peers = Peers(target, draft)
    for peer in PEERS:
        assert peers.generate(peer, ids, max_new_tokens=20).tokens == expected
    assert target.generation_config.repetition_penalty == 5.0


def test_sampling_peers_depend_on_the_seed_and_leave_torch_s_generator_alone():
    peers = Peers(tiny_llama(), tiny_llama(layers=1, seed=1), threads=1)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    sampling: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0}
    texts = [peers.generate("greedy", [5, 9], seed=seed, **sampling).tokens for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    only_best = peers.generate("greedy", [5, 9], top_k=1, **sampling).tokens
    assert only_best == peers.generate("greedy", [5, 9], max_new_tokens=12).tokens


def test_the_first_step_of_a_peer_is_timed_apart():
    peers = Peers(tiny_llama(), tiny_llama(layers=1, seed=1))
    begin = time.perf_counter()
    text = peers.generate("greedy", [5, 9, 13], max_new_tokens=10)
    assert text.first_tokens == 1
    assert 0 < text.first_seconds < time.perf_counter() - begin
    assert 1 <= peers.generate("assisted", [5, 9, 13], max_new_tokens=10).first_tokens <= 10


# ---- the report


def record(name: str, speed: float, *, id: str = "a", task: str = "t", same: bool | None = True) -> report.Record:
    difference = None if same in (True, None) else {"id": id, "position": 3, "logit_gap": 0.0625}
    return {
        "name": name,
        "task": task,
        "id": id,
        "error": None,
        "new_tokens": 10,
        "tokens_per_second": speed,
        "prefill_seconds": 0.5,
        "decode_tokens_per_second": 2 * speed,
        "stats": None,
        "same_tokens": same,
        "first_difference": difference,
        "memory_over_bytes": None,
    }


def test_ratios_use_the_prompts_that_both_finished():
    greedy = [record("greedy", speed, id=id) for id, speed in (("a", 1.0), ("b", 2.0), ("c", 4.0))]
    ours = [record("specbranch", speed, id=id) for id, speed in (("a", 3.0), ("b", 2.0), ("d", 100.0))]
    rows = {row["name"]: row for row in report.summarize([*greedy, *ours])}
    assert rows["greedy"]["tokens_per_second"] == 2.0
    assert rows["specbranch"]["tokens_per_second"] == 3.0
    assert rows["specbranch"]["ratio_to_greedy"] == pytest.approx(2.5 / 1.5)
    assert rows["specbranch"]["decode_tokens_per_second"] == 6.0
    assert rows["specbranch"]["decode_ratio_to_greedy"] == pytest.approx(2.5 / 1.5)
    assert rows["specbranch"]["median_prompt_ratio"] == pytest.approx((3.0 + 1.0) / 2)


def test_tasks_have_rows_of_their_own_and_one_together():
    records = [record("greedy", 1.0, task="x"), record("greedy", 3.0, task="y"), record("greedy", 5.0, task="y")]
    failed = {**record("greedy", 9.0, task="y"), "error": "it broke"}
    rows = {row["task"]: row for row in report.summarize([*records, failed])}
    assert {task: row["tokens_per_second"] for task, row in rows.items()} == {"x": 1.0, "y": 4.0, "all": 3.0}
    assert rows["all"]["prompts"] == 3


def test_interval_covers_what_resampling_prompts_gives():
    exact = [(2.0 * speed, speed) for speed in (1.0, 3.0, 7.0)]
    assert ratio_interval(exact) == (2.0, 2.0)  # figures of a prompt stay together
    assert ratio_interval(exact[:1]) is None
    pairs = [(1.0, 1.0), (3.0, 1.0)]  # drawn: both the first (1/4), both the second (1/4), one of each (1/2)
    assert ratio_interval(pairs) == (1.0, 3.0)
    many = [(1.0 + 0.01 * i, 1.0) for i in range(101)]
    low, high = ratio_interval(many) or (0.0, 0.0)
    assert 1.3 < low < 1.5 < high < 1.7
    assert ratio_interval(many) == (low, high)  # the same seed every time


def test_speed_ups_are_over_greedy_or_else_over_autoregressive():
    plain = [record("autoregressive", speed, id=id) for id, speed in (("a", 1.0), ("b", 2.0))]
    ours = [record("pearl", speed, id=id) for id, speed in (("a", 3.0), ("b", 3.0))]
    rows = {row["name"]: row for row in report.summarize([*plain, *ours])}
    assert report.base_of(list(rows.values())) == "autoregressive"
    assert rows["pearl"]["ratio_to_autoregressive"] == 2.0
    assert rows["pearl"]["ratio_to_autoregressive_interval"] == (1.5, 3.0)
    assert rows["pearl"]["decode_ratio_to_autoregressive"] == 2.0
    assert (rows["pearl"]["ratio_to_greedy"], rows["pearl"]["ratio_to_greedy_interval"]) == (None, None)
    greedy = [record("greedy", 1.0, id=id) for id in ("a", "b")]
    rows = {row["name"]: row for row in report.summarize([*plain, *ours, *greedy])}
    assert report.base_of(list(rows.values())) == "greedy"
    assert rows["pearl"]["ratio_to_greedy_interval"] == (3.0, 3.0)


def test_every_task_names_the_contenders_in_one_order():
    records = [record(name, 1.0, task=task) for task, name in (("x", "a"), ("x", "b"), ("y", "b"), ("y", "a"))]
    assert [row["name"] for row in report.summarize(records)] == ["a", "b"] * 3


def test_tables_fit_100_columns(capsys):
    stats = {"drafted_tokens": 10, "new_tokens": 10, "tokens_per_target_forward": 12.5, "wasted_tokens": 10}
    stats |= dict.fromkeys(CAUSES, 10) | dict.fromkeys(("acceptance_rate", "hit_rate", "rollback_rate"), 1.0)
    records = [
        record(name, speed, id=id, task="a-long-task-name") | {"stats": stats if name == "specbranch-paper" else None}
        for name, fast in (("specbranch-paper", 1234.5), ("autoregressive", 88.0), ("greedy", 99.0))
        for id, speed in (("a", fast), ("b", 2 * fast))
    ]
    for table in report.tables(report.summarize(records), "title"):
        output_console().print(table)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    for figure in ("1851.75", "12.47-12.47", "14.03", "3703.50", "12.50", "specbranch-paper"):
        assert figure in printed, figure


def test_differences_are_counted_and_the_first_is_told():
    records = [record("assisted", 1.0, id="a"), record("assisted", 1.0, id="b", same=False)]
    rows = report.summarize(records)
    assert rows[0]["same_tokens"] is False
    assert rows[0]["prompts_with_same_tokens"] == 1
    assert report.difference_lines(rows) == [
        "assisted differs from autoregressive first in b at new token 3; "
        "the target's two best scores there differ by 0.0625"
    ]
    assert report.summarize([record("greedy", 1.0, same=None)])[0]["same_tokens"] is None


@pytest.mark.parametrize(
    ("tokens", "reference", "position"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 3], 1), ([1, 2, 3], [1, 2], 2), ([], [], None)],
)
def test_first_difference(tokens, reference, position):
    assert report.compare_tokens(tokens, reference) == position


def test_gap_is_that_of_the_two_best_logits():
    target = tiny_llama()
    engine = SpecBranch(target, tiny_llama(layers=1, seed=1))
    options = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
    with torch.inference_mode():
        best = target(torch.tensor([[5, 9, 13]])).logits[0, -1].topk(2).values
    gap = top_two_gap(engine, Asked([5, 9]), [13], type("Arguments", (), options)())
    assert gap == pytest.approx(float(best[0] - best[1]), rel=1e-4)
    only_one = type("Arguments", (), {**options, "temperature": 1.0, "top_k": 1})()
    assert top_two_gap(engine, Asked([5, 9, 13]), [], only_one) is None


# ---- memory


def test_shared_weights_count_once():
    model = tiny_llama()
    apart = memory.weight_bytes(model)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert apart - memory.weight_bytes(model) == 64 * 32 * 4
    assert memory.weight_bytes(model, model, None) == memory.weight_bytes(model)


def test_peak_follows_an_allocation():
    if not memory.reset_peak():
        pytest.skip("this system does not let the peak be reset")
    before, size = memory.peak_resident_bytes(), 64 << 20
    block = torch.ones(size // 4)
    del block
    assert memory.peak_resident_bytes() - before > 0.9 * size


def test_peers_run_with_the_weights_of_the_checkpoint(capsys, tmp_path):
    """Ours may be packed; theirs are as stored."""
    out = tmp_path / "report.json"
    options = ["--dtype", "bfloat16", "--target-weights", "lossless", "--max-new-tokens", "4", "--limit", "1"]
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"id": "a", "prompt": "def f(x):"}) + "\n")
    run = ["bench", "--target", "bundled", "--draft", "bundled", "--prompts", str(prompts), "--json", str(out)]
    assert cli.main([*run, *options, "--peers", "greedy,assisted"]) == 0
    assert "bfloat16 (lossless)" in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report["settings"]["weights"] == {"target": "lossless", "draft": ""}
    ours = [record for record in report["records"] if record["name"] == "autoregressive"]
    assert ours[0]["stats"]["target_weights"] == "lossless"
    args = Namespace(
        target="bundled", draft="bundled", dtype="bfloat16", trust_remote_code=False, peers=("greedy",), threads=None
    )
    args.__dict__ |= {"max_new_tokens": 4, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
    engine = SpecBranch.from_pretrained("bundled", "bundled", dtype="bfloat16", target_weights="lossless")
    models = Contenders(engine, args).models
    assert [weight_format(model) for model in models] == ["lossless", "", "", ""]
    assert models[0] is engine.target
    assert models[3] is engine.draft
