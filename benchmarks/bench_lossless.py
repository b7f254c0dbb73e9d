"""Every method against autoregressive decoding, token for token, on real models and prompts.

    python benchmarks/bench_lossless.py --target DIR --draft DIR --prompts FILE --limit 5 --dtype float32 --json OUT

For each prompt, greedy and at temperature 1 with top-p 0.95 for three seeds: all methods that draft, serial and
overlapped, must give the tokens of plain decoding. Exits with 1 and names the first difference when one does not.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from specbranch import METHODS, SpecBranch
from specbranch.cli.machine import describe_machine, describe_versions
from specbranch.core.files import write_json
from specbranch.text.encoding import encode
from specbranch.text.prompts import read_prompts

SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    *({"temperature": 1.0, "top_k": 0, "top_p": 0.95, "seed": seed} for seed in (1, 2, 3)),
]


def compare(pair: SpecBranch, ids: list[int], sampling: dict[str, Any], new_tokens: int) -> list[dict[str, Any]]:
    """One record per method and mode for one prompt and sampling."""
    plain = pair.generate(ids, max_new_tokens=new_tokens, method="autoregressive", **sampling)
    records = []
    for method in METHODS[1:]:
        for overlap in (False, True):
            drafted = pair.generate(ids, max_new_tokens=new_tokens, method=method, overlap=overlap, **sampling)
            pairs = zip(drafted.tokens, plain.tokens, strict=False)
            difference = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            records.append(
                {
                    "method": method,
                    "overlap": overlap,
                    **sampling,
                    "tokens": len(plain.tokens),
                    "same_tokens": drafted.tokens == plain.tokens,
                    "first_difference": difference,
                    "tokens_per_target_forward": drafted.stats.as_dict()["tokens_per_target_forward"],
                }
            )
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="bundled")
    parser.add_argument("--draft", default="bundled")
    parser.add_argument("--prompts", required=True, type=Path)
    parser.add_argument("--limit", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    pair = SpecBranch.from_pretrained(args.target, draft=args.draft, dtype=args.dtype, threads=args.threads)
    records = []
    for prompt in read_prompts(args.prompts, args.limit):
        ids = encode(pair.tokenizer, prompt.text, chat=prompt.chat)
        for sampling in SAMPLINGS:
            records += [{"id": prompt.id, **record} for record in compare(pair, ids, sampling, args.max_new_tokens)]
        same = sum(record["same_tokens"] for record in records)
        print(f"{prompt.id}: {same} of {len(records)} texts the same so far", flush=True)
    if args.json is not None:
        report = {
            "command": shlex.join(["python", *sys.argv]),
            "machine": describe_machine(),
            "versions": describe_versions(),
            "records": records,
        }
        write_json(args.json, report)
    different = [record for record in records if not record["same_tokens"]]
    if different:
        print(f"different: {different[0]}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
