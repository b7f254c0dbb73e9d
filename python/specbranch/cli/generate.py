"""`specbranch generate`: answers to one prompt or to a file of prompts."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from specbranch.cli.arguments import add_models, add_sampling, sampling_options, text, whole
from specbranch.cli.constraint import add_constraint, constrained, constraint_for, constraint_given, free, prepare
from specbranch.cli.drafting import add_drafting, add_hrad, add_method, check_method
from specbranch.cli.files import Output, write_json
from specbranch.cli.loading import load_engine
from specbranch.cli.messages import FAILURE, INTERRUPTED, complain, one_line
from specbranch.cli.terminal import progress
from specbranch.cli.trace import is_trace
from specbranch.text.prompts import Prompt, read_prompts, read_text

if TYPE_CHECKING:
    from specbranch import Generation, SpecBranch
    from specbranch.core.stats import Stats
    from specbranch.request import Request


HELP = "generate text for a prompt or a file of prompts"
OUTPUTS = (Output("trace", "a trace of specbranch generate", is_trace),)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_models(parser, draft_required=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompt",
        type=text,
        metavar="TEXT",
        help="the text to continue; - is standard input, all of it but a newline at its end",
    )
    source.add_argument(
        "--prompts", metavar="FILE", help="JSON lines with id and prompt or messages; - is standard input"
    )
    parser.add_argument("--chat", action="store_true", help="apply the chat template to --prompt")
    add_method(parser)
    add_sampling(parser, from_checkpoint=True)
    parser.add_argument(
        "--stop", type=text, action="append", metavar="TEXT", help="end before this text; may be repeated"
    )
    add_constraint(parser)
    add_hrad(parser)
    parser.add_argument("--limit", type=whole(1), metavar="N", help="only the first N prompts of the file")
    parser.add_argument(
        "--max-requests",
        type=whole(1),
        default=1,
        metavar="N",
        help="prompts of the file that are decoded at once (default: 1)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line, one for each prompt")
    parser.add_argument(
        "--trace", metavar="FILE", help="write when each model ran, for chrome://tracing or ui.perfetto.dev"
    )
    add_drafting(parser)


def run(args: argparse.Namespace) -> int:
    """Generate for every prompt in turn, or for --max-requests of them at once; output is in the order of the file.

    A prompt of a file that fails (too long, for example) is reported on stderr, the others have their turn, and the
    exit status is 1. Ctrl-C prints what the current prompt has so far and ends with 130.
    """
    if args.chat and args.prompt is None:
        raise ValueError('--chat has no effect with --prompts; in a prompt file a line says "chat": true')
    if args.limit is not None and args.prompts is None:
        raise ValueError("--limit has no effect with --prompt; it is for --prompts")
    if args.max_requests > 1 and args.prompts is None:
        raise ValueError("--max-requests has no effect with --prompt; it is for --prompts")
    given = constraint_given(args)
    prompts = [Prompt("prompt", args.prompt, args.chat)] if args.prompts is None else []
    prompts = constrained(args, given, prompts or read_prompts(args.prompts, args.limit), [args.method])
    check_method(args, forced=free(args, prompts))
    if args.prompt == "-":
        prompts = [replace(prompts[0], text=read_text())]
    engine = load_engine(args)
    prepare(engine, args, given)
    runs: list[tuple[str, Stats]] = []
    try:
        return (_generate_together if args.max_requests > 1 else _generate_all)(engine, prompts, args, runs)
    finally:  # also when interrupted
        if args.trace is not None:
            from specbranch.cli.trace import trace

            write_json(args.trace, trace(runs))


def _generate_all(
    engine: SpecBranch, prompts: list[Prompt], args: argparse.Namespace, runs: list[tuple[str, Stats]]
) -> int:
    """Generate for every prompt in turn and add what each cost to `runs`."""
    from specbranch import GenerationFailed, GenerationInterrupted
    from specbranch.text.encoding import encode

    config = engine.target.generation_config
    options = {**sampling_options(args, config), "stop": args.stop, "method": args.method}
    failed = False
    with progress(len(prompts), shown=not sys.stdout.isatty()) as bar:
        for number, prompt in enumerate(prompts):
            bar.next(prompt.id)
            try:
                ids = encode(engine.tokenizer, prompt.text, chat=prompt.chat)
                options["constraint"] = constraint_for(args, prompt)
                if args.json:
                    generation = engine.generate(ids, **options)
                    _print_json(prompt, generation)
                else:
                    if args.prompts is not None:
                        print(f"{chr(10) if number else ''}=== {prompt.id}", flush=True)
                    generation = _print_stream(engine, ids, options)
                    _print_summary(generation)
                runs.append((prompt.id, generation.stats))
            except OSError:  # of the output
                raise
            except (Exception, GenerationInterrupted) as error:
                if isinstance(error, (GenerationFailed, GenerationInterrupted)):
                    runs.append((prompt.id, error.generation.stats))
                    if args.json:
                        _print_json(prompt, error.generation)
                if isinstance(error, GenerationInterrupted):
                    complain(f"interrupted after {len(error.generation.tokens)} new tokens")
                    return INTERRUPTED
                if args.prompts is None:
                    raise
                complain(f"error: prompt {prompt.id}: {one_line(error)}")
                failed = True
            bar.done()
    return FAILURE if failed else 0


def _generate_together(
    engine: SpecBranch, prompts: list[Prompt], args: argparse.Namespace, runs: list[tuple[str, Stats]]
) -> int:
    """Generate for several prompts at once. Each is printed when it and those before it are over."""
    from specbranch import GenerationInterrupted
    from specbranch.core.errors import SpecBranchError
    from specbranch.several import Several
    from specbranch.text.encoding import encode

    options = {**sampling_options(args, engine.target.generation_config), "stop": args.stop, "method": args.method}
    outcomes: dict[int, Generation | Exception] = {}
    asked, places = [], []
    for number, prompt in enumerate(prompts):
        try:
            ids = encode(engine.tokenizer, prompt.text, chat=prompt.chat)
            options["constraint"] = constraint_for(args, prompt)
            asked.append(partial(_same, engine.request(ids, **options)))
            places.append(number)
        except SpecBranchError as error:
            outcomes[number] = error
    several = Several(engine.decoder, asked, args.max_requests, engine.cache_tokens)
    printed, failed = 0, False
    with progress(len(prompts), shown=not sys.stdout.isatty()) as bar:
        while True:
            while printed in outcomes:
                failed |= not _print_outcome(prompts[printed], printed, outcomes[printed], args, runs)
                bar.done()
                printed += 1
            if printed == len(prompts):
                return FAILURE if failed else 0
            bar.next(prompts[printed].id)
            try:
                touched = several.advance()
            except GenerationInterrupted as interrupt:
                for number, generation in zip(places, interrupt.generations, strict=True):
                    if number >= printed:
                        _print_outcome(prompts[number], number, outcomes.get(number, generation), args, runs)
                complain("interrupted")
                return INTERRUPTED
            for place in touched:
                if (outcome := several.tickets[place].outcome) is not None:
                    outcomes[places[place]] = outcome


def _same(request: Request) -> Request:
    return request


def _print_outcome(
    prompt: Prompt,
    number: int,
    outcome: Generation | Exception,
    args: argparse.Namespace,
    runs: list[tuple[str, Stats]],
) -> bool:
    """False for an error, which may come with a part of the text."""
    from specbranch import GenerationFailed

    generation = outcome.generation if isinstance(outcome, GenerationFailed) else outcome
    if not args.json:
        print(f"{chr(10) if number else ''}=== {prompt.id}")
    if not isinstance(generation, Exception):
        runs.append((prompt.id, generation.stats))
        if args.json:
            _print_json(prompt, generation)
        else:
            print(generation.text, flush=True)
            _print_summary(generation)
    if isinstance(outcome, Exception):
        complain(f"error: prompt {prompt.id}: {one_line(outcome)}")
    return not isinstance(outcome, Exception)


def _print_json(prompt: Prompt, generation: Generation) -> None:
    record = {
        "id": prompt.id,
        "text": generation.text,
        "tokens": generation.tokens,
        "finish_reason": generation.finish_reason,
        "stats": generation.stats.as_dict(),
    }
    print(json.dumps(record), flush=True)


def _print_stream(engine: SpecBranch, ids: list[int], options: dict[str, Any]) -> Generation:
    """Print the text as it is committed, and end its line whatever happens."""
    from specbranch import GenerationFailed, GenerationInterrupted

    written = ""
    with closing(engine.stream(ids, **options)) as stream:
        try:
            try:
                for piece in stream:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
                    written += piece
            except GenerationInterrupted:
                raise
            except KeyboardInterrupt as interrupt:  # between two rounds
                stream.hand_in(interrupt)
        except (GenerationFailed, GenerationInterrupted) as ending:
            rest = ending.generation.text.removeprefix(written)  # committed, but held back until now
            sys.stdout.write(rest + "\n")
            raise
        except KeyboardInterrupt:  # before the first round or behind the last one
            sys.stdout.write("\n")
            raise
    sys.stdout.write("\n")
    sys.stdout.flush()
    assert stream.generation is not None
    return stream.generation


def _print_summary(generation: Generation) -> None:
    if not sys.stderr.isatty():
        return
    stats = generation.stats.as_dict()
    print(
        f"[{stats['method']}: {stats['new_tokens']} tokens, {stats['tokens_per_second']:.1f} tokens/s, "
        f"{stats['tokens_per_target_forward']:.2f} tokens per target forward, "
        f"acceptance {stats['acceptance_rate']:.2f}]",
        file=sys.stderr,
    )
