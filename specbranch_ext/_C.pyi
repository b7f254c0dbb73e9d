from typing import TypedDict

from torch import Tensor

class BuildInfo(TypedDict):
    compiler: str
    isa_levels: list[str]
    isa: str
    cuda: bool
    cuda_reason: str
    openmp: int

def build_info() -> BuildInfo: ...
def gumbel_noise(positions: Tensor, seed: Tensor, noise: Tensor, threads: int) -> None: ...
