"""`specbranch chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

from specbranch.cli.arguments import add_models, add_sampling, sampling_options, text
from specbranch.cli.drafting import add_drafting, add_hrad, add_method, check_method
from specbranch.cli.loading import add_chat, load_engine
from specbranch.cli.messages import FAILURE, complain, one_line
from specbranch.text.generation_config import ANSWER_TOKENS, new_tokens

if TYPE_CHECKING:
    from specbranch import Generation, SpecBranch, TextStream

HELP = "chat with a model in the terminal"
OUTPUTS = ()
COMMANDS = {
    "/help": "this list",
    "/stats": "what the last answer took",
    "/clear": "forget the conversation, but for the system message",
    "/exit": "end; so does Ctrl-D. Ctrl-C ends an answer only",
}
STATS = (  # of Stats.as_dict, as /stats has them
    "prompt_tokens",
    "reused_tokens",
    "new_tokens",
    "seconds",
    "prefill_seconds",
    "tokens_per_second",
    "tokens_per_target_forward",
    "acceptance_rate",
    "saved_seconds",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_models(parser, draft_required=False)
    add_method(parser)
    parser.add_argument("--system", type=text, metavar="TEXT", help="the system message")
    add_chat(parser)
    add_sampling(parser, from_checkpoint=True, new_tokens=ANSWER_TOKENS)
    add_hrad(parser)
    add_drafting(parser)


def run(args: argparse.Namespace) -> int:
    """Answer a message a line until the input ends; 1 where a message of an input that is no terminal failed.

    Raises ValueError for a target without a chat template.
    """
    check_method(args)
    engine = load_engine(args)
    if engine.tokenizer is None or engine.tokenizer.chat_template is None:
        raise ValueError(f"--target {args.target} has no chat template: use generate, or pass --chat-template")
    options = {**sampling_options(args, engine.target.generation_config), "method": args.method}
    failed = Chat(engine, args.system, options).run()
    return FAILURE if failed and not sys.stdin.isatty() else 0


class Chat:
    """A conversation. Each answer is made from the whole of it, as chat messages."""

    def __init__(self, engine: SpecBranch, system: str | None, options: dict[str, Any]) -> None:
        self.engine, self.options = engine, options
        self.beginning = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self.beginning)
        self.last: Generation | None = None

    def run(self) -> bool:
        """Until /exit, Ctrl-D or the end of the input; whether a message failed."""
        failed = False
        for line in lines():
            word = line.split(maxsplit=1)[0]
            is_command = line.startswith("/") and re.fullmatch(r"/[a-z]+", word)
            if is_command and word == "/exit":
                break
            try:
                if is_command:
                    self.command(word)
                else:
                    failed |= not self.answer(line)
            except KeyboardInterrupt:  # a second one, while the first was seen to
                if not sys.stdin.isatty():
                    raise
        return failed

    def command(self, word: str) -> None:
        if word == "/help":
            print("\n".join(f"{name:<8}{what}" for name, what in COMMANDS.items()))
        elif word == "/clear":
            self.messages = list(self.beginning)
        elif word == "/stats":
            self.stats()
        else:
            complain(f"unknown command {word}: /help lists them; a message may begin with a space")

    def stats(self) -> None:
        if self.last is None:
            print("no answer yet")
            return
        stats = self.last.stats.as_dict()
        print(f"method {stats['method']}, ended by {self.last.finish_reason}")
        for name in STATS:
            value = stats[name]
            print(f"{name.replace('_', ' ')}: {value if isinstance(value, int) else f'{value:.2f}'}")

    def stream(self, messages: list[dict[str, str]]) -> TextStream:
        options = dict(self.options)
        if options["max_new_tokens"] is None:
            context = self.engine.pair.target.model.context
            prompt = len(self.engine.encode(messages))
            config = self.engine.target.generation_config
            options["max_new_tokens"] = new_tokens(config, None, prompt, context, usual=ANSWER_TOKENS)
        return self.engine.stream(messages, **options)

    def answer(self, message: str) -> bool:
        """Print the answer to a message as it is made. What was said before Ctrl-C or a failure is kept; a message that
        nothing was said to is forgotten. Whether it succeeded."""
        from specbranch import GenerationFailed, GenerationInterrupted

        question = {"role": "user", "content": message}
        said, fault = "", ""
        try:
            with closing(self.stream([*self.messages, question])) as stream:
                try:
                    for piece in stream:
                        said += piece
                        sys.stdout.write(piece)
                        sys.stdout.flush()
                except GenerationInterrupted:
                    raise
                except KeyboardInterrupt as interrupt:  # between two pieces
                    stream.hand_in(interrupt)
            self.last = stream.generation
        except (GenerationFailed, GenerationInterrupted) as ending:
            self.last, whole = ending.generation, ending.generation.text
            sys.stdout.write(whole[len(said) :])  # committed, but held back until now
            said, fault = whole, f"error: {one_line(ending)}" if isinstance(ending, GenerationFailed) else "interrupted"
        except KeyboardInterrupt:  # before the first piece or behind the last one
            fault = "interrupted"
        except OSError:  # of the output
            raise
        except Exception as error:
            fault = f"error: {one_line(error)}"
        print(flush=True)
        if said or not fault:
            self.messages += [question, {"role": "assistant", "content": said}]
        if fault == "interrupted" and not sys.stdin.isatty():
            raise KeyboardInterrupt  # a script is ended, and no prompt awaits anybody
        if fault:
            complain(fault if said else f"{fault}; your message is not part of the conversation")
        elif self.last is not None and self.last.finish_reason == "length":
            complain(f"cut off after {len(self.last.tokens)} tokens, which --max-new-tokens sets")
        return not fault


def lines() -> Iterator[str]:
    """Messages, a line each. At a terminal Ctrl-C drops the line that is being written."""
    read = _typed if sys.stdin.isatty() else _piped
    while True:
        try:
            line = read()
        except EOFError:
            return
        except KeyboardInterrupt:
            if read is _piped:
                raise
            print(flush=True)
            continue
        if line.strip():
            yield line


def _typed() -> str:
    with suppress(ImportError):
        import readline  # noqa: F401  (arrows, and earlier lines)
    try:
        return input("> ")
    except EOFError:
        print(flush=True)
        raise


def _piped() -> str:
    if line := sys.stdin.readline():
        return line.rstrip("\n")
    raise EOFError
