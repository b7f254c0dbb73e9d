"""Log probabilities of tokens, in the forms of OpenAI's two endpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from specbranch.core.generation import TokenLogprob

REPLACEMENT = "\ufffd"
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # of byte-level vocabularies


class TokenTexts:
    """The text of single tokens. Half a character has no text of its own, only bytes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # Some tokenizers drop a space at the beginning of a text; behind a token there is none.
        self._before = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        self._lead = self._decode([])
        self._known: dict[int, bytes] = {}

    def _decode(self, tokens: Sequence[int]) -> str:
        ids = [*self._before, *tokens]
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def text(self, token: int) -> str:
        """As it stands within a text; of bytes that are no text, OpenAI's form of them: "bytes:\\xe2\\x82"."""
        raw = self.raw(token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def raw(self, token: int) -> bytes:
        if token not in self._known:
            self._known[token] = self._raw(token)
        return self._known[token]

    def _raw(self, token: int) -> bytes:
        text = self._decode([token]).removeprefix(self._lead)
        if REPLACEMENT not in text:
            return text.encode("utf-8")
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        if all(character in BYTES for character in piece):
            return bytes(BYTES[character] for character in piece)
        return text.encode("utf-8")


def chat_logprobs(texts: TokenTexts, entries: Iterable[TokenLogprob]) -> dict[str, Any]:
    """For /v1/chat/completions."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        return {"token": texts.text(token), "logprob": logprob, "bytes": list(texts.raw(token))}

    content = [
        {**one(entry.token, entry.logprob), "top_logprobs": [one(*alternative) for alternative in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(texts: TokenTexts, entries: Iterable[TokenLogprob], offset: int) -> dict[str, Any]:
    """For /v1/completions. offset: characters of the tokens before."""
    tokens, values, alternatives, offsets = [], [], [], []
    for entry in entries:
        text = texts.text(entry.token)
        tokens.append(text)
        values.append(entry.logprob)
        # Of tokens with one text the likeliest stays; the token itself is always there.
        top = {texts.text(token): logprob for token, logprob in reversed(entry.top)}
        alternatives.append({**top, text: entry.logprob} if top else None)
        offsets.append(offset)
        offset += len(text)
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": alternatives, "text_offset": offsets}
