"""`response_format`: answers that follow a schema, and what is refused before anything is decoded."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from jsonschema import validate
from serving import Served, chat_template, served

from specbranch import Constraint, SpecBranch, bundled
from specbranch.runtime.runner import Runner
from specbranch.serve.refusal import Refusal
from specbranch.serve.requests import chat, completion
from specbranch.serve.response_format import Form, form
from specbranch.text import grammar
from specbranch.text.kinds import constraint_of

PROMPTS = [record["prompt"] for record in bundled.prompts()]
MESSAGES: Any = [{"role": "user", "content": PROMPTS[0]}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "ok": {"type": "boolean"}, "size": {"enum": [1, 25]}},
    "required": ["name", "ok", "size"],
    "additionalProperties": False,
}
SIZE = {"type": "object", "properties": {"size": {"enum": [7, 70]}}, "required": ["size"]}


def wanted(schema: Any = SCHEMA, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, **more}}


@pytest.fixture(scope="module")
def server(bundled_pair: SpecBranch) -> Iterator[Served]:
    with chat_template(bundled_pair), served(bundled_pair, at_once=4) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return server.client()


# ---- what is read


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, Form("json_object")),
        (wanted(), Form("json_schema", SCHEMA)),
        (wanted(strict=True, description="a thing"), Form("json_schema", SCHEMA)),
        (wanted(strict=False), Form("json_schema", SCHEMA)),
        (wanted(strict=None, description=None), Form("json_schema", SCHEMA)),
        (wanted(True), Form("json_schema", True)),
    ],
)
def test_forms(value: Any, expected: Form | None) -> None:
    assert form(value) == expected
    assert completion({"prompt": "x", "response_format": value}).form == expected
    assert chat({"messages": MESSAGES, "response_format": value}).form == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (5, 'response_format is 5; expected {"type": …}'),
        ([], "response_format is []; expected"),
        ({}, "response_format has the type None; expected one of text, json_object, json_schema"),
        ({"type": ["text"]}, "response_format has the type ['text']; expected one of"),
        ({"type": "structural_tag"}, "response_format has the type 'structural_tag'; expected one of"),
        ({"type": "json_object", "schema": {}}, "response_format has 'schema'; expected type"),
        ({"type": "json_schema"}, "response_format.json_schema is None; expected"),
        ({"type": "json_schema", "json_schema": []}, "response_format.json_schema is []; expected"),
        (
            {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
            "response_format.json_schema.name is None; expected text",
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "", "schema": {}}},
            "response_format.json_schema.name is ''; expected text",
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "x"}},
            "response_format.json_schema.schema is None; expected a JSON schema",
        ),
        (wanted("{}"), "response_format.json_schema.schema is '{}'; expected a JSON schema"),
        (wanted(strict="yes"), "response_format.json_schema.strict is 'yes'; expected true or false"),
        (wanted(description=5), "response_format.json_schema.description is 5; expected text"),
        (wanted(shape="x"), "response_format.json_schema has 'shape'; expected name, schema, strict, description"),
    ],
)
def test_bad_forms_are_refused_by_name(value: Any, expected: str) -> None:
    for read in (lambda: chat({"messages": MESSAGES, "response_format": value}), lambda: form(value)):
        with pytest.raises(Refusal) as refused:
            read()
        assert (refused.value.status, refused.value.param) == (400, "response_format")
        assert str(refused.value).startswith(expected)


# ---- answers


@pytest.mark.parametrize("strict", [True, False, None])
@pytest.mark.parametrize("sampled", [{}, {"temperature": 1.2, "seed": 3}])
def test_an_answer_follows_its_schema(server: Served, client: openai.OpenAI, strict: Any, sampled: Any) -> None:
    format: Any = wanted() if strict is None else wanted(strict=strict)
    constraint = Constraint.json_schema(SCHEMA)
    answer = client.chat.completions.create(
        model="bundled", messages=MESSAGES, max_tokens=60, response_format=format, **sampled
    )
    alone = server.engine.generate(MESSAGES, max_new_tokens=60, constraint=constraint, **sampled)
    assert answer.choices[0].message.content == alone.text
    assert answer.choices[0].finish_reason == "stop"
    validate(json.loads(alone.text), SCHEMA)
    body = {"response_format": format}
    plain = client.completions.create(model="bundled", prompt=PROMPTS[1], max_tokens=60, extra_body=body, **sampled)
    alone = server.engine.generate(PROMPTS[1], max_new_tokens=60, constraint=constraint, **sampled)
    assert plain.choices[0].text == alone.text


@pytest.mark.parametrize(("most", "reason"), [(5, "length"), (60, "stop")])
def test_streams_that_are_cut_off_and_complete(server: Served, client: openai.OpenAI, most: int, reason: str) -> None:
    forms: list[tuple[Any, Constraint]] = [
        (wanted(), Constraint.json_schema(SCHEMA)),
        ({"type": "json_object"}, Constraint.json_object()),
    ]
    for format, constraint in forms:
        alone = server.engine.generate(MESSAGES, max_new_tokens=most, constraint=constraint)
        pieces = client.chat.completions.create(
            model="bundled", messages=MESSAGES, max_tokens=most, response_format=format, stream=True
        )
        choices = [piece.choices[0] for piece in pieces]
        assert "".join(choice.delta.content or "" for choice in choices) == alone.text
        assert choices[-1].finish_reason == alone.finish_reason
        if format == wanted():
            assert alone.finish_reason == reason


def test_stop_strings_and_log_probabilities_beside_it(server: Served, client: openai.OpenAI) -> None:
    format: Any = wanted()
    asked: dict[str, Any] = {"model": "bundled", "messages": MESSAGES, "max_tokens": 60, "response_format": format}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    assert whole is not None
    answer = client.chat.completions.create(**asked, stop=['"ok"'], logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == whole[: whole.index('"ok"')]
    assert answer.choices[0].finish_reason == "stop"
    content = answer.choices[0].logprobs.content
    assert whole.startswith("".join(entry.token for entry in content))
    assert all(len(entry.top_logprobs) == 2 for entry in content)


def test_requests_at_once_have_each_the_text_that_it_has_alone(server: Served) -> None:
    forms = [None, wanted(), {"type": "json_object"}, wanted(SIZE), {"type": "text"}]
    bodies = [
        {
            "prompt": PROMPTS[number % 5],
            "max_tokens": 40,
            "response_format": forms[number % len(forms)],
            "temperature": (0, 0.9)[number % 2],
            "seed": number,
        }
        for number in range(20)
    ]
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda body: server.post("/v1/completions", body), bodies))
    for body, answer in zip(bodies, answers, strict=True):
        assert answer.status_code == 200, answer.text
        found = form(body["response_format"])
        alone = server.engine.generate(
            body["prompt"],
            max_new_tokens=40,
            temperature=body["temperature"],
            seed=body["seed"],
            constraint=None if found is None else constraint_of(*found),
        )
        choice = answer.json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (alone.text, alone.finish_reason)


def test_equal_schemas_are_compiled_once(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, compile = [], grammar.Grammar._compile
    monkeypatch.setattr(grammar.Grammar, "_compile", lambda self, of: compiled.append(self) or compile(self, of))
    schema = {"const": {"only here": None}}
    body = {"prompt": PROMPTS[0], "max_tokens": 20, "response_format": wanted({**schema, "title": "x"})}
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: server.post("/v1/completions", body), range(6)))
    assert {answer.json()["choices"][0]["text"] for answer in answers} == {'{"only here":null}'}
    assert len(compiled) == 1
    server.post("/v1/completions", {**body, "response_format": wanted({"title": "x", **schema})})
    assert len(compiled) == 2  # the order of keys may matter


def test_whitespace_where_the_server_allows_it(bundled_pair: SpecBranch) -> None:
    """A bias makes the model want it."""
    newline = bundled_pair.encode("\n")
    assert len(newline) == 1
    body = {
        "prompt": PROMPTS[0],
        "max_tokens": 8,
        "response_format": wanted(),
        "logit_bias": {str(newline[0]): 100},
    }
    texts = []
    for whitespace in (False, True):
        with served(bundled_pair, whitespace=whitespace) as server:
            texts.append(server.post("/v1/completions", body).json()["choices"][0]["text"])
    assert "\n" not in texts[0]
    assert texts[1].startswith("{\n")


# ---- what cannot be followed


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"not": {}}, "json_schema has keywords that are not supported: not"),
        (False, "json_schema: no text satisfies it: schema is false"),
        ({"type": "nothing"}, "json_schema cannot be used: "),
        ({"type": "string", "pattern": "("}, "json_schema cannot be used: "),
        ({"type": "object", "x-guidance": {"lenient": True}}, "json_schema has x-guidance: expected no options"),
        ({"minimum": 5, "maximum": 1, "type": "integer"}, "json_schema: no text satisfies it: "),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_schemas_are_refused_before_anything_is_decoded(
    server: Served, monkeypatch: pytest.MonkeyPatch, schema: Any, expected: str, stream: bool
) -> None:
    monkeypatch.setattr(Runner, "prefill", lambda *_: pytest.fail("a model ran"))
    for path, body in (("/v1/chat/completions", {"messages": MESSAGES}), ("/v1/completions", {"prompt": "x"})):
        answer = server.post(path, {**body, "response_format": wanted(schema), "stream": stream})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == "response_format"
        assert error["type"] == "invalid_request_error"
        assert error["message"].startswith(f"response_format cannot be followed: {expected}")
        assert "\n" not in error["message"]
    server.wait(lambda: server.idle)


def test_the_event_loop_goes_on_while_a_schema_is_compiled(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other requests are answered meanwhile, too."""
    compile = grammar.Grammar._compile

    def slowly(self: grammar.Grammar, of: Any) -> Any:
        time.sleep(1.5)
        return compile(self, of)

    monkeypatch.setattr(grammar.Grammar, "_compile", slowly)
    schema = {"type": "object", "properties": {"slow": {"type": "null"}}, "required": ["slow"]}
    body = {"prompt": PROMPTS[0], "max_tokens": 20, "response_format": wanted(schema)}
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(server.post, "/v1/completions", body)
        time.sleep(0.2)
        begin = time.perf_counter()
        assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200
        assert server.post("/v1/completions", {"prompt": PROMPTS[1], "max_tokens": 1}).status_code == 200
        assert not slow.done()
        assert time.perf_counter() - begin < 1.2
        assert slow.result().json()["choices"][0]["text"].startswith('{"slow":null')


def test_without_a_tokenizer_it_says_so(bundled_pair: SpecBranch) -> None:
    body = {"prompt": [5, 9], "max_tokens": 2, "response_format": {"type": "json_object"}}
    with served(SpecBranch(bundled_pair.target, method="autoregressive")) as bare:
        error = bare.post("/v1/completions", body).json()["error"]
        assert bare.post("/v1/completions", {"prompt": [5, 9], "max_tokens": 2}).status_code == 200
    assert (error["param"], error["message"]) == (
        "response_format",
        "response_format cannot be followed: a constraint needs a tokenizer: pass tokenizer=",
    )
