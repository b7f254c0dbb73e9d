"""`specbranch train-hrad`: collect a pair's rounds, train the predictor, say what it is worth."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from specbranch.cli.loading import load_engine, sampling_options
from specbranch.cli.messages import INTERRUPTED, complain
from specbranch.cli.record import record_prompts, with_costs
from specbranch.cli.terminal import output_console, status, steps
from specbranch.text.prompts import read_prompts

if TYPE_CHECKING:
    from specbranch.replay.record import Record
    from specbranch.replay.train_hrad import Score, Split
    from specbranch.runtime.hrad.predictor import HRad

ROUNDS = "rounds.safetensors"


def run(args: argparse.Namespace) -> int:
    """Collect (what is there already is kept), train, evaluate on held-out prompts, save."""
    from specbranch.core.messages import FORECASTS
    from specbranch.replay.train_hrad import EPOCHS, Split, check_enough, evaluate, examples, fit

    prompts = [prompt for path in args.prompts for prompt in read_prompts(path, args.limit)]
    check_enough(len(prompts))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    engine = load_engine(args)
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
        with steps(EPOCHS) as progress:

            def after_epoch(epoch: int, loss: float) -> None:
                progress.done()
                progress.next(f"epoch {epoch + 1}, validation loss {loss:.4f}")

            progress.next("epoch 0")
            model = fit(train, validation, record.target, record.draft, after_epoch=after_epoch)
    except KeyboardInterrupt:
        complain(f"interrupted while training; the rounds are in {out / ROUNDS}: run it again to go on")
        return INTERRUPTED
    scores = evaluate(model, train, held_out)
    with status("replaying the held-out prompts"):
        gains = expected_gains(record, split, model)
    metrics = {
        "prompts": {"train": len(split.train), "validation": len(split.validation), "held out": len(split.held_out)},
        "rounds": {"train": len(train), "validation": len(validation), "held out": len(held_out)},
        "held out": {name: asdict(score) for name, score in scores.items()},
        "expected gain": gains,
    }
    model.with_metrics(metrics).save(out)
    console = output_console()
    console.print(score_table(scores, FORECASTS, len(split.held_out), len(held_out)))
    console.print(confusion_table(scores["H-RAD"], FORECASTS))
    for method, gain in gains.items():
        print(f"{method}: {gain:.3f} times its speed without H-RAD, replayed on the held-out prompts")
    print(f"saved to {out}")
    return 0


def expected_gains(record: Record, split: Split, model: HRad) -> dict[str, float]:
    """Speed with the predictor over speed without it, at the measured costs, for the methods that use it."""
    from specbranch.policies.methods import make_policy
    from specbranch.replay.costs import ReplayCosts
    from specbranch.replay.replayer import replay

    costs = ReplayCosts.of(record)
    gains = {}
    for method in ("specbranch-paper", "specbranch"):
        seconds = []
        for predictor in (None, model):
            stats = replay(record, make_policy(method, {}), costs, None, split.held_out, predictor)
            seconds.append(sum(s.seconds for s in stats))
        gains[method] = seconds[0] / seconds[1]
    return gains


def score_table(scores: dict[str, Score], classes: tuple[str, ...], prompts: int, rounds: int) -> Table:
    title = f"{prompts} held-out prompts, {rounds} positions: will none, some or all of the next tokens stand?"
    view = Table(title=title, title_justify="left")
    view.add_column("predictor", no_wrap=True)
    for heading in ("accuracy", *(f"recall: {name}" for name in classes), "log loss"):
        view.add_column(heading, justify="right")
    for name, score in scores.items():
        loss = "-" if score.loss is None else f"{score.loss:.3f}"
        view.add_row(name, f"{score.accuracy:.3f}", *(f"{recall:.2f}" for recall in score.recall), loss)
    return view


def confusion_table(score: Score, classes: tuple[str, ...]) -> Table:
    view = Table(title="H-RAD: true class by predicted class", title_justify="left")
    for heading in ("", *classes):
        view.add_column(heading, justify="right")
    for name, row in zip(classes, score.confusion, strict=True):
        view.add_row(name, *(str(count) for count in row))
    return view
