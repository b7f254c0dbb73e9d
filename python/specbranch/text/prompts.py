"""Prompt files: JSON lines with `id`, `prompt` or `messages`, and `chat`, read and checked before a model is loaded."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONSTRAINTS: dict[str, tuple[tuple[type, ...], str]] = {  # keys of a line: types of the value, and in words
    "json_schema": ((dict, bool), "an object, true or false"),
    "regex": ((str,), "text"),
    "grammar": ((str,), "text"),
}


class PromptFileError(ValueError):
    """A prompt file that cannot be used; the message names the file and the line."""


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    id: names the prompt in every output, unique in its file.
    text: what the model is asked to continue, or with `chat` the user's message, or the messages of a chat.
    chat: apply the tokenizer's chat template.
    task: the benchmark it belongs to; the file's stem unless the line says otherwise.
    constraint: what the answer may be: a kind of CONSTRAINTS and its value.
    """

    id: str
    text: str | list[dict[str, Any]]
    chat: bool = False
    task: str = "prompts"
    constraint: tuple[str, Any] | None = None


def read_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """Read a prompt file (`-` is standard input).

    Each line is a JSON object with `prompt` (text) or `messages` (of a chat, each with `role` and `content`) and,
    optionally, `id` (text or integer; default: stem/line number), `chat` (true or false; default false, with `messages`
    true), `task` (text; default: the file's stem) and one of `json_schema` (an object, true or false), `regex` and
    `grammar` (text), which the answer has to follow. Other keys are ignored, and so are blank lines.

    limit: keep only the first `limit` prompts; the lines after them are not looked at.
    Raises PromptFileError naming the file, and the line where one is at fault.
    """
    name = "standard input" if str(path) == "-" else str(path)
    stem = "stdin" if str(path) == "-" else Path(path).stem
    prompts: list[Prompt] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(_lines(path, name), start=1):
        if limit is not None and len(prompts) >= limit:
            break
        where = f"{name}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise PromptFileError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
        if not text.strip():
            continue
        prompt = _parse(text, where, stem, number)
        if prompt.id in line_of:
            raise PromptFileError(f"{where}: id {prompt.id!r} is already used on line {line_of[prompt.id]}")
        line_of[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise PromptFileError(f"{name}: holds no prompts")
    return prompts


def read_text() -> str:
    """The prompt that standard input is, without a newline at its end: `echo` and editors write one.

    Raises PromptFileError for what is empty or not UTF-8.
    """
    try:
        text = _standard_input().decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise PromptFileError(f"standard input: not UTF-8 ({error.reason} at byte {error.start})") from None
    if not text:
        raise PromptFileError("standard input: is empty; expected the prompt")
    return text


def read_all(paths: Sequence[str], limit: int | None = None) -> list[Prompt]:
    """The prompts of several files, each as `read_prompts` reads it. Raises PromptFileError also for two of one name,
    by which results know them."""
    prompts = [prompt for path in paths for prompt in read_prompts(path, limit)]
    check_distinct(prompts)
    return prompts


def check_distinct(prompts: Iterable[Prompt]) -> None:
    """That no two prompts have one task and id. Raises PromptFileError."""
    seen = set()
    for prompt in prompts:
        if (prompt.task, prompt.id) in seen:
            raise PromptFileError(f"two prompts have the id {prompt.id!r} and the task {prompt.task!r}; expected one")
        seen.add((prompt.task, prompt.id))


def _lines(path: str | Path, name: str) -> Iterable[bytes]:
    # Bytes, split at newlines only: str.splitlines would also cut at characters that JSON text may hold.
    try:
        data = _standard_input() if str(path) == "-" else Path(path).read_bytes()
    except OSError as error:
        raise PromptFileError(f"{name}: {error.strerror or error}") from None
    return data.split(b"\n")


def _standard_input() -> bytes:
    return b"" if sys.stdin is None else sys.stdin.buffer.read()  # None: closed


def _parse(text: str, where: str, stem: str, number: int) -> Prompt:
    try:
        record: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise PromptFileError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise PromptFileError(f"{where}: not a prompt (nested too deeply)") from None
    if not isinstance(record, dict):
        raise PromptFileError(f'{where}: expected an object like {{"id": …, "prompt": …}}, found {_kind(record)}')
    source = "messages" if "messages" in record else "prompt"
    if source not in record:
        raise PromptFileError(f'{where}: "prompt" is missing')
    prompt, chat = record[source], record.get("chat", source == "messages")
    name, task = record.get("id", f"{stem}/{number}"), record.get("task", stem)
    if source == "messages" and "prompt" in record:
        raise PromptFileError(f'{where}: has both "prompt" and "messages"')
    if source == "prompt" and not isinstance(prompt, str):
        raise PromptFileError(f'{where}: "prompt" must be text, found {_kind(prompt)}')
    if source == "messages" and not (isinstance(prompt, list) and all(isinstance(one, dict) for one in prompt)):
        raise PromptFileError(f'{where}: "messages" must be an array of objects with "role" and "content"')
    if not prompt:
        raise PromptFileError(f'{where}: "{source}" is empty')
    if not isinstance(chat, bool):
        raise PromptFileError(f'{where}: "chat" must be true or false, found {_kind(chat)}')
    if source == "messages" and not chat:
        raise PromptFileError(f'{where}: "messages" are a chat, but "chat" is false')
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise PromptFileError(f'{where}: "id" must be text or an integer, found {_kind(name)}')
    if not isinstance(task, str):
        raise PromptFileError(f'{where}: "task" must be text, found {_kind(task)}')
    return Prompt(id=str(name), text=prompt, chat=chat, task=task, constraint=_constraint(record, where))


def _constraint(record: dict[str, Any], where: str) -> tuple[str, Any] | None:
    given = [kind for kind in CONSTRAINTS if record.get(kind) is not None]
    if not given:
        return None
    if len(given) > 1:
        raise PromptFileError(f'{where}: has both "{given[0]}" and "{given[1]}"')
    (kind,) = given
    types, expected = CONSTRAINTS[kind]
    if not isinstance(record[kind], types):
        raise PromptFileError(f'{where}: "{kind}" must be {expected}, found {_kind(record[kind])}')
    return kind, record[kind]


def _kind(value: object) -> str:
    kinds: dict[type, str] = {
        dict: "an object",
        list: "an array",
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return kinds.get(type(value), "null")
