"""Arguments that several commands share, and the values that they take."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from specbranch.cli.messages import complain
from specbranch.core.errors import SpecBranchError
from specbranch.core.excerpt import check_draft_context
from specbranch.runtime.choices import ARITHMETIC_OF, ARITHMETICS, DTYPES, PRIORITIES, RETRIEVAL, WEIGHTS
from specbranch.text.generation_config import sampling

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
SAMPLING = {"max_new_tokens": 128, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
MODEL = "DIR|GGUF|NAME"  # what names a model
OF_A_DRAFT = {  # arguments that say something of a draft model, and what they are where they say nothing
    "draft_device": None,
    "draft_weights": "auto",
    "draft_arithmetic": None,
    "draft_context": "auto",
    "overlap": "auto",
    "hrad": None,
}
AUTO: dict[str, bool | str] = {"auto": "auto", "on": True, "off": False}  # of what may be left to the engine


def add_models(parser: argparse.ArgumentParser, *, draft_required: bool, retrieval: bool = True) -> None:
    """retrieval: whether drafts may be retrieved."""
    parser.add_argument(
        "--target", required=True, metavar=MODEL, help='the model: a checkpoint or a file; "bundled" is the tiny one'
    )
    parser.add_argument(
        "--draft",
        required=draft_required,
        metavar=MODEL,
        help="the small model that drafts; its vocabulary must be the target's; self: the target's weights in 4 bits"
        + ("; retrieval: no model, but what followed the same tokens before" if retrieval else "")
        + ("" if draft_required else " (not needed by the method autoregressive)"),
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype of the weights (default: as stored)")
    parser.add_argument("--device", type=device, metavar="cpu|cuda", help="where the models run (default: cpu)")
    parser.add_argument(
        "--draft-device",
        type=device,
        metavar="cpu|cuda",
        help="where the draft runs, for example cuda:1 (default: --device)",
    )
    parser.add_argument(
        "--device-map", choices=DEVICE_MAPS, help="spread the target over several devices, as transformers does"
    )
    parser.add_argument(
        "--no-cuda-graphs",
        dest="cuda_graphs",
        action="store_false",
        help="on a GPU: do not capture steps in CUDA graphs",
    )
    parser.add_argument(
        "--priority",
        choices=PRIORITIES,
        default="target",
        help="on one GPU: the model whose work goes first (default: %(default)s)",
    )
    for role, automatic in (("target", "lossless if that is faster"), ("draft", "4 bits, which change no text")):
        parser.add_argument(
            f"--{role}-weights",
            choices=WEIGHTS,
            default="auto",
            help=f"how the {role}'s weights are kept, on the CPU: as they are, with the same values in 12 bits, or "
            f"rounded to 8 or 4 bits; auto: {automatic} (default: %(default)s)",
        )
    for role, usual in ARITHMETIC_OF.items():
        parser.add_argument(
            f"--{role}-arithmetic",
            choices=ARITHMETICS,
            help=f"how the {role} multiplies by weights in blocks (8 or 4 bits, GGUF): by their values as bfloat16, or "
            f"with activations in 8 bits (default: {usual})",
        )
    add_trust(parser)
    parser.add_argument("--threads", type=whole(1), metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument(
        "--overlap",
        choices=tuple(AUTO),
        default="auto",
        help="draft while the target verifies; auto measures (default: %(default)s)",
    )
    parser.add_argument(
        "--draft-context",
        type=draft_context,
        default="auto",
        metavar="auto|all|H+N",
        help="what of a prompt the draft reads: all of it, or its first H tokens and its last N; auto reads when and "
        "what pays, by measured costs (default: %(default)s)",
    )
    if retrieval:
        add_retrieval(parser)


def add_retrieval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--retrieval",
        choices=tuple(AUTO),
        default="auto",
        help="draft what followed the same tokens before, too, which takes no forward; auto: with methods that go by "
        "measured costs (default: %(default)s)",
    )
    parser.add_argument(
        "--corpus",
        nargs="+",
        metavar="FILE",
        help="texts in which that is looked for, beside the one that is decoded: text files, or what specbranch corpus "
        "made of some",
    )


def add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code that a checkpoint comes with; without it, one that needs its own code is refused",
    )


def check_devices(args: argparse.Namespace) -> None:
    """Refuse devices that nothing runs on, and what is for a draft model where there is none; warn of switches for GPUs
    in a run without one. Raises ValueError."""
    no_draft = args.draft in (None, RETRIEVAL)
    if no_draft:
        without = "without --draft" if args.draft is None else f"with --draft {args.draft}"
        for name, unset in OF_A_DRAFT.items():
            if getattr(args, name, unset) != unset:
                raise ValueError(f"{flag(name)} has no effect {without}")
    if args.device is not None and args.device_map is not None and (no_draft or args.draft_device is not None):
        others = "--device-map" if no_draft else "--device-map and --draft-device"
        raise ValueError(f"--device has no effect with {others}")
    unused = ["--no-cuda-graphs"] * (not args.cuda_graphs) + [f"--priority {args.priority}"] * (
        args.priority != "target"
    )
    if unused and args.device_map is None and {args.device, args.draft_device} <= {None, "cpu"}:
        complain(f"warning: no effect on a CPU: {', '.join(unused)}")


def add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", nargs="+", required=True, metavar="FILE", help="JSON lines with id, prompt, chat")
    parser.add_argument("--limit", type=whole(1), metavar="N", help="only the first N prompts of each file")


def add_sampling(parser: argparse.ArgumentParser, *, from_checkpoint: bool = False, new_tokens: int = 128) -> None:
    """from_checkpoint: what is not given is None, and so as the checkpoint's generation_config says, new_tokens where
    it does not say how many; else it has a default of its own, so that runs can be compared."""

    def add(name: str, help: str, own: str = "", **kind: Any) -> None:
        shown = f"the checkpoint's{own}" if from_checkpoint else f"{SAMPLING[name]:g}"
        default = None if from_checkpoint else SAMPLING[name]
        parser.add_argument(flag(name), default=default, help=f"{help} (default: {shown})", **kind)

    add("max_new_tokens", "most tokens of an answer", f", or else {new_tokens}", type=whole(1), metavar="N")
    add("temperature", "0 is greedy decoding", type=number(0, math.inf), metavar="T")
    add("top_k", "sample from the K likeliest tokens; 0 is off", type=whole(0), metavar="K")
    share = number(0, 1, open_low=True)
    add("top_p", "sample from the likeliest tokens that make up P; 1 is off", type=share, metavar="P")
    add("min_p", "drop tokens less likely than M times the likeliest; 0 is off", type=number(0, 1), metavar="M")
    parser.add_argument(
        "--seed",
        type=whole(0, 2**63 - 1),
        default=0,
        metavar="S",
        help="of the sampling noise; the same seed gives the same text (default: 0)",
    )


def sampling_options(args: argparse.Namespace, generation_config: object = None) -> dict[str, Any]:
    """The sampling arguments as `SpecBranch.generate` takes them; what has no effect is warned of and left out.

    generation_config: the checkpoint's, where `add_sampling` says that it counts.
    """
    given = {name: getattr(args, name) for name in (*SAMPLING, "seed")}
    if sampling(generation_config, args.temperature).temperature > 0:
        return given
    neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
    unused = [name for name, value in neutral.items() if given[name] not in (None, value)]
    if unused:
        complain(f"warning: no effect at temperature 0: {', '.join(map(flag, unused))}")
    return {**given, **{name: neutral[name] for name in unused}}


def read_named(switch: str, file: str) -> str:
    """The text of a file that a switch names. Raises OSError or ValueError that names both."""
    try:
        content = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{switch} {file}: not UTF-8: {error}") from None
    except OSError as error:
        raise OSError(f"{switch} {file}: {error.strerror}") from None
    if not content.strip():
        raise ValueError(f"{switch} {file} is empty")
    return content


def flag(name: str) -> str:
    """The switch of an argument."""
    return f"--{name.replace('_', '-')}"


# ---- values


def text(value: str) -> str:
    if not value:
        raise argparse.ArgumentTypeError("must not be empty")
    return value


def draft_context(value: str) -> str:
    try:
        check_draft_context(value)
    except SpecBranchError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return value


def device(value: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", value):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, found {value!r}")
    return value


def whole(low: float, high: float = math.inf) -> Callable[[str], int]:
    """A whole number from `low` to `high`."""

    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, found {value!r}") from None
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{_expected(low, high)}, found {number}")
        return number

    return parse


def number(low: float, high: float, *, open_low: bool = False) -> Callable[[str], float]:
    """A finite number from `low` to `high`; open_low: above `low`."""

    def parse(value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, found {value!r}") from None
        inside = (low < number if open_low else low <= number) and number <= high and math.isfinite(number)
        if not inside:
            raise argparse.ArgumentTypeError(f"{_expected(low, high, open_low)}, found {value}")
        return number

    return parse


def _expected(low: float, high: float, open_low: bool = False) -> str:
    """The range in words; an end that is infinite is left out."""
    ends = [f"{'above' if open_low else 'at least'} {_plain(low)}"] if math.isfinite(low) else []
    if math.isfinite(high):
        ends.append(f"at most {_plain(high)}")
    return f"must be {' and '.join(ends) or 'finite'}"


def _plain(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def names(
    known: Sequence[str], *, none: bool = False, groups: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> Callable[[str], tuple[str, ...]]:
    """Comma-separated names of `known`, each once. none: whether "none" may be given, for no names. groups: names that
    mean several."""

    def parse(value: str) -> tuple[str, ...]:
        if none and value == "none":
            return ()
        given = [name.strip() for name in value.split(",")]
        names = tuple(dict.fromkeys(each for name in given for each in groups.get(name, (name,))))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown name {name!r} (choose from {', '.join([*known, *groups])})")
        return names

    return parse
