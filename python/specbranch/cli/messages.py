"""Exit statuses and one-line messages on stderr."""

from __future__ import annotations

import contextlib
import os
import sys

from specbranch.core.generation import GenerationFailed

FAILURE, USAGE = 1, 2
INTERRUPTED, CLOSED_PIPE = 130, 141  # as a shell reports SIGINT and SIGPIPE


def complain(message: str) -> None:
    """One line on stderr, after flushing stdout."""
    try:
        sys.stdout.flush()
        print(f"specbranch: {message}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        discard_output()


def one_line(error: BaseException) -> str:
    """The message of an error on one line, with the error's type where the message alone says too little."""
    message = " ".join(str(error).split())
    expected = message and isinstance(error, (ValueError, OSError, ImportError, GenerationFailed))
    return message if expected else f"{type(error).__name__}: {message}".rstrip(": ")


def discard_output() -> None:
    """Nobody reads stdout any more; without this the interpreter would complain when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
