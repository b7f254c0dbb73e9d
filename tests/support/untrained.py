"""A predictor of nothing, of the right shape for a pair."""

import torch

from specbranch import SpecBranch
from specbranch.runtime.hrad.predictor import HRad, HRadConfig
from specbranch.runtime.identity import identify


def untrained(engine: SpecBranch, seed: int = 0) -> HRad:
    assert engine.draft is not None
    torch.manual_seed(seed)
    size = 5 * engine.target.config.hidden_size
    return HRad(HRadConfig(identify(engine.target), identify(engine.draft), size, 5))
