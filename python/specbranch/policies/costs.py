"""What a forward costs on this machine, measured while decoding, and what follows from it.

Costs only steer how far to draft and whether to overlap; they never change the text.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from specbranch.policies.gain import Gain, guessed_token_cost

DECAY = 0.97  # weight of the past at every new measurement
LOSS_START = 3.0  # plain tokens' time that drafting may cost a text before the draft rests,
LOSS_SHARE = 0.02  # and at each of its tokens
SIZE_PRIOR = 0.3  # a draft beside its target
SINGLE_WEIGHT = 0.2  # of a new forward over one row: in texts that are drafted there are few
ROW_PRIOR = 0.08  # an extra row costs 8 % of a one-row forward (about 0 on a GPU, more on a compute-bound CPU)
OUTLIER = 4.0  # a measurement counts as at most 4 times what was expected: a laptop may have slept
TRIAL_ROUNDS = 6  # rounds in each mode before "auto" trusts its measurements
ENOUGH_ROUNDS = 2  # measured rounds after which the trial of the overlapped mode may end early,
HOPELESS = 1.1  # namely if it is 1.1 times as slow as the serial mode
TRIAL_STAKE = 6.0  # plain rounds' time that texts must have saved before it is put at stake in that trial
RETRY_AFTER = 40  # rounds, at least, before the slower mode is tried again; doubled whenever it loses
RETRY_SHARE = 0.01  # of the time that such trials may cost at first
RETRY_ROUNDS = 3  # rounds of such a trial
STALE = 0.3  # weight of the measurements before such a trial


@dataclass
class ForwardCost:
    """Seconds of one forward as intercept + slope * rows, an exponentially weighted least-squares fit; and those over
    one row apart, since rows are often cheap at first and dear later, where a line through the later ones is too low.

    skipped: how many forwards do not count: the first one pays for page faults and lazy set-up. most: rows of the
    largest one. beyond: seconds that every row behind those is expected to take; 0: what the others do.
    """

    skipped: int = 1
    count: int = 0
    weight: float = 0.0
    rows: float = 0.0
    seconds: float = 0.0
    rows_squared: float = 0.0
    rows_seconds: float = 0.0
    slope: float | None = None
    single: float | None = None
    most: float = 0.0
    beyond: float = 0.0

    def record(self, rows: float, seconds: float) -> None:
        if not rows:
            return
        self.count += 1
        if self.count <= self.skipped:
            return
        if self.known:
            seconds = min(seconds, OUTLIER * max(self.of(rows), self.mean))
        if rows == 1:
            self.single = seconds if self.single is None else self.single + SINGLE_WEIGHT * (seconds - self.single)
        self.most = max(self.most, rows)
        self.weight = self.weight * DECAY + 1
        self.rows = self.rows * DECAY + rows
        self.seconds = self.seconds * DECAY + seconds
        self.rows_squared = self.rows_squared * DECAY + rows * rows
        self.rows_seconds = self.rows_seconds * DECAY + rows * seconds
        spread = self.weight * self.rows_squared - self.rows * self.rows
        if spread > 1e-6 * self.weight:
            slope = (self.weight * self.rows_seconds - self.rows * self.seconds) / spread
            self.slope = min(max(0.0, slope), self.seconds / self.rows)  # rows together take no more than each alone

    def fade(self) -> None:
        """Let what is known count little from now on."""
        for name in ("weight", "rows", "seconds", "rows_squared", "rows_seconds"):
            setattr(self, name, STALE * getattr(self, name))

    @property
    def known(self) -> bool:
        return self.weight > 0

    @property
    def mean(self) -> float:
        """Seconds of a forward, whatever its rows; only where something is known."""
        return self.seconds / self.weight

    @property
    def per_row(self) -> float:
        """Seconds that one more row adds; never negative. The prior's until forwards of different sizes were seen."""
        if self.slope is not None:
            return self.slope
        # The mean is a forward over `rows` rows on average, not over one.
        return self.mean / (1 / ROW_PRIOR + self.rows / self.weight - 1) if self.known else 0.0

    def of(self, rows: float) -> float:
        """Expected seconds of a forward over `rows` rows; 0 while nothing is known."""
        if not self.known:
            return 0.0
        beyond = max(0.0, rows - self.most) * (self.beyond or self.per_row)
        rows = min(rows, self.most)
        line = max(0.0, (self.seconds + self.per_row * (rows * self.weight - self.rows)) / self.weight)
        if self.single is None:
            return line + beyond
        least = min(self.single, self.mean)
        return least + beyond if rows <= 1 else max(least, line) + beyond


