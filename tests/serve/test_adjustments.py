"""Biases and penalties of OpenAI's."""

from __future__ import annotations

import pytest
import torch
from serving import served

from specbranch import bundled
from specbranch.serve.adjustments import Adjustments

PROMPT = bundled.prompts()[0]["prompt"]


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        (Adjustments(bias={1: 2.0, 4: -3.0}), [0, 2, 0, 0, -3]),
        (Adjustments(presence=0.5), [0, 0, -0.5, -0.5, 0]),  # token 1 is in the prompt alone
        (Adjustments(frequency=0.5), [0, 0, -1, -0.5, 0]),
        (Adjustments(bias={2: 1.0}, presence=1, frequency=-1), [0, 0, 2, 0, 0]),
    ],
)
def test_what_is_added_to_the_logits(what, expected):
    ids, scores = torch.tensor([[1, 1, 2, 3, 2]]), torch.zeros(1, 5)
    processor = what.options(prompt=2)["logits_processor"]
    assert processor(ids, scores).tolist() == [expected]
    assert scores.tolist() == [[0] * 5]  # the caller's stay


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_request_is_answered_under_them(bundled_pair, temperature):
    sampling = {"temperature": temperature, "seed": 5}
    ids = bundled_pair.encode(PROMPT)
    plain = bundled_pair.generate(ids, max_new_tokens=40, **sampling)
    banned = plain.tokens[2]
    given = {"logit_bias": {str(banned): -100}, "presence_penalty": 0.5, "frequency_penalty": 1.0}
    what = Adjustments({banned: -100.0}, 0.5, 1.0, 1.2)
    asked = {"model": "bundled", "prompt": PROMPT, "max_tokens": 40, **sampling, **given}
    with served(bundled_pair) as server:
        answer = server.client().completions.create(**asked, extra_body={"repetition_penalty": 1.2})
    alone = bundled_pair.generate(ids, max_new_tokens=40, **what.options(len(ids)), **sampling)
    assert answer.choices[0].text == alone.text != plain.text
    assert banned in plain.tokens
    assert banned not in alone.tokens


def test_a_requests_repetition_penalty_counts_in_place_of_the_checkpoints(bundled_pair, monkeypatch):
    asked = {"prompt": PROMPT, "max_tokens": 40}
    plain = bundled_pair.generate(PROMPT, max_new_tokens=40).text
    monkeypatch.setattr(bundled_pair.target.generation_config, "repetition_penalty", 1.5)
    penalised = bundled_pair.generate(PROMPT, max_new_tokens=40).text
    with served(bundled_pair) as server:
        answers = [server.post("/v1/completions", {**asked, **own}) for own in ({}, {"repetition_penalty": 1})]
    assert [answer.json()["choices"][0]["text"] for answer in answers] == [penalised, plain]
    assert plain != penalised


def test_a_bias_beyond_the_vocabulary_is_refused(bundled_pair):
    with served(bundled_pair) as server:
        answer = server.post("/v1/completions", {"prompt": PROMPT, "logit_bias": {"2048": 1}})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "logit_bias")
    assert error["message"] == "logit_bias: token id 2048 is outside the target's vocabulary of 2048"
