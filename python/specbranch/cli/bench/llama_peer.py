"""llama.cpp as a peer of our methods: its server on the same prompts, with GGUF files of the same models.

The server is the one of llama.cpp's programs that takes and gives token ids, keeps its models between two texts, and
says how long the prompt took. There is one for each number of drafted tokens, as a request cannot change that.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbranch.cli.bench.process import PeerProcess, last_line

if TYPE_CHECKING:
    from specbranch.cli.bench.peers import PeerText

PROGRAM = "llama-server"
DRAFTED_TOKENS = {"llama.cpp-plain": 0, "llama.cpp-4": 4, "llama.cpp-8": 8}  # at most, by name
NAMES = tuple(DRAFTED_TOKENS)
SUFFIX = ".gguf"

# Runs a command, and kills its whole group once nobody holds standard input any more: the server would live on. Asked
# to end, it waits for the command, which is asked too.
_GUARD = 'exec 3<&0; trap : TERM; "$@" 3<&- & server=$!; (read -r _ <&3; kill -9 0) & wait "$server"; wait "$server"'
_ERROR = re.compile(r"^[\d.]+ E (.+)", re.MULTILINE)  # a line of the server's log


def versions() -> dict[str, str]:
    """What the server calls its version. Raises ValueError where there is none."""
    done = subprocess.run(
        [_program(), "--version"], env=_environment(), capture_output=True, text=True, errors="replace"
    )
    said = (done.stdout + done.stderr).strip()
    if done.returncode:
        raise ValueError(f"{PROGRAM} does not run: {last_line(said) or f'it ended with status {done.returncode}'}")
    lines = said.splitlines()
    return {"llama.cpp": next((line for line in lines if line.startswith("version")), last_line(said))}


def models(args: argparse.Namespace) -> dict[str, str]:
    """The GGUF files that the peers of `args` need, by role. Raises ValueError where one is not named or not there."""
    found = {}
    for role in ("target", "draft") if any(map(DRAFTED_TOKENS.get, args.peers)) else ("target",):
        option, own = f"--llama-{role}", getattr(args, role)
        file = getattr(args, f"llama_{role}")
        if file is None:
            if not own.endswith(SUFFIX):
                raise ValueError(f"--peers llama.cpp needs {option} FILE{SUFFIX}: --{role} {own} is no such file")
            option, file = f"--{role}", own
        if not Path(file).is_file():
            raise ValueError(f"{option}: there is no file {file}")
        found[role] = file
    return found


def has_our_weights(args: argparse.Namespace) -> bool:
    """Whether the peers run the target's own file, so that greedy texts can be compared."""
    return args.target.endswith(SUFFIX) and args.llama_target in (None, args.target)


def notes(args: argparse.Namespace) -> list[str]:
    """What to know when its rows are read."""
    lines = [
        "its seconds are what its server states, without HTTP: until the first token, with the draft's reading of the "
        "prompt too, and then for the others",
        "a text ends at any token that its file says ends one",
    ]
    if not has_our_weights(args):
        lines.append("its weights are those of its own files, so its texts are not compared")
    elif args.temperature > 0:
        lines.append("it draws other noise, so its texts are not compared")
    else:
        lines.append("it rounds activations to 8 bits where weights are quantised, so texts may part from ours")
    if args.temperature > 0 and any(map(DRAFTED_TOKENS.get, args.peers)):
        lines.append("with a draft it keeps a drafted token only where it draws the same one from the target")
    return [f"llama.cpp: {line}" for line in lines]