@dataclass
class Rate:
    """Seconds and tokens of rounds, of which the newest count most."""

    rounds: int = 0
    seconds: float = 0.0
    tokens: float = 0.0

    def record(self, seconds: float, tokens: int, forward: float) -> None:
        """Count a round. forward: seconds of the target's, to know what is unusual."""
        self.rounds += 1
        if self.rounds == 1:
            return
        if self.tokens:
            seconds = min(seconds, OUTLIER * (self.per_token * max(tokens, 1) + forward))
        self.seconds = self.seconds * DECAY + seconds
        self.tokens = self.tokens * DECAY + tokens

    def fade(self) -> None:
        """Let the rounds so far count little from now on."""
        self.seconds, self.tokens = STALE * self.seconds, STALE * self.tokens

    @property
    def per_token(self) -> float:
        """Infinite while nothing is known."""
        return self.seconds / self.tokens if self.tokens else float("inf")


@dataclass
class ModeCosts:
    """Measurements of one mode, serial or overlapped. size, texts: see Costs. least_row: seconds that a row of the
    target takes at least, where there are many. drafted: rounds whose tokens were not mostly retrieved. every: all
    rounds, also of texts that the draft has not read."""

    size: float = SIZE_PRIOR
    texts: int = 1
    least_row: float = 0.0
    target: ForwardCost = field(default_factory=ForwardCost)
    draft: ForwardCost = field(default_factory=ForwardCost)
    drafted: Rate = field(default_factory=Rate)
    every: Rate = field(default_factory=Rate)

    def record_round(self, seconds: float, tokens: int, drafted: bool = True) -> None:
        """Count a round. drafted: it tells what a drafted token takes."""
        for rate in (self.drafted, self.every) if drafted else (self.every,):
            rate.record(seconds, tokens, self.target.of(1))

    def burst(self) -> int:
        """Draft steps to ask for at once: half of what fits into a verdict's time, so that the policy decides twice."""
        if not (self.target.known and self.draft.known):
            return 1
        return max(1, round(0.5 * self.target.of(4) / max(self.draft.of(4), 1e-9)))

    def fade(self) -> None:
        """Let the rounds measured so far count little from now on."""
        self.drafted.fade()
        self.every.fade()

    def step_price(self, sharing: int = 1, rows: int = 1) -> float:
        """Committed tokens that a draft step must bring to each of the texts that share it, to pay for itself. rows: of
        the text that asks; the others have one each."""
        if not (self.draft.known and self.target.known):
            return self.size * (1 + ROW_PRIOR * (rows - 1))
        step = self.draft.of(sharing)
        more = self.draft.of(sharing + rows - 1) - step if rows > 1 else 0.0
        return (step / sharing + more) / max(self.token_value, 1e-9)

    @property
    def plain(self) -> float:
        """Seconds of a token without a draft; only where something is known."""
        return self.target.of(self.texts) / self.texts

    @property
    def row_price(self) -> float:
        """Committed tokens that one more row in the target's forward must bring, to pay for itself: of all tokens, as
        rows are for retrieved ones too.

        Few rows may cost next to nothing more than one; of that does not follow what those behind them cost.
        """
        return self._row_price(min(self.token_value, self.every.per_token))

    @property
    def drafted_row_price(self) -> float:
        """The same in drafted tokens, as `step_price` is."""
        return self._row_price(self.token_value)

    def _row_price(self, value: float) -> float:
        if not self.target.known:
            return ROW_PRIOR * self.texts
        return max(self.target.per_row, self.least_row) / max(value, 1e-9)

    @property
    def rounds(self) -> int:
        """Those that told what a drafted token takes."""
        return self.drafted.rounds

    @property
    def seconds_per_token(self) -> float:
        """The time that a committed token takes on average, where not most are retrieved."""
        return self.drafted.per_token if self.drafted.tokens else self.plain

    @property
    def token_value(self) -> float:
        """Seconds that one more drafted token saves: what a token takes, at most what it takes without a draft."""
        without = self.plain if self.target.known else float("inf")
        return min(self.seconds_per_token, without)


