"""`specbranch record`: decode prompts and record what target and draft predict, for `specbranch plan`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbranch.cli.arguments import add_models, add_prompts, add_sampling, sampling_options
from specbranch.cli.constraint import add_constraint, constrained, constraint_given, prepare
from specbranch.cli.drafting import DEFAULT_METHOD, add_drafting
from specbranch.cli.files import Output
from specbranch.cli.loading import load_engine
from specbranch.cli.machine import describe_measuring_machine, describe_versions
from specbranch.cli.messages import FAILURE, INTERRUPTED, complain, one_line
from specbranch.cli.terminal import progress, status
from specbranch.text.generation_config import bare
from specbranch.text.prompts import Prompt, read_all

if TYPE_CHECKING:
    from specbranch import SpecBranch
    from specbranch.replay.record import Record


HELP = "decode prompts once and record the predictions of both models, for plan"


def is_record(file: Path) -> bool:
    from specbranch.replay import record

    return record.is_record(file)


OUTPUTS = (Output("out", "a record of specbranch record", is_record, read_back=True, makes_parents=True),)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_models(parser, draft_required=True, retrieval=False)
    add_prompts(parser)
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="output file (safetensors); resumes if it is incomplete"
    )
    parser.add_argument("--features", action="store_true", help="also record the target's features, for H-RAD")
    parser.add_argument(
        "--prompt-ids",
        action="store_true",
        help="also record the prompts' tokens, from which the prompts can be read; without them plan --retrieval looks "
        "into the answers only",
    )
    add_sampling(parser)
    add_constraint(parser)
    add_drafting(parser, [DEFAULT_METHOD])


def run(args: argparse.Namespace) -> int:
    """Record every prompt and what forwards cost here. Running it again resumes an incomplete file."""
    given = constraint_given(args)
    prompts = constrained(args, given, read_all(args.prompts, args.limit), [DEFAULT_METHOD])
    path = Path(args.out)
    engine = load_engine(args)
    prepare(engine, args, given)
    engine.target.generation_config = bare(engine.target)  # a record has no rules but its sampling
    record = record_prompts(
        engine,
        prompts,
        sampling_options(args),
        path,
        args.features,
        prompt_ids=args.prompt_ids,
        whitespace=args.json_whitespace,
        forced=not args.no_forced_tokens,
    )
    if record is None:
        return INTERRUPTED
    if record.texts:
        record = with_costs(engine, record, path)
    positions = sum(len(text) for text in record.texts)
    print(f"{path}: {len(record.texts)} texts, {positions} tokens, agreement {agreement(record):.3f}")
    return 0 if len(record.texts) == len(prompts) else FAILURE


def record_prompts(
    engine: SpecBranch,
    prompts: list[Prompt],
    options: dict[str, Any],
    path: Path,
    features: bool,
    **more: bool,
) -> Record | None:
    """The record of the prompts, without those that cannot be used, which are told; None after Ctrl-C, with the
    finished ones in the file. more: as `collect` takes them."""
    from specbranch.core.sampling import Sampling
    from specbranch.replay.recorder import collect

    new_tokens = options.pop("max_new_tokens")
    with progress(len(prompts)) as bar:

        def failed(prompt: Prompt, error: Exception) -> None:
            complain(f"error: prompt {prompt.id}: {one_line(error)}")

        try:
            here = machine(engine)
            return collect(
                engine, prompts, Sampling(**options), new_tokens, path, features, bar.after, failed, here, **more
            )
        except KeyboardInterrupt:
            complain(f"interrupted at prompt {bar.started} of {len(prompts)}; run it again to go on")
            return None


def with_costs(engine: SpecBranch, record: Record, path: Path) -> Record:
    """The record at `path`, with measured costs added if it has none."""
    if record.costs:
        return record
    from specbranch.replay.measure import measure_costs

    with status("measuring forwards"):
        record = replace(record, costs=measure_costs(engine.pair), machine=machine(engine))
    record.save(path)
    return record


def machine(engine: SpecBranch) -> dict[str, object]:
    dtype = str(engine.target.dtype).removeprefix("torch.")
    run = {
        "dtype": dtype,
        "device": engine.target.device.type,
        "threads": engine.pair.threads,
        "draft_context": str(engine.draft_excerpt),
    }
    return {**describe_measuring_machine(), **describe_versions(), **run}


def agreement(record: Record) -> float:
    """How often the draft's first candidate is the target's token."""
    right = sum(int((text.proposals.tokens[:, 0] == text.tokens).sum()) for text in record.texts)
    return right / max(1, sum(len(text) for text in record.texts))
