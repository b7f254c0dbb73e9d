"""Online calibration: how likely the target agrees with a drafted token, learned from the verdicts while decoding.

Every verdict labels the drafted tokens that it judged: the accepted ones were right, the first rejected one was
wrong. A logistic model over the draft's signals is updated label by label (the extended Kalman filter of logistic
regression), so it needs no training run. Its prior is the draft's own probability; a learned predictor's forecast
(H-RAD) is one more feature, which gets the weight that the labels give it; so is what was retrieved for the same place.
Retrieved tokens have a model of their own, of how they were found, until the draft has run over their place: what it
says counts then. Both steer how far to draft and where to branch; they never change the text.
"""

from __future__ import annotations

from typing import Any

from specbranch.core import _planning


class Calibrator(_planning.Calibrator):
    """Turns the draft's signals, and how retrieved tokens were found, into probabilities.

    State: weights and covariance of both logistic models, and how often the draft's other candidates held the target's
    token. Its methods are compiled (csrc/tree), and described in core/_planning.pyi.
    """

    __slots__ = ()

    def __getstate__(self) -> dict[str, Any]:
        return self.state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.restore(state)
