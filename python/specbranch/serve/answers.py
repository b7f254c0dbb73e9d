"""One request's generation: it waits for its turn, is decoded in a thread with others, and its pieces arrive in the
event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from specbranch.core.errors import SpecBranchError
from specbranch.core.generation import Generation, TokenLogprob
from specbranch.engine import SpecBranch
from specbranch.request import Request
from specbranch.scheduler import Ticket
from specbranch.serve.queue import Place, Queue
from specbranch.serve.refusal import Refusal
from specbranch.serve.requests import Asked
from specbranch.serve.response_format import Form, refused
from specbranch.serve.rounds import Rounds
from specbranch.text.generation_config import ANSWER_TOKENS, new_tokens
from specbranch.text.grammar import Constraint
from specbranch.text.kinds import constraint_of
from specbranch.text.prompt_ids import prompt_ids


@dataclass(frozen=True)
class Piece:
    """Text that follows what came before. logprobs: of the tokens committed since, where they were asked for; their
    text may come with a later piece."""

    text: str
    logprobs: Sequence[TokenLogprob] = ()


class Left(Exception):
    """The client is gone."""

    def __init__(self) -> None:
        super().__init__("the client left")


Event = Piece | Generation | Exception  # the last two end an answer


class Answers:
    """max_new_tokens: of a request that names no limit; None: as the checkpoint says, or else 1,024, where the context
    has room for so many. cache_tokens: rows for the texts that are decoded at once. options: of every generation, as
    `SpecBranch.stream` takes them. done: is told of each answer that is over. whitespace: JSON of a response_format may
    have some."""

    def __init__(
        self,
        engine: SpecBranch,
        queue: Queue,
        max_new_tokens: int | None = None,
        options: Mapping[str, Any] | None = None,
        done: Callable[[Answer], None] = lambda answer: None,
        cache_tokens: int | None = None,
        whitespace: bool = False,
    ) -> None:
        self.engine, self.queue, self.options, self.done = engine, queue, dict(options or {}), done
        self.max_new_tokens = max_new_tokens
        self.whitespace = whitespace
        self.encoder = ThreadPoolExecutor(1, "encode")  # one: not every tokenizer bears two threads
        self.compiler = ThreadPoolExecutor(1, "compile")  # another: a large schema takes a second
        self.rounds = Rounds(engine.scheduler(queue.at_once, cache_tokens))

    def begin(self, asked: Asked, path: str, left: Callable[[], Coroutine[Any, Any, None]]) -> Answer:
        """left: returns when the client is gone. Raises Refusal when the queue takes no more."""
        answer = Answer(self, asked, path, self.queue.enter())
        answer.watch(left)
        return answer

    def warm(self) -> None:
        """Read the tokenizer for constraints, which takes seconds and lets no other thread go on. Where it cannot be,
        the requests that want it are told."""
        with suppress(SpecBranchError):
            self.engine.prepare(constraint_of("json_object", None))

    def constraint(self, form: Form) -> Constraint:
        """Compiled; equal ones are one. Raises Refusal."""
        try:
            constraint = constraint_of(*form, whitespace=self.whitespace)
            self.engine.prepare(constraint)
        except SpecBranchError as error:
            raise refused(f"cannot be followed: {' '.join(str(error).split())}") from error
        return constraint

    def request(self, asked: Asked, constraint: Constraint | None = None) -> Request:
        """Raises SpecBranchError, and Refusal for what the context cannot hold."""
        engine, target = self.engine, self.engine.pair.target.model
        vocabulary = engine.pair.vocabulary
        for token in asked.adjustments.bias:
            if token >= vocabulary:
                message = f"logit_bias: token id {token} is outside the target's vocabulary of {vocabulary}"
                raise Refusal(400, message, param="logit_bias")
        ids = prompt_ids(engine.tokenizer, asked.prompt, vocabulary)
        wanted = self.max_new_tokens if asked.max_new_tokens is None else asked.max_new_tokens
        config = engine.target.generation_config
        most = new_tokens(config, wanted, len(ids), target.context, usual=ANSWER_TOKENS)
        try:
            target.check(len(ids) + most)
        except SpecBranchError as error:
            field = "messages" if asked.chat else "prompt"
            raise Refusal(400, str(error), param=field, code="context_length_exceeded") from None
        options = {**self.options, **asked.options, **asked.adjustments.options(len(ids))}
        if asked.logprobs is not None:
            options["logprobs"] = asked.logprobs
        if constraint is not None:
            options["constraint"] = constraint
        return self.engine.request(ids, max_new_tokens=most, seed=asked.seed, **options)


class Answer:
    """Its events are Pieces, then a Generation, or an exception in place of it."""

    def __init__(self, answers: Answers, asked: Asked, path: str, place: Place) -> None:
        self.asked, self.path = asked, path
        self.prompt_tokens = 0
        self.characters = 0  # handed on
        self._known = 0  # log probabilities handed on
        self.outcome: Generation | Exception | None = None
        self._answers, self._place = answers, place
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._ticket: Ticket | None = None
        self._fault: Exception | None = None
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._task = asyncio.create_task(self._run())
        self._watch: asyncio.Task[None] | None = None

    def watch(self, left: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._watch = asyncio.create_task(left())
        self._watch.add_done_callback(lambda _: self.leave())

    async def event(self) -> Event:
        return await self._events.get()

    def leave(self) -> None:
        """The client is gone: it waits no longer, or its generation ends before the next round."""
        if self._ticket is None:
            self._task.cancel()
        else:
            self._ticket.leave()

    async def _run(self) -> None:
        try:
            in_thread, answers, constraint = self._loop.run_in_executor, self._answers, None
            if self.asked.form is not None:
                constraint = await in_thread(answers.compiler, answers.constraint, self.asked.form)
            request = await in_thread(answers.encoder, answers.request, self.asked, constraint)
            self.prompt_tokens = len(request.ids)
            await self._place.turn()
            self._ticket = Ticket(request)
            self._answers.rounds.begin(self._ticket, self._told)
            await self._over
            left = self._ticket.left and not isinstance(self._ticket.outcome, Generation)
            self.outcome = self._fault or (Left() if left else self._ticket.outcome)
        except asyncio.CancelledError:
            self.outcome = Left()
        except Exception as error:
            self.outcome = error
        finally:
            self._place.leave()
            assert self.outcome is not None
            self._events.put_nowait(self.outcome)
            self._answers.done(self)

    def _told(self, ticket: Ticket) -> None:
        """In the thread that decodes: hand on what there is of the text."""
        try:
            if not ticket.left:
                self._hand_on(ticket)
        except Exception as error:  # which the others must not suffer from
            self._fault = error
            ticket.leave()
        if ticket.outcome is not None:
            self._loop.call_soon_threadsafe(self._over.set_result, None)

    def _hand_on(self, ticket: Ticket) -> None:
        fresh, text = ticket.said.logprobs[self._known :], ticket.fresh()
        self._known, self.characters = self._known + len(fresh), self.characters + len(text)
        if text or fresh:
            self._loop.call_soon_threadsafe(self._events.put_nowait, Piece(text, fresh))
