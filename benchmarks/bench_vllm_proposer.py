"""vLLM with our draft inside, beside vLLM alone, its own ways to draft, and our own loop: one request, and several.

    PYTHONPATH=.:python vllm-env/bin/python benchmarks/bench_vllm_proposer.py --target DIR --draft DIR \
        --prompts humaneval.jsonl --limit 10 --json out.json

It runs in the Python that has vLLM and our package. Every engine is a process of its own, all are loaded (see to the
memory: name fewer in `--kinds`), and they take turns prompt by prompt, the others stopped meanwhile. Each answers a
prompt to warm up, then each prompt alone and `--concurrent` of them at once, for `--rounds` rounds. Seconds are those
of a request, its prefill included. Greedy.

Kinds: plain, draft-N (vLLM's `draft_model`, N tokens), ngram, ours, ours:{"option": value, …} as in
`--additional-config`, and loop or loop:{"option": value, …}: our own loop without vLLM, with a chain of as many tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from specbranch.cli.bench.vllm_peer import VllmProcess, bound_to, cores
from specbranch.cli.bench.vllm_worker import preloaded, serve, versions
from specbranch.runtime.sources import resolve

OURS = "specbranch.integrations.vllm.SpecBranchProposer"
DRAFTED = (2, 4, 6)  # tokens of vLLM's own draft_model method
KINDS = ("plain", *[f"draft-{n}" for n in DRAFTED], "ngram", "ours")
COUNTED = ("drafts", "draft_tokens", "accepted_tokens")


def setup_of(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """What an engine is told to load. Raises SystemExit for a kind that is none."""
    name, _, options = kind.partition(":")
    chosen = json.loads(options or "{}")
    common: dict[str, Any] = {"target": args.target, "dtype": args.dtype, "limit": max(1, args.concurrent)}
    if name == "loop":
        policy = {"siblings": 0, "max_trunk": args.most, **chosen.pop("policy", {})}
        return {"loop": True, "draft": args.draft, **common, **chosen, **policy}
    common |= {"positions": args.positions, "eager": args.eager}
    if name == "plain":
        return common
    if name == "ngram":
        found = {"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
        return {**common, "speculative_config": found}
    if name.startswith("draft-"):
        tokens = int(name.removeprefix("draft-"))
        found = {"method": "draft_model", "model": args.draft, "num_speculative_tokens": tokens}
        return {**common, "speculative_config": found}
    if name != "ours":
        raise SystemExit(f"unknown kind {name!r}; expected one of {', '.join((*KINDS, 'loop'))}")
    return {
        **common,
        "speculative_config": {"method": "custom_class", "model": OURS, "num_speculative_tokens": args.most},
        "additional_config": {"specbranch": {"draft": args.draft, **chosen}},
    }


# ---- One engine, in a process of its own


class Vllm:
    """vLLM with a target, and with drafts as `options` say."""

    def __init__(self, *, target: str, dtype: str, limit: int, positions: int, eager: bool, **options: Any) -> None:
        os.environ["LD_PRELOAD"] = ":".join(preloaded())  # for the processes that vLLM starts
        from vllm import LLM

        self._llm = LLM(
            target,
            dtype=dtype,
            generation_config="vllm",
            enable_prefix_caching=False,
            max_model_len=positions,
            max_num_seqs=limit,
            kv_cache_memory_bytes=1 << 29,
            disable_log_stats=False,
            enforce_eager=eager,
            **options,
        )
        self._requests = 0

    def generate(self, *, texts: Sequence[list[int]], max_new_tokens: int) -> dict[str, Any]:
        """The texts behind several prompts, asked for at once; the seconds of all, and what was counted of drafts."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, detokenize=False)
        engine, found, before = self._llm.llm_engine, dict[str, list[int]](), self._drafts()
        began = time.perf_counter()
        for ids in texts:
            self._requests += 1
            found[str(self._requests)] = []
            engine.add_request(str(self._requests), {"type": "token", "prompt_token_ids": ids}, sampling)
        while engine.has_unfinished_requests():
            for output in engine.step():
                found[output.request_id.split("-")[0]] = list(output.outputs[0].token_ids)
        seconds = time.perf_counter() - began
        counted = {name: value - before.get(name, 0.0) for name, value in self._drafts().items()}
        return {"seconds": seconds, "texts": list(found.values()), **counted}

    def _drafts(self) -> dict[str, float]:
        names = {f"vllm:spec_decode_num_{name}": name for name in COUNTED}
        return {names[each.name]: getattr(each, "value", 0.0) for each in self._llm.get_metrics() if each.name in names}


class Loop:
    """Our own, without vLLM."""

    def __init__(self, *, target: str, draft: str, dtype: str, limit: int, **options: Any) -> None:
        from specbranch import SpecBranch

        self._engine = SpecBranch.from_pretrained(target, draft, dtype=dtype, max_requests=limit, **options)

    def generate(self, *, texts: Sequence[list[int]], max_new_tokens: int) -> dict[str, Any]:
        """As `Vllm.generate`."""
        began = time.perf_counter()
        answers = self._engine.generate(list(texts), max_new_tokens=max_new_tokens)
        seconds = time.perf_counter() - began
        counted = dict.fromkeys(COUNTED, 0)
        for answer in answers:
            counted["drafts"] += answer.stats.rounds
            counted["draft_tokens"] += answer.stats.verified
            counted["accepted_tokens"] += answer.stats.accepted
        return {"seconds": seconds, "texts": [list(answer.tokens) for answer in answers], **counted}


