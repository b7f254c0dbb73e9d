"""Cases of verify and draft_sample: the vocabulary of Qwen2.5, flat rows and rows as peaked as a real model's."""

from collections.abc import Iterator
from typing import Any

import torch
from op_case import Case
from torch import Tensor

from specbranch_ext import draft_sample, reference, verify

VOCABULARY, NODES = 151_936, 9
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_p": 0.95},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.95},
    {"temperature": 1.0, "min_p": 0.05},
]


def flat_logits(rows: int) -> Tensor:
    return torch.randn(rows, VOCABULARY)


def peaked_logits(rows: int) -> Tensor:
    """A bulk of hopeless tokens and a few dozen likely ones: about one to three nats of entropy."""
    logits = torch.randn(rows, VOCABULARY) * 2.2
    likely = torch.randint(0, VOCABULARY, (rows, 40))
    return logits.scatter(1, likely, 12 + 3 * torch.randn(rows, 40))


def torch_scores(
    logits: Tensor, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Filtered scores with Gumbel noise the usual way: float32 [n, V], in the order of the second result if any."""
    if temperature == 0.0:
        return logits, None
    scores, order = logits / temperature, None
    if top_k:
        scores = scores.masked_fill(scores < scores.topk(top_k, dim=1).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        scores, order = scores.sort(dim=1, descending=True)
        share = scores.softmax(dim=1)
        scores = scores.masked_fill(share.cumsum(dim=1) - share >= top_p, -torch.inf)
    if min_p:
        share = scores.softmax(dim=1)
        scores = scores.masked_fill(share < min_p * share.amax(dim=1, keepdim=True), -torch.inf)
    return scores - torch.empty_like(scores).exponential_().log(), order


def torch_verify(logits: Tensor, tokens: list[int], parents: list[int], **options: Any) -> tuple[list[int], int]:
    scores, order = torch_scores(logits, **options)
    best = scores.argmax(dim=1)
    target = (best if order is None else order.gather(1, best.unsqueeze(1)).squeeze(1)).tolist()
    node = 0
    path: list[int] = []
    for child in range(1, len(tokens)):
        if parents[child] == node and tokens[child] == target[node]:
            node = child
            path.append(child)
    return path, target[node]


def torch_draft_sample(logits: Tensor, k: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    scores, order = torch_scores(logits, **options)
    tokens = scores.topk(k, dim=1).indices
    if order is not None:
        tokens = order.gather(1, tokens)
    probability = (logits / options.get("temperature", 1.0)).softmax(dim=1)
    return tokens, probability.gather(1, tokens), torch.special.entr(probability).sum(dim=1)


def describe(what: str, dtype: torch.dtype, options: dict[str, Any]) -> str:
    filters = ", ".join(f"{name} {value:g}" for name, value in options.items()) or "greedy"
    return f"{what}, {str(dtype).removeprefix('torch.')}, {filters}"


def verify_cases() -> Iterator[Case]:
    tokens, parents = torch.zeros(NODES, dtype=torch.int64), torch.arange(NODES) - 1
    positions, seed = torch.arange(NODES) + 100, torch.tensor(7)
    for what, logits in (("peaked", peaked_logits(NODES)), ("flat", flat_logits(NODES))):
        for dtype in (torch.float32, torch.bfloat16):
            rows = logits.to(dtype)
            for options in OPTIONS if dtype == torch.float32 else OPTIONS[::2]:
                yield verify_case(what, rows, tokens, parents, positions, seed, options)


def verify_case(
    what: str,
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    positions: Tensor,
    seed: Tensor,
    options: dict[str, Any],
) -> Case:
    ours = verify(logits, tokens, parents, positions, seed=seed, **options)
    expected = reference.verify(logits, tokens, parents, positions, seed=seed, **options)
    assert torch.equal(ours.target_tokens, expected.target_tokens)
    token_list, parent_list = tokens.tolist(), parents.tolist()
    return Case(
        op="verify",
        what=describe(f"{len(logits)} rows, {what}", logits.dtype, options),
        ours=lambda: verify(logits, tokens, parents, positions, seed=seed, **options),
        peers={"softmax, sort, cumsum, noise": lambda: torch_verify(logits, token_list, parent_list, **options)},
        bytes=logits.nbytes,
    )


def draft_sample_cases() -> Iterator[Case]:
    for what, logits in (("peaked", peaked_logits(3)), ("flat", flat_logits(3))):
        for rows in (1, 3):
            for options in OPTIONS[:4]:
                yield draft_sample_case(what, logits[:rows], options)


def draft_sample_case(what: str, logits: Tensor, options: dict[str, Any]) -> Case:
    positions, seed, k = torch.arange(len(logits)) + 100, torch.tensor(7), 4
    ours = draft_sample(logits, positions, k, seed=seed, **options)
    expected = reference.draft_sample(logits, positions, k, seed=seed, **options)
    assert torch.equal(ours.tokens, expected.tokens)
    return Case(
        op="draft_sample",
        what=describe(f"{len(logits)} rows, {what}, k {k}", logits.dtype, options),
        ours=lambda: draft_sample(logits, positions, k, seed=seed, **options),
        peers={"softmax, sort, topk, entropy": lambda: torch_draft_sample(logits, k, **options)},
        bytes=logits.nbytes,
    )
