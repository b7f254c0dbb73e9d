from typing import TypedDict

from torch import Tensor

# `launch`: the number of threads for tensors on the CPU, the current stream's handle for tensors on a CUDA device.
# `tickets`: specbranch_ext.ops._tickets.
# `filters`: float64 [4] in place of the four numbers, which are then off; `any_filters`: whether it is given.
# `workspace`: device memory of <op>_workspace bytes, None on the CPU. Only a build with CUDA kernels has those.

emulated: bool

class BuildInfo(TypedDict, total=False):
    compiler: str
    isa_levels: list[str]
    isa: str
    cuda: bool
    cuda_reason: str
    cuda_compiler: str
    cuda_architectures: list[str]
    openmp: int

def build_info() -> BuildInfo: ...
def cuda_runtime_report() -> str: ...
def cuda_device_problem(device: int) -> str: ...
def capture_id(stream: int) -> int: ...
def gumbel_noise(positions: Tensor, seed: Tensor, noise: Tensor, launch: int) -> None: ...
def linear(input: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor, launch: int) -> None: ...
def ancestor_mask(parents: Tensor, ancestors: Tensor, depths: Tensor, launch: int) -> None: ...
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
    by_position: bool,
    launch: int,
    workspace: Tensor | None,
    tickets: Tensor | None,
) -> None: ...
def tree_attention_workspace(nodes: int, query_heads: int, kv_heads: int, value_dim: int, capacity: int) -> int: ...
def kv_commit(buffers: list[Tensor], rows: Tensor, start: Tensor, launch: int) -> None: ...
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
    filters: Tensor | None,
    target_tokens: Tensor,
    path: Tensor,
    accepted: Tensor,
    next_token: Tensor,
    launch: int,
    workspace: Tensor | None,
    tickets: Tensor | None,
) -> None: ...
def verify_workspace(
    n: int, vocabulary: int, temperature: float, top_k: int, top_p: float, min_p: float, any_filters: bool
) -> int: ...
def verify_rejection(
    target_logits: Tensor,
    draft_logits: Tensor,
    tokens: Tensor,
    positions: Tensor,
    seed: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    block: bool,
    accepted: Tensor,
    next_token: Tensor,
    launch: int,
    workspace: Tensor | None,
    tickets: Tensor | None,
) -> None: ...
def verify_rejection_workspace(
    n: int, vocabulary: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> int: ...
def draft_sample(
    draft_logits: Tensor,
    positions: Tensor,
    seed: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    filters: Tensor | None,
    tokens: Tensor,
    scores: Tensor,
    confidence: Tensor,
    entropy: Tensor,
    launch: int,
    workspace: Tensor | None,
) -> None: ...
def draft_sample_workspace(
    b: int, vocabulary: int, k: int, temperature: float, top_k: int, top_p: float, min_p: float, any_filters: bool
) -> int: ...
