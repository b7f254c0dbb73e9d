"""Training H-RAD from a record with features, and how it compares with simpler predictors.

Every position of a text is a possible start of a round: the label says whether none, some or all of the next `length`
drafted tokens would be accepted there (SpecBranch, arXiv 2506.01979, section on hybrid drafting).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specbranch.core.errors import SpecBranchError
from specbranch.core.identity import ModelIdentity
from specbranch.core.messages import FORECASTS
from specbranch.core.tree import Proposals, Signals
from specbranch.policies.calibration import Calibrator
from specbranch.replay.record import TAIL, Record, RecordedText
from specbranch.runtime.hrad.predictor import HRad, HRadConfig

LENGTH = 5  # drafted tokens that "all" means
BATCH = 128
EPOCHS = 200
PATIENCE = 12  # epochs without a better validation loss
LEARNING_RATE = 3e-4
WEIGHT_DECAY = 0.05
FEWEST_PROMPTS = 5
NONE, SOME, ALL = range(3)


@dataclass(frozen=True)
class Examples:
    """features: [M, F]. labels: int64 [M], places in FORECASTS. confidences: float32 [M, length], the draft's
    confidence in its own next tokens. online: float32 [M, 3], class probabilities of the online calibration."""

    features: Tensor
    labels: Tensor
    confidences: Tensor
    online: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Split:
    """A record's texts, by prompt: fitted on, stopped by, and never looked at."""

    train: list[RecordedText]
    validation: list[RecordedText]
    held_out: list[RecordedText]

    @staticmethod
    def of(record: Record, seed: int = 0) -> Split:
        """A fifth held out, a sixth for validation. Raises SpecBranchError for fewer texts than check_enough wants."""
        texts = sorted(record.texts, key=lambda text: (text.task, text.id))
        check_enough(len(texts))
        random.Random(seed).shuffle(texts)
        held, validation = max(1, len(texts) // 5), max(1, len(texts) // 6)
        return Split(texts[held + validation :], texts[held : held + validation], texts[:held])


def check_enough(prompts: int) -> None:
    if prompts < FEWEST_PROMPTS:
        raise SpecBranchError(
            f"{prompts} prompts: expected at least {FEWEST_PROMPTS}, to train on some and hold others out"
        )


def draft_run(text: RecordedText, at: int, length: int) -> tuple[int | None, list[float]]:
    """How many of the draft's next tokens are accepted from position `at`, and its confidence in each of `length` of
    them.

    None where the text ends before that is known.
    """
    confidences: list[float] = []
    while len(confidences) < length:
        i = at + len(confidences)
        if i >= len(text):
            return None, confidences
        confidences.append(float(text.proposals.agreement[i, 0]))
        if text.proposals.tokens[i, 0] != text.tokens[i]:
            accepted = len(confidences) - 1
            behind = range(i * TAIL, i * TAIL + min(TAIL, length - len(confidences)))
            return accepted, confidences + [float(text.tails.agreement[row, 0]) for row in behind]
    return length, confidences


def examples(texts: Sequence[RecordedText], calibrator: Calibrator, length: int = LENGTH) -> Examples:
    """Every position of the texts whose label is known; the calibrator goes on learning from text to text."""
    features, labels, confidences, online = [], [], [], []
    for text in texts:
        if text.features is None:
            raise SpecBranchError("the record has no features: make it with --features")
        for at in range(len(text)):
            accepted, confidence = draft_run(text, at, length)
            if accepted is not None:
                chances = [_calibrated(text, at, j, confidence[j], calibrator) for j in range(length)]
                first, through = chances[0], float(torch.tensor(chances).prod())
                features.append(text.features[at].float())
                labels.append(NONE if accepted == 0 else ALL if accepted == length else SOME)
                confidences.append(confidence)
                online.append((1 - first, max(0.0, first - through), through))
            right = bool(text.proposals.tokens[at, 0] == text.tokens[at])
            calibrator.learn(_signals(text, at, 0), right, bool((text.proposals.tokens[at] == text.tokens[at]).any()))
    return Examples(torch.stack(features), torch.tensor(labels), torch.tensor(confidences), torch.tensor(online))


def _signals(text: RecordedText, at: int, depth: int) -> Signals:
    rows = text.proposals
    return Signals(float(rows.agreement[at, 0]), float(rows.entropy[at]), float(rows.margin[at]), depth)


def _calibrated(text: RecordedText, at: int, depth: int, confidence: float, calibrator: Calibrator) -> float:
    """The calibrated chance of the draft's token at `depth` of a round that starts at `at`."""
    for step in range(depth):
        if text.proposals.tokens[at + step, 0] != text.tokens[at + step]:  # on the draft's own wrong turn
            tails, row = text.tails, (at + step) * TAIL + depth - step - 1
            signals = Signals(confidence, float(tails.entropy[row]), float(tails.margin[row]), depth)
            break
    else:
        signals = _signals(text, at + depth, depth)
    return calibrator.correct([Proposals((0,), (confidence,), signals)])[0].confidence[0]


def fit(
    train: Examples,
    validation: Examples,
    target: ModelIdentity,
    draft: ModelIdentity,
    seed: int = 0,
    after_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> HRad:
    """Train with class weights until the validation loss has not fallen for PATIENCE epochs; the best epoch stays.

    The network's probabilities are then put back on the classes' own frequencies. The same examples and seed give the
    same bits.
    """
    with _reproducible():
        torch.manual_seed(seed)
        return _fit(train, validation, target, draft, after_epoch)


def _fit(
    train: Examples,
    validation: Examples,
    target: ModelIdentity,
    draft: ModelIdentity,
    after_epoch: Callable[[int, float], None],
) -> HRad:
    model = HRad(HRadConfig(target, draft, train.features.shape[1], train.confidences.shape[1]))
    deviation = train.features.std(0)
    model.mean.copy_(train.features.mean(0))
    model.scale.copy_(1 / deviation.clamp(min=float(deviation.median()) * 1e-2 + 1e-6))
    counts = torch.bincount(train.labels, minlength=len(FORECASTS)).float().clamp(min=1)
    weights = (counts.sum() / counts).sqrt()
    weights = weights / weights.mean()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    best, best_state, since = float("inf"), model.state_dict(), 0
    for epoch in range(EPOCHS):
        model.train()
        for batch in torch.randperm(len(train)).split(BATCH):
            loss = F.cross_entropy(model(train.features[batch]), train.labels[batch], weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            now = float(F.cross_entropy(model(validation.features), validation.labels, weights))
        after_epoch(epoch, now)
        since += 1
        if now < best:
            best, since = now, 0
            best_state = {name: values.clone() for name, values in model.state_dict().items()}
        if since >= PATIENCE:
            break
    model.load_state_dict(best_state)
    _recalibrate(model, validation, weights)
    return model


@contextmanager
def _reproducible() -> Iterator[None]:
    """One thread, as sums depend on how many share them; the caller's threads and generator are as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _recalibrate(model: HRad, validation: Examples, weights: Tensor) -> None:
    """Fold the class weights out of the last layer, and the temperature in that suits the validation texts best."""
    last = model.layers[-1]
    assert isinstance(last, torch.nn.Linear)
    last.bias.sub_(weights.log())
    logits = model(validation.features)
    temperatures = [0.5 * 1.1**step for step in range(25)]
    losses = [float(F.cross_entropy(logits / temperature, validation.labels)) for temperature in temperatures]
    temperature = temperatures[losses.index(min(losses))]
    last.weight.div_(temperature)
    last.bias.div_(temperature)


@dataclass(frozen=True)
class Score:
    """How well a predictor does. accuracy: of all. recall: per class, NaN for a class that does not occur.

    confusion: int64 [3, 3], true class by predicted class. loss: mean negative log-likelihood; None without
    probabilities.
    """

    accuracy: float
    recall: tuple[float, ...]
    confusion: list[list[int]]
    loss: float | None = None


def score(predicted: Tensor, labels: Tensor, probabilities: Tensor | None = None) -> Score:
    confusion = torch.zeros(3, 3, dtype=torch.int64)
    confusion.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)
    recall = confusion.diagonal() / confusion.sum(1)
    loss = None
    if probabilities is not None:
        loss = float(F.nll_loss(probabilities.clamp(min=1e-6).log(), labels))
    return Score(float((predicted == labels).float().mean()), tuple(recall.tolist()), confusion.tolist(), loss)


def by_confidence(confidences: Tensor, epsilon: float) -> Tensor:
    """The class that the draft's confidence alone suggests: int64 [M]."""
    sure = confidences >= epsilon
    return torch.where(sure.all(1), ALL, torch.where(sure[:, 0], SOME, NONE))


def best_epsilon(train: Examples) -> float:
    """The threshold with the best accuracy on the training texts."""
    grid = [step / 50 for step in range(1, 50)]

    def accuracy(epsilon: float) -> float:
        return float((by_confidence(train.confidences, epsilon) == train.labels).float().mean())

    return max(grid, key=accuracy)


def evaluate(model: HRad, train: Examples, held_out: Examples) -> dict[str, Score]:
    """H-RAD, online calibration, confidence alone and the majority class on texts that nothing was fitted to."""
    with torch.no_grad(), _reproducible():
        probabilities = model(held_out.features).softmax(1)
    majority = torch.full_like(held_out.labels, int(torch.bincount(train.labels, minlength=3).argmax()))
    labels = held_out.labels
    frequencies = torch.bincount(train.labels, minlength=3) / len(train)
    return {
        "H-RAD": score(probabilities.argmax(1), labels, probabilities),
        "online calibration": score(held_out.online.argmax(1), labels, held_out.online),
        "confidence alone": score(by_confidence(held_out.confidences, best_epsilon(train)), labels),
        "majority class": score(majority, labels, frequencies.expand(len(labels), 3)),
    }
