"""`SpecBranch`: a target and a draft, ready to generate."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specbranch.core.checks import count, flag, shown, whole
from specbranch.core.errors import SpecBranchError
from specbranch.core.excerpt import ALL, Excerpt
from specbranch.core.generation import Generation, GenerationFailed, TextStream
from specbranch.core.sampling import Sampling
from specbranch.corpus import Corpus, CorpusSource, corpora_of
from specbranch.decoder import Decoder, check_auto, check_corpus_used
from specbranch.door import (
    HandedOver,
    answer,
    as_settings,
    asked_of_generate,
    beside_ours,
    check_shared,
    fused,
    lists,
    prepared,
    requests,
)
from specbranch.request import Drafting, Request
from specbranch.runtime.choices import CACHE_TOKENS, RETRIEVAL, SELF, draft_of
from specbranch.runtime.hrad.predictor import HRad, load_hrad
from specbranch.runtime.loading import ModelSource, check_loaded, load_model, load_tokenizer
from specbranch.runtime.model import PREFILL_CHUNK, rows_for
from specbranch.runtime.packing import pack_loaded
from specbranch.runtime.pair import Pair
from specbranch.runtime.rules import Rules, Said
from specbranch.runtime.weights import unwrapped
from specbranch.scheduler import Scheduler
from specbranch.several import Several, TextStreams, is_several
from specbranch.text.encoding import Message, encode, is_chat
from specbranch.text.generation_config import OWNER, CheckpointSettings, Layered, processed
from specbranch.text.grammar import Constraint
from specbranch.text.prompt_ids import PromptInput, prompt_ids
from specbranch.text.stopping import stop_strings
from specbranch.text.vocabulary import check_vocabularies, ids_of

LONGEST = 32768  # of a text, where a configuration does not say

Messages = Sequence[Message] | Sequence[Sequence[Message]]
Prompts = PromptInput | Sequence[PromptInput]
Constraints = Constraint | Sequence[Constraint | None] | None
Corpora = Corpus | CorpusSource | Sequence[Corpus | CorpusSource]


class SpecBranch:
    """Speculative decoding with the tokens that the target alone would give.

    Each generation has its own caches over the models' shared weights, so streams may be read in turn and threads may
    share an engine: their rounds take turns. Between rounds, and so after a generation too, the models are as they were
    found.

    Implements SpecBranch (arXiv 2506.01979) and, over the same loop, the methods that it is compared with; see
    `specbranch.METHODS`.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft: PreTrainedModel | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        method: str = "specbranch",
        overlap: bool | str | None = "auto",
        draft_context: str | None = "auto",
        retrieval: bool | str | None = "auto",
        corpus: Corpora | None = None,
        threads: int | None = None,
        target_threads: int | None = None,
        hrad: HRad | str | Path | None = None,
        cuda_graphs: bool = True,
        priority: str = "target",
        prompt_cache: int = 0,
        max_requests: int = 8,
        cache_tokens: int | None = None,
        **options: object,
    ) -> None:
        """Take loaded models.

        overlap: True, False or "auto" (measure both and take the faster). draft_context: what of a prompt the draft
        reads: "all" of it, or "H+N", its first H tokens and its last N; "auto" reads when that is expected to pay, and
        as much as pays, with the methods that go by measured costs (`thrifty`), and all of it with the others.
        retrieval: True, False or "auto": whether what followed the same tokens before, in the text, is drafted too,
        which costs no forward; "auto" with the methods that go by measured costs. True needs no draft. corpus: texts
        that it is found in too: a Corpus, the path of a saved one or of a text file, or a list of these. threads:
        intra-op threads (default: torch's); target_threads: the target's share of them when both models run. hrad: a
        predictor trained for this pair, or the directory of one (`specbranch train-hrad`); SpecBranch uses it.
        cuda_graphs: on a GPU, replay steps that were captured; models whose steps cannot be captured run eagerly.
        priority: whose work goes first where both share a GPU: "target", "draft" or "none". prompt_cache: of how many
        texts caches are kept, for texts that begin alike and then read the rest only. (Weights that are written or
        replaced and other adapters are noticed; for whatever else changes a model there is `forget`.) max_requests:
        texts that are decoded at once, of those that one call asks for. cache_tokens: rows of the cache that these
        share; the others wait when it is full (default: as many as max_requests of them need). options: of the policy,
        such as epsilon, k_max, max_trunk (SpecBranch) or length (speculative, PEARL).

        Raises SpecBranchError for a model or option that cannot be used.
        """
        check_loaded(target, draft, hrad)
        self.target, self.draft = target, draft
        drafting = Drafting(method, overlap, draft_context, retrieval, options)
        self.corpora = [] if corpus is None else used_corpora(corpus, drafting, tokenizer)
        threads, target_threads = count("threads", threads), count("target_threads", target_threads)
        kept = whole("prompt_cache", prompt_cache, least=0)
        self.pair = Pair(target, draft, threads, target_threads, flag("cuda_graphs", cuda_graphs), priority, kept)
        predictor = None
        if hrad is not None:
            if draft is None:
                raise SpecBranchError("hrad predicts for a pair: pass draft=")
            predictor = hrad if isinstance(hrad, HRad) else load_hrad(hrad, target, draft)
        self.decoder = Decoder(
            self.pair, tokenizer, drafting, predictor, [(each.name, each.index) for each in self.corpora]
        )
        self.max_requests = whole("max_requests", max_requests, least=1)
        self.cache_tokens = count("cache_tokens", cache_tokens)
        self.last: Generation | None = None
        self._settings = CheckpointSettings(target)

    @classmethod
    def from_pretrained(
        cls,
        target: ModelSource,
        draft: ModelSource | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "cpu",
        draft_device: str | torch.device | None = None,
        device_map: str | dict[str, int | str] | None = None,
        trust_remote_code: bool = False,
        target_weights: str = "auto",
        draft_weights: str = "auto",
        target_arithmetic: str | None = None,
        draft_arithmetic: str | None = None,
        method: str = "specbranch",
        overlap: bool | str | None = "auto",
        draft_context: str | None = "auto",
        retrieval: bool | str | None = "auto",
        corpus: Corpora | None = None,
        threads: int | None = None,
        target_threads: int | None = None,
        hrad: HRad | str | Path | None = None,
        cuda_graphs: bool = True,
        priority: str = "target",
        prompt_cache: int = 0,
        max_requests: int = 8,
        cache_tokens: int | None = None,
        **options: object,
    ) -> SpecBranch:
        """Load a pair: directories, GGUF files, hub names, "bundled" for the pair in this package, or loaded models.

        dtype: "auto" (the checkpoint's own), "bfloat16", "float16", "float32" or a torch dtype. device: of both models;
        draft_device: of the draft, if it has one of its own. device_map: spreads the target over devices instead, as
        transformers does. trust_remote_code: run the code that a checkpoint comes with; without it, one that needs its
        own code is refused. target_weights, draft_weights: how weights are kept in memory: "keep" (as they are); on the
        CPU "lossless" (bfloat16 in 12 bits, with the same values and so the same text), "int8" and "int4" (rounded,
        which changes a target's text, and never a draft's); or "auto": of a target lossless where a measurement at load
        shows that it is faster, of a draft 4 bits. A loaded model's are always kept. A GGUF file's stay in its blocks,
        but a draft's may be rounded on, and "auto" takes bfloat16 where that is faster. draft "self": the target once
        more, its weights in 4 bits; "retrieval": no model, as retrieval=True. target_arithmetic, draft_arithmetic: of
        products over blocks, of 8 or 4 bits or a file's: "exact" (their values as bfloat16) or "fast" (activations in 8
        bits); None is exact for the target, fast for the draft. The rest is as for the constructor.

        Raises SpecBranchError when a checkpoint cannot be loaded, when its weights are not those of its configuration
        or cannot be kept or multiplied as asked for, and when the vocabularies differ.
        """
        trust = flag("trust_remote_code", trust_remote_code)
        if not isinstance(target, (str, os.PathLike)) and draft == SELF:
            raise SpecBranchError(
                "draft is 'self', but target is a loaded model: expected one that can be loaded again"
            )
        if isinstance(draft, str) and draft == RETRIEVAL:
            if check_auto("retrieval", retrieval) is False:
                raise SpecBranchError("draft is 'retrieval', but retrieval is False: expected 'auto' or True")
            draft, retrieval = None, True
        draft, draft_weights = draft_of(target, draft, draft_weights)
        own_tokenizer = tokenizer if tokenizer is not None else load_tokenizer(target, "target", trust)
        if corpus is not None:  # before the models are loaded, for what cannot be used
            corpus = used_corpora(corpus, Drafting(method, overlap, draft_context, retrieval, options), own_tokenizer)
        if draft is not None:
            check_vocabularies(own_tokenizer, load_tokenizer(draft, "draft", trust))
        threads = count("threads", threads)
        target_model = load_model(target, "target", dtype, device, device_map, trust, target_arithmetic)
        pack_loaded(target, target_model, "target", target_weights, target_arithmetic, threads)
        draft_model = None
        if draft is not None:
            place = draft_device or device
            draft_model = load_model(draft, "draft", dtype, place, None, trust, draft_arithmetic)
            pack_loaded(draft, draft_model, "draft", draft_weights, draft_arithmetic, threads)
        return cls(
            target_model,
            draft_model,
            tokenizer=own_tokenizer,
            method=method,
            overlap=overlap,
            draft_context=draft_context,
            retrieval=retrieval,
            corpus=corpus,
            threads=threads,
            target_threads=target_threads,
            hrad=hrad,
            cuda_graphs=cuda_graphs,
            priority=priority,
            prompt_cache=prompt_cache,
            max_requests=max_requests,
            cache_tokens=cache_tokens,
            **options,
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return self.decoder.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.decoder.tokenizer = tokenizer

    @property
    def hrad(self) -> HRad | None:
        """The predictor that there is."""
        return self.decoder.hrad

    @hrad.setter
    def hrad(self, predictor: HRad | None) -> None:
        self.decoder.hrad = predictor

    @property
    def draft_excerpt(self) -> Excerpt:
        """What of a prompt the draft is told to read; all of it where costs decide."""
        return ALL if self.decoder.excerpt is None else self.decoder.excerpt

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """By role: "target" and, where there is one, "draft"."""
        return {"target": self.target} | ({} if self.draft is None else {"draft": self.draft})

    def forget(self) -> None:
        """Let go of the texts that are kept; see `prompt_cache`."""
        self.pair.forget()

    def encode(self, prompt: str | Sequence[Message], chat: bool = False) -> list[int]:
        """Token ids of a prompt, as `generate` takes them; see specbranch.text.encoding.encode."""
        return encode(self.tokenizer, prompt, chat)

    def prepare(self, constraint: Constraint) -> None:
        """Compile a constraint for the tokenizer now, and not with the first text under it. That takes milliseconds;
        for the first constraint of a tokenizer with 100,000 tokens, seconds.

        Raises SpecBranchError for one that cannot be used: what no text satisfies, or is not supported.
        """
        eos = self._ends(ids_of(self._settings.under(None).eos_token_id, f"{OWNER}: eos_token_id"))
        constraint.matcher(self.tokenizer, self.pair.vocabulary, eos)

    @overload
    def generate(
        self, prompt: list[str] | list[list[int]] | list[list[Message]], **arguments: Any
    ) -> list[Generation]: ...

    @overload
    def generate(self, prompt: PromptInput, **arguments: Any) -> Generation: ...

    @overload
    def generate(self, prompt: None = None, *, messages: Sequence[Message], **arguments: Any) -> Generation: ...

    def generate(
        self,
        prompt: Prompts | None = None,
        *,
        messages: Messages | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        streamer: Any = None,
        logprobs: int | None = None,
        constraint: Constraints = None,
        method: str | None = None,
        overlap: bool | str | None = None,
        draft_context: str | None = None,
        retrieval: bool | str | None = None,
        **options: object,
    ) -> Generation | list[Generation]:
        """Continue a prompt by at most max_new_tokens.

        prompt: text, token ids (a list, range or array [n], or a tensor or array of integers [n] or [1, n]), a
        tokenizer's output (input_ids, attention_mask), or chat messages, for the tokenizer's chat template; messages:
        the last, by name. A list of such prompts is decoded at once, `max_requests` of them, and each text is what it
        is alone; the result is a list too, and seed may be one. The text is a pure function of target, prompt, sampling
        parameters, rules and seed: method, draft and overlap change the speed only. stop: strings that end the text.
        method, overlap, draft_context, retrieval and options: for this call only.

        What is None is as generation_config says, else as the checkpoint's does, else as transformers' `generate` has
        it: greedy decoding unless do_sample is set. A temperature above 0 samples, with their filters or transformers'
        (top_k 50); 0 is greedy. max_new_tokens: max_new_tokens or max_length of theirs, or else 128. Penalties, bans,
        biases and so on count as in transformers' `generate`. A SpecBranchWarning names, once, what specbranch does not
        have, beams for example: the text then differs from transformers'.

        logits_processor, stopping_criteria: transformers' or callables like them, one or several. They are called as
        `generate` calls them: once a token, in the order of the text. The draft guesses under those of transformers'
        own that have no state, and those with an attribute `stateless = True`. streamer: gets the prompt's ids, and
        tokens as they are committed. logprobs: how many alternatives to each token `Generation.logprobs` shows.

        constraint: what the text may be, a `Constraint`; of several prompts one for all, or a list with one or None for
        each. It is applied to the logits before temperature and filters, and behind logits_processor. The draft
        proposes nothing else, and tokens that nothing else can stand for are drafted without it (or without any draft).
        A text that max_new_tokens cut off before it was complete has `finish_reason` "length".

        Raises:
            SpecBranchError: bad input; the message names it.
            GenerationInterrupted: Ctrl-C; holds what was committed.
            GenerationFailed: the generation ended early, out of memory or on NaN logits; holds what was committed.
        """
        asks = self._asks(
            prompt,
            messages,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=stop,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            logprobs=logprobs,
            constraint=constraint,
            drafting=Drafting(method, overlap, draft_context, retrieval, options),
        )
        if isinstance(asks, list):
            if streamer is not None:
                raise SpecBranchError("streamer is for one prompt: use stream for several")
            return self._decoded_together(asks)
        return self._decoded(asks, streamer, Said())

    @overload
    def stream(self, prompt: list[str] | list[list[int]] | list[list[Message]], **arguments: Any) -> TextStreams: ...

    @overload
    def stream(self, prompt: PromptInput, **arguments: Any) -> TextStream: ...

    @overload
    def stream(self, prompt: None = None, *, messages: Sequence[Message], **arguments: Any) -> TextStream: ...

    def stream(
        self,
        prompt: Prompts | None = None,
        *,
        messages: Messages | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        logprobs: int | None = None,
        constraint: Constraints = None,
        method: str | None = None,
        overlap: bool | str | None = None,
        draft_context: str | None = None,
        retrieval: bool | str | None = None,
        **options: object,
    ) -> TextStream | TextStreams:
        """`generate`, giving the text piece by piece as it is committed, never half a character.

        An iterator, and a context manager that stops generating: `with engine.stream(prompt) as pieces: …`
        Of several prompts: pieces come with the place of their prompt; see TextStreams. What is wrong with a prompt,
        its length or the method is raised when the iteration starts, other arguments at once.
        """
        asks = self._asks(
            prompt,
            messages,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=stop,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            logprobs=logprobs,
            constraint=constraint,
            drafting=Drafting(method, overlap, draft_context, retrieval, options),
        )
        if isinstance(asks, list):
            return TextStreams(partial(Several, self.decoder, asks, self.max_requests, self.cache_tokens))
        said = Said()
        return TextStream(self.decoder.decode(asks, said), said.logprobs)

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Sequence[Any],
        stopping_criteria: Sequence[Any],
        generation_config: GenerationConfig,
        seed: int | None = None,
        constraint: Constraints = None,
        method: str | None = None,
        overlap: bool | str | None = None,
        draft_context: str | None = None,
        retrieval: bool | str | None = None,
        **model_arguments: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """The door from transformers: `target.generate(**inputs, custom_generate=engine, …)`.

        All that `generate` takes is honoured, or refused by name. seed: of the noise that tokens are sampled with, the
        next row of a batch with the next one; None draws it from torch's generator, so that `set_seed` decides.
        constraint, method, overlap, draft_context, retrieval: as for `generate` here. Texts of a batch are decoded at
        once, `max_requests` of them. `last` is the Generation of the last one.

        Returns what `generate` returns: int64 [rows, n], or an output with sequences, scores and logits.
        """
        if unwrapped(model, "target") is not self.pair.target.model.model:
            raise SpecBranchError(f"custom_generate: this SpecBranch decodes another {type(self.target).__name__}")
        handed = HandedOver(
            input_ids, logits_processor, stopping_criteria, generation_config, model_arguments, asked_of_generate()
        )
        asked = requests(handed, seed, Drafting(method, overlap, draft_context, retrieval), self.pair.vocabulary)
        each = one_each(constraint, len(asked))
        asked = [self._under(one, request) for one, request in zip(each, asked, strict=True)]
        asks, said = [partial(_same, request) for request in asked], Said()
        try:
            if len(asks) == 1 or handed.streamer is not None:
                made = [self._decoded(ask, handed.streamer, said, told=True) for ask in asks]
            else:
                made = self._decoded_together(asks)
        except GenerationFailed as failure:
            raise failure.__cause__ or failure from None  # of a rule, as `generate` lets it out
        self.last = made[-1]
        return answer(handed, [generation.tokens for generation in made], said)

    def _decoded(self, ask: Callable[[], Request], streamer: Any, said: Said, told: bool = False) -> Generation:
        """said: where it goes. told: the streamer has the prompt already."""
        ask = cache(ask)
        if streamer is not None and not told:
            streamer.put(torch.tensor([ask().ids]))
        stream, sent = TextStream(self.decoder.decode(ask, said, whole=streamer is None)), 0
        while stream.advance() is not None:
            for token in said.tokens[sent:] if streamer is not None else ():
                streamer.put(torch.tensor([token]))
            sent = len(said.tokens)
        if streamer is not None:
            streamer.end()
        assert stream.generation is not None
        return stream.generation

    def _decoded_together(self, asks: Sequence[Callable[[], Request]]) -> list[Generation]:
        several = Several(self.decoder, asks, self.max_requests, self.cache_tokens)
        while several.advance():
            pass
        return several.generations()

    def request(self, prompt: PromptInput, **arguments: Any) -> Request:
        """What `generate` makes of the same arguments, checked, for a `scheduler`. Raises SpecBranchError."""
        how = ("method", "overlap", "draft_context", "retrieval")
        drafting = Drafting(**{name: arguments.pop(name) for name in how if name in arguments})
        asks = self._asks(prompt, drafting=drafting, **arguments)
        if isinstance(asks, list):
            raise SpecBranchError("there are several prompts; expected one a request")
        request = asks()
        self.pair.target.model.check(request.tokens)
        return request

    def scheduler(self, max_requests: int | None = None, cache_tokens: int | None = None) -> Scheduler:
        """For requests that come one by one and share their rounds; None: as the engine was told, or else room for one
        text as long as the context, and for max_requests of CACHE_TOKENS."""
        most = self.max_requests if max_requests is None else max_requests
        rows = self.cache_tokens if cache_tokens is None else cache_tokens
        if rows is None:
            context = self.pair.target.model.context or LONGEST
            rows = max(rows_for(context), most * rows_for(min(context, CACHE_TOKENS)))
        return Scheduler(self.decoder, most, rows, PREFILL_CHUNK)

    def _asks(
        self,
        prompt: Prompts | None,
        messages: Messages | None = None,
        *,
        drafting: Drafting,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        logprobs: int | None = None,
        constraint: Constraints = None,
    ) -> Callable[[], Request] | list[Callable[[], Request]]:
        """What makes the request of a prompt; of several, one for each."""
        prompt, config = one_of(prompt, messages), self._settings.under(generation_config)
        given = lists(logits_processor, stopping_criteria)
        filters = temperature, top_k, top_p, min_p
        rest = max_new_tokens, stop, given, logprobs, drafting
        if not is_several(prompt):
            sampling = self._settings.sampling(config, *filters, seed)  # type: ignore[arg-type]
            (alone,) = one_each(constraint, 1)  # of a list, too
            return partial(self._request, prompt, alone, config, sampling, *rest)  # type: ignore[arg-type]
        check_shared(given)
        prompts: list[PromptInput] = list(prompt)  # type: ignore[arg-type]
        seeds: list[Any] = list(seed) if isinstance(seed, (list, tuple, range)) else [seed] * len(prompts)
        if len(seeds) != len(prompts):
            raise SpecBranchError(f"seed has {len(seeds)} elements; expected one for each of {len(prompts)} prompts")
        samplings = [self._settings.sampling(config, *filters, each) for each in seeds]
        return [
            partial(self._request, one, under, config, sampling, *rest)
            for one, under, sampling in zip(prompts, one_each(constraint, len(prompts)), samplings, strict=True)
        ]

    def _request(
        self,
        prompt: PromptInput,
        constraint: Constraint | None,
        config: Layered,
        sampling: Sampling,
        max_new_tokens: int | None,
        stop: str | Sequence[str] | None,
        given: Mapping[str, Any],
        logprobs: int | None,
        drafting: Drafting,
    ) -> Request:
        ids = prompt_ids(self.tokenizer, prompt, self.pair.vocabulary)
        alternatives = None if logprobs is None else whole("logprobs", logprobs, least=0)
        rules = Rules(logprobs=alternatives)
        new_tokens = self._settings.new_tokens(config, max_new_tokens, len(ids))
        eos = ids_of(config.eos_token_id, f"{OWNER}: eos_token_id")
        sampled = sampling.temperature > 0
        if processed(config, sampled) or any(given.values()):
            acting = {*processed(config, sampled), *processed(self.target.generation_config, sampled)}
            fields = {name: getattr(config, name) for name in acting}
            settings = {**given, **fields, **as_settings(sampling, new_tokens, eos)}
            device = self.pair.target.model.device
            handed = prepared(self.target, torch.tensor([ids], device=device), settings)
            filters, rest, _ = fused(handed.processors, sampled)
            sampling = Sampling(**filters, seed=sampling.seed)
            rules = Rules(rest, (), beside_ours(handed), logprobs=alternatives)
        request = Request(
            ids,
            new_tokens,
            sampling,
            eos,
            stop_strings(config.stop_strings if stop is None else stop, self.tokenizer),
            rules=rules,
            drafting=drafting,
        )
        return self._under(constraint, request)

    def _under(self, constraint: Constraint | None, request: Request) -> Request:
        """The request under a constraint. Raises SpecBranchError for one that cannot be used."""
        if constraint is None:
            return request
        eos = self._ends(request.eos)
        matcher = partial(constraint.matcher, self.tokenizer, self.pair.vocabulary, eos)
        matcher()
        return replace(request, eos=eos, matcher=matcher, forces=constraint.forced)

    def _ends(self, eos: frozenset[int]) -> frozenset[int]:
        """The tokens that end a text under a constraint, which needs some: the tokenizer's where nobody says others."""
        if eos or self.tokenizer is None:
            return eos
        return ids_of(self.tokenizer.eos_token_id, "tokenizer: eos_token_id")


def _same(request: Request) -> Request:
    return request


def one_each(constraint: Constraints, prompts: int) -> list[Constraint | None]:
    """The constraint of each prompt. Raises SpecBranchError for what is none."""
    several = isinstance(constraint, (list, tuple))
    each: list[Any] = list(constraint) if several else [constraint] * prompts  # type: ignore[arg-type]
    if len(each) != prompts:
        raise SpecBranchError(f"constraint has {len(each)} elements; expected one for each of {prompts} prompts")
    for one in each:
        if one is not None and not isinstance(one, Constraint):
            raise SpecBranchError(f"constraint is {shown(one)}; expected a Constraint, such as Constraint.regex('…')")
    return each


def used_corpora(corpus: Corpora, drafting: Drafting, tokenizer: PreTrainedTokenizerBase | None) -> list[Corpus]:
    """Raises SpecBranchError where they would have no effect, and for what is none."""
    check_corpus_used(drafting)
    return corpora_of(corpus, tokenizer)


def one_of(prompt: Prompts | None, messages: Messages | None) -> Prompts:
    """Raises SpecBranchError unless there is one of the two."""
    if messages is None:
        if prompt is None:
            raise SpecBranchError("there is no prompt: expected prompt or messages")
        return prompt
    if prompt is not None:
        raise SpecBranchError("there are both prompt and messages: expected one of them")
    if not is_chat(messages) and not (is_several(messages) and is_chat(messages[0])):
        raise SpecBranchError(f"messages is {shown(messages)}; expected a list of chat messages")
    return messages
