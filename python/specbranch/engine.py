"""`SpecBranch`: a target and a draft, ready to generate."""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specbranch.core.checks import count, flag, shown
from specbranch.core.errors import SpecBranchError, SpecBranchWarning
from specbranch.core.excerpt import ALL, Excerpt, check_draft_context
from specbranch.core.generation import Generation, GenerationFailed, GenerationInterrupted, TextStream
from specbranch.core.sampling import Sampling
from specbranch.drafters.model import ModelDrafter
from specbranch.loop import DecodingLoop
from specbranch.policies.calibration import Calibrator
from specbranch.policies.costs import Costs
from specbranch.policies.methods import make_policy
from specbranch.policies.policy import Policy
from specbranch.policies.reading import AtOnce, Lengths, Reading, WhenItPays
from specbranch.runtime.choices import SELF, draft_of
from specbranch.runtime.hrad.predictor import HRad, Predictor, load_hrad
from specbranch.runtime.loading import ModelSource, check_loaded, load_model, load_tokenizer
from specbranch.runtime.packed import weight_format
from specbranch.runtime.packing import pack_loaded
from specbranch.runtime.pair import Pair, Slot
from specbranch.runtime.verifier import ModelVerifier
from specbranch.text.detokenizer import TextBuilder
from specbranch.text.encoding import Message, encode
from specbranch.text.generation_config import CheckpointSettings
from specbranch.text.prompt_ids import PromptInput, prompt_ids
from specbranch.text.vocabulary import check_vocabularies, end_of_sequence


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
        threads: int | None = None,
        target_threads: int | None = None,
        hrad: HRad | str | Path | None = None,
        cuda_graphs: bool = True,
        priority: str = "target",
        **options: object,
    ) -> None:
        """Take loaded models.

        overlap: True, False or "auto" (measure both and take the faster). draft_context: what of a prompt the draft
        reads: "all" of it, or "H+N", its first H tokens and its last N; "auto" reads when that is expected to pay, and
        as much as pays, with the methods that go by measured costs (`thrifty`), and all of it with the others. threads:
        intra-op threads (default: torch's); target_threads: the target's share of them when both models run. hrad: a
        predictor trained for this pair, or the directory of one (`specbranch train-hrad`); SpecBranch uses it.
        cuda_graphs: on a GPU, replay steps that were captured; models whose steps cannot be captured run eagerly.
        priority: whose work goes first where both share a GPU: "target", "draft" or "none". options: of the policy,
        such as epsilon, k_max, max_trunk (SpecBranch) or length (speculative, PEARL).

        Raises SpecBranchError for a model or option that cannot be used.
        """
        check_loaded(target, draft, hrad)
        self.target, self.draft, self.tokenizer = target, draft, tokenizer
        self.method = method
        self.options = options
        self._overlap = check_overlap(overlap)
        threads, target_threads = count("threads", threads), count("target_threads", target_threads)
        self.pair = Pair(target, draft, threads, target_threads, flag("cuda_graphs", cuda_graphs), priority)
        self._draft_context = self._excerpt("auto" if draft_context is None else draft_context)
        self._lengths = Lengths()
        self._costs: defaultdict[str, Costs] = defaultdict(partial(Costs, self.pair.relative_size))  # by method
        self._calibrator = Calibrator()
        self._eos = end_of_sequence(target)
        self._settings = CheckpointSettings(target)
        self.hrad: HRad | None = None
        if hrad is not None:
            if draft is None:
                raise SpecBranchError("hrad predicts for a pair: pass draft=")
            self.hrad = hrad if isinstance(hrad, HRad) else load_hrad(hrad, target, draft)
        make_policy(method, options)
        self._row_dependence = ""
        self._check_rows()

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
        threads: int | None = None,
        target_threads: int | None = None,
        hrad: HRad | str | Path | None = None,
        cuda_graphs: bool = True,
        priority: str = "target",
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
        more, its weights in 4 bits. target_arithmetic, draft_arithmetic: of products over blocks, of 8 or 4 bits or a
        file's: "exact" (their values as bfloat16) or "fast" (activations in 8 bits); None is exact for the target, fast
        for the draft. The rest is as for the constructor.

        Raises SpecBranchError when a checkpoint cannot be loaded, when its weights are not those of its configuration
        or cannot be kept or multiplied as asked for, and when the vocabularies differ.
        """
        trust = flag("trust_remote_code", trust_remote_code)
        if not isinstance(target, (str, os.PathLike)) and draft == SELF:
            raise SpecBranchError(
                "draft is 'self', but target is a loaded model: expected one that can be loaded again"
            )
        draft, draft_weights = draft_of(target, draft, draft_weights)
        own_tokenizer = tokenizer if tokenizer is not None else load_tokenizer(target, "target", trust)
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
            threads=threads,
            target_threads=target_threads,
            hrad=hrad,
            cuda_graphs=cuda_graphs,
            priority=priority,
            **options,
        )

    @property
    def draft_excerpt(self) -> Excerpt:
        """What of a prompt the draft is told to read; all of it where costs decide."""
        return ALL if self._draft_context is None else self._draft_context

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """By role: "target" and, where there is one, "draft"."""
        return {"target": self.target} | ({} if self.draft is None else {"draft": self.draft})

    def encode(self, prompt: str | Sequence[Message], chat: bool = False) -> list[int]:
        """Token ids of a prompt, as `generate` takes them; see specbranch.text.encoding.encode."""
        return encode(self.tokenizer, prompt, chat)

    def generate(
        self,
        prompt: PromptInput,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        stop: str | Sequence[str] | None = None,
        method: str | None = None,
        overlap: bool | str | None = None,
        draft_context: str | None = None,
        **options: object,
    ) -> Generation:
        """Continue a prompt by at most max_new_tokens.

        prompt: text, token ids (a list, range or array [n], or a tensor or array of integers [n] or [1, n]), a
        tokenizer's output (input_ids, attention_mask), or chat messages, for the tokenizer's chat template.
        The text is a pure function of target, prompt, sampling parameters and seed: method, draft and overlap
        change the speed only. stop: strings that end the text. method, overlap, draft_context and options: for this
        call only.

        What is None is as the checkpoint's generation_config says, or else as transformers' `generate` has it: greedy
        decoding unless do_sample is set. A temperature above 0 samples, with the checkpoint's filters or transformers'
        (top_k 50); 0 is greedy. max_new_tokens: the checkpoint's max_new_tokens or max_length, or else 128. A
        SpecBranchWarning names, once, what a generation_config asks for and specbranch does not have, a repetition
        penalty for example: the text then differs from that of transformers' `generate`.

        Raises:
            SpecBranchError: bad input; the message names it.
            GenerationInterrupted: Ctrl-C; holds what was committed.
            GenerationFailed: the generation ended early, out of memory or on NaN logits; holds what was committed.
        """
        sampling = self._settings.sampling(temperature, top_k, top_p, min_p, seed)
        stream = TextStream(
            self._run(prompt, max_new_tokens, sampling, stop, method, overlap, draft_context, options, whole=True)
        )
        for _ in stream:
            pass
        assert stream.generation is not None
        return stream.generation

    def stream(
        self,
        prompt: PromptInput,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        stop: str | Sequence[str] | None = None,
        method: str | None = None,
        overlap: bool | str | None = None,
        draft_context: str | None = None,
        **options: object,
    ) -> TextStream:
        """`generate`, giving the text piece by piece as it is committed, never half a character.

        An iterator, and a context manager that stops generating: `with engine.stream(prompt) as pieces: …`
        The arguments are checked, and errors raised, when the iteration starts.
        """
        sampling = self._settings.sampling(temperature, top_k, top_p, min_p, seed)
        return TextStream(self._run(prompt, max_new_tokens, sampling, stop, method, overlap, draft_context, options))

    def _run(
        self,
        prompt: PromptInput,
        max_new_tokens: int | None,
        sampling: Sampling,
        stop: str | Sequence[str] | None,
        method: str | None,
        overlap: bool | str | None,
        draft_context: str | None,
        options: dict[str, object],
        whole: bool = False,
    ) -> Generator[str | Generation, None, None]:
        """Pieces of text and, last, the Generation. whole: the text is one piece."""
        begin = time.perf_counter()
        ids = self._prompt_ids(prompt)
        max_new_tokens = self._settings.new_tokens(max_new_tokens, len(ids))
        builder = TextBuilder(self.tokenizer, self._eos, self._stop_strings(stop))
        self._check_rows()
        calibrator = copy.deepcopy(self._calibrator)
        slot = self.pair.take(owner=builder)
        try:
            loop = self._loop(slot, calibrator, method, sampling, overlap, draft_context, options)
            slot.reset(len(ids) + max_new_tokens, draft=loop.drafter is not None)
            attachment = self.pair.attachment(slot.target.model.tap, draft=loop.drafter is not None)
            reason, rounds = "length", loop.rounds(ids, max_new_tokens)

            def take_turn() -> bool:
                """Decode for as long as nobody looks at the text or wants the models. False when it is over."""
                nonlocal reason
                for committed in rounds:
                    if any(builder.add(token) for token in committed):
                        reason = "stop"
                        break
                    if not whole or attachment.wanted:
                        return True
                return False

            try:
                while attachment.turn(take_turn):
                    if not whole:
                        yield builder.fresh()
                    if attachment.wanted:
                        time.sleep(0)  # or this thread would have the next turn too
            except KeyboardInterrupt as interrupt:
                raise GenerationInterrupted(self._result(slot, loop, builder, begin, "interrupted")) from interrupt
            except (MemoryError, RuntimeError, ValueError) as error:
                if not builder.tokens:
                    raise
                generation = self._result(slot, loop, builder, begin, "error")
                raise GenerationFailed(f"generation ended early: {error}", generation) from error
            finally:
                rounds.close()
                if loop.policy.calibrated:
                    self._calibrator = calibrator  # what it learned serves the generations that begin from now on
                self._lengths.record(len(builder.tokens), ended=reason == "stop")
        finally:
            self.pair.give_back(slot)
        yield builder.fresh(final=True)
        yield self._result(slot, loop, builder, begin, reason)

    def _loop(
        self,
        slot: Slot,
        calibrator: Calibrator,
        method: str | None,
        sampling: Sampling,
        overlap: bool | str | None,
        draft_context: str | None,
        options: dict[str, object],
    ) -> DecodingLoop:
        policy = make_policy(method or self.method, {**self.options, **options})
        drafter = None
        if policy.candidates > 0:
            draft = slot.need_draft(f"method {policy.name!r}")
            learner = calibrator if policy.calibrated else None
            drafter = ModelDrafter(draft, sampling, policy.candidates, slot.vocabulary, learner)
        mode = self._overlap if overlap is None else check_overlap(overlap)
        predictor = None
        if self.hrad is not None and policy.uses_forecast:
            predictor = Predictor(slot.tap, self.hrad)
        slot.target.model.tap = None if predictor is None else predictor.tap
        verifier = ModelVerifier(slot.target, sampling, predictor)
        reading = self._reading(policy, draft_context)
        return DecodingLoop(verifier, drafter, policy, self._costs[policy.name], self.pair.workers, mode, reading)

    def _reading(self, policy: Policy, draft_context: str | None) -> Reading:
        excerpt = self._draft_context if draft_context is None else self._excerpt(draft_context)
        if excerpt is None and policy.thrifty:
            return WhenItPays(self._lengths)
        return AtOnce(ALL if excerpt is None else excerpt)

    def _excerpt(self, draft_context: str) -> Excerpt | None:
        """None for "auto". Raises SpecBranchError for what is none, and for more than the draft has positions for."""
        excerpt, draft = check_draft_context(draft_context), self.pair.draft
        most = None if draft is None else draft.model.context
        if excerpt not in (None, ALL) and most is not None and excerpt.size > most:
            raise SpecBranchError(
                f"draft_context is {excerpt}; expected at most {most} tokens together, the draft model's context"
            )
        return excerpt

    def _check_rows(self) -> None:
        """Say once, and again when the target's layers were replaced, what keeps texts from being equal to the bit."""
        found = self.pair.row_dependence()
        if found and found != self._row_dependence:
            warnings.warn(f"target {type(self.target).__name__}: {found}", SpecBranchWarning, stacklevel=1)
        self._row_dependence = found

    def _prompt_ids(self, prompt: PromptInput) -> list[int]:
        return prompt_ids(self.tokenizer, prompt, self.pair.vocabulary)

    def _stop_strings(self, stop: str | Sequence[str] | None) -> tuple[str, ...]:
        return self._settings.stop_strings(stop, self.tokenizer)

    def _result(self, slot: Slot, loop: DecodingLoop, builder: TextBuilder, begin: float, reason: str) -> Generation:
        stats = loop.stats
        stats.seconds = time.perf_counter() - begin
        stats.target_runner = slot.target.note
        stats.draft_runner = "" if slot.draft is None or loop.drafter is None else slot.draft.note
        stats.target_weights = weight_format(self.target)
        stats.draft_weights = "" if self.draft is None or loop.drafter is None else weight_format(self.draft)
        stats.row_dependent = self._row_dependence
        stats.end(len(builder.tokens))
        return Generation(builder.text, builder.tokens, stats, reason)


def check_overlap(overlap: bool | str | None) -> bool | None:
    """True, False, or None for "auto". Raises SpecBranchError for anything else."""
    if overlap is None or (isinstance(overlap, str) and overlap == "auto"):
        return None
    if isinstance(overlap, bool):
        return overlap
    raise SpecBranchError(f"overlap is {shown(overlap)}; expected True, False or 'auto'")
