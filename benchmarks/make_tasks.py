"""Prompt files whose answers repeat what was there before: what drafts that copy are worth shows on them.

    python benchmarks/make_tasks.py --out DIR [--data DIR [--limit N]]

From Python's standard library, so that any machine has them: `edit` (a function to be written again with one change),
`quote` (a passage to be repeated) and `json` (records to be returned as objects that share their keys). With --data,
a folder of humaneval.jsonl, gsm8k.jsonl, mt_bench.jsonl and spec_bench.jsonl, also the prompts of these, Spec-Bench's
in a file for each of its six tasks, and `schema`: some of them to be answered by JSON of ten schemas. The same Python
makes the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tasks_edit import edits
from tasks_json import tables
from tasks_quote import quotes
from tasks_schema import answers

from specbranch.core.files import write
from specbranch.text.prompts import Prompt, PromptFileError, read_prompts

STANDARD_LIBRARY: dict[str, Callable[[], Iterator[Prompt]]] = {"edit": edits, "quote": quotes, "json": tables}
DATA = ("humaneval", "gsm8k", "mt_bench")
SPEC_BENCH = ("multi_turn", "translation", "summarization", "qa", "math_reasoning", "rag")


def read_data(folder: Path, limit: int | None) -> dict[str, list[Prompt]]:
    """The prompts of each task. Raises PromptFileError that names the file and what is wrong with it."""
    tasks = {name: read_prompts(folder / f"{name}.jsonl", limit) for name in DATA}
    spec_bench = folder / "spec_bench.jsonl"
    prompts = read_prompts(spec_bench)
    for task in SPEC_BENCH:
        tasks[task] = [prompt for prompt in prompts if prompt.task == task][:limit]
        if not tasks[task]:
            raise PromptFileError(f"{spec_bench}: holds no prompts of the task {task!r}")
    return tasks | {"schema": list(answers(tasks))}


def as_line(prompt: Prompt) -> str:
    text = "prompt" if isinstance(prompt.text, str) else "messages"
    record = {"task": prompt.task, "id": prompt.id, text: prompt.text, "chat": prompt.chat}
    if prompt.constraint is not None:
        kind, value = prompt.constraint
        record[kind] = value
    return json.dumps(record, ensure_ascii=False) + "\n"


def count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {number}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder for the files, made if it is not there")
    parser.add_argument("--data", type=Path, help="folder with humaneval.jsonl and the others")
    parser.add_argument("--limit", type=count, help="keep the first N prompts of each task of --data")
    args = parser.parse_args(argv)
    if args.limit and not args.data:
        parser.error("--limit is for the prompts of --data")
    try:
        tasks = {task: list(make()) for task, make in STANDARD_LIBRARY.items()}
        if missing := [task for task, prompts in tasks.items() if not prompts]:
            raise PromptFileError(f"{missing[0]}: this Python's standard library has nothing for it")
        if args.data is not None:
            tasks |= read_data(args.data, args.limit)
        args.out.mkdir(parents=True, exist_ok=True)
        for task, prompts in tasks.items():
            file = args.out / f"{task}.jsonl"
            write(file, "".join(map(as_line, prompts)).encode())
            print(f"{file}: {len(prompts)} prompts")
    except (OSError, PromptFileError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
