"""The `specbranch` command: arguments and dispatch. Each subcommand's work is in a module of its own here."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from specbranch.cli.messages import (
    CLOSED_PIPE,
    FAILURE,
    INTERRUPTED,
    USAGE,
    complain,
    discard_output,
    one_line,
)

# Spelled out here because `specbranch --help` must not wait for torch; a test compares with the package's.
METHODS = ("autoregressive", "speculative", "adaptive", "pearl", "ssd", "specbranch-paper", "specbranch")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
PRIORITIES = ("target", "draft", "none")
PEERS = ("greedy", "assisted", "prompt-lookup")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Whatever goes wrong is one line on stderr; SPECBRANCH_DEBUG=1 shows the traceback instead. A closed output
    pipe ends quietly with 141, Ctrl-C with 130.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without UTF-8 shows "?", and does not end the run
            stream.reconfigure(errors="replace")
    format_before, warnings.formatwarning = warnings.formatwarning, _warning_line
    try:
        args = build_parser().parse_args(arguments)
        args.argv = arguments
        command = importlib.import_module(f"specbranch.cli.{args.command.replace('-', '_')}")
        status: int = command.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        discard_output()
        return CLOSED_PIPE
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("SPECBRANCH_DEBUG", "0") not in ("", "0"):
            raise
        complain(f"error: {one_line(error)}")
        return FAILURE
    finally:
        warnings.formatwarning = format_before


def _warning_line(message: Warning | str, *_: object, **__: object) -> str:
    """A warning as the other messages: one line, and not where in the code it was given."""
    return f"specbranch: warning: {' '.join(str(message).split())}\n"


class _Parser(argparse.ArgumentParser):
    """Usage errors on one line; no abbreviated options, which would change meaning as options are added."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"specbranch: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="specbranch",
        description="Makes a Hugging Face causal language model answer faster with a small draft model, "
        "without changing a token.",
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, dest=argparse.SUPPRESS, help="print the version and exit"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    generate = commands.add_parser("generate", help="generate text for a prompt or a file of prompts")
    _add_models(generate, draft_required=False)
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", type=_text, metavar="TEXT", help="the text to continue")
    source.add_argument("--prompts", metavar="FILE", help="JSON lines with id, prompt, chat; - is standard input")
    generate.add_argument("--chat", action="store_true", help="apply the chat template to --prompt")
    generate.add_argument("--method", choices=METHODS, default="specbranch", help="default: %(default)s")
    _add_sampling(generate)
    generate.add_argument(
        "--stop", type=_text, action="append", metavar="TEXT", help="end before this text; may be repeated"
    )
    _add_policy(generate)
    generate.add_argument("--limit", type=_at_least(1), metavar="N", help="only the first N prompts of the file")
    generate.add_argument("--json", action="store_true", help="one JSON object a prompt, one a line")
    generate.add_argument(
        "--trace", metavar="FILE", help="write when each model ran, for chrome://tracing or ui.perfetto.dev"
    )

    bench = commands.add_parser("bench", help="compare methods, and transformers' own, on the same prompts")
    _add_models(bench, draft_required=True)
    _add_prompts(bench)
    bench.add_argument(
        "--methods",
        type=_names(METHODS),
        default=("specbranch", "autoregressive"),
        metavar="LIST",
        help=f"comma-separated, of {', '.join(METHODS)}; autoregressive always runs "
        "(default: specbranch,autoregressive)",
    )
    bench.add_argument(
        "--peers",
        type=_names(PEERS, none=True),
        default=PEERS,
        metavar="LIST",
        help=f"transformers' own generation: comma-separated, of {', '.join(PEERS)}; or none (default: all)",
    )
    _add_sampling(bench)
    _add_policy(bench)
    bench.add_argument(
        "--json",
        metavar="OUT",
        help="write everything measured to this file; what an interrupted run left there is gone on with",
    )
    bench.add_argument("--fresh", action="store_true", help="measure anew what the file of --json holds already")
    bench.add_argument("--plot", metavar="OUT.png", help="draw the figures (needs matplotlib; also .svg, .pdf, …)")

    record = commands.add_parser("record", help="decode prompts once and keep what any method could ask of the pair")
    _add_models(record, draft_required=True)
    _add_prompts(record)
    record.add_argument("--out", required=True, metavar="FILE", help="a safetensors file; an unfinished one goes on")
    record.add_argument("--features", action="store_true", help="keep the target's features too, for H-RAD")
    _add_sampling(record)

    plan = commands.add_parser("plan", help="replay every method over records: expected speed and best settings")
    plan.add_argument("records", nargs="+", metavar="RECORD", help="files made by specbranch record, of one pair")
    plan.add_argument(
        "--ratio",
        type=_number(0, math.inf, open_low=True),
        action="append",
        metavar="C",
        help="a target forward costs C draft forwards, instead of what was measured; may be repeated",
    )
    plan.add_argument(
        "--row", type=_number(0, math.inf), default=0.0, metavar="R", help="with --ratio: what one more row adds (0.02)"
    )
    plan.add_argument("--json", metavar="OUT", help="write everything replayed to this file")

    train = commands.add_parser(
        "train-hrad", help="train H-RAD, the predictor of how much will be accepted, for a pair"
    )
    _add_models(train, draft_required=True)
    _add_prompts(train)
    train.add_argument("--out", required=True, metavar="DIR", help="of the predictor; an unfinished one goes on")
    _add_sampling(train)

    demo = commands.add_parser("demo", help="the bundled pair, autoregressive and SpecBranch side by side")
    demo.add_argument("--threads", type=_at_least(1), metavar="N", help="CPU threads (default: torch's)")

    doctor = commands.add_parser("doctor", help="what is installed, what can run, and why not")
    doctor.add_argument(
        "--target",
        default="bundled",
        metavar="DIR|NAME",
        help="whether its steps can be captured (default: %(default)s)",
    )
    doctor.add_argument("--draft", default="bundled", metavar="DIR|NAME", help="the same (default: %(default)s)")
    doctor.add_argument("--json", action="store_true", help="as one JSON object")
    return parser