@dataclass
class Costs:
    """Both modes' measurements for one pair of models and one method, what reading a text takes, how often the draft is
    right, and what it brings.

    size: parameters of the draft's forward over those of the target's, which says what the draft takes until that is
    measured. texts: that share the rounds; times of a token are of a round divided by the tokens of all. idle: seconds
    of texts that it did not read, since it last read one. drafted: of those that it did.
    """

    size: float = SIZE_PRIOR
    texts: int = 1
    serial: ModeCosts = field(init=False)
    overlapped: ModeCosts = field(init=False)
    target_read: ForwardCost = field(default_factory=lambda: ForwardCost(skipped=0))
    draft_read: ForwardCost = field(default_factory=lambda: ForwardCost(skipped=0))
    gain: Gain = field(default_factory=Gain)
    idle: float = 0.0
    drafted: float = 0.0
    accepted: float = 4.0  # prior: 0.8 of 5 tokens
    verified: float = 5.0
    _preferred: bool | None = None
    _losses: int = 0
    _waited: int = 0
    _trial: int = 0

    def __post_init__(self) -> None:
        self.serial, self.overlapped = ModeCosts(self.size), ModeCosts(self.size)

    def at_once(self, texts: int) -> None:
        """So many texts share the rounds to come."""
        self.texts = self.serial.texts = self.overlapped.texts = texts

    def for_more(self) -> Costs:
        """To begin with where more texts share the rounds: what is known counts little, and what was gained nothing."""
        fresh = copy.deepcopy(self)
        for mode in (fresh.serial, fresh.overlapped):
            mode.fade()
            for cost in (mode.target, mode.draft):
                cost.fade()
        fresh.gain = Gain()
        return fresh

    def mode(self, overlapped: bool) -> ModeCosts:
        return self.overlapped if overlapped else self.serial

    def record_prompt(self, tokens: int, seconds: float) -> None:
        """The target has read so many tokens of a prompt."""
        self.target_read.record(tokens, seconds)
        if self.target_read.known:
            self.serial.least_row = self.overlapped.least_row = self.target_read.per_row
            self._expect_of_rows()

    def record_reading(self, tokens: int, seconds: float) -> None:
        """The draft has read so many tokens of a text."""
        self.draft_read.record(tokens, seconds)
        self._expect_of_rows()

    def _expect_of_rows(self) -> None:
        """Rows of the draft that come beyond all measured ones take what those of a prompt take."""
        row = self.draft_read.per_row if self.draft_read.known else self.size * self.target_read.per_row
        self.serial.draft.beyond = self.overlapped.draft.beyond = row

    def end_waiting(self) -> None:
        """The draft has read a text: the wait for it is over."""
        self.idle = 0.0
        if self.gain.token_cost(1.0) >= 1.0:
            self.gain.fade()

    def record_drafted(self, seconds: float, tokens: int, texts: int = 1) -> None:
        """Count a round of so many texts that the draft has read: their shares of its time, and what they committed."""
        self.drafted += seconds
        if self.serial.target.known:
            self.gain.record(seconds / max(self.plain, 1e-9), tokens, texts)

    @property
    def plain(self) -> float:
        """Seconds of a token without a draft. Before any was decoded, what a row of a prompt took, which is less."""
        for mode in (self.serial, self.overlapped):
            if mode.target.known:
                return mode.plain
        return self.target_read.seconds / max(self.target_read.rows, 1.0)

    def saving(self, sharing: int = 1) -> float:
        """Seconds that a draft is expected to save at each token. sharing: texts that would share its steps."""
        guess = guessed_token_cost(self.acceptance, self.serial.step_price(sharing), self.serial.drafted_row_price)
        return self.plain * (1 - self.gain.token_cost(guess))

    def bearable_loss(self, tokens: int) -> float:
        """Seconds that drafting may cost a text of so many tokens, before the draft rests."""
        return (LOSS_START + LOSS_SHARE * tokens) * self.plain

    def reading(self, tokens: int) -> float:
        """Seconds that the draft takes to read so many tokens."""
        return self.draft_read.of(tokens) if self.draft_read.known else self.size * self.target_read.of(tokens)

    def record_verdict(self, accepted: int, rejected: bool) -> None:
        """Count a verdict: so many tokens accepted and then, perhaps, one rejected. What follows that was not
        judged."""
        if not accepted and not rejected:
            return
        self.accepted = self.accepted * DECAY + accepted
        self.verified = self.verified * DECAY + accepted + rejected

    @property
    def acceptance(self) -> float:
        """Chance that the target agrees with one drafted token."""
        return min(0.99, self.accepted / self.verified)

    def choose_overlap(self, saved: float = float("inf")) -> bool:
        """The mode of the next round: both are tried, then the one with the cheaper committed token is used. The
        other one is tried again now and then, in case it was measured at a bad moment. saved: seconds, by the draft in
        these texts so far."""
        if self.serial.rounds < TRIAL_ROUNDS:
            return False
        if self.overlapped.every.rounds < TRIAL_ROUNDS and not self._hopeless():
            return saved + RETRY_SHARE * self.drafted >= TRIAL_STAKE * self.plain * self.texts
        if self._trial > 0:
            self._trial -= 1
            return not self._preferred
        known = self.overlapped.drafted.tokens > 0
        preferred = known and self.overlapped.seconds_per_token < self.serial.seconds_per_token
        if preferred != self._preferred:
            self._preferred, self._losses, self._waited = preferred, 0, 0
        self._waited += 1
        if self._waited <= self._patience():
            return preferred
        self._losses, self._waited, self._trial = self._losses + 1, 0, RETRY_ROUNDS - 1
        self.mode(not preferred).fade()
        return not preferred

    def _hopeless(self) -> bool:
        """Whether the trial of the overlapped mode may end early."""
        enough = self.overlapped.rounds > ENOUGH_ROUNDS
        return enough and self.overlapped.seconds_per_token > HOPELESS * self.serial.token_value

    def _patience(self) -> float:
        """Rounds before the other mode is tried again: trying it costs at most a RETRY_SHARE of the time, ever less
        of it."""
        winner, loser = sorted(mode.seconds_per_token for mode in (self.serial, self.overlapped))
        return max(RETRY_AFTER, RETRY_ROUNDS * (loser / winner - 1) / RETRY_SHARE) * 2.0**self._losses


@dataclass
class CostsByTexts:
    """What rounds have cost by how many texts shared them, in powers of two. first: of one text, where none was
    decoded."""

    first: Costs
    by_size: dict[int, Costs] = field(default_factory=dict)

    def of(self, texts: int) -> Costs:
        """With so many texts at once; where there were none, what is known from fewer."""
        size = (texts - 1).bit_length()
        if size not in self.by_size:
            fewer = [self.by_size[less] for less in range(size) if less in self.by_size]
            self.by_size[size] = fewer[-1].for_more() if fewer else copy.deepcopy(self.first)
        costs = self.by_size[size]
        costs.at_once(texts)
        return costs
