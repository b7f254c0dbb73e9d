"""`specbranch train-hrad`: record prompts, train the predictor on them, and evaluate it on held-out ones."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from specbranch.cli.arguments import add_models, add_prompts, add_sampling, sampling_options
from specbranch.cli.constraint import check_unconstrained
from specbranch.cli.drafting import DEFAULT_METHOD, add_drafting, drafting_options, forecast_methods
from specbranch.cli.files import Output
from specbranch.cli.loading import load_engine
from specbranch.cli.messages import FAILURE, INTERRUPTED, complain
from specbranch.cli.record import is_record, record_prompts, with_costs
from specbranch.cli.tables import FoldedTable, figures, key
from specbranch.cli.terminal import output_console, progress, status
from specbranch.runtime.choices import ROUNDS
from specbranch.text.generation_config import bare
from specbranch.text.prompts import read_all

if TYPE_CHECKING:
    from specbranch import SpecBranch
    from specbranch.replay.record import Record
    from specbranch.replay.train_hrad import Score, Split
    from specbranch.runtime.hrad.predictor import HRad

HELP = "train H-RAD, which predicts how many drafted tokens will be accepted, for a pair"


def check_out(directory: Path) -> None:
    from specbranch.runtime.hrad.predictor import check_directory

    check_directory(directory)


OUTPUTS = (
    Output("out", "a record of train-hrad", is_record, makes_parents=True, in_directory=ROUNDS, check=check_out),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_models(parser, draft_required=True, retrieval=False)
    add_prompts(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="output directory; resumes if it is incomplete")
    add_sampling(parser)
    add_drafting(parser, [DEFAULT_METHOD])


def run(args: argparse.Namespace) -> int:
    """Record the prompts (those recorded before are kept), train, evaluate on held-out prompts, save."""
    from specbranch.core.messages import FORECASTS
    from specbranch.replay.train_hrad import EPOCHS, Split, check_enough, evaluate, examples, fit

    prompts = read_all(args.prompts, args.limit)
    check_unconstrained(args, prompts)
    check_enough(len(prompts))
    out = Path(args.out)
    engine = load_engine(args)
    engine.target.generation_config = bare(engine.target)  # a record has no rules but its sampling
    check_pair(out, engine)
    record = record_prompts(engine, prompts, sampling_options(args), out / ROUNDS, features=True)
    if record is None:
        return INTERRUPTED
    record = with_costs(engine, record, out / ROUNDS)
    split = Split.of(record)
    with status("sorting rounds"):
        from specbranch.policies.calibration import Calibrator

        calibrator = Calibrator()
        train, validation, held_out = (
            examples(texts, calibrator) for texts in (split.train, split.validation, split.held_out)
        )
    try:
        with progress(EPOCHS) as bar:

            def after_epoch(epoch: int, loss: float) -> None:
                bar.done()
                bar.next(f"epoch {epoch + 1}, validation loss {loss:.4f}")

            bar.next("epoch 0")
            model = fit(train, validation, record.target, record.draft, after_epoch=after_epoch)
    except KeyboardInterrupt:
        complain(f"interrupted while training; the rounds are in {out / ROUNDS}: run it again to go on")
        return INTERRUPTED
    scores = evaluate(model, train, held_out)
    with status("replaying the held-out prompts"):
        gains = expected_gains(record, split, model, drafting_options(args))
    metrics = {
        "prompts": {"train": len(split.train), "validation": len(split.validation), "held out": len(split.held_out)},
        "rounds": {"train": len(train), "validation": len(validation), "held out": len(held_out)},
        "held out": {name: asdict(score) for name, score in scores.items()},
    }  # no times, so that the same command gives the same file
    model.with_metrics(metrics).save(out)
    console = output_console()
    console.print(score_table(scores, FORECASTS, len(split.held_out), len(held_out)))
    console.print(confusion_table(scores["H-RAD"], FORECASTS))
    for method, gain in gains.items():
        print(f"{method}: {gain:.3f} times its speed without H-RAD, replayed on the held-out prompts")
    print(f"saved to {out}")
    return 0 if len(record.texts) == len(prompts) else FAILURE


def check_pair(directory: Path, engine: SpecBranch) -> None:
    """That there is no predictor of another pair in the directory. Raises SpecBranchError."""
    from specbranch.runtime.hrad.predictor import HRadConfig, check_directory
    from specbranch.runtime.identity import identify

    assert engine.draft is not None
    check_directory(directory, HRadConfig(identify(engine.target), identify(engine.draft), 0, 0))


def expected_gains(record: Record, split: Split, model: HRad, options: dict[str, object]) -> dict[str, float]:
    """Speed with the predictor over speed without it, at the measured costs, for the methods that use it.

    options: of the policies.
    """
    from specbranch.policies.methods import make_policy
    from specbranch.replay.costs import ReplayCosts
    from specbranch.replay.replayer import replay

    costs = ReplayCosts.of(record)
    gains = {}
    for method in forecast_methods():
        seconds = []
        for predictor in (None, model):
            stats = replay(record, make_policy(method, options), costs, None, split.held_out, predictor)
            seconds.append(sum(s.seconds for s in stats))
        gains[method] = seconds[0] / seconds[1]
    return gains


def score_table(scores: dict[str, Score], classes: tuple[str, ...], prompts: int, rounds: int) -> FoldedTable:
    found = list(scores.values())
    recalls = [
        figures(f"recall:\n{name}", (f"{score.recall[place]:.2f}" for score in found))
        for place, name in enumerate(classes)
    ]
    return FoldedTable(
        f"{prompts} held-out prompts, {rounds} positions: will none, some or all of the next tokens be accepted?",
        [key("predictor", scores)],
        [
            figures("accuracy", (f"{score.accuracy:.3f}" for score in found)),
            *recalls,
            figures("log loss", ("-" if score.loss is None else f"{score.loss:.3f}" for score in found)),
        ],
    )


def confusion_table(score: Score, classes: tuple[str, ...]) -> FoldedTable:
    columns = [figures(name, (str(row[place]) for row in score.confusion)) for place, name in enumerate(classes)]
    return FoldedTable("H-RAD: true class by predicted class", [key("", classes)], columns)
