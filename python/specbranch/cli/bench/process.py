"""A peer in a process of its own: its group, its log, and its end."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from specbranch.cli.bench.vllm_worker import GRACE, kill, members

if TYPE_CHECKING:
    from specbranch.cli.bench.peers import PeerText

ROOM = 16  # positions behind the last token, so that drafting is not cut short there

_Self = TypeVar("_Self", bound="ChildProcess")


class ChildProcess:
    """A process and all that it starts, until `close`, which a with statement does. Its log stays where something went
    wrong.

    answers: whether standard output is read here; else it goes into the log, as the errors do.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], *, answers: bool) -> None:
        handle, path = tempfile.mkstemp(prefix=f"specbranch-{name}-", suffix=".log")
        self._log, self._read = Path(path), 0
        self._failed, self._useless = False, ""  # useless: why nothing more can be asked
        try:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if answers else handle,
                stderr=handle,
                start_new_session=True,  # a group to be ended together, and Ctrl-C is for us alone
            )
        finally:
            os.close(handle)

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process and every one that it started."""
        group = self._process.pid  # its own, as it was started in a session
        try:
            for number in (signal.SIGCONT, signal.SIGTERM):
                _signal(group, number)
            self._wait(GRACE)
            kill(members(group))
            self._wait(1)
        finally:
            _signal(group, signal.SIGKILL)
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with suppress(OSError):  # what nobody has read
                        pipe.close()
            if not self._failed:
                self._log.unlink(missing_ok=True)

    def _wait(self, seconds: float) -> None:
        """Until every process has ended, for so many seconds at most."""
        until = time.monotonic() + seconds
        while (self._process.poll() is None or members(self._process.pid)) and time.monotonic() < until:
            time.sleep(0.05)

    def _begin(self) -> None:
        """Before a question: what the log says from now on is about that one."""
        if self._useless:
            raise ChildProcessError(self._useless)
        self._read = self._log.stat().st_size

    def _said(self) -> str:
        """The log since the last question."""
        with self._log.open("rb") as log:
            log.seek(self._read)
            return log.read().decode(errors="replace")

    def _ended(self, cause: str) -> ChildProcessError:
        return self._end(f"it ended: {cause or 'without a word'}")

    def _nonsense(self) -> ChildProcessError:
        return self._end("its answer cannot be understood")

    def _end(self, reason: str) -> ChildProcessError:
        error = self._failure(reason)
        self._useless = str(error)
        return error

    def _failure(self, reason: str) -> ChildProcessError:
        self._failed = True
        log = "" if str(self._log) in reason else f" (its log: {self._log})"
        return ChildProcessError(" ".join(reason.split()) + log)


class PeerProcess(ChildProcess, ABC):
    """One that writes texts beside our methods."""

    @abstractmethod
    def generate(self, ids: Sequence[int], **options: Any) -> PeerText:
        """What the peer writes; options: as for `Peers.generate`.

        Raises ChildProcessError for what it refuses, a process that has ended, and an answer that cannot be.
        """


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # macOS forbids it where only a zombie is left
        os.killpg(group, number)


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
