"""Answers as OpenAI's JSON: whole, or as chunks of a stream."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from specbranch.core.generation import Generation, TokenLogprob
from specbranch.serve.answers import Piece
from specbranch.serve.logprobs import TokenTexts, chat_logprobs, completion_logprobs
from specbranch.serve.requests import Asked

DONE = b"data: [DONE]\n\n"


def encoded(value: object) -> bytes:
    """JSON as UTF-8; half a surrogate pair, which a client may send and an error may repeat, as its escape."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def sent(value: object) -> bytes:
    """A server-sent event."""
    return b"data: " + encoded(value) + b"\n\n"


class Reply(ABC):
    """One answer. What both endpoints have; `seed` is ours: with it, the same request gives the same text."""

    whole_object, chunk_object, prefix = "", "", ""

    def __init__(self, asked: Asked, model: str, prompt_tokens: int, texts: TokenTexts | None) -> None:
        self.asked, self.prompt_tokens, self.texts = asked, prompt_tokens, texts
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": "specbranch",
            "seed": asked.seed,
        }

    def whole(self, pieces: Sequence[Piece], generation: Generation) -> dict[str, Any]:
        logprobs = self._logprobs([entry for piece in pieces for entry in piece.logprobs])
        choice = self._choice("".join(piece.text for piece in pieces), logprobs, generation.finish_reason)
        return {**self.head, "object": self.whole_object, "choices": [choice], "usage": self._usage(generation)}

    def first(self) -> list[dict[str, Any]]:
        """Chunks before any text."""
        return []

    def chunk(self, piece: Piece) -> dict[str, Any]:
        return self._chunk([self._part(piece.text, self._logprobs(piece.logprobs), None)])

    def last(self, generation: Generation) -> list[dict[str, Any]]:
        """Why it ended and, where it was asked for, what it took."""
        chunks = [self._chunk([self._part("", None, generation.finish_reason)])]
        if self.asked.include_usage:
            chunks.append(self._chunk([]) | {"usage": self._usage(generation)})
        return chunks

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self.asked.include_usage else {}
        return {**self.head, "object": self.chunk_object, "choices": choices, **usage}

    def _usage(self, generation: Generation) -> dict[str, Any]:
        prompt, new = self.prompt_tokens, len(generation.tokens)
        reused = {"cached_tokens": generation.stats.reused_tokens}
        counts = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
        return {**counts, "prompt_tokens_details": reused}

    @abstractmethod
    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """Of some tokens, as this protocol has them."""

    @abstractmethod
    def _choice(self, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        """A choice of a whole answer."""

    @abstractmethod
    def _part(self, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        """A choice of a chunk."""


class ChatReply(Reply):
    whole_object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def first(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])]

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return None if self.texts is None else chat_logprobs(self.texts, entries)

    def _choice(self, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _part(self, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        delta = {"content": text} if reason is None else {}
        return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


class CompletionReply(Reply):
    whole_object, chunk_object, prefix = "text_completion", "text_completion", "cmpl"
    _offset = 0  # characters of the tokens so far

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self.texts is None:
            return None
        form = completion_logprobs(self.texts, entries, self._offset)
        self._offset += sum(map(len, form["tokens"]))
        return form

    def _choice(self, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}

    _part = _choice
