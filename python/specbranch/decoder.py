"""One text of an engine: from a request to a generation, round by round."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Generator, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from specbranch.constrained import Constrained
from specbranch.core.checks import shown
from specbranch.core.errors import SpecBranchError, SpecBranchWarning
from specbranch.core.excerpt import ALL, Excerpt, check_draft_context
from specbranch.core.generation import Generation, GenerationFailed, GenerationInterrupted
from specbranch.core.suffix_index import SuffixIndex
from specbranch.decoding import Decoding, costs_name
from specbranch.drafters.model import ModelDrafter
from specbranch.drafters.retrieval import RetrievalDrafter
from specbranch.job import Job
from specbranch.loop import DecodingLoop
from specbranch.policies.calibration import Calibrator
from specbranch.policies.costs import Costs, CostsByTexts
from specbranch.policies.methods import make_policy
from specbranch.policies.policy import Policy, retrieves
from specbranch.policies.reading import AtOnce, Lengths, Reading, WhenItPays
from specbranch.request import Drafting, Request
from specbranch.runtime.hrad.predictor import HRad, Predictor
from specbranch.runtime.pair import Pair, Slot
from specbranch.runtime.rules import DraftRules, Said, Walk
from specbranch.runtime.verifier import ModelVerifier
from specbranch.text.detokenizer import TextBuilder
from specbranch.together import Together


class Decoder:
    """Decodes the texts of one pair, and keeps what a text teaches the next: costs, calibration and lengths."""

    def __init__(
        self,
        pair: Pair,
        tokenizer: PreTrainedTokenizerBase | None,
        drafting: Drafting,
        hrad: HRad | None,
        corpora: Sequence[tuple[str, SuffixIndex]] = (),
    ) -> None:
        """drafting: of requests that say nothing else. corpora: what retrieved tokens may come from, beside the text,
        with names. Raises SpecBranchError for what cannot be used."""
        self.pair, self.tokenizer, self.hrad = pair, tokenizer, hrad
        self.drafting, self.corpora = drafting, list(corpora)
        self.calibrator = Calibrator()
        self._costs: dict[str, CostsByTexts] = {}  # of each method
        self.excerpt = self._excerpt("auto" if drafting.draft_context is None else drafting.draft_context)
        self._overlap = check_auto("overlap", drafting.overlap)
        self._retrieval = check_auto("retrieval", drafting.retrieval)
        self._lengths = Lengths()
        self._when_it_pays = WhenItPays(self._lengths)
        self._row_dependence = ""
        make_policy(drafting.method or "", dict(drafting.options))
        self._check_rows()

    def decode(
        self, ask: Callable[[], Request], said: Said, whole: bool = False
    ) -> Generator[str | Generation, None, None]:
        """Pieces of text and, last, the Generation. ask: checks what is asked for, when it begins. said: what has been
        said so far. whole: the text is one piece."""
        begin = time.perf_counter()
        request = ask()
        builder = self.builder(request, said)
        slot = self.pair.take(owner=builder, text=request.ids[:-1])
        try:
            job = self.open(request, said, builder, slot, begin)
            attachment = self.pair.attachment(slot.target.model.tap, draft=job.drafted)
            loop = DecodingLoop(self.pair.workers, Together())
            rounds = loop.rounds(job.text, request.ids, request.new_tokens)

            def take_turn() -> bool:
                """Decode for as long as nobody looks at the text or wants the models. False when it is over."""
                for committed in rounds:
                    if job.take(committed):
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
                raise GenerationInterrupted(job.result("interrupted")) from interrupt
            except (MemoryError, RuntimeError, ValueError) as error:
                if not builder.tokens:
                    raise
                generation = job.result("error")
                raise GenerationFailed(f"generation ended early: {error}", generation) from error
            finally:
                rounds.close()
                self.close(job)
        finally:
            self.pair.give_back(slot)
        yield builder.fresh(final=True)
        yield job.result()

    def builder(self, request: Request, said: Said) -> TextBuilder:
        """Of a request's text. said: shows its tokens."""
        builder = TextBuilder(self.tokenizer, request.eos, request.stop)
        said.tokens = builder.tokens
        return builder

    def open(self, request: Request, said: Said, builder: TextBuilder, slot: Slot, begin: float) -> Job:
        """Begin a text in a slot of its own. Raises SpecBranchError for what cannot be used or does not fit."""
        self._check_rows()
        calibrator = copy.deepcopy(self.calibrator)
        constraint = self._constrained(request)
        walk = self._walk(request, builder, said, constraint)
        text = self._decoding(slot, calibrator, request, walk, constraint)
        slot.reset(request.ids, request.tokens, draft=text.drafter is not None)
        return Job(request, said, builder, slot, text, walk, calibrator, begin, self._row_dependence)

    def close(self, job: Job) -> None:
        """A text is over, or left: let what it has taught serve others, and its rows those that begin alike."""
        if self.pair.prompt_cache and not self._row_dependence:
            for stage in (job.text.verifier, job.text.drafter):
                if isinstance(stage, (ModelVerifier, ModelDrafter)):
                    stage.keep()
        if job.text.policy.calibrated or job.text.retriever is not None:
            self.calibrator = job.calibrator
        self._lengths.record(len(job.builder.tokens), ended=job.reason == "stop")

    def costs_of(self, name: str, texts: int = 1) -> Costs:
        """What a method (see costs_name) has cost with so many texts at once; where there were none, what is known
        from fewer."""
        if name not in self._costs:
            self._costs[name] = CostsByTexts(Costs(self.pair.relative_size))
        return self._costs[name].of(texts)

    def _constrained(self, request: Request) -> Constrained | None:
        constraint = request.constrained(self.pair.vocabulary)
        if constraint is not None:
            constraint.allowed([])  # which raises where no text is possible
        return constraint

    def _walk(self, request: Request, builder: TextBuilder, said: Said, constraint: Constrained | None) -> Walk | None:
        """None where no rule wants to be asked."""
        if not request.rules:
            return None
        ids = torch.tensor([[*request.padding, *request.ids]], device=self.pair.target.model.device)
        return Walk(request.rules, ids, request.sampling, builder.add, said, constraint)

    def _decoding(
        self,
        slot: Slot,
        calibrator: Calibrator,
        request: Request,
        walk: Walk | None,
        constraint: Constrained | None,
    ) -> Decoding:
        own, asked, sampling = self.drafting, request.drafting, request.sampling
        policy = make_policy(asked.method or own.method or "", {**own.options, **asked.options})
        told = self._retrieval if asked.retrieval is None else check_auto("retrieval", asked.retrieval)
        if told and not policy.may_retrieve and (asked.retrieval is not None or policy.candidates > 0):
            name = policy.name
            raise SpecBranchError(f"retrieval is True, but method {name!r} never retrieves: expected 'auto' or False")
        retriever = RetrievalDrafter(calibrator, self.corpora) if retrieves(policy, told) else None
        drafter = None
        free = told or (constraint is not None and policy.may_retrieve)  # tokens without a draft
        if policy.candidates > 0 and (slot.draft is not None or not free):
            draft = slot.need_draft(f"method {policy.name!r}")
            learner = calibrator if policy.calibrated else None
            rules = self._draft_rules(request, slot)
            candidates, vocabulary = policy.candidates, slot.vocabulary
            drafter = ModelDrafter(draft, sampling, candidates, vocabulary, learner, rules, constraint)
        mode = self._overlap if asked.overlap is None else check_auto("overlap", asked.overlap)
        predictor = None
        if self.hrad is not None and policy.uses_forecast:
            predictor = Predictor(slot.tap, self.hrad)
        slot.target.model.tap = None if predictor is None else predictor.tap
        verifier = ModelVerifier(slot.target, sampling, predictor, walk, constraint)
        reading = self._reading(policy, asked.draft_context)
        costs = self.costs_of(costs_name(policy, retriever, constraint))
        workers, watched = self.pair.workers, walk is not None
        return Decoding(verifier, drafter, policy, costs, workers, mode, reading, retriever, constraint, watched)

    def _draft_rules(self, request: Request, slot: Slot) -> DraftRules | None:
        processors = request.rules.for_draft
        if not processors or slot.draft is None:
            return None
        ids = torch.tensor([[*request.padding, *request.ids]], device=slot.draft.model.device)
        return DraftRules(processors, ids, len(request.ids), slot.vocabulary)

    def _reading(self, policy: Policy, draft_context: str | None) -> Reading:
        excerpt = self.excerpt if draft_context is None else self._excerpt(draft_context)
        if excerpt is None and policy.thrifty:
            return self._when_it_pays
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
            warnings.warn(
                f"target {type(self.pair.target.model.model).__name__}: {found}", SpecBranchWarning, stacklevel=1
            )
        self._row_dependence = found


def check_corpus_used(drafting: Drafting) -> None:
    """Raises SpecBranchError where nothing would be retrieved from a corpus."""
    policy = make_policy(drafting.method or "", dict(drafting.options))
    told = check_auto("retrieval", drafting.retrieval)
    if not retrieves(policy, told):
        auto = policy.may_retrieve and told is None
        raise SpecBranchError(
            f"corpus has no effect with method {policy.name!r} and retrieval {shown(drafting.retrieval)}"
            + (": pass retrieval=True" if auto else ", which retrieve nothing")
        )


def check_auto(name: str, value: bool | str | None) -> bool | None:
    """True, False, or None for "auto". Raises SpecBranchError for anything else."""
    if value is None or (isinstance(value, str) and value == "auto"):
        return None
    if isinstance(value, bool):
        return value
    raise SpecBranchError(f"{name} is {shown(value)}; expected True, False or 'auto'")