def make(*, loop: bool = False, **setup: Any) -> Vllm | Loop:
    return Loop(**setup) if loop else Vllm(**setup)


# ---- All of them


class Engine(VllmProcess):
    """A process of this script. Raises ChildProcessError where it does not start."""

    def __init__(self, kind: str, args: argparse.Namespace) -> None:
        # In this Python our package is found, as it was here.
        environment = {**bound_to(cores(args.threads)), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        setup = setup_of(kind, args)
        if "loop" not in setup:
            environment["LD_PRELOAD"] = ":".join(preloaded())
        command = [sys.executable, __file__, "--worker"]
        super().__init__(kind.partition(":")[0], command, environment, setup)

    def ask(self, texts: Sequence[Sequence[int]], max_new_tokens: int) -> dict[str, Any]:
        """As `Vllm.generate`. Raises ChildProcessError for an engine that fails or has ended."""
        return self._ask({"texts": list(texts), "max_new_tokens": max_new_tokens})


def prompts_of(args: argparse.Namespace) -> list[list[int]]:
    """The ids of the first prompts, and of one more to warm up."""
    from transformers import AutoTokenizer

    tokenizer, found = AutoTokenizer.from_pretrained(args.target), []
    for line in Path(args.prompts).read_text().splitlines()[: args.limit + 1]:
        prompt = json.loads(line)
        if prompt.get("chat"):
            messages = [{"role": "user", "content": prompt["prompt"]}]
            found.append(list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)))
        else:
            found.append(list(tokenizer(prompt["prompt"])["input_ids"]))
    return found


def summary(alone: Sequence[dict[str, dict[str, Any]]], together: Sequence[dict[str, dict[str, Any]]]) -> list[str]:
    """A table: medians over prompts and rounds, and ratios to the first kind with the same prompt in the same round."""
    kinds = list(alone[0])
    lines = [
        f"{'':10} {'alone':>7} {'ratio':>6} {'at once':>8} {'ratio':>6} {'a draft':>8} {'accepted':>9} {'equal':>6}"
    ]
    for kind in kinds:
        cells = []
        for turns in (alone, together):
            rates = [rate(turn[kind]) for turn in turns]
            ratios = [rate(turn[kind]) / rate(turn[kinds[0]]) for turn in turns]
            cells += [statistics.median(each) if each else 0.0 for each in (rates, ratios)]
        drafts, drafted, taken = (sum(turn[kind].get(name, 0.0) for turn in alone) for name in COUNTED)
        equal = sum(turn[kind]["texts"] == turn[kinds[0]]["texts"] for turn in alone)
        lines.append(
            f"{kind[:10]:10} {cells[0]:7.2f} {cells[1]:6.2f} {cells[2]:8.2f} {cells[3]:6.2f} "
            f"{drafted / max(drafts, 1):8.2f} {taken / max(drafted, 1):9.2%} {equal:3}/{len(alone)}"
        )
    return lines


def rate(turn: dict[str, Any]) -> float:
    """Tokens a second."""
    return float(sum(map(len, turn["texts"])) / turn["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="bundled")
    parser.add_argument("--draft", default="bundled")
    parser.add_argument("--prompts", required=True, help="JSON lines with `prompt` and, for a chat, `chat`")
    parser.add_argument("--limit", type=int, default=10, help="prompts")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--concurrent", type=int, default=8, help="requests at once; 0: only one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=KINDS, help="see above; ratios are to the first")
    parser.add_argument("--most", type=int, default=8, help="num_speculative_tokens of ours")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--eager", action="store_true", help="without torch.compile: starts sooner")
    parser.add_argument("--json", help="where every figure goes")
    args = parser.parse_args()
    args.target, args.draft = resolve(args.target, "target"), resolve(args.draft, "draft")
    prompts = prompts_of(args)
    *prompts, warm = prompts
    alone: list[dict[str, dict[str, Any]]] = []
    together: list[dict[str, dict[str, Any]]] = []
    with ExitStack() as stack:
        engines: dict[str, Engine] = {}
        for kind in args.kinds:
            engines[kind] = stack.enter_context(Engine(kind, args))
            engines[kind].ask([warm], args.max_new_tokens)
            print(f"{kind} is there", flush=True)
        group = [prompts[i % len(prompts)] for i in range(args.concurrent)]
        for number in range(args.rounds):
            for ids in prompts:
                alone.append({kind: engine.ask([ids], args.max_new_tokens) for kind, engine in engines.items()})
            if group:
                if number == 0:  # what a step takes with so many is learned here
                    for engine in engines.values():
                        engine.ask(group, args.max_new_tokens)
                together.append({kind: engine.ask(group, args.max_new_tokens) for kind, engine in engines.items()})
            print("\n".join(summary(alone, together)), flush=True)
            if args.json:
                record = {"versions": versions(), "options": vars(args), "alone": alone, "together": together}
                Path(args.json).write_text(json.dumps(record))


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        serve(make)
    else:
        main()
