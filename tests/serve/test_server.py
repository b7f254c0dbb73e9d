"""The server as OpenAI's client and others meet it: the engine's texts, in OpenAI's forms."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from serving import Served, chat_template, served

from specbranch import SpecBranch, bundled
from specbranch.runtime.verifier import ModelVerifier
from specbranch.serve.app import Service

PROMPTS = [record["prompt"] for record in bundled.prompts()]
PROMPT = PROMPTS[0]
MESSAGES = [{"role": "system", "content": "Python"}, {"role": "user", "content": PROMPT}]
SAMPLED = {"temperature": 0.8, "top_p": 0.9}


@pytest.fixture(scope="module")
def server(bundled_pair: SpecBranch) -> Iterator[Served]:
    with chat_template(bundled_pair), served(bundled_pair) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return server.client()


# ---- texts


def test_a_completion_is_the_engines_text(server, client):
    answer = client.completions.create(model="bundled", prompt=PROMPT, max_tokens=24)
    alone = server.engine.generate(PROMPT, max_new_tokens=24)
    assert answer.choices[0].text == alone.text
    assert answer.choices[0].finish_reason == alone.finish_reason == "length"
    prompt = len(server.engine.encode(PROMPT))
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (prompt, 24, prompt + 24)
    assert server.lines[-1].startswith(f"/v1/completions: {prompt} + 24 tokens, ")
    assert server.lines[-1].endswith(" tokens/s, length")


def test_a_chat_completion_is_the_engines_text(server, client):
    answer = client.chat.completions.create(model="bundled", messages=MESSAGES, max_completion_tokens=24)
    assert answer.choices[0].message.content == server.engine.generate(MESSAGES, max_new_tokens=24).text
    assert answer.choices[0].message.role == "assistant"
    parts = [
        MESSAGES[0],
        {"role": "user", "content": [{"type": "text", "text": part} for part in (PROMPT[:9], PROMPT[9:])]},
    ]
    again = client.chat.completions.create(model="bundled", messages=parts, max_tokens=24)
    assert again.choices[0].message.content == answer.choices[0].message.content


def test_a_prompt_may_be_token_ids(server, client):
    ids = server.engine.encode(PROMPT)
    for prompt in (ids, [ids], [PROMPT]):
        answer = client.completions.create(model="bundled", prompt=prompt, max_tokens=8)
        assert answer.choices[0].text == server.engine.generate(ids, max_new_tokens=8).text


@pytest.mark.parametrize("options", [{}, {"temperature": 2, "seed": 5}])
def test_streams_add_up_to_the_engines_text(server, client, options):
    """At a high temperature there are halves of characters, which no piece ends with."""
    alone = server.engine.generate(PROMPT, max_new_tokens=60, **options)
    pieces = list(client.completions.create(model="bundled", prompt=PROMPT, max_tokens=60, stream=True, **options))
    texts = [piece.choices[0].text for piece in pieces]
    assert "".join(texts) == alone.text
    assert sum(map(bool, texts)) > 5
    assert [piece.choices[0].finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert all(piece.usage is None for piece in pieces)
    assert len({piece.id for piece in pieces}) == 1


def test_a_chat_stream_has_a_role_and_usage(server, client):
    alone = server.engine.generate(MESSAGES, max_new_tokens=20)
    options = {"max_tokens": 20, "stream": True, "stream_options": {"include_usage": True}}
    first, *pieces, last, usage = client.chat.completions.create(model="bundled", messages=MESSAGES, **options)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(piece.choices[0].delta.content for piece in pieces) == alone.text
    assert last.choices[0].finish_reason == "length"
    assert (usage.choices, usage.usage.completion_tokens) == ([], 20)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_stop_ends_the_text_and_is_not_in_it(server, client, stream, several):
    whole = server.engine.generate(PROMPT, max_new_tokens=24).text
    stop = whole[10:13]
    options = {"max_tokens": 24, "stop": ["\0", stop] if several else stop, "stream": stream}
    answer = client.completions.create(model="bundled", prompt=PROMPT, **options)
    choices = [piece.choices[0] for piece in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
    assert choices[-1].finish_reason == "stop"


def test_a_seed_gives_the_engines_text(server, client):
    asked = {"model": "bundled", "messages": MESSAGES, "max_tokens": 24}
    more = {"top_k": 40, "min_p": 0.01}
    answer = client.chat.completions.create(**asked, **SAMPLED, seed=7, extra_body=more)
    alone = server.engine.generate(MESSAGES, max_new_tokens=24, seed=7, **SAMPLED, **more)
    assert answer.choices[0].message.content == alone.text


def test_without_a_seed_texts_differ_and_each_can_be_had_again(server, client):
    asked = {"model": "bundled", "prompt": PROMPT, "max_tokens": 24, "temperature": 1.0}
    answers = [client.completions.create(**asked) for _ in range(4)]
    assert len({answer.choices[0].text for answer in answers}) > 1
    again = client.completions.create(**asked, seed=answers[0].seed)
    assert (again.choices[0].text, again.seed) == (answers[0].choices[0].text, answers[0].seed)
    assert answers[0].seed < 2**53


def test_what_is_not_said_is_as_the_checkpoint_says(bundled_pair, server, client, monkeypatch):
    """Here: greedy. OpenAI's own default is to sample at temperature 1."""
    asked = {"model": "bundled", "prompt": PROMPT, "max_tokens": 24}
    greedy = server.engine.generate(PROMPT, max_new_tokens=24).text
    assert {client.completions.create(**asked).choices[0].text for _ in range(2)} == {greedy}
    config = bundled_pair.target.generation_config
    monkeypatch.setattr(config, "do_sample", True)
    monkeypatch.setattr(config, "max_new_tokens", 6)
    answer = client.completions.create(model="bundled", prompt=PROMPT, seed=3)
    assert answer.usage.completion_tokens == 6
    assert answer.choices[0].text == server.engine.generate(PROMPT, seed=3).text


