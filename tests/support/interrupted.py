"""Interrupts at chosen moments: wherever CPython looks for one, behind a call, at a function's begin, in a loop."""

import dis
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

LOOKS = {code for name, code in dis.opmap.items() if name.startswith(("CALL", "RESUME", "JUMP_BACKWARD"))}
FILES = ("/specbranch/", "/contextlib.py", "/grad_mode.py", "/_contextlib.py")

Place = tuple[CodeType, int]


class Tracer:
    """Sees the places where an interrupt may arrive in our code, and in what context managers are made of.

    place: to interrupt at when it is passed for the first time.
    """

    def __init__(self, place: Place | None = None) -> None:
        self.place = place
        self.seen: dict[Place, None] = {}
        self._last: dict[int, int] = {}

    def run(self, work: Callable[[], object]) -> None:
        sys.settrace(self._enter)
        try:
            work()
        finally:
            sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, argument: object) -> Any:
        if not any(part in frame.f_code.co_filename for part in FILES):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return self._step

    def _step(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "return":
            self._last.pop(id(frame), None)
        if event == "opcode":
            last, code = self._last.get(id(frame)), frame.f_code
            self._last[id(frame)] = frame.f_lasti
            if (
                last is not None
                and code.co_code[last] in LOOKS
                and _handler(code, last) == _handler(code, frame.f_lasti)
            ):
                place = code, last
                self.seen[place] = None
                if place == self.place:
                    self.place = None
                    sys.settrace(None)
                    raise KeyboardInterrupt
        return self._step


@cache
def _handler(code: CodeType, offset: int) -> int | None:
    """Where an error in an instruction goes. A trace function raises in the next one, CPython in the call itself."""
    entries = dis._parse_exception_table(code)  # type: ignore[attr-defined]
    return next((entry.target for entry in entries if entry.start <= offset < entry.end), None)


def file_of(place: Place) -> str:
    return Path(place[0].co_filename).name


def named(place: Place) -> str:
    code, offset = place
    line = next(line for start, end, line in code.co_lines() if start <= offset < end)
    return f"{code.co_name} ({file_of(place)}:{line})"
