"""Prompt files whose answers repeat what was there before: what drafts that copy are worth shows on them.

    python benchmarks/make_tasks.py --out DIR [--data DIR] [--limit N]

From Python's standard library, so that any machine has them: `edit` (a function to be written again with one change),
`quote` (a passage to be repeated) and `json` (records to be returned as objects that share their keys). With --data,
folder of humaneval.jsonl, gsm8k.jsonl, mt_bench.jsonl and spec_bench.jsonl, also the prompts of these, those of
Spec-Bench in a file for each of its six tasks. The same Python makes the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from stdlib_prompts import TASKS

from specbranch.core.files import write
from specbranch.text.prompts import Prompt, PromptFileError, read_prompts

DATA = ("humaneval", "gsm8k", "mt_bench")
SPEC_BENCH = ("multi_turn", "translation", "summarization", "qa", "math_reasoning", "rag")


def line(prompt: Prompt) -> str:
    source = "prompt" if isinstance(prompt.text, str) else "messages"
    record = {"task": prompt.task, "id": prompt.id, source: prompt.text, "chat": prompt.chat}
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_data(folder: Path) -> dict[str, list[Prompt]]:
    """The prompts of each task of the data. Raises PromptFileError that names the file and what is wrong with it."""
    tasks = {name: read_prompts(folder / f"{name}.jsonl") for name in DATA}
    spec_bench = folder / "spec_bench.jsonl"
    prompts = read_prompts(spec_bench)
    for task in SPEC_BENCH:
        tasks[task] = [prompt for prompt in prompts if prompt.task == task]
        if not tasks[task]:
            raise PromptFileError(f"{spec_bench}: holds no prompts of the task {task!r}")
    return tasks


def save(folder: Path, task: str, prompts: Iterable[Prompt]) -> None:
    lines = [line(prompt) for prompt in prompts]
    file = folder / f"{task}.jsonl"
    write(file, "".join(lines).encode())
    print(f"{file}: {len(lines)} prompts")


def count(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder for the files, made if it is not there")
    parser.add_argument("--data", type=Path, help="folder with humaneval.jsonl and the others")
    parser.add_argument("--limit", type=count, help="keep the first so many prompts of each task of --data")
    args = parser.parse_args(argv)
    try:
        data = read_data(args.data) if args.data else {}  # before anything is written
        args.out.mkdir(parents=True, exist_ok=True)
        for task, make in TASKS.items():
            save(args.out, task, make())
        for task, prompts in data.items():
            save(args.out, task, prompts[: args.limit])
    except (OSError, PromptFileError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