def test_without_any_limit_an_answer_has_room(bundled_pair):
    ids = bundled_pair.encode("x = 1\n") * 240
    with served(bundled_pair) as free, served(bundled_pair, max_new_tokens=3) as limited:
        room = 1024 - len(ids)
        assert 0 < room < 128
        answers = [each.post("/v1/completions", {"prompt": ids, "stop": []}).json() for each in (free, limited)]
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [room, 3]


def test_curl_reads_a_stream(server):
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    body = json.dumps({"prompt": PROMPT, "max_tokens": 8, "stream": True})
    command = ["curl", "-sN", f"{server.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    *events, done = output.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    text = "".join(json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events)
    assert text == server.engine.generate(PROMPT, max_new_tokens=8).text


# ---- models and health


def test_models(client):
    assert [model.id for model in client.models.list()] == ["bundled"]
    assert client.models.retrieve("bundled").owned_by == "specbranch"
    with pytest.raises(openai.NotFoundError, match="the model 'gpt' does not exist; this server has 'bundled'"):
        client.models.retrieve("gpt")


def test_health_is_answered_while_a_text_is_generated(server, monkeypatch):
    verify, go_on = ModelVerifier.place, threading.Event()

    def waiting(self, trunk):
        assert go_on.wait(60)
        return verify(self, trunk)

    monkeypatch.setattr(ModelVerifier, "place", waiting)
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(server.post, "/v1/completions", {"prompt": PROMPT, "max_tokens": 2}) for _ in range(3)]
        server.wait(lambda: server.queue.waiting == 2)
        health = httpx.get(f"{server.url}/health", timeout=10)
        assert (health.status_code, health.json()) == (200, {"status": "ok", "running": 1, "waiting": 2})
        go_on.set()
        assert [answer.result().status_code for answer in answers] == [200] * 3
    assert httpx.get(f"{server.url}/health").json()["running"] == 0


# ---- many at once


@pytest.mark.parametrize("at_once", [1, 3])
def test_many_requests_get_the_texts_that_each_gets_alone(bundled_pair, at_once):
    requests = [
        {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number, "temperature": (0, 0.8, 1.5)[number % 3]}
        for number in range(32)
    ]
    alone = [bundled_pair.generate(**request, max_new_tokens=12).text for request in requests]
    with served(bundled_pair, at_once=at_once, most_waiting=32) as server, ThreadPoolExecutor(32) as pool:
        client = server.client()

        def ask(number: int) -> str:
            asked = {"model": "bundled", "max_tokens": 12, **requests[number]}
            if number % 2:
                return client.completions.create(**asked).choices[0].text
            return "".join(piece.choices[0].text for piece in client.completions.create(**asked, stream=True))

        assert list(pool.map(ask, range(32))) == alone
        assert server.idle
    assert len(server.lines) == 32


def test_a_full_queue_says_so(bundled_pair, monkeypatch):
    verify, go_on = ModelVerifier.place, threading.Event()

    def waiting(self, trunk):
        assert go_on.wait(60)
        return verify(self, trunk)

    monkeypatch.setattr(ModelVerifier, "place", waiting)
    asked = {"model": "bundled", "prompt": PROMPT, "max_tokens": 2}
    with served(bundled_pair, most_waiting=2) as server, ThreadPoolExecutor() as pool:
        first = [pool.submit(server.post, "/v1/completions", asked) for _ in range(3)]
        server.wait(lambda: server.queue.waiting == 2)
        with pytest.raises(openai.RateLimitError, match="1 requests run and 2 wait; the server takes no more"):
            server.client().completions.create(**asked)
        go_on.set()
        assert [answer.result().status_code for answer in first] == [200] * 3
        assert server.client().completions.create(**asked).choices[0].text


