"""vLLM with our draft inside, beside vLLM alone and its own ways to draft: one request, and several at once.

    PYTHONPATH=.:python vllm-env/bin/python benchmarks/bench_vllm_proposer.py --target DIR --draft DIR \
        --prompts humaneval.jsonl --limit 10 --json out.json

It runs in the Python that has vLLM and our package. One engine at a time, each in a process of its own; they take turns
for `--rounds` rounds. Every engine gets a prompt to warm up, each prompt alone, and `--concurrent` of them at once.
Seconds are those of a request, its prefill included. Greedy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specbranch.cli.bench.vllm_peer import cores
from specbranch.cli.bench.vllm_worker import _preloaded, versions
from specbranch.runtime.sources import resolve

OURS = "specbranch.integrations.vllm.SpecBranchProposer"
DRAFTED = (2, 4, 6)  # tokens of vLLM's own draft_model method
KINDS = ("plain", *[f"draft-{n}" for n in DRAFTED], "ngram", "ours")


def speculation(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """What vLLM is told."""
    if kind == "plain":
        return {}
    if kind == "ngram":
        found = {"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
        return {"speculative_config": found}
    if kind.startswith("draft-"):
        tokens = int(kind.removeprefix("draft-"))
        return {"speculative_config": {"method": "draft_model", "model": args.draft, "num_speculative_tokens": tokens}}
    options = {"draft": args.draft, "overlap": args.overlap, **json.loads(args.options)}
    return {
        "speculative_config": {"method": "custom_class", "model": OURS, "num_speculative_tokens": args.most},
        "additional_config": {"specbranch": options},
    }


# ---- One engine, in a process of its own


def work(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and tokens of every prompt alone and of several at once, and what vLLM counted of drafts."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        args.target,
        dtype=args.dtype,
        generation_config="vllm",
        enable_prefix_caching=False,
        max_model_len=args.positions,
        max_num_seqs=max(1, args.concurrent),
        kv_cache_memory_bytes=1 << 29,
        disable_log_stats=False,
        enforce_eager=args.eager,
        **speculation(kind, args),
    )
    engine, count = llm.llm_engine, 0
    tokenizer = llm.get_tokenizer()

    def ids_of(prompt: dict[str, Any]) -> list[int]:
        if prompt.get("chat"):
            messages = [{"role": "user", "content": prompt["prompt"]}]
            return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        return list(tokenizer(prompt["prompt"])["input_ids"])

    def run(texts: Sequence[list[int]]) -> tuple[float, list[list[int]]]:
        nonlocal count
        sampling = SamplingParams(temperature=0.0, max_tokens=args.max_new_tokens, detokenize=False)
        began, found = time.perf_counter(), {}
        for ids in texts:
            count += 1
            found[str(count)] = list[int]()
            engine.add_request(str(count), {"type": "token", "prompt_token_ids": ids}, sampling)
        while engine.has_unfinished_requests():
            for output in engine.step():
                found[output.request_id.split("-")[0]] = list(output.outputs[0].token_ids)
        return time.perf_counter() - began, list(found.values())

    def drafts() -> dict[str, float]:
        named = {"vllm:spec_decode_num_drafts", "vllm:spec_decode_num_draft_tokens"}
        named.add("vllm:spec_decode_num_accepted_tokens")
        return {metric.name.removeprefix("vllm:spec_decode_num_"): getattr(metric, "value", 0.0)
                for metric in llm.get_metrics() if metric.name in named}  # fmt: skip

    prompts = [ids_of(json.loads(line)) for line in Path(args.prompts).read_text().splitlines()]
    prompts = prompts[: args.limit + 1]
    run(prompts[-1:])  # warms up
    alone, before = [], drafts()
    for ids in prompts[: args.limit]:
        seconds, (tokens,) = run([ids])
        alone.append({"seconds": seconds, "tokens": tokens})
    result: dict[str, Any] = {"alone": alone, "drafts": _less(drafts(), before)}
    if args.concurrent:
        group, before = [prompts[i % args.limit] for i in range(args.concurrent)], drafts()
        run(group)  # costs of so many requests are learned here
        seconds, texts = run(group)
        result |= {"together": {"seconds": seconds, "tokens": sum(map(len, texts))}}
        result |= {"drafts_together": _less(drafts(), before)}
    return result


def _less(now: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0.0) for name, value in now.items()}


# ---- All of them


def measure(kind: str, arguments: Sequence[str], threads: int) -> dict[str, Any]:
    """What one engine gives. Raises ChildProcessError where it fails."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "LD_PRELOAD": ":".join(_preloaded()),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores(threads))),
    }
    command = [sys.executable, __file__, *arguments, "--worker", kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    line = next((line for line in reversed(done.stdout.splitlines()) if line.startswith('{"alone"')), None)
    if line is None:
        raise ChildProcessError(f"{kind}: status {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(line)
    return found


def summary(rounds: Sequence[dict[str, dict[str, Any]]]) -> list[str]:
    """A table: medians over prompts and rounds, and ratios to plain of the same prompt and round."""
    lines = [f"{'':10} {'alone':>8} {'x plain':>8} {'together':>9} {'x plain':>8} {'a draft':>8} {'accepted':>9}"]
    for kind in rounds[0]:
        rates, ratios, together, times, draft, taken, drafted = [], [], [], [], 0.0, 0.0, 0.0
        for found in rounds:
            if kind not in found:
                continue
            mine = [len(text["tokens"]) / text["seconds"] for text in found[kind]["alone"]]
            plain = [len(text["tokens"]) / text["seconds"] for text in found.get("plain", found[kind])["alone"]]
            rates += mine
            ratios += [one / other for one, other in zip(mine, plain, strict=True)]
            if (group := found[kind].get("together")) is not None:
                together.append(group["tokens"] / group["seconds"])
                base = found.get("plain", found[kind])["together"]
                times.append(together[-1] * base["seconds"] / base["tokens"])
            counted = found[kind]["drafts"]
            draft += counted.get("drafts", 0)
            drafted += counted.get("draft_tokens", 0)
            taken += counted.get("accepted_tokens", 0)
        cells = [statistics.median(each) if each else 0.0 for each in (rates, ratios, together, times)]
        lines.append(
            f"{kind:10} {cells[0]:8.2f} {cells[1]:8.2f} {cells[2]:9.2f} {cells[3]:8.2f} "
            f"{drafted / max(draft, 1):8.2f} {taken / max(drafted, 1):9.2%}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="bundled")
    parser.add_argument("--draft", default="bundled")
    parser.add_argument("--prompts", required=True, help="JSON lines with `prompt` and, for a chat, `chat`")
    parser.add_argument("--limit", type=int, default=10, help="prompts")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--concurrent", type=int, default=8, help="requests at once; 0: only one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", default=",".join(KINDS), help="of " + ", ".join(KINDS))
    parser.add_argument("--most", type=int, default=8, help="num_speculative_tokens of ours")
    parser.add_argument("--overlap", default="auto")
    parser.add_argument("--options", default="{}", help="more options of ours, JSON")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--eager", action="store_true", help="without torch.compile: starts sooner")
    parser.add_argument("--json", help="where every figure goes")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.target, args.draft = resolve(args.target, "target"), resolve(args.draft, "draft")
    if args.worker:
        print(json.dumps(work(args.worker, args)), flush=True)
        return
    rounds: list[dict[str, dict[str, Any]]] = []
    for _ in range(args.rounds):
        rounds.append({})
        for kind in args.kinds.split(","):
            rounds[-1][kind] = measure(kind, sys.argv[1:], args.threads)
            print("\n".join(summary(rounds)), flush=True)
            if args.json:
                record = {"versions": versions(), "options": vars(args), "rounds": rounds}
                Path(args.json).write_text(json.dumps(record))


if __name__ == "__main__":
    main()
