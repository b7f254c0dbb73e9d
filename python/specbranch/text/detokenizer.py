"""From committed tokens to text: whole UTF-8 characters only, stop strings, end-of-sequence tokens."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from specbranch.text.stopping import StopStrings

REPLACEMENT = "\ufffd"


class TextBuilder:
    """Collects tokens; says after each whether the text is over, and which text is safe to show.

    stop: strings that end the text; they are cut off it, though the tokens that complete one stay.
    eos: ids that end the text; they are kept as tokens and never shown.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, eos: frozenset[int] = frozenset(), stop: Sequence[str] = ()
    ) -> None:
        self.tokenizer, self.eos, self.stop = tokenizer, eos, StopStrings(tuple(stop))
        self.tokens: list[int] = []
        self.stopped = False
        self._settled = ""  # text of the tokens before _start, final
        self._start = 0
        self._shown = 0

    def add(self, token: int) -> bool:
        """Append a token; True when it ends the text."""
        self.tokens.append(token)
        if token in self.eos or (self.stop.strings and self.stop.find(self._text()) is not None):
            self.stopped = True
        return self.stopped

    def fresh(self, final: bool = False) -> str:
        """Text not returned before. Unless final, what may still change or belong to a stop string is held back."""
        text = self._text()
        end = self.stop.find(text)
        if end is None:
            end = len(text)
            if not final:
                while end and text[end - 1] == REPLACEMENT:
                    end -= 1
                end -= self.stop.begun(text[:end])
        new, self._shown = text[self._shown : end], max(self._shown, end)
        return new

    @property
    def text(self) -> str:
        """The whole text, without a stop string."""
        text = self._text()
        return text[: self.stop.find(text)]

    def _text(self) -> str:
        """All text so far. Decoding starts a few tokens back, since a tokenizer may join or strip at a seam."""
        if self.tokenizer is None:
            return ""
        tail = self._decode(self.tokens[self._start :])
        if len(self.tokens) - self._start > 48 and not tail.endswith(REPLACEMENT):
            middle = len(self.tokens) - 16
            head = self._decode(self.tokens[self._start : middle])
            if tail.startswith(head) and self._decode(self.tokens[middle:]) == tail[len(head) :]:
                self._settled, self._start = self._settled + head, middle
                return self._settled + tail[len(head) :]
        return self._settled + tail

    def _decode(self, tokens: Sequence[int]) -> str:
        assert self.tokenizer is not None
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)
