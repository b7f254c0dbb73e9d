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
def linear(input: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor, threads: int) -> None: ...
def ancestor_mask(parents: Tensor, ancestors: Tensor, depths: Tensor, threads: int) -> None: ...
def tree_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    prefix_length: Tensor,
    ancestors: Tensor | None,
    output: Tensor,
    scale: float,
    sliding_window: int,
    softcap: float,
    threads: int,
) -> None: ...
def kv_commit(buffers: list[Tensor], rows: Tensor, start: Tensor, threads: int) -> None: ...
def verify(
    target_logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    positions: Tensor,
    seed: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    target_tokens: Tensor,
    path: Tensor,
    accepted: Tensor,
    next_token: Tensor,
    threads: int,
) -> None: ...
def draft_sample(
    draft_logits: Tensor,
    positions: Tensor,
    seed: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    tokens: Tensor,
    scores: Tensor,
    confidence: Tensor,
    entropy: Tensor,
    threads: int,
) -> None: ...
