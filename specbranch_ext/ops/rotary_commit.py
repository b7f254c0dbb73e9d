"""rotary_commit: the rotary embedding of queries and keys, and the write of keys and values to a cache."""

from typing import Any

import torch
from torch import Tensor

from ._checks import checked
from ._library import register


def _output(query: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)  # half the time of new_empty


_op = register(
    "rotary_commit(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor rows, Tensor(a!) keys, "
    "Tensor(b!) values, Tensor? query_norm, Tensor? key_norm, float eps, bool unit_offset, bool round_first, "
    "bool interleaved) -> Tensor",
    _output,
)


@checked
def rotary_commit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    *,
    eps: float = 1e-6,
    unit_offset: bool = False,
    round_first: bool = True,
    interleaved: bool = False,
) -> Tensor:
    """Embed queries and keys by their positions, and write keys and values to the rows of a cache layer, in place.

    The first R elements of a head are pairs that the angle of their position turns, the others stay:

        first * cos - second * sin,  second * cos + first * sin

    with the cosine and the sine at each one's own place. Products and sums are rounded to query's dtype, as torch's
    operations are; where cos and sin are float32 and query is not, all is float32 and rounded once. So the results have
    the bits of the modules of transformers.

    Before it comes, where a model has them, an RMS norm of every head of queries and keys, x / sqrt(mean(x^2) + eps) in
    float32 times the weight. Its bits may differ from torch's by the order of the sum and the square root.

    Bit for bit, a row's results depend neither on the other rows nor on the number of threads.

    Args:
        query: [n, Hq, D] float32, bfloat16 or float16. In this and every other tensor of floats all strides but the
            last are free.
        key: [n, Hkv, D], query's dtype.
        value: [n, Hkv, Dv], query's dtype.
        cos: [n, R], R even and at most D, query's dtype or float32: of each row's position.
        sin: as cos.
        rows: int64 [n], contiguous: where in the cache each row goes. Rows may go to the same place; it is then
            unspecified what it holds.
        keys: [Hkv, C, D], query's dtype, written at `rows`. No other argument may share its memory.
        values: [Hkv, C, Dv], likewise.
        query_norm: [D], query's dtype: the weight of the norm of queries; None: there is none.
        key_norm: [D], of keys; both or none.
        eps: what the norm adds to the mean square.
        unit_offset: the norm multiplies by 1 + weight (Gemma).
        round_first: the norm rounds to query's dtype before it multiplies by the weight (Llama), too. False: only
            after.
        interleaved: elements 2i and 2i + 1 are a pair (Cohere, GPT-J). False: i and i + R / 2 (Llama, GPT-NeoX).

    Returns:
        [n, Hq, D] in query's dtype, contiguous: the embedded query.

    Raises:
        ValueError: wrong shape, dtype or stride, one norm without the other, eps below 0, or a row outside [0, C), and
            then nothing is written; the message names the tensor. On a CUDA device a row outside [0, C) does not raise:
            its keys and values are not written.

    Source: RoFormer (arXiv 2104.09864, section 3.4.2).
    """
    output: Tensor = _op(
        query,
        key,
        value,
        cos,
        sin,
        rows,
        keys,
        values,
        query_norm,
        key_norm,
        eps,
        unit_offset,
        round_first,
        interleaved,
    )
    return output
