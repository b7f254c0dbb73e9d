"""Proposes tokens for all texts of another engine's step, from their trees where those are grown already."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from threading import Event

from transformers import PreTrainedModel

from specbranch.core.excerpt import Excerpt
from specbranch.policies.calibration import Calibrator
from specbranch.policies.costs import Costs
from specbranch.policies.policy import Policy, State
from specbranch.policies.reading import AtOnce, Lengths, Reading, Unread, WhenItPays
from specbranch.proposer.drafting import Turn, draft_for, draft_on
from specbranch.proposer.recognition import Row, recognise
from specbranch.proposer.slots import Slots
from specbranch.proposer.step_costs import Round, StepCosts
from specbranch.proposer.text import Text
from specbranch.runtime.attach import Attachment
from specbranch.runtime.model import PREFILL_CHUNK, CachedModel
from specbranch.runtime.placement import make_runner
from specbranch.runtime.threads import run_on, set_threads

GONE = 128  # calls without it, after which a text is over


class Proposer:
    """One draft, for a target that somebody else runs.

    The engine calls `propose` after every step, with all texts of that step. Between two calls the draft goes on by
    itself, where that pays.
    """

    def __init__(
        self,
        draft: PreTrainedModel,
        policy: Policy,
        *,
        most: int,
        vocabulary: int,
        context: int,
        size: float,
        say: Callable[[str], None],
        excerpt: Excerpt | None = None,
        overlap: bool | None = None,
        cache_bytes: int = 2**31,
        threads: int | None = None,
        cores: Collection[int] = (),
    ) -> None:
        """most: tokens of one proposal. vocabulary: ids from here on are never proposed. context: the most tokens of a
        text. size: parameters of the draft's forward over those of the target's. say: takes a line for the log.
        excerpt: what of a text the draft reads; None for what pays. overlap: None for what pays. threads, cores:
        of torch, for drafting while the target runs; no cores: any that this thread may use.

        Raises SpecBranchError for a draft that cannot be run.
        """
        self.policy, self._most, self._context, self._say = policy, most, context, say
        self._overlap = overlap
        self._lengths = Lengths()
        self._reading: Reading = (
            WhenItPays(self._lengths) if excerpt is None and policy.thrifty else AtOnce(excerpt or Excerpt(context, 0))
        )
        # Not captured on a GPU: a capture clears cuBLAS's workspaces, which graphs of the engine's own may be using.
        runner = make_runner(CachedModel(draft, "draft"), cuda_graphs=False)
        self._vocabulary = min(vocabulary, runner.model.vocabulary)
        self._slots = Slots(runner, cache_bytes)
        self._attached = ExitStack()  # the draft is ours alone: it stays attached
        self._attached.enter_context(Attachment([draft]).attached())
        self._costs = StepCosts(size)
        self._texts: list[Text] = []
        self._calibrator = Calibrator()  # as the newest verdict left it
        self._calls = 0
        self._round: Round | None = None
        self._background = Background(threads, cores)

    def propose(self, rows: Sequence[Row | None]) -> list[list[int]]:
        """Tokens to verify behind each row, perhaps none. None instead of a row: it is not to get any."""
        begin = time.perf_counter()
        self._background.stop()
        self._calls += 1
        texts = self._follow(rows, begin)
        costs = self._costs.of(max(1, len(texts)))
        live = [text for text in texts.values() if not text.failed]
        turns: list[Turn] = []
        overlapped = False
        if costs.serial.target.known:  # else a step without drafts is to be measured first
            self._read(live, costs)
            drafting = [text for text in live if text.ready]
            overlapped = bool(drafting) and self._overlaps(drafting, costs)
            turns = [Turn(text, self._state(text, costs, overlapped)) for text in drafting]
            draft_for(turns, self.policy, self._most, self._guard, self._fail)
        proposed = {text: text.proposed for text in texts.values()}
        self._round = None
        if texts:
            counts = {text: len(tokens) for text, tokens in proposed.items()}
            self._round = Round(counts, costs, begin, time.perf_counter(), overlapped)
        if overlapped:
            self._draft_on(turns, costs)
        return [proposed[texts[i]] if i in texts else [] for i in range(len(rows))]

    def close(self) -> None:
        """End what runs beside the engine, and leave the draft as it was."""
        try:
            self._background.close()
        finally:
            self._attached.close()

    @property
    def texts(self) -> Sequence[Text]:
        """Those that are remembered."""
        return self._texts

    def _follow(self, rows: Sequence[Row | None], now: float) -> dict[int, Text]:
        """What was committed reaches the texts, and what it took is measured. Returns each row's text."""
        live = {i: row for i, row in enumerate(rows) if row is not None}
        found = recognise(list(live.values()), self._texts)
        texts, tokens, accepted = {}, {}, {}
        for (i, row), text in zip(live.items(), found, strict=True):
            if text is None:
                text = Text(row.tokens, None)
                self._texts.append(text)
            else:
                behind = row.tokens[len(text.tokens) :]
                if self._round is not None and text in self._round.proposed:
                    tokens[text] = len(behind)
                taken = self._advance(text, row, len(behind))
                if text in tokens:
                    accepted[text] = taken
            text.seen, texts[i] = self._calls, text
        if self._round is not None:
            pure = len(live) == len(rows) and all(text in tokens for text in texts.values()) and bool(texts)
            self._round.measure(now, tokens, accepted, pure)
        for text in texts.values():
            text.steps, text.spent, text.retried = 0, 0.0, False
        for text in [text for text in self._texts if self._calls - text.seen > GONE]:
            self._lengths.record(text.new_tokens, ended=True)
            self._slots.forget(text)
            self._texts.remove(text)
        return texts

    def _advance(self, text: Text, row: Row, count: int) -> int:
        accepted = 0

        def advance() -> None:
            nonlocal accepted
            accepted = text.advance(row.tokens[-count:], judged=count == row.new)
            if text.calibrator is not None:
                self._calibrator = text.calibrator

        self._guard(text, advance)
        return accepted

    def _read(self, texts: Sequence[Text], costs: Costs) -> None:
        """The draft begins to read texts where that is expected to pay; of those that grew, its caches do. Then it
        reads on, those first that wait longest; not so much that the engine would wait long."""
        rooms: dict[Text, int] = {}
        for text in texts:
            tokens = len(text.tokens)
            if text.fits(tokens + self._most):
                continue
            room = self._slots.room_for(tokens + self._most)
            if room is None:
                self._slots.forget(text)
            else:
                rooms[text] = room
        excerpts = {text: text.excerpt for text in rooms if text.runner is not None}
        excerpts |= self._choose([text for text in rooms if text.runner is None], texts, costs)
        for text, excerpt in excerpts.items():
            self._guard(text, partial(self._begin, text, excerpt, rooms[text], texts))
        left = float(PREFILL_CHUNK)
        for text in sorted(texts, key=lambda text: text.read_at):
            if left > 0 and text.runner is not None and not text.ready:
                left -= self._read_on(text, left, costs)

    def _choose(self, texts: Sequence[Text], live: Sequence[Text], costs: Costs) -> dict[Text, Excerpt]:
        """Those that the draft is to begin to read, and what of them."""
        unread: dict[Text, Unread] = {}

        def look(text: Text) -> None:
            others = [other for other in self._texts if other is not text]
            tokens = {each: self._slots.unread(text.tokens, each, others) for each in self._reading.excerpts}
            unread[text] = Unread(costs, tokens, max(1, self._context - len(text.tokens)))

        for text in texts:
            self._guard(text, partial(look, text))
        if not unread:
            return {}
        chosen = self._reading.choose([*unread.values()], sum(text.runner is not None for text in live))
        return {text: excerpt for text, excerpt in zip(unread, chosen, strict=True) if excerpt is not None}

    def _begin(self, text: Text, excerpt: Excerpt, room: int, live: Sequence[Text]) -> None:
        others = [other for other in self._texts if other is not text]
        if text.runner is not None:
            runner = self._slots.move(text, room, others, live)
        else:
            runner = self._slots.take(text.tokens, room, others, live)
            if self.policy.calibrated:
                text.calibrator = copy.deepcopy(self._calibrator)
        if runner is None:
            return
        text.begin(runner, excerpt, room, self.policy, self._vocabulary)
        text.read_at = self._calls

    def _read_on(self, text: Text, most: float, costs: Costs) -> int:
        begin, count = time.perf_counter(), 0

        def read() -> None:
            nonlocal count
            count = text.read(most)

        self._guard(text, read)
        costs.record_reading(count, time.perf_counter() - begin)
        if text.ready:
            costs.end_waiting()
        text.read_at = self._calls
        return count

    def _overlaps(self, texts: Sequence[Text], costs: Costs) -> bool:
        if not self.policy.overlaps or self._overlap is not None:
            return self.policy.overlaps and bool(self._overlap)
        saved = max(text.saved for text in texts) if self.policy.thrifty else math.inf
        return costs.choose_overlap(saved)

    def _state(self, text: Text, costs: Costs, overlapped: bool) -> State:
        mode = costs.mode(overlapped)
        assert text.runner is not None
        burst = min(text.runner.burst, mode.burst())
        text.retried = text.backoff.over(mode.step_price())
        losing = -text.saved > costs.bearable_loss(text.new_tokens)
        remaining = max(1, self._context - len(text.tokens))
        return State(overlapped, mode, costs.acceptance, remaining, text.retried, burst, None, losing)

    def _draft_on(self, turns: Sequence[Turn], costs: Costs) -> None:
        assert self._round is not None
        mode, begin, texts = costs.overlapped, self._round.end, len(self._round.proposed)
        rows = 1 + sum(self._round.proposed.values()) / texts

        def should_continue(under_way: int) -> bool:
            """Whether one more step would end with the engine's, or at most half a step later."""
            if self._background.stopping:
                return False
            if not mode.target.known or not mode.draft.known:
                return True
            left = mode.target.of(rows) * texts - (time.perf_counter() - begin)
            return left >= (under_way + 0.5) * mode.draft.mean

        self._background.start(lambda: draft_on(turns, self.policy, self._guard, self._fail, should_continue))

    def _guard(self, text: Text, work: Callable[[], None]) -> None:
        if text.failed:
            return
        try:
            work()
        except Exception as error:
            self._fail(text, error)

    def _fail(self, text: Text, error: Exception) -> None:
        """Nothing is drafted for a text any more."""
        if not text.failed:
            text.failed = True
            self._slots.forget(text)
            self._say(f"a text of {len(text.tokens)} tokens gets no more drafts: {type(error).__name__}: {error}")


class Background:
    """Work on a thread of its own, until it is stopped. threads: of torch there. cores: that it runs on."""

    def __init__(self, threads: int | None, cores: Collection[int] = ()) -> None:
        self._threads, self._cores = threads, cores
        self._executor: ThreadPoolExecutor | None = None
        self._task: Future[None] | None = None
        self._stop = Event()

    @property
    def stopping(self) -> bool:
        """Whether the work is to end."""
        return self._stop.is_set()

    def start(self, work: Callable[[], None]) -> None:
        """The caller goes on."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, "specbranch", self._begin)
        self._stop.clear()
        self._task = self._executor.submit(work)

    def stop(self) -> None:
        """Return when it has ended. Raises what it raised."""
        self._stop.set()
        if self._task is not None:
            task, self._task = self._task, None
            task.result()

    def close(self) -> None:
        try:
            self.stop()
        finally:
            if self._executor is not None:
                self._executor.shutdown()

    def _begin(self) -> None:
        if self._threads is not None:
            set_threads(self._threads)
        if self._cores:
            run_on(self._cores)
