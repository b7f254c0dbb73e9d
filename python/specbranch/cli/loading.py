"""Loading the models for a command, without the messages of the libraries below."""

from __future__ import annotations

import argparse
import warnings
from typing import TYPE_CHECKING, Any

from specbranch.cli.arguments import AUTO, check_devices, read_named, whole
from specbranch.cli.drafting import drafting_options
from specbranch.cli.terminal import status
from specbranch.runtime.choices import RETRIEVAL, draft_of

if TYPE_CHECKING:
    from specbranch import SpecBranch


def quiet_libraries() -> None:
    """No progress bars or warnings of transformers: what matters is raised as an exception."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")


def add_chat(parser: argparse.ArgumentParser, kept: int = 1) -> None:
    """Arguments of commands whose prompts are conversations. kept: texts whose caches are kept, usually."""
    parser.add_argument(
        "--chat-template", metavar="FILE", help="a Jinja template to use in place of the tokenizer's chat template"
    )
    parser.add_argument(
        "--prompt-cache",
        type=whole(0),
        default=kept,
        metavar="N",
        help="keep the caches of so many texts: of a prompt that begins like one the rest alone is read; 0 keeps none "
        "(default: %(default)s)",
    )


def load_engine(args: argparse.Namespace) -> SpecBranch:
    """Load the pair of `add_models`, with the options of `add_drafting`, `add_hrad` and `add_chat` where a
    command has them.

    Raises ValueError for devices that nothing runs on and for a draft that is none, and OSError for a chat template
    that cannot be read.
    """
    if args.draft == RETRIEVAL and not hasattr(args, "retrieval"):
        raise ValueError(f"{args.command} needs a draft model; --draft {RETRIEVAL} has none")
    check_devices(args)
    args.draft, args.draft_weights = draft_of(args.target, args.draft, args.draft_weights)
    template = chat_template(args) if hasattr(args, "chat_template") else None
    engine = load_pair(
        args.target,
        args.draft,
        dtype=args.dtype,
        device=args.device or "cpu",
        draft_device=args.draft_device,
        device_map=args.device_map,
        trust_remote_code=args.trust_remote_code,
        target_weights=args.target_weights,
        draft_weights=args.draft_weights,
        target_arithmetic=args.target_arithmetic,
        draft_arithmetic=args.draft_arithmetic,
        cuda_graphs=args.cuda_graphs,
        priority=args.priority,
        overlap=AUTO[args.overlap],
        draft_context=args.draft_context,
        retrieval=AUTO[getattr(args, "retrieval", "auto")],
        corpus=getattr(args, "corpus", None),
        threads=args.threads,
        hrad=getattr(args, "hrad", None),
        prompt_cache=getattr(args, "prompt_cache", 0),
        **drafting_options(args),
    )
    if template is not None and engine.tokenizer is not None:
        engine.tokenizer.chat_template = template
    return engine


def chat_template(args: argparse.Namespace) -> str | None:
    """What the file of `add_chat` holds. Raises OSError or ValueError that names it."""
    return None if args.chat_template is None else read_named("--chat-template", args.chat_template)


def load_pair(target: str, draft: str | None, **options: Any) -> SpecBranch:
    """Load a pair; a spinner on stderr when it is a terminal. options: as `SpecBranch.from_pretrained` takes them."""
    with status("loading the models"):
        from specbranch import SpecBranch

        quiet_libraries()
        return SpecBranch.from_pretrained(target, draft=draft, **options)
