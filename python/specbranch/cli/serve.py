"""`specbranch serve`: a server that speaks OpenAI's protocol."""

from __future__ import annotations

import argparse
import signal
import sys

from specbranch.cli.arguments import add_models, text, whole
from specbranch.cli.constraint import add_whitespace
from specbranch.cli.drafting import add_drafting, add_hrad, add_method, check_method
from specbranch.cli.loading import add_chat, load_engine
from specbranch.cli.messages import INTERRUPTED, complain
from specbranch.runtime.choices import CACHE_TOKENS

HELP = "serve a model to clients of OpenAI's API"
OUTPUTS = ()
EXTRA = "serve"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_models(parser, draft_required=False)
    add_method(parser)
    parser.add_argument(
        "--host", type=text, default="127.0.0.1", help="the address to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=whole(0, 65535), default=8000, metavar="N", help="0: any that is free (default: %(default)s)"
    )
    parser.add_argument(
        "--served-model-name", type=text, metavar="NAME", help="the model's name in requests (default: --target)"
    )
    add_chat(parser, kept=4)
    parser.add_argument(
        "--max-new-tokens",
        type=whole(1),
        metavar="N",
        help="most tokens of an answer to a request that names no limit (default: the checkpoint's, or else 1024)",
    )
    parser.add_argument(
        "--max-requests",
        type=whole(1),
        default=8,
        metavar="N",
        help="requests that are decoded at once (default: %(default)s)",
    )
    parser.add_argument(
        "--cache-tokens",
        type=whole(1),
        metavar="N",
        help="tokens of text that the cache holds for them; others wait (default: one text as long as the context, or "
        f"{CACHE_TOKENS} for each of --max-requests)",
    )
    parser.add_argument(
        "--max-queue",
        type=whole(0),
        default=64,
        metavar="N",
        help="requests that may wait; more are refused (default: %(default)s)",
    )
    add_whitespace(parser)
    parser.add_argument("--quiet", action="store_true", help="no line for each request on stderr")
    add_hrad(parser)
    add_drafting(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal: 0 after SIGTERM, 130 after Ctrl-C. Raises OSError for an address that cannot be had."""
    check_method(args)
    from specbranch.serve.answers import Answer, Answers
    from specbranch.serve.app import Service
    from specbranch.serve.queue import Queue
    from specbranch.serve.server import bound, line, serve, url

    name = args.served_model_name or args.target
    listening = bound(args.host, args.port)
    engine = load_engine(args)

    def log(message: str) -> None:
        if not args.quiet:
            complain(message)

    def done(answer: Answer) -> None:
        log(line(answer))

    def ready() -> None:
        print(f"specbranch: serving {name} at {url(listening)}/v1", flush=True)

    queue = Queue(args.max_requests, args.max_queue)
    answers = Answers(
        engine,
        queue,
        args.max_new_tokens,
        {"method": args.method},
        done,
        args.cache_tokens,
        whitespace=args.json_whitespace,
    )
    answers.warm()
    ended_by = serve(Service(answers, name, log), listening, ready, complain)
    sys.stdout.flush()
    return INTERRUPTED if ended_by == signal.SIGINT else 0
