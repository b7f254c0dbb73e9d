"""Loading the models for a subcommand, without the chatter of the libraries below."""

from __future__ import annotations

import argparse
import warnings
from typing import TYPE_CHECKING, Any

from specbranch.cli.terminal import status

if TYPE_CHECKING:
    from specbranch import SpecBranch


def quiet_libraries() -> None:
    """No progress bars or warnings of transformers between our lines: what matters comes as an exception."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")


OVERLAP: dict[str, bool | str] = {"auto": "auto", "on": True, "off": False}
POLICY_OPTIONS = ("epsilon", "k_max", "max_trunk", "length")


def load_engine(args: argparse.Namespace) -> SpecBranch:
    """Load the pair that the arguments name; a spinner on stderr when it is a terminal."""
    policy = {name: getattr(args, name, None) for name in POLICY_OPTIONS}
    with status("loading the models"):
        from specbranch import SpecBranch

        quiet_libraries()
        return SpecBranch.from_pretrained(
            args.target,
            draft=args.draft,
            dtype=args.dtype,
            device=args.device,
            draft_device=getattr(args, "draft_device", None),
            device_map=getattr(args, "device_map", None),
            cuda_graphs=getattr(args, "cuda_graphs", True),
            priority=getattr(args, "priority", "target"),
            overlap=OVERLAP[args.overlap],
            threads=args.threads,
            hrad=getattr(args, "hrad", None),
            **{name: value for name, value in policy.items() if value is not None},
        )


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling arguments as `SpecBranch.generate` takes them."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed")
    return {name: getattr(args, name) for name in names}
