"""What a request's fields mean, and which are refused."""

from __future__ import annotations

import pytest

from specbranch.serve.adjustments import Adjustments
from specbranch.serve.refusal import Refusal
from specbranch.serve.requests import HARMLESS, LACKING, Asked, chat, completion

MESSAGES = [{"role": "user", "content": "x"}]


def refusal(read, **body) -> Refusal:
    with pytest.raises(Refusal) as refused:
        read(body)
    assert refused.value.status == 400
    return refused.value


def test_everything_that_can_be_asked():
    body = {
        "model": "m",
        "prompt": "x",
        "max_tokens": 5,
        "temperature": 1,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "seed": 7,
        "stop": ["a", "b"],
        "stream": True,
        "stream_options": {"include_usage": True, "include_obfuscation": False},
        "logprobs": 2,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "logit_bias": {"5": -3},
    }
    options = {"temperature": 1.0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "stop": ("a", "b")}
    expected = Asked("m", "x", False, True, True, 2, 5, 7, options, Adjustments({5: -3.0}, 1.0, -1.0, 1.5))
    assert completion(body) == expected


def test_what_is_not_said_is_left_to_the_engine():
    for body in (
        {},
        dict.fromkeys(["temperature", "stop", "stream", "n", "tools", "logit_bias", "presence_penalty", "unknown"]),
    ):
        asked = completion({"prompt": "x", **body})
        assert asked.adjustments.options(3) == {}
        assert (asked.options, asked.max_new_tokens, asked.logprobs, asked.stream) == ({}, None, None, False)


@pytest.mark.parametrize(("read", "body"), [(chat, {"messages": MESSAGES}), (completion, {"prompt": "x"})])
def test_fields_that_change_no_text_are_accepted(read, body):
    given = {name: "anything" for name in HARMLESS} | {name: value[0] for name, value in LACKING.items() if value}
    assert read({**body, **given}).options == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("best_of", 2),
        ("echo", True),
        ("suffix", "x"),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("reasoning_effort", "high"),
        ("audio", {}),
    ],
)
def test_fields_that_would_change_the_text_are_refused_by_name(name, value):
    for read, body in ((chat, {"messages": MESSAGES}), (completion, {"prompt": "x"})):
        refused = refusal(read, **body, **{name: value})
        assert refused.param == name
        assert str(refused).startswith(f"{name} is {value!r}, which specbranch does not have; expected ")


@pytest.mark.parametrize("name", ["guided_json", "messages"])
def test_an_unknown_field_is_refused(name):
    assert str(refusal(completion, prompt="x", **{name: 1.5})) == f"unknown field {name!r}"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", "hot", "temperature is 'hot'; expected a number"),
        ("temperature", -1, "temperature is -1.0; expected 0 <= temperature"),
        ("temperature", float("nan"), "temperature is nan; expected 0 <= temperature"),
        ("top_p", 0, "top_p is 0.0; expected 0 < top_p <= 1"),
        ("top_k", 1.5, "top_k is 1.5; expected an integer"),
        ("min_p", True, "min_p is True; expected a number"),
        ("seed", -1, "seed is -1; expected 0 <= seed"),
        ("seed", [], "seed is []; expected an integer"),
        ("stop", 5, "stop is 5; expected text, or a list of texts"),
        ("stop", ["a", 5], "stop[1] is 5; expected text"),
        ("stop", "", "a stop string is empty"),
        ("stream", "yes", "stream is 'yes'; expected True or False"),
        (
            "stream_options",
            {"include_usage": True},
            "stream_options is {'include_usage': True}; expected no such field",
        ),
        ("max_tokens", 0, "max_tokens is 0; expected 1 <= max_tokens"),
        ("max_tokens", "5", "max_tokens is '5'; expected an integer"),
        ("logprobs", 21, "logprobs is 21; expected 0 <= logprobs <= 20"),
        ("logprobs", True, "logprobs is True; expected an integer"),
        ("presence_penalty", 3, "presence_penalty is 3.0; expected -2 <= presence_penalty <= 2"),
        ("frequency_penalty", "x", "frequency_penalty is 'x'; expected a number"),
        ("repetition_penalty", 0, "repetition_penalty is 0.0; expected 0.01 <= repetition_penalty"),
        ("logit_bias", [], "logit_bias is []; expected token ids and numbers"),
        ("logit_bias", {"x": 1}, "logit_bias is {'x': 1}; expected token ids and numbers"),
        ("logit_bias", {"-1": 1}, "logit_bias is {'-1': 1}; expected token ids and numbers"),
        ("logit_bias", {"1": 101}, "logit_bias is 101.0; expected -100 <= logit_bias <= 100"),
        ("model", 5, "model is 5; expected text"),
        ("prompt", 5, "prompt is 5; expected text or token ids"),
        ("prompt", "", "prompt is ''; expected text or token ids"),
        ("prompt", [], "prompt is []; expected text or token ids"),
        ("prompt", [1, "x"], "prompt is 'x'; expected an integer"),
        ("prompt", ["a", "b"], "prompt has 2 texts; expected one a request"),
        ("prompt", {"a": 1}, "prompt is {'a': 1}; expected text or token ids"),
    ],
)
def test_a_bad_value_is_refused_by_name(name, value, expected):
    refused = refusal(completion, **{"prompt": "x", name: value})
    assert str(refused).startswith(expected)
    assert refused.param == name


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, "messages is None; expected a list of chat messages"),
        ({"messages": []}, "messages is []; expected a list"),
        ({"messages": "x"}, "messages is 'x'; expected a list"),
        ({"messages": ["x"]}, "messages[0] is 'x'; expected"),
        ({"messages": [{"content": "x"}]}, "messages[0].role is None; expected one of system, "),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role is 'tool'; expected one of system, "),
        ({"messages": [*MESSAGES, {"role": "assistant"}]}, "messages[1].content is None; expected text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0] is 'image_url'; expected",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "messages[0] has 'tool_calls', which specbranch does not have",
        ),
        ({"messages": MESSAGES, "top_logprobs": 3}, "top_logprobs has no effect without logprobs: true"),
        ({"messages": MESSAGES, "logprobs": 3}, "logprobs is 3; expected True or False"),
        ({"messages": MESSAGES, "max_tokens": 3, "max_completion_tokens": 4}, "there are two limits: "),
    ],
)
def test_a_bad_chat_is_refused(body, expected):
    assert str(refusal(chat, **body)).startswith(expected)


def test_chats():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "s"}, {"role": "user", "content": parts, "name": "n"}]
    asked = chat({"messages": messages, "logprobs": True, "max_tokens": 3, "max_completion_tokens": 3})
    assert asked.prompt == [{"role": "system", "content": "s"}, {"role": "user", "content": "ab", "name": "n"}]
    assert (asked.chat, asked.logprobs, asked.max_new_tokens) == (True, 0, 3)
    assert chat({"messages": MESSAGES, "logprobs": True, "top_logprobs": 4}).logprobs == 4
    assert chat({"messages": MESSAGES, "logprobs": False}).logprobs is None
