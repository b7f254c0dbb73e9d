"""What rules cost, through transformers' `generate`; and what a chat's next turn takes, with kept caches and without.

    python benchmarks/bench_door.py --target DIR --draft DIR --prompts prompts.jsonl

Rules: each prompt is decoded greedily by transformers, and with `custom_generate` by autoregressive decoding and by
specbranch, in an order that rotates; medians over prompts. Turns: a document, an answer of 32 tokens, and twice another
question; seconds until the first round is there, and for the whole turn.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from specbranch import SpecBranch
from specbranch.text.prompts import read_prompts

RULES: dict[str, dict[str, Any]] = {
    "none": {},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "penalty, n-gram ban, bias": {
        "repetition_penalty": 1.1,
        "no_repeat_ngram_size": 4,
        "sequence_bias": [[[198], -0.5]],
    },
}
WAYS = ("transformers", "autoregressive", "specbranch")
TURNS, ANSWER = 3, 32
QUESTION = "\nUser: and now shorter, please.\n"


def timed(engine: SpecBranch, ids: Sequence[int], way: str, new: int, rules: dict[str, Any]) -> tuple[list[int], float]:
    """The tokens, and tokens/s of the whole text."""
    how = {} if way == "transformers" else {"custom_generate": engine, "method": way}
    inputs = torch.tensor([list(ids)])
    generate: Any = engine.target.generate
    begin = time.perf_counter()
    made = generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=new, do_sample=False, **how, **rules)
    tokens = [int(token) for token in made[0, len(ids) :]]
    return tokens, len(tokens) / (time.perf_counter() - begin)


def measure_rules(engine: SpecBranch, prompts: Sequence[Sequence[int]], new: int) -> None:
    for way in WAYS:  # warm up
        timed(engine, prompts[0], way, 16, {})
    print("rules                        " + "".join(f"{way:>16}" for way in WAYS) + "   x autoregressive, same tokens")
    for name, rules in RULES.items():
        rates, same = defaultdict[str, list[float]](list), 0
        for number, ids in enumerate(prompts):
            tokens = {}
            for way in (*WAYS[number % 3 :], *WAYS[: number % 3]):
                tokens[way], rate = timed(engine, ids, way, new, rules)
                rates[way].append(rate)
            same += tokens["specbranch"] == tokens["autoregressive"]
        gain = median(a / b for a, b in zip(rates["specbranch"], rates["autoregressive"], strict=True))
        cells = "".join(f"{median(rates[way]):16.1f}" for way in WAYS)
        print(f"{name:29}{cells}{gain:12.2f}, {same} of {len(prompts)}", flush=True)


def measure_turns(engine: SpecBranch, document: Sequence[int]) -> None:
    assert engine.tokenizer is not None
    print("kept texts  turn  prompt  reused  first round s  whole turn s")
    for kept in (0, 1):
        turns = SpecBranch(engine.target, engine.draft, tokenizer=engine.tokenizer, prompt_cache=kept)
        turns.decoder._costs = engine.decoder._costs
        text = list(document)
        for turn in range(TURNS):
            begin = time.perf_counter()
            stream = turns.stream(text, max_new_tokens=ANSWER, temperature=0)
            stream.advance()
            first = time.perf_counter() - begin
            for _ in stream:
                pass
            whole, made = time.perf_counter() - begin, stream.generation
            assert made is not None
            row = f"{kept:10}  {turn:4}  {len(text):6}  {made.stats.reused_tokens:6}  {first:13.2f}  {whole:12.2f}"
            print(row, flush=True)
            text += [*made.tokens, *engine.encode(QUESTION)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="bundled")
    parser.add_argument("--draft", default="bundled")
    parser.add_argument("--prompts", default="python/specbranch/bundled/prompts.jsonl")
    parser.add_argument("--document", default="README.md", help="its first 1,000 tokens are the chat's first prompt")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--limit", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()
    engine = SpecBranch.from_pretrained(args.target, draft=args.draft, dtype=args.dtype)
    prompts = [engine.encode(prompt.text, chat=prompt.chat) for prompt in read_prompts(args.prompts, args.limit)]
    measure_rules(engine, prompts, args.max_new_tokens)
    most = min(1000, (engine.pair.target.model.context or 10**9) - TURNS * (ANSWER + 40))
    measure_turns(engine, engine.encode(Path(args.document).read_text(encoding="utf-8"))[:most])


if __name__ == "__main__":
    main()