class LlamaServer(PeerProcess):
    """One server.

    models: as of the function of that name; positions: the longest text that there can be, with its prompt. Raises
    ChildProcessError where it does not start, and then keeps its log.
    """

    def __init__(self, name: str, models: Mapping[str, str], *, positions: int, threads: int) -> None:
        count = str(threads)
        options = ["--model", models["target"], "--ctx-size", str(positions), "--threads", count]
        options += ["--threads-batch", count, "--parallel", "1", "--device", "none", "--fit", "off", "--cache-ram", "0"]
        if drafted := DRAFTED_TOKENS[name]:
            options += ["--spec-type", "draft-simple", "--spec-draft-model", models["draft"]]
            options += ["--spec-draft-n-max", str(drafted), "--spec-draft-device", "none"]
            options += ["--spec-draft-threads", count, "--spec-draft-threads-batch", count]
        self._folder = tempfile.TemporaryDirectory(prefix="specbranch-")
        self._socket = str(Path(self._folder.name, "s.sock"))
        try:
            command = ["/bin/sh", "-c", _GUARD, "sh", _program(), *options, "--host", self._socket]
            super().__init__(name, command, _environment(), answers=False)
        except BaseException:
            self._folder.cleanup()
            raise
        try:
            self._wait_until_it_listens()
        except BaseException:
            self.close()
            raise

    def generate(self, ids: Sequence[int], **options: Any) -> PeerText:
        """As `PeerProcess.generate`. Seconds are those that the server states."""
        from specbranch.cli.bench.peers import PeerText

        self._begin()
        try:
            status, answer = self._request("POST", "/completion", _completion(ids, **options))
        except (OSError, http.client.HTTPException):
            raise self._ended(self._cause()) from None
        except ValueError:
            raise self._nonsense() from None
        match answer:
            case {"error": {"message": str(message)}}:
                raise self._failure(message)
            case {
                "tokens": [_, *_] as tokens,
                "timings": {
                    "prompt_n": int(read),
                    "prompt_ms": float() | int() as prompt_ms,
                    "predicted_ms": float() | int() as predicted_ms,
                },
            } if status == http.HTTPStatus.OK and all(isinstance(token, int) for token in tokens):
                if read != len(ids):
                    raise self._failure(f"it read {read} of {len(ids)} tokens of the prompt")
                if prompt_ms > 0 and predicted_ms >= 0:
                    return PeerText(list(tokens), 1, prompt_ms / 1000, (prompt_ms + predicted_ms) / 1000)
        raise self._nonsense()

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._folder.cleanup()

    def _wait_until_it_listens(self) -> None:
        """For as long as it loads."""
        while self._process.poll() is None:
            with suppress(OSError, http.client.HTTPException, ValueError):
                if self._request("GET", "/health")[0] == http.HTTPStatus.OK:
                    return
            time.sleep(0.05)
        raise self._ended(self._cause())

    def _cause(self) -> str:
        """The first error in the log since the last question, as the last says only that there was one; else its last
        line."""
        said = self._said()
        found = _ERROR.search(said)
        return found[1] if found else last_line(said)

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
        """The status, and the JSON of the answer."""
        connection = _Connection(self._socket)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()


class _Connection(http.client.HTTPConnection):
    """HTTP over a socket in the file system, which only this user can reach."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


def _completion(
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
) -> dict[str, Any]:
    """A request. Nothing is kept from the last one, and only the samplers named here run: no penalties."""
    sampling: dict[str, Any] = {"samplers": ["top_k"], "top_k": 1}
    if temperature > 0:
        sampling = {"samplers": ["top_k", "temperature", "top_p", "min_p"], "temperature": temperature, "top_k": top_k}
        sampling |= {"top_p": top_p, "min_p": min_p, "seed": seed % (2**32 - 1)}  # the last one means any
    return {
        "prompt": list(ids),
        "n_predict": max_new_tokens,
        "cache_prompt": False,
        "return_tokens": True,
        **sampling,
    }


def _program() -> str:
    found = shutil.which(PROGRAM)
    if found is None:
        raise ValueError(f"--peers llama.cpp needs llama.cpp's {PROGRAM} on the PATH")
    return found


def _environment() -> dict[str, str]:
    """Ours without llama.cpp's variables, each of which is an option."""
    return {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")}
