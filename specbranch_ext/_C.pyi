from typing import TypedDict

# The ops have the names and the arguments of torch.ops.specbranch, then the outputs, then
# `launch`: the number of threads for tensors on the CPU, the current stream's handle for tensors on a CUDA device;
# `workspace`, where there is <op>_workspace: device memory of so many bytes, None on the CPU;
# `tickets`, where the op needs some: specbranch_ext.ops._tickets.
# Only ops/_library.py calls them, and it takes any module of such functions, so they have no types here. DecoderLayer
# (csrc/layers/bound_layer.h) is for specbranch's fused layers: a layer's weights, bound once, and `run`.

emulated: bool

class BuildInfo(TypedDict, total=False):
    compiler: str
    isa_levels: list[str]
    isa: str
    exact_blocks: bool
    cuda: bool
    cuda_reason: str
    cuda_compiler: str
    cuda_architectures: list[str]
    openmp: int

def build_info() -> BuildInfo: ...
def cuda_runtime_report() -> str: ...
def cuda_device_problem(device: int) -> str: ...
def capture_id(stream: int) -> int: ...
