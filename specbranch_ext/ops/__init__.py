"""The ops: typed functions over operators registered with `torch.library` as `torch.ops.specbranch.<op>`.

One file per op, each with the schema, the CPU implementation, the fake (shape-only) implementation that
`torch.compile` needs, and the function meant for use. Bad input raises ValueError naming the tensor.
"""

from .gumbel_noise import gumbel_noise

__all__ = ["gumbel_noise"]
