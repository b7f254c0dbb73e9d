"""Prompts as callers have them: all forms give the same ids, and what is no prompt is refused by name."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from specbranch import SpecBranch, SpecBranchError, bundled
from specbranch.text.encoding import encode
from specbranch.text.prompt_ids import prompt_ids

VOCABULARY = 2048
IDS = [5, 7, 9]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(bundled.path("target"))
    found.chat_template = TEMPLATE
    return found


def numbers() -> Iterator[int]:
    yield from IDS


@pytest.mark.parametrize(
    "prompt",
    [
        IDS,
        tuple(IDS),
        range(5, 10, 2),
        numbers(),
        [np.int32(5), np.uint8(7), torch.tensor(9)],
        *(np.array(IDS, kind) for kind in (np.int64, np.int32, np.uint16, np.uint8)),
        np.array([IDS]),
        *(torch.tensor(IDS, dtype=kind) for kind in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.uint16)),
        torch.tensor([IDS]),
        {"input_ids": IDS},
        {"input_ids": [IDS], "attention_mask": [[1, 1, 1]]},
        {"input_ids": IDS, "attention_mask": None, "token_type_ids": [0, 0, 0], "special_tokens_mask": [1, 0, 0]},
        {"input_ids": torch.tensor([IDS]), "attention_mask": torch.ones(1, 3)},
        {"input_ids": [0, 0, *IDS], "attention_mask": [0, 0, 1, 1, 1]},
        {"input_ids": np.array([[*IDS, 0]]), "attention_mask": np.array([[True, True, True, False]])},
        {"input_ids": torch.tensor([[0, *IDS, 0]]), "attention_mask": torch.tensor([[0, 1, 1, 1, 0]])},
    ],
    ids=lambda prompt: str(prompt).partition(" at 0x")[0][:60],
)
def test_every_form_gives_the_same_ids(prompt: Any) -> None:
    found = prompt_ids(None, prompt, VOCABULARY)
    assert found == IDS
    assert all(type(token) is int for token in found)


def test_a_tokenizer_s_output_is_a_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    text, expected = "def f(x):", encode(tokenizer, "def f(x):")
    assert prompt_ids(tokenizer, text, VOCABULARY) == expected
    for tensors in (None, "pt", "np"):
        assert prompt_ids(None, tokenizer(text, return_tensors=tensors), VOCABULARY) == expected
    tokenizer.pad_token = tokenizer.eos_token
    for side in ("left", "right"):
        padded = tokenizer([text], padding="max_length", max_length=32, padding_side=side, return_tensors="pt")
        assert padded["input_ids"].shape == (1, 32)
        assert prompt_ids(None, padded, VOCABULARY) == expected


def test_chat_messages_go_through_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "f?"}]
    expected = encode(tokenizer, "system: be brief\nuser: f?\nA:")
    assert prompt_ids(tokenizer, messages, VOCABULARY) == expected
    assert prompt_ids(tokenizer, tuple(messages), VOCABULARY) == expected
    assert encode(tokenizer, "f?", chat=True) == encode(tokenizer, messages[1:])


REFUSED: list[tuple[Any, str]] = [
    (None, "the prompt is None; expected text, token ids, a tokenizer's output or chat messages"),
    (5, "the prompt is 5; expected text"),
    (b"def", "the prompt is b'def'; expected text"),
    (bytearray(b"def"), "the prompt is bytearray"),
    ({5, 7}, "the prompt is {5, 7}; expected text"),
    ([], "the prompt is empty"),
    ((), "the prompt is empty"),
    (range(0), "the prompt is empty"),
    (torch.tensor([], dtype=torch.int64), "the prompt is empty"),
    ([5.0, 7.0], r"the prompt\[0\] is 5.0; expected an integer token id"),
    ([5, None], r"the prompt\[1\] is None; expected an integer token id"),
    ([5, True], r"the prompt\[1\] is True; expected an integer token id"),
    ([5, "7"], r"the prompt\[1\] is '7'; expected an integer token id"),
    ([[5, 7]], r"the prompt\[0\] is a list; expected an integer token id"),
    ([b"def"], r"the prompt\[0\] is b'def'"),
    ([np.float32(5)], r"the prompt\[0\] is .*5.0"),
    ([torch.tensor(True)], r"the prompt\[0\] is tensor\(True\)"),
    (torch.tensor([5.0]), "the prompt is of float32; expected integers"),
    (torch.tensor([True]), "the prompt is of bool; expected integers"),
    (np.array([5.0]), "the prompt is of float64; expected integers"),
    (np.array([5], object), "the prompt is of object; expected integers"),
    (torch.tensor(5), r"the prompt has the shape \[\]; expected \[n\] or \[1, n\]"),
    (torch.ones(1, 1, 2, dtype=torch.int64), r"the prompt has the shape \[1, 1, 2\]"),
    (torch.ones(2, 3, dtype=torch.int64), "the prompt is a batch of 2; expected one text at a time"),
    (torch.ones(3, dtype=torch.int64, device="meta"), "the prompt cannot be read"),
    ([5, -1], "token id -1 is outside the target's vocabulary of 2048"),
    ([5, 2048], "token id 2048 is outside"),
    ([10**30], "is outside"),
    ({}, "the prompt has nothing; expected input_ids"),
    ({"text": "def"}, "the prompt has text; expected input_ids"),
    ({"role": "user", "content": "f?"}, "the prompt has role, content; expected input_ids"),
    ({"input_ids": None}, "expected input_ids"),
    ({"input_ids": "def"}, "input_ids is 'def'"),
    ({"input_ids": [[5], [7]]}, "input_ids is a batch of 2"),
    ({"input_ids": [5.5]}, r"input_ids\[0\] is 5.5"),
    ({"input_ids": IDS, "attention_mask": [1, 1]}, "attention_mask has 2 elements; expected one for each of 3"),
    ({"input_ids": IDS, "attention_mask": [1, 0, 1]}, "attention_mask hides tokens inside the prompt"),
    ({"input_ids": IDS, "attention_mask": [2, 1, 1]}, "attention_mask has values other than 0 and 1"),
    ({"input_ids": IDS, "attention_mask": [0, 0, 0]}, "the prompt is empty"),
    ({"input_ids": IDS, "attention_mask": torch.ones(1, 1, 3, 3)}, r"attention_mask has the shape \[1, 1, 3, 3\]"),
    ({"input_ids": IDS, "token_type_ids": [0, 1, 1]}, "the prompt has token_type_ids; expected"),
    ({"input_ids": IDS, "position_ids": [0, 1, 2]}, "the prompt has position_ids; expected"),
    ({"input_ids": IDS, "pixel_values": torch.ones(1)}, "the prompt has pixel_values; expected"),
    ([{"role": "user"}], r"prompt\[0\]: content is None; expected text"),
    ([{"content": "f?"}], r"prompt\[0\] is .*; expected a message like"),
    ([{"role": "user", "content": "f?"}, "g?"], r"prompt\[1\] is 'g\?'; expected a message like"),
    ([{"role": "user", "content": b"f?"}], r"prompt\[0\]: content is b'f\?'; expected text"),
    ("half a pair: \ud83d", "the prompt cannot be tokenized"),
]


@pytest.mark.parametrize(("prompt", "message"), REFUSED, ids=[message[:50] for _, message in REFUSED])
def test_what_is_no_prompt_is_refused_by_name(tokenizer: PreTrainedTokenizerBase, prompt: Any, message: str) -> None:
    with pytest.raises(SpecBranchError, match=message) as caught:
        prompt_ids(tokenizer, prompt, VOCABULARY)
    assert "\n" not in str(caught.value)


def test_text_and_messages_need_a_tokenizer_and_messages_a_template(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "f?"}]
    for prompt in ("def", messages):
        with pytest.raises(SpecBranchError, match="came without a tokenizer"):
            prompt_ids(None, prompt, VOCABULARY)
    plain = AutoTokenizer.from_pretrained(bundled.path("target"))
    with pytest.raises(SpecBranchError, match="no chat template"):
        prompt_ids(plain, messages, VOCABULARY)
    with pytest.raises(SpecBranchError, match="chat is 'yes'; expected True or False"):
        encode(tokenizer, "f?", chat="yes")  # type: ignore[arg-type]
    with pytest.raises(SpecBranchError, match="the prompt is 5; expected text, or a list of chat messages"):
        encode(tokenizer, 5)  # type: ignore[arg-type]


def test_generate_and_stream_take_them_all(bundled_pair: SpecBranch) -> None:
    expected = bundled_pair.generate(IDS, max_new_tokens=4).tokens
    padded = {"input_ids": torch.tensor([[0, *IDS]]), "attention_mask": torch.tensor([[0, 1, 1, 1]])}
    assert bundled_pair.generate(padded, max_new_tokens=4).tokens == expected
    stream = bundled_pair.stream(np.array(IDS), max_new_tokens=4)
    list(stream)
    assert stream.generation is not None
    assert stream.generation.tokens == expected
    for bad in ([5.0], b"def", None):
        with pytest.raises(SpecBranchError, match=r"the prompt|there is no prompt"):
            list(bundled_pair.stream(bad, max_new_tokens=4))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 4.5}, "max_new_tokens is 4.5; expected an integer"),
        ({"max_new_tokens": True}, "max_new_tokens is True; expected an integer"),
        ({"max_new_tokens": "4"}, "max_new_tokens is '4'; expected an integer"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected 1 <= max_new_tokens"),
        ({"temperature": "1"}, "temperature is '1'; expected a number"),
        ({"temperature": True}, "temperature is True; expected a number"),
        ({"temperature": float("inf")}, "temperature is inf; expected a finite number"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": -0.5}, "temperature is -0.5; expected 0 <= temperature"),
        ({"temperature": 1e-40}, "temperature is 1e-40; expected 0, or 1e-38 to 1e\\+38"),
        ({"temperature": 2e38}, "temperature is 2e\\+38; expected 0 <= temperature <= 1e\\+38"),
        ({"temperature": torch.ones(2)}, r"temperature is tensor\(\[1., 1.\]\); expected a number"),
        ({"temperature": 1, "top_k": 2.5}, "top_k is 2.5; expected an integer"),
        ({"temperature": 1, "top_k": -1}, "top_k is -1; expected 0 <= top_k"),
        ({"temperature": 1, "top_p": "0.5"}, "top_p is '0.5'; expected a number"),
        ({"temperature": 1, "top_p": 0}, "top_p is 0.0; expected 0 < top_p <= 1"),
        ({"temperature": 1, "top_p": 1.5}, "top_p is 1.5; expected top_p <= 1"),
        ({"temperature": 1, "min_p": -0.5}, "min_p is -0.5; expected 0 <= min_p <= 1"),
        ({"seed": 3.5}, "seed is 3.5; expected an integer"),
        ({"seed": None}, "seed is None; expected an integer"),
        ({"seed": 2**63}, "seed is 9223372036854775808; expected 0 <= seed <= 9223372036854775807"),
        ({"stop": 5}, "stop is 5; expected text, or a list of texts"),
        ({"stop": b"x"}, "stop is b'x'; expected text"),
        ({"stop": ["x", 5]}, r"stop\[1\] is 5; expected text"),
        ({"stop": ["x", ""]}, "a stop string is empty"),
        ({"method": ["pearl"]}, r"unknown method \['pearl'\]"),
        ({"method": "speculative", "length": "3"}, "length is '3'; expected an integer"),
        ({"overlap": np.ones(2)}, "overlap is array"),
    ],
)
def test_options_of_another_kind_are_refused_by_name(
    bundled_pair: SpecBranch, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecBranchError, match=message):
        bundled_pair.generate(IDS, **{"max_new_tokens": 4, **options})


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"max_new_tokens": 4.0}, {"max_new_tokens": 4}),
        ({"max_new_tokens": np.int64(4)}, {"max_new_tokens": 4}),
        ({"max_new_tokens": torch.tensor(4)}, {"max_new_tokens": 4}),
        ({"temperature": 1, "top_k": 5.0, "seed": 3.0}, {"temperature": 1.0, "top_k": 5, "seed": 3}),
        ({"temperature": np.float32(0.5), "seed": np.uint64(3)}, {"temperature": 0.5, "seed": 3}),
        ({"temperature": torch.tensor(0.5)}, {"temperature": 0.5}),
        ({"method": "speculative", "length": 3.0}, {"method": "speculative", "length": 3}),
        ({"stop": ()}, {"stop": None}),
    ],
)
def test_whole_floats_and_scalars_are_numbers(
    bundled_pair: SpecBranch, options: dict[str, Any], same: dict[str, Any]
) -> None:
    """As JSON, YAML, numpy and torch give them."""
    texts = [bundled_pair.generate(IDS, **{"max_new_tokens": 8, **each}).tokens for each in (options, same)]
    assert texts[0] == texts[1]
