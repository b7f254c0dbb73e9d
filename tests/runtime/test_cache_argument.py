"""The cache goes to a forward under the name that its signature has: transformers 5.24 renamed it, and the old one
warns."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from specbranch import SpecBranch
from specbranch.runtime.cache_argument import cache_argument

THEIRS = cache_argument(LlamaForCausalLM)
PROMPT = [3, 9, 4, 1, 7]


class New(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, cache: Any = None, **kwargs: Any) -> Any:
        assert "past_key_values" not in kwargs
        return super().forward(input_ids, position_ids=position_ids, **{THEIRS: cache}, **kwargs)


class Old(LlamaForCausalLM):
    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        assert "cache" not in kwargs
        return super().forward(input_ids, position_ids=position_ids, **{THEIRS: past_key_values}, **kwargs)


class Anything(New):
    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().forward(input_ids, position_ids, **kwargs)


class OtherMixin:
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def prepare(self, ids: Any, cache: Any) -> Any:
        raise NotImplementedError


def test_the_name_is_that_of_the_signature() -> None:
    assert (cache_argument(New), cache_argument(Old), cache_argument(Anything)) == ("cache", "past_key_values", "cache")
    assert cache_argument(OtherMixin) == "past_key_values"
    assert cache_argument(OtherMixin, "prepare") == "cache"


@pytest.mark.parametrize("kind", [New, Old, Anything])
def test_every_forward_goes_by_it(kind: Any) -> None:
    """The one over a tree, the probes at load, and fused layers below a forward that is not known."""
    plain = tiny_model()
    own = kind(plain.config).eval()
    own.load_state_dict(plain.state_dict())
    expected = SpecBranch(plain).generate(PROMPT, max_new_tokens=12, method="autoregressive").tokens
    engine = SpecBranch(own, own)
    for method in ("autoregressive", "speculative"):
        assert engine.generate(PROMPT, max_new_tokens=12, method=method).tokens == expected


def test_no_warning_reaches_the_user() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model = tiny_model()
        engine = SpecBranch(model, model)
        engine.generate(PROMPT, max_new_tokens=8)
        with torch.no_grad():
            model(torch.tensor([PROMPT]), **{THEIRS: DynamicCache(config=model.config)})
