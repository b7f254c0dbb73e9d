"""The `specbranch` command: dispatch and errors. A command is a module here (see `module`) and a name in COMMANDS."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from specbranch.cli.files import claim
from specbranch.cli.messages import (
    CLOSED_PIPE,
    FAILURE,
    INTERRUPTED,
    USAGE,
    complain,
    discard_output,
    one_line,
)
from specbranch.core.extras import check_installed

COMMANDS = ("generate", "chat", "serve", "bench", "corpus", "record", "plan", "train-hrad", "demo", "doctor")
SAYS_WHAT_IS_MISSING = ("doctor",)  # and runs without it


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
        parser = build_parser()
        if not arguments:
            parser.print_help()
            sys.stdout.flush()
            return 0
        args = parser.parse_args(arguments)
        args.argv = arguments
        command = module(args.command)
        if args.command not in SAYS_WHAT_IS_MISSING:
            check_installed(f"specbranch {args.command}", getattr(command, "EXTRA", "cli"))
        with claim(args, command.OUTPUTS):
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
    for name in COMMANDS:
        command = module(name)
        command.add_arguments(commands.add_parser(name, help=command.HELP, description=_sentence(command.HELP)))
    return parser


def module(command: str) -> Any:
    """The module of a command: HELP, OUTPUTS, add_arguments(parser), run(args), and EXTRA where `cli` will not do.

    Importing it loads neither torch nor transformers, so that --help is quick.
    """
    return importlib.import_module(f"specbranch.cli.{command.replace('-', '_')}")


def _sentence(help: str) -> str:
    return f"{help[0].upper()}{help[1:]}."


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"specbranch {version('specbranch')}")
        parser.exit(0)


if __name__ == "__main__":
    sys.exit(main())