def _add_models(parser: argparse.ArgumentParser, *, draft_required: bool) -> None:
    parser.add_argument("--target", required=True, metavar="DIR|NAME", help='the model; "bundled" is the tiny one')
    parser.add_argument(
        "--draft",
        required=draft_required,
        metavar="DIR|NAME",
        help="the small model that guesses ahead, with the same vocabulary"
        + ("" if draft_required else " (not needed by --method autoregressive)"),
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="of the weights (default: as stored)",
    )
    parser.add_argument("--device", type=_device, default="cpu", metavar="cpu|cuda", help="default: %(default)s")
    parser.add_argument(
        "--draft-device",
        type=_device,
        metavar="cpu|cuda",
        help="of the draft alone, for example cuda:1 (default: --device)",
    )
    parser.add_argument(
        "--device-map", choices=DEVICE_MAPS, help="spread the target over all devices instead, as transformers does"
    )
    parser.add_argument(
        "--no-cuda-graphs", dest="cuda_graphs", action="store_false", help="on a GPU: run every step from Python"
    )
    parser.add_argument(
        "--priority",
        choices=PRIORITIES,
        default="target",
        help="on one GPU: the model whose work goes first (default: %(default)s)",
    )
    parser.add_argument("--threads", type=_at_least(1), metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument(
        "--overlap",
        choices=("auto", "on", "off"),
        default="auto",
        help="draft while the target verifies; auto measures (default: %(default)s)",
    )


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", nargs="+", required=True, metavar="FILE", help="JSON lines with id, prompt, chat")
    parser.add_argument("--limit", type=_at_least(1), metavar="N", help="only the first N prompts of each file")


def _add_policy(parser: argparse.ArgumentParser) -> None:
    policy = parser.add_argument_group("drafting", "these change the speed, never the text")
    policy.add_argument(
        "--epsilon", type=_number(0, 1), metavar="E", help="specbranch: less confidence than this branches"
    )
    policy.add_argument("--k-max", type=_at_least(1), metavar="N", help="specbranch: most branches at once")
    policy.add_argument(
        "--max-trunk", type=_at_least(1), metavar="N", help="specbranch: most tokens drafted before verifying"
    )
    policy.add_argument("--hrad", metavar="DIR", help="specbranch: a predictor for this pair, of train-hrad")
    policy.add_argument("--length", type=_at_least(1), metavar="N", help="speculative, pearl: tokens drafted a round")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=_at_least(1), default=128, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=_number(0, math.inf), default=0.0, metavar="T", help="0 is greedy (default: 0)"
    )
    parser.add_argument("--top-k", type=_at_least(0), default=0, metavar="K", help="0 is off (default: 0)")
    parser.add_argument(
        "--top-p", type=_number(0, 1, open_low=True), default=1.0, metavar="P", help="1 is off (default: 1)"
    )
    parser.add_argument("--min-p", type=_number(0, 1), default=0.0, metavar="M", help="0 is off (default: 0)")
    parser.add_argument(
        "--seed",
        type=_at_least(0),
        default=0,
        metavar="S",
        help="the text is a function of target, prompt, sampling options and seed (default: 0)",
    )


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        parser.exit(0, f"specbranch {version('specbranch')}\n")


def _text(value: str) -> str:
    if not value:
        raise argparse.ArgumentTypeError("must not be empty")
    return value


def _device(value: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", value):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, found {value!r}")
    return value


def _at_least(low: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, found {value!r}") from None
        if number < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, found {number}")
        return number

    return parse


def _number(low: float, high: float, *, open_low: bool = False) -> Callable[[str], float]:
    above = f"above {low:g}" if open_low else f"at least {low:g}"
    expected = f"must be {above}" + (f" and at most {high:g}" if math.isfinite(high) else "")

    def parse(value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, found {value!r}") from None
        inside = (low < number if open_low else low <= number) and number <= high and math.isfinite(number)
        if not inside:
            raise argparse.ArgumentTypeError(f"{expected}, found {value}")
        return number

    return parse


def _names(known: Sequence[str], *, none: bool = False) -> Callable[[str], tuple[str, ...]]:
    def parse(value: str) -> tuple[str, ...]:
        if none and value == "none":
            return ()
        names = tuple(dict.fromkeys(name.strip() for name in value.split(",")))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown name {name!r} (choose from {', '.join(known)})")
        return names

    return parse


if __name__ == "__main__":
    sys.exit(main())
