"""What a transformers user has today, as peers of our methods: the same models, transformers' own generation.

Our methods leave a loaded model as it is between their runs, so the peers can share it. They are set up as
transformers' documentation advises: `generate` with its default attention and cache; assisted
generation with `assistant_model=` and its default schedule; prompt lookup with `prompt_lookup_num_tokens=10`.
Settings that a checkpoint brings in its generation config (a repetition penalty, for example) are left out on
both sides: they would change the text, and the peers are compared on the same text.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from specbranch.cli.bench.masked import Masked
from specbranch.request import Request
from specbranch.text.generation_config import bare

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT_LOOKUP_TOKENS = 10


@dataclass(frozen=True)
class PeerText:
    """tokens: the new ones. first_tokens came after first_seconds, prefill included: the first step's. seconds: what
    all of it took, where that is not what the caller waits."""

    tokens: list[int]
    first_tokens: int
    first_seconds: float
    seconds: float | None = None


class _FirstStep(StoppingCriteria):
    """Notes when generate() has its first tokens, and stops nothing."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens, self.begin = prompt_tokens, time.perf_counter()
        self.tokens, self.seconds = 0, 0.0

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: Any) -> torch.Tensor:
        if self.tokens == 0:
            self.tokens = input_ids.shape[1] - self.prompt_tokens
            self.seconds = time.perf_counter() - self.begin
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Peers:
    """transformers' own generation over a loaded target and draft, which assisted generation needs.

    threads: intra-op threads for every peer; None leaves torch's.
    """

    def __init__(self, target: PreTrainedModel, draft: PreTrainedModel | None, threads: int | None = None) -> None:
        self._target, self._draft, self._threads = target, draft, threads
        # One config each for the whole run: assisted generation keeps an adapted threshold in the draft's.
        self._configs = {model: bare(model) for model in self.models}

    @property
    def models(self) -> tuple[PreTrainedModel, ...]:
        return (self._target,) if self._draft is None else (self._target, self._draft)

    def generate(
        self,
        peer: str,
        ids: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        under: Request | None = None,
    ) -> PeerText:
        """What `peer` writes: greedy, static (the same with a static cache, which is compiled on a GPU), assisted or
        prompt-lookup. under: a request of this text that has a constraint.

        At a temperature above 0 the peers sample with the same filters, from torch's own generator.
        """
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if under is not None:
            vocabulary = int(self._target.config.get_text_config().vocab_size)
            options["logits_processor"] = LogitsProcessorList([Masked(under, vocabulary)])
            options["eos_token_id"] = sorted(under.eos)
        if temperature > 0:
            options |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p or None}
        if peer == "assisted":
            options["assistant_model"] = self._draft
        elif peer == "prompt-lookup":
            options["prompt_lookup_num_tokens"] = PROMPT_LOOKUP_TOKENS
        elif peer == "static":
            options["cache_implementation"] = "static"
        elif peer != "greedy":
            raise ValueError(f"unknown peer {peer!r}")
        target: Any = self._target
        input_ids = torch.tensor([list(ids)], device=self._target.device)
        with self._as_transformers_sets_up(), torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(seed)
            first = _FirstStep(len(ids))
            output = target.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                stopping_criteria=StoppingCriteriaList([first]),
                **options,
            )
        tokens = [int(token) for token in output[0, len(ids) :]]
        return PeerText(tokens, min(first.tokens, len(tokens)), first.seconds)

    @contextmanager
    def _as_transformers_sets_up(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self._threads is not None:
                stack.enter_context(_threads(self._threads))
            for model, config in self._configs.items():
                stack.enter_context(_generation_config(model, config))
            yield


@contextmanager
def _generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    before, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = before


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
