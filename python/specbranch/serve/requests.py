"""What a request asks for, read from OpenAI's JSON; what would change a text and is not here is refused by name."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from specbranch.core.checks import flag, number, shown, whole
from specbranch.core.errors import SpecBranchError
from specbranch.core.sampling import Sampling
from specbranch.serve.adjustments import Adjustments
from specbranch.serve.refusal import Refusal
from specbranch.serve.response_format import Form, form
from specbranch.text.stopping import stop_strings

MOST_ALTERNATIVES = 20  # of a token, as OpenAI has it
SAMPLING = ("temperature", "top_p", "top_k", "min_p")
ADJUSTING = ("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias")
OTHERS = ("model", "max_tokens", "seed", "stop", "stream", "stream_options", "logprobs", "response_format")
SHARED = {*SAMPLING, *ADJUSTING, *OTHERS}
CHAT = SHARED | {"messages", "max_completion_tokens", "top_logprobs"}
COMPLETION = SHARED | {"prompt"}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}  # as templates know them

# Fields that change no text.
HARMLESS = {
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Fields that change a text and that the engine does not have, each with the values that ask for nothing.
LACKING: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}

Body = Mapping[str, Any]


@dataclass(frozen=True)
class Asked:
    """prompt: text, token ids or chat messages. logprobs: how many alternatives to give of each token; None: no log
    probabilities at all. options: as `SpecBranch.stream` takes them; what is not said is not there. form: what the
    answer has to follow."""

    model: str | None
    prompt: str | list[int] | list[dict[str, str]]
    chat: bool
    stream: bool
    include_usage: bool
    logprobs: int | None
    max_new_tokens: int | None
    seed: int
    options: dict[str, Any]
    adjustments: Adjustments
    form: Form | None = None


def chat(body: object) -> Asked:
    """A request for /v1/chat/completions. Raises Refusal."""
    fields = _fields(body, CHAT)
    wanted = _checked("logprobs", flag, fields.get("logprobs", False))
    top = _whole(fields, "top_logprobs", least=0, most=MOST_ALTERNATIVES)
    if top is not None and not wanted:
        raise Refusal(400, "top_logprobs has no effect without logprobs: true", param="top_logprobs")
    limits = {name: _whole(fields, name, least=1) for name in ("max_completion_tokens", "max_tokens")}
    given = {limit for limit in limits.values() if limit is not None}
    if len(given) > 1:
        names = ", ".join(f"{name} {limit}" for name, limit in limits.items())
        raise Refusal(400, f"there are two limits: {names}; expected one", param="max_tokens")
    return _asked(fields, _messages(fields), (top or 0) if wanted else None, next(iter(given), None))


def completion(body: object) -> Asked:
    """A request for /v1/completions. Raises Refusal."""
    fields = _fields(body, COMPLETION)
    logprobs = _whole(fields, "logprobs", least=0, most=MOST_ALTERNATIVES)
    return _asked(fields, _prompt(fields), logprobs, _whole(fields, "max_tokens", least=1))


def _fields(body: object, known: set[str]) -> Body:
    """The fields that say something, all of them known."""
    if not isinstance(body, Mapping):
        raise Refusal(400, f"the body is {shown(body)}; expected a JSON object")
    fields = {name: value for name, value in body.items() if value is not None and name not in HARMLESS}
    for name in fields.keys() - known:
        if name not in LACKING:
            raise Refusal(400, f"unknown field {shown(name)}", param=name, code="unknown_parameter")
        if fields[name] not in LACKING[name]:
            expected = " or ".join([*map(repr, LACKING[name]), "no such field"])
            message = f"{name} is {shown(fields[name])}, which specbranch does not have; expected {expected}"
            raise Refusal(400, message, param=name, code="unsupported_parameter")
    return {name: fields[name] for name in fields.keys() & known}


def _asked(fields: Body, prompt: Any, logprobs: int | None, max_new_tokens: int | None) -> Asked:
    stream = _checked("stream", flag, fields.get("stream", False))
    stream_options = fields.get("stream_options")
    if stream_options is not None and not (stream and isinstance(stream_options, Mapping)):
        expected = "an object" if stream else "no such field without stream: true"
        raise Refusal(400, f"stream_options is {shown(stream_options)}; expected {expected}", param="stream_options")
    usage = (stream_options or {}).get("include_usage") or False
    model = fields.get("model")
    if model is not None and not isinstance(model, str):
        raise Refusal(400, f"model is {shown(model)}; expected text", param="model")
    options = _options(fields)
    # Without a seed every call has noise of its own. 53 bits: numbers of JavaScript hold no more.
    seed = options.pop("seed", None)
    return Asked(
        model=model,
        prompt=prompt,
        chat=isinstance(prompt, list) and isinstance(prompt[0], dict),
        stream=stream,
        include_usage=_checked("stream_options", flag, usage),
        logprobs=logprobs,
        max_new_tokens=max_new_tokens,
        seed=secrets.randbits(53) if seed is None else seed,
        options=options,
        adjustments=_adjustments(fields),
        form=form(fields.get("response_format")),
    )


def _options(fields: Body) -> dict[str, Any]:
    """What the engine is told of the request's fields, under the engine's names."""
    options: dict[str, Any] = {}
    for name in (*SAMPLING, "seed"):
        if name in fields:
            options[name] = getattr(_checked(name, lambda name, value: Sampling(**{name: value}), fields[name]), name)
    if "stop" in fields:
        # Any tokenizer will do: whether there is one, the engine says.
        options["stop"] = _checked("stop", lambda _, value: stop_strings(value, ANY_TOKENIZER), fields["stop"])
    return options


ANY_TOKENIZER: Any = object()


def _adjustments(fields: Body) -> Adjustments:
    def value(name: str, usual: float, least: float, most: float) -> float:
        found: float = _checked(name, partial(number, least=least, most=most), fields.get(name, usual))
        return found

    bias = fields.get("logit_bias", {})
    if not isinstance(bias, Mapping) or not all(isinstance(token, str) and token.isdecimal() for token in bias):
        raise Refusal(400, f"logit_bias is {shown(bias)}; expected token ids and numbers", param="logit_bias")
    biased = {int(token): _checked("logit_bias", partial(number, least=-100, most=100), bias[token]) for token in bias}
    return Adjustments(
        bias=biased,
        presence=value("presence_penalty", 0, -2, 2),
        frequency=value("frequency_penalty", 0, -2, 2),
        repetition=value("repetition_penalty", 1, 0.01, 100) if "repetition_penalty" in fields else None,
    )


def _messages(fields: Body) -> list[dict[str, str]]:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, f"messages is {shown(messages)}; expected a list of chat messages", param="messages")
    return [_message(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _message(message: object, place: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise Refusal(400, f'{place} is {shown(message)}; expected {{"role": …, "content": …}}', param="messages")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise Refusal(400, f"{place}.role is {shown(role)}; expected one of {', '.join(ROLES)}", param="messages")
    for name, value in message.items():
        if name not in ("role", "content", "name", "refusal") and value not in (None, []):
            raise Refusal(400, f"{place} has {shown(name)}, which specbranch does not have", param="messages")
    read = {"role": ROLES[role], "content": _content(message.get("content"), f"{place}.content")}
    if isinstance(name := message.get("name"), str):
        read["name"] = name
    return read


def _content(content: object, place: str) -> str:
    """The text of a message; parts of a text are one text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refusal(400, f"{place} is {shown(content)}; expected text", param="messages")
    for at, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            found = shown(part.get("type") if isinstance(part, Mapping) and part.get("type") != "text" else part)
            message = f'{place}[{at}] is {found}; expected {{"type": "text", "text": …}}'
            raise Refusal(400, message, param="messages")
    return "".join(part["text"] for part in content)


def _prompt(fields: Body) -> str | list[int]:
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        if len(prompt) != 1:
            raise Refusal(400, f"prompt has {len(prompt)} texts; expected one a request", param="prompt")
        prompt = prompt[0]
    if isinstance(prompt, list) and prompt:
        return [_checked("prompt", whole, token) for token in prompt]
    if not isinstance(prompt, str) or not prompt:
        raise Refusal(400, f"prompt is {shown(prompt)}; expected text or token ids", param="prompt")
    return prompt


def _whole(fields: Body, name: str, least: int, most: int | None = None) -> int | None:
    if name not in fields:
        return None
    found: int = _checked(name, partial(whole, least=least, most=most), fields[name])
    return found


def _checked(name: str, check: Callable[[str, Any], Any], value: object) -> Any:
    """A check of the engine's, whose complaint names the field."""
    try:
        return check(name, value)
    except SpecBranchError as error:
        raise Refusal(400, str(error), param=name) from None