# ---- failures


def failing_after(monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    verify, calls = ModelVerifier.place, iter(range(10_000))

    def failing(self, trunk):
        if next(calls) == rounds:
            raise RuntimeError("not enough memory")
        return verify(self, trunk)

    monkeypatch.setattr(ModelVerifier, "place", failing)


@pytest.mark.parametrize("held_back", [False, True])
def test_a_failure_in_the_middle_of_a_stream_is_its_last_event(server, client, monkeypatch, held_back):
    """Behind all that was committed, also what was held back since a stop string may begin with it."""
    alone = server.engine.generate(MESSAGES, max_new_tokens=60).text
    failing_after(monkeypatch, 4)
    asked = {"messages": MESSAGES, "max_tokens": 60, "stream": True, "stop": alone + "." if held_back else None}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=asked, timeout=60) as response:
        assert response.status_code == 200
        _, *events = [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line]
    *pieces, last = events
    said = "".join(piece["choices"][0]["delta"]["content"] for piece in pieces)
    assert said
    assert alone.startswith(said)
    message = "generation ended early: not enough memory"
    assert last == {"error": {"message": message, "type": "server_error", "param": None, "code": None}}
    assert server.lines[-1] == f"/v1/chat/completions: 500, {message} (after {len(said)} characters)"
    assert server.idle
    failing_after(monkeypatch, 4)
    with pytest.raises(openai.APIError, match=message):
        list(client.chat.completions.create(model="bundled", **asked))


@pytest.mark.parametrize("rounds", [0, 4])
def test_a_failure_is_a_500(server, client, monkeypatch, rounds):
    with monkeypatch.context() as patch:
        failing_after(patch, rounds)
        with pytest.raises(openai.InternalServerError, match="not enough memory"):
            client.completions.create(model="bundled", prompt=PROMPT, max_tokens=60)
    assert client.completions.create(model="bundled", prompt=PROMPT, max_tokens=4).choices[0].text


def test_a_fault_of_the_server_is_a_500_too(server, monkeypatch):
    monkeypatch.setattr(Service, "_reply", None)
    answer = server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 2})
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "TypeError: 'NoneType' object is not callable"
    assert server.idle


def test_a_chat_needs_a_template(server):
    with chat_template(server.engine, None):
        answer = server.post("/v1/chat/completions", {"messages": MESSAGES})
    assert answer.status_code == 400
    assert "the target's tokenizer has no chat template" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_refused_with_the_contexts_length(server, client, stream):
    with pytest.raises(openai.BadRequestError, match="the target model's context holds 1024") as refused:
        client.completions.create(model="bundled", prompt="word " * 3000, max_tokens=1, stream=stream)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError, match="the target model's context holds 1024") as refused:
        client.chat.completions.create(model="bundled", messages=MESSAGES, max_tokens=1020)
    assert refused.value.param == "messages"


def test_another_models_name_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="the model 'gpt' does not exist") as refused:
        client.completions.create(model="gpt", prompt=PROMPT)
    assert refused.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("content", "kind", "status", "expected"),
    [
        (b"{oops", "application/json", 400, "the body is not JSON: "),
        (b"\xff", "application/json", 400, "the body is not JSON: "),
        (b"[" * 100_000, "application/json", 400, "the body is not JSON: "),
        (b"", "application/json", 400, "the body is not JSON: "),
        (b"[1]", "application/json", 400, "the body is [1]; expected a JSON object"),
        (b'{"prompt": "\\ud83d"}', "application/json", 400, "the prompt cannot be tokenized: "),
        (b'{"model": "\\ud83d", "prompt": "x"}', "application/json", 404, "the model '\\ud83d' does not exist"),
        (b'{"\\ud83d": 1}', "application/json; charset=utf-8", 400, "unknown field '\\ud83d'"),
        (b'{"prompt": [4096]}', "application/json", 400, "token id 4096 is outside the target's vocabulary of 2048"),
        (b"{}", "text/plain", 415, "Content-Type is 'text/plain'; expected application/json"),
        (b" " * (2**24 + 1), "application/json", 413, "the body has more than 16777216 bytes"),
    ],
)
def test_a_bad_body_is_refused(server, content, kind, status, expected):
    answer = httpx.post(f"{server.url}/v1/completions", content=content, headers={"Content-Type": kind}, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["message"][: len(expected)]) == (status, expected)
    assert error["type"] == "invalid_request_error"
    assert server.idle


@pytest.mark.parametrize(("path", "status"), [("/v2", 404), ("/v1/completions", 405)])
def test_other_paths_and_methods_are_refused_in_the_same_form(server, path, status):
    answer = httpx.get(f"{server.url}{path}")
    assert answer.status_code == status
    assert answer.json()["error"]["message"].startswith(f"GET {path}: ")
