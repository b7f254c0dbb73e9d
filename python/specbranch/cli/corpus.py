"""`specbranch corpus`: text files made into one that drafts by retrieval copy from, for --corpus."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from specbranch.cli.arguments import MODEL, add_trust
from specbranch.cli.files import Output
from specbranch.cli.loading import quiet_libraries
from specbranch.cli.terminal import progress, status

HELP = "make a corpus of text files, for drafts by retrieval"


def is_corpus(file: Path) -> bool:
    from specbranch import corpus

    return corpus.is_corpus(file)


OUTPUTS = (Output("out", "a corpus of specbranch corpus", is_corpus),)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="text in UTF-8: code, documents, earlier answers")
    parser.add_argument(
        "--tokenizer", required=True, metavar=MODEL, help="the target that it is for, whose tokenizer is used"
    )
    parser.add_argument("--out", required=True, metavar="OUT", help="output file (safetensors)")
    add_trust(parser)


def run(args: argparse.Namespace) -> int:
    """Read the files, index their tokens, and write both; Ctrl-C leaves a corpus that is there as it is."""
    with status("loading the tokenizer"):
        from specbranch import Corpus, bundled
        from specbranch.runtime.loading import load_tokenizer

        quiet_libraries()
        source = str(bundled.path("target")) if args.tokenizer == "bundled" else args.tokenizer
        tokenizer = load_tokenizer(source, "tokenizer", args.trust_remote_code)
        assert tokenizer is not None  # as it is the name of one
    begin = time.perf_counter()
    with progress(len(args.files) + 1) as bar:
        corpus = Corpus.build(args.files, tokenizer, before=bar.after)
    corpus.save(args.out)
    print(f"{args.out}: {len(corpus)} tokens of {len(args.files)} files, {time.perf_counter() - begin:.1f} s")
    return 0
