"""Log probabilities in OpenAI's forms, whole and streamed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from serving import Served, chat_template, served
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from specbranch import Generation, Sampling, SpecBranch, bundled
from specbranch.core.generation import TokenLogprob
from specbranch.core.stats import Stats
from specbranch.request import Request
from specbranch.runtime.rules import Rules
from specbranch.scheduler import Ticket
from specbranch.serve.logprobs import TokenTexts

PROMPT = bundled.prompts()[0]["prompt"]
EURO = "€"


class Scripted:
    """An engine that says one text, with the bundled pair's tokenizer: a token a round, one character in three."""

    def __init__(self, pair: SpecBranch, text: str) -> None:
        self.pair, self.target, self.tokenizer = pair.pair, pair.target, pair.tokenizer
        self.tokens = [*pair.encode(text), 0]
        self.entries = [TokenLogprob(token, -0.5 - place, ()) for place, token in enumerate(self.tokens)]

    def request(self, ids: list[int], logprobs: int | None = None, **options: Any) -> Request:
        return Request(ids, len(self.tokens), Sampling(), rules=Rules(logprobs=logprobs))

    def scheduler(self, *limits: Any) -> ScriptedScheduler:
        return ScriptedScheduler(self)


class ScriptedBuilder:
    """The text of a ticket so far."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.tokens, self.shown = tokenizer, list[int](), ""

    def fresh(self, final: bool = False) -> str:
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True).rstrip("\ufffd")
        fresh, self.shown = text[len(self.shown) :], text
        return str(fresh)


class ScriptedScheduler:
    def __init__(self, engine: Scripted) -> None:
        self.engine, self.running = engine, list[tuple[Ticket, ScriptedBuilder]]()

    @property
    def busy(self) -> bool:
        return bool(self.running)

    def add(self, ticket: Ticket) -> None:
        builder = ScriptedBuilder(self.engine.tokenizer)
        ticket.job = SimpleNamespace(builder=builder)  # type: ignore[assignment]
        self.running.append((ticket, builder))

    def advance(self) -> list[Ticket]:
        touched = list(self.running)
        for ticket, builder in touched:
            entry, wanted = self.engine.entries[len(builder.tokens)], ticket.request.rules.logprobs
            builder.tokens.append(entry.token)
            if wanted is not None:
                top = ((entry.token, entry.logprob), (5, -9.0))[:wanted]
                ticket.said.logprobs.append(TokenLogprob(entry.token, entry.logprob, top))
            if len(builder.tokens) == len(self.engine.tokens):
                text = str(self.engine.tokenizer.decode(builder.tokens, skip_special_tokens=True))
                entries = None if wanted is None else list(ticket.said.logprobs)
                ticket.outcome = Generation(text, builder.tokens, Stats(), "stop", entries)
                self.running.remove((ticket, builder))
        return [ticket for ticket, _ in touched]


@pytest.fixture(scope="module")
def engine(bundled_pair: SpecBranch) -> Scripted:
    return Scripted(bundled_pair, f"return {EURO} + 1")


@pytest.fixture(scope="module")
def server(bundled_pair: SpecBranch, engine: Scripted) -> Iterator[Served]:
    with chat_template(bundled_pair), served(engine) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return server.client()


def test_of_a_completion(engine, client):
    choice = client.completions.create(model="bundled", prompt=PROMPT, logprobs=2).choices[0]
    given = choice.logprobs
    assert given.token_logprobs == [entry.logprob for entry in engine.entries]
    assert len(given.tokens) == len(engine.tokens)
    first, second = given.tokens[:2]
    assert choice.text.startswith(first + second)
    assert given.text_offset[:3] == [0, len(first), len(first + second)]
    other = engine.tokenizer.decode([5])
    assert given.top_logprobs[1] == {second: -1.5, other: -9.0}
    assert given.tokens[-1] == engine.tokenizer.convert_ids_to_tokens(0)  # the end, which is no text


def test_of_a_chat(engine, client):
    messages = [{"role": "user", "content": PROMPT}]
    options = {"logprobs": True, "top_logprobs": 1}
    choice = client.chat.completions.create(model="bundled", messages=messages, **options).choices[0]
    content = choice.logprobs.content
    assert [entry.logprob for entry in content] == [entry.logprob for entry in engine.entries]
    assert b"".join(bytes(entry.bytes) for entry in content[:-1]).decode() == choice.message.content
    assert [[top.token for top in entry.top_logprobs] for entry in content] == [[entry.token] for entry in content]
    halves = [entry.token for entry in content if entry.token.startswith("bytes:")]
    assert "".join(halves) == "bytes:\\xe2bytes:\\x82bytes:\\xac"


@pytest.mark.parametrize("alternatives", [0, 2])
def test_of_a_stream_they_are_those_of_the_whole(client, alternatives):
    asked = {"model": "bundled", "prompt": PROMPT, "logprobs": alternatives}
    whole = client.completions.create(**asked).choices[0].logprobs
    assert (whole.top_logprobs[0] is None) == (alternatives == 0)
    parts = [piece.choices[0].logprobs for piece in client.completions.create(**asked, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [each for part in parts if part for each in getattr(part, name)] == getattr(whole, name)
    asked = {"model": "bundled", "messages": [{"role": "user", "content": PROMPT}], "logprobs": True}
    content = client.chat.completions.create(**asked).choices[0].logprobs.content
    parts = [piece.choices[0].logprobs for piece in client.chat.completions.create(**asked, stream=True)]
    assert [each for part in parts if part for each in part.content] == content


def test_none_where_none_are_asked_for(client):
    choice = client.completions.create(model="bundled", prompt=PROMPT).choices[0]
    assert (choice.text, choice.logprobs) == (f"return {EURO} + 1", None)


@pytest.mark.parametrize("stream", [False, True])
def test_of_the_engine(bundled_pair, stream):
    alone = bundled_pair.generate(PROMPT, max_new_tokens=20, logprobs=2)
    with served(bundled_pair) as server:
        asked = {"model": "bundled", "prompt": PROMPT, "max_tokens": 20, "logprobs": 2, "stream": stream}
        answer = server.client().completions.create(**asked)
    parts = [piece.choices[0].logprobs for piece in answer] if stream else [answer.choices[0].logprobs]
    values = [value for part in parts if part for value in part.token_logprobs]
    assert values == [entry.logprob for entry in alone.logprobs]
    assert all(value <= 0 and math.isfinite(value) for value in values)


# ---- the text of a token


def sentencepiece(tmp_path: Path) -> PreTrainedTokenizerFast:
    """Spaces as ▁, one of them dropped at the beginning of a text, and single bytes as <0xE2>."""
    vocabulary = {"<unk>": 0, "▁": 1, "a": 2, "▁a": 3, **{f"<0x{byte:02X}>": 4 + byte for byte in range(256)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_a_tokens_text_is_as_within_a_text(tmp_path, bundled_pair):
    texts = TokenTexts(sentencepiece(tmp_path))
    assert [texts.text(token) for token in (2, 3, 1, 4 + 0x41, 4 + 0xE2)] == ["a", " a", " ", "A", "bytes:\\xe2"]
    assert texts.raw(4 + 0xE2) == b"\xe2"
    texts = TokenTexts(bundled_pair.tokenizer)
    text = f" x = '{EURO} é' \n"
    assert b"".join(texts.raw(token) for token in bundled_pair.encode(text)).decode() == text
