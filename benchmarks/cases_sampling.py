"""Cases of verify, verify_rejection and draft_sample: flat rows and rows as peaked as a real model's."""

from collections.abc import Iterator
from typing import Any

import torch
from op_case import Built, Case, Peer
from torch import Tensor

from specbranch_ext import (
    DraftSample,
    RejectionVerification,
    Verification,
    draft_sample,
    reference,
    verify,
    verify_rejection,
)

QWEN = 151_936
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_p": 0.95},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.95},
    {"temperature": 1.0, "min_p": 0.05},
]


def flat_logits(rows: int, vocabulary: int, device: str) -> Tensor:
    return torch.randn(rows, vocabulary, device=device)


def peaked_logits(rows: int, vocabulary: int, device: str) -> Tensor:
    """A bulk of hopeless tokens and a few dozen likely ones: about one to three nats of entropy."""
    logits = torch.randn(rows, vocabulary, device=device) * 2.2
    likely = torch.randint(0, vocabulary, (rows, 40), device=device)
    return logits.scatter(1, likely, 12 + 3 * torch.randn(rows, 40, device=device))


def allowed_tokens(rows: int, vocabulary: int, mask: str, device: str) -> tuple[Tensor, Tensor | None]:
    """Which tokens of each row a mask allows, at least one: bool [n, V], and its bits; all and None without a mask."""
    tokens = torch.rand(rows, vocabulary, device=device) < MASKS.get(mask, 2.0)
    if not mask:
        return tokens, None
    tokens |= torch.arange(vocabulary, device=device) == torch.randint(vocabulary, (rows, 1), device=device)
    bits = torch.nn.functional.pad(tokens, (0, -vocabulary % 32)).view(rows, -1, 32).long()
    words = (bits << torch.arange(32, device=device)).sum(dim=2)
    return tokens, torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


MASKS = {"dense mask": 0.95, "sparse mask": 10 / QWEN}
"""What a grammar allows within a string, and where it allows a few tokens only."""
WAITS = "it waits for tokens from the device"
LOGITS = {"peaked": peaked_logits, "flat": flat_logits}


def torch_filtered(
    logits: Tensor, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Scaled logits, -inf where a filter drops the token: float32 [n, V], in the order of the second result if any."""
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
    return scores, order


def torch_scores(logits: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Filtered scores with Gumbel noise the usual way, in the order of the second result if any."""
    if not options.get("temperature"):
        return logits, None
    scores, order = torch_filtered(logits, **options)
    return scores - torch.empty_like(scores).exponential_().log(), order


def torch_target_tokens(logits: Tensor, **options: Any) -> Tensor:
    scores, order = torch_scores(logits, **options)
    best = scores.argmax(dim=1)
    return best if order is None else order.gather(1, best.unsqueeze(1)).squeeze(1)


def torch_verify(logits: Tensor, tokens: list[int], parents: list[int], **options: Any) -> tuple[list[int], int]:
    target = torch_target_tokens(logits, **options).tolist()
    node = 0
    path: list[int] = []
    for child in range(1, len(tokens)):
        if parents[child] == node and tokens[child] == target[node]:
            node = child
            path.append(child)
    return path, target[node]


def torch_probabilities(logits: Tensor, **options: Any) -> Tensor:
    scores, order = torch_filtered(logits, **options)
    share = scores.softmax(dim=1)
    return share if order is None else torch.empty_like(share).scatter_(1, order, share)


def torch_verify_rejection(
    target_logits: Tensor, draft_logits: Tensor, tokens: Tensor, block: bool, **options: Any
) -> tuple[Tensor, Tensor]:
    """The classical algorithms without waiting for a device: the number accepted and the next token."""
    target, draft = torch_probabilities(target_logits, **options), torch_probabilities(draft_logits, **options)
    drafted = tokens[1:].unsqueeze(1)
    ratio = (target[:-1].gather(1, drafted) / draft.gather(1, drafted)).squeeze(1)
    coins = torch.rand_like(ratio)
    against = torch.nn.functional.pad(draft, (0, 0, 0, 1))  # behind the last token nothing is taken away
    if block:
        path = torch.ones_like(ratio[:1])
        for step in ratio.split(1):
            path = torch.cat([path, (path[-1:] * step).clamp(max=1.0)])
        residual = (path.unsqueeze(1) * target - against).clamp(min=0.0)
        mass = residual.sum(dim=1)
        chance = torch.cat([(mass / (mass + 1.0 - path))[1:-1], path[-1:]])
        accepted = ((coins < chance) * torch.arange(1, len(tokens), device=coins.device)).amax()
        law = residual.index_select(0, accepted.reshape(1))
    else:
        accepted = (coins < ratio).cumprod(dim=0).sum()
        row = accepted.reshape(1)
        law = (target.index_select(0, row) - against.index_select(0, row)).clamp(min=0.0)
    return accepted, (law / torch.empty_like(law).exponential_()).argmax(dim=1)


def torch_draft_sample(logits: Tensor, k: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    scores, order = torch_scores(logits, **options)
    tokens = scores.topk(k, dim=1).indices
    if order is not None:
        tokens = order.gather(1, tokens)
    probability = (logits / options.get("temperature", 1.0)).softmax(dim=1)
    return tokens, probability.gather(1, tokens), torch.special.entr(probability).sum(dim=1)


def masked(logits: Tensor, tokens: Tensor, mask: str) -> Tensor:
    """What has to come first without `allowed`."""
    return logits.masked_fill(~tokens, -torch.inf) if mask else logits


def describe(rows: int, vocabulary: int, what: str, dtype: torch.dtype, options: dict[str, Any], mask: str = "") -> str:
    filters = ", ".join(f"{name} {value:g}" for name, value in options.items()) or "greedy"
    return f"{rows} rows of {vocabulary}, {what}, {str(dtype).removeprefix('torch.')}, {filters}" + f", {mask}" * bool(
        mask
    )


def verify_cases(device: str) -> Iterator[Case]:
    vocabularies, all_rows = ((QWEN,), (9,)) if device == "cpu" else ((32_000, 128_256, QWEN), (1, 5, 9, 33))
    for vocabulary in vocabularies:
        for rows in all_rows:
            full = rows == 9 and vocabulary == QWEN
            for what in LOGITS if full else ("peaked",):
                for dtype in (torch.float32, torch.bfloat16) if full else (torch.float32,):
                    for options in OPTIONS if full and dtype == torch.float32 else OPTIONS[:3:2]:
                        quick = full and what == "peaked" and dtype == torch.float32 and options in OPTIONS[:3]
                        yield verify_case(device, rows, vocabulary, what, dtype, options, quick)
    if device != "cpu":  # as a captured step has it
        for options in OPTIONS[:3]:
            yield verify_case(device, 9, QWEN, "peaked", torch.float32, options, quick=True, in_memory=True)
    yield verify_texts_case(device, texts=8, rows=4)
    for mask in MASKS:
        for dtype in (torch.float32, torch.bfloat16):
            for options in OPTIONS[:3]:
                yield verify_case(device, 9, QWEN, "peaked", dtype, options, quick=False, mask=mask)


def filters_in_memory(device: str, options: dict[str, Any]) -> dict[str, Any]:
    """The same filters as one tensor, which the kernel reads when it runs."""
    numbers = (options.get("temperature", 0), options.get("top_k", 0), options.get("top_p", 1), options.get("min_p", 0))
    return {"filters": torch.tensor(numbers, dtype=torch.float64, device=device)}


def verify_case(
    device: str,
    rows: int,
    vocabulary: int,
    what: str,
    dtype: torch.dtype,
    options: dict[str, Any],
    quick: bool,
    in_memory: bool = False,
    mask: str = "",
) -> Case:
    def build() -> Built:
        logits = LOGITS[what](rows, vocabulary, device).to(dtype)
        may_be, allowed = allowed_tokens(rows, vocabulary, mask, device)
        given = {**(filters_in_memory(device, options) if in_memory else options), "allowed": allowed}
        token_list, parent_list = [0] * rows, list(range(-1, rows - 1))
        tokens, parents = torch.tensor(token_list, device=device), torch.tensor(parent_list, device=device)
        positions, seed = torch.arange(rows, device=device) + 100, torch.tensor(7, device=device)

        def ours() -> Verification:
            return verify(logits, tokens, parents, positions, seed=seed, **given)

        def check() -> None:
            on_cpu = (tensor.cpu() for tensor in (masked(logits, may_be, mask), tokens, parents, positions))
            expected = reference.verify(*on_cpu, seed=7, **options)
            assert torch.equal(ours().target_tokens.cpu(), expected.target_tokens), "other tokens than the reference's"

        peers = {
            "softmax, sort, cumsum, noise": Peer(
                lambda: torch_verify(masked(logits, may_be, mask), token_list, parent_list, **options),
                never_captured=WAITS,
            )
        }
        if device != "cpu":
            peers["the same without the walk"] = Peer(
                lambda: torch_target_tokens(masked(logits, may_be, mask), **options)
            )
        return Built(ours, peers, check)

    description = describe(rows, vocabulary, what, dtype, options, mask) + (", in memory" if in_memory else "")
    return Case("verify", description, build, rows * vocabulary * dtype.itemsize, quick=quick)


def options_of_texts(device: str, texts: int, rows: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Other options and seeds for every text: of each by themselves, and of all their rows for one call."""
    seeds = torch.arange(texts, device=device)
    options = [{"seed": seeds[i]} | filters_in_memory(device, OPTIONS[i % len(OPTIONS)]) for i in range(texts)]
    filters = torch.stack([each["filters"] for each in options]).repeat_interleave(rows, dim=0)
    return options, {"seed": seeds.repeat_interleave(rows), "filters": filters}


def verify_texts_case(device: str, texts: int, rows: int) -> Case:
    """A chain of each text, each sampled in its own way."""

    def build() -> Built:
        logits = peaked_logits(texts * rows, QWEN, device)
        roots, chain = torch.arange(texts, device=device) * rows, torch.arange(rows, device=device)
        tokens, positions = torch.zeros(texts * rows, dtype=torch.int64, device=device), (chain + 100).repeat(texts)
        parents = (roots.unsqueeze(1) + chain - 1).where(chain > 0, -1).flatten()
        each, of_all = options_of_texts(device, texts, rows)

        def ours() -> Verification:
            return verify(logits, tokens, parents, positions, roots=roots, **of_all)

        def one_by_one() -> list[Verification]:
            parts = logits.split(rows)
            return [
                verify(parts[i], tokens[:rows], parents[:rows], positions[:rows], **options)
                for i, options in enumerate(each)
            ]

        def check() -> None:
            expected = torch.cat([alone.target_tokens for alone in one_by_one()])
            assert torch.equal(ours().target_tokens, expected), "other tokens than a call for each text"

        return Built(ours, {"a call for each text": Peer(one_by_one)}, check)

    description = f"{texts} texts of {rows} rows of {QWEN}, peaked, float32, each with filters of its own"
    return Case("verify", description, build, texts * rows * QWEN * 4)


def verify_rejection_cases(device: str) -> Iterator[Case]:
    vocabularies, all_rows = ((QWEN,), (9,)) if device == "cpu" else ((32_000, QWEN), (5, 9, 33))
    for vocabulary in vocabularies:
        for rows in all_rows:
            full = rows == 9 and vocabulary == QWEN
            for what in LOGITS if full else ("peaked",):
                for dtype in (torch.float32, torch.bfloat16) if full else (torch.float32,):
                    for options in OPTIONS[1:] if full and dtype == torch.float32 else OPTIONS[1:3]:
                        for block in (False, True):
                            yield verify_rejection_case(device, rows, vocabulary, what, dtype, options, block)
    for mask in MASKS:
        for block in (False, True):
            yield verify_rejection_case(device, 9, QWEN, "peaked", torch.float32, OPTIONS[2], block, mask)


def verify_rejection_case(
    device: str,
    rows: int,
    vocabulary: int,
    what: str,
    dtype: torch.dtype,
    options: dict[str, Any],
    block: bool,
    mask: str = "",
) -> Case:
    """A draft whose logits are not far from the target's, so that some of its tokens are accepted."""

    def build() -> Built:
        target = LOGITS[what](rows, vocabulary, device)
        draft = (target[:-1] + 0.3 * torch.randn(rows - 1, vocabulary, device=device)).to(dtype)
        target = target.to(dtype)
        may_be, allowed = allowed_tokens(rows, vocabulary, mask, device)

        def masked_logits() -> tuple[Tensor, Tensor]:
            return masked(target, may_be, mask), masked(draft, may_be[:-1], mask)

        drafted = torch.multinomial(torch_probabilities(masked_logits()[1].float(), **options), 1).squeeze(1)
        tokens = torch.nn.functional.pad(drafted, (1, 0))
        positions, seed = torch.arange(rows, device=device) + 100, torch.tensor(7, device=device)

        def ours() -> RejectionVerification:
            given = {"block": block, "seed": seed, "allowed": allowed, **options}
            return verify_rejection(target, draft, tokens, positions, **given)

        def check() -> None:
            on_cpu = (tensor.cpu() for tensor in (*masked_logits(), tokens, positions))
            found, expected = ours(), reference.verify_rejection(*on_cpu, block=block, seed=7, **options)
            assert tuple(map(int, found)) == tuple(map(int, expected)), f"{found}, where the reference has {expected}"

        name = "softmax, sort, residual, noise"
        peers = {name: Peer(lambda: torch_verify_rejection(*masked_logits(), tokens, block, **options))}
        return Built(ours, peers, check)

    mode = "block" if block else "token-wise"
    description = f"{describe(rows, vocabulary, what, dtype, options, mask)}, {mode}"
    return Case("verify_rejection", description, build, (2 * rows - 1) * vocabulary * dtype.itemsize)


def draft_sample_cases(device: str) -> Iterator[Case]:
    for what in LOGITS:
        for rows in (1, 3) if device == "cpu" else (1, 8):
            for options in OPTIONS[:4]:
                yield draft_sample_case(device, rows, what, options, quick=what == "peaked" and options == OPTIONS[1])
    yield draft_texts_case(device, texts=8)
    for mask in MASKS:
        for rows in (1, 8):
            for options in OPTIONS[:3]:
                yield draft_sample_case(device, rows, "peaked", options, quick=False, mask=mask)


def draft_sample_case(device: str, rows: int, what: str, options: dict[str, Any], quick: bool, mask: str = "") -> Case:
    k = 4

    def build() -> Built:
        logits = LOGITS[what](rows, QWEN, device)
        may_be, allowed = allowed_tokens(rows, QWEN, mask, device)
        positions, seed = torch.arange(rows, device=device) + 100, torch.tensor(7, device=device)

        def ours() -> DraftSample:
            return draft_sample(logits, positions, k, seed=seed, allowed=allowed, **options)

        def check() -> None:
            expected = reference.draft_sample(masked(logits, may_be, mask).cpu(), positions.cpu(), k, seed=7, **options)
            assert torch.equal(ours().tokens.cpu(), expected.tokens), "other tokens than the reference's"

        peer = Peer(lambda: torch_draft_sample(masked(logits, may_be, mask), k, **options))
        return Built(ours, {"softmax, sort, topk, entropy": peer}, check)

    description = f"{describe(rows, QWEN, what, torch.float32, options, mask)}, k {k}"
    return Case("draft_sample", description, build, rows * QWEN * 4, quick=quick)


def draft_texts_case(device: str, texts: int) -> Case:
    """A row of each text, each sampled in its own way."""
    k = 4

    def build() -> Built:
        logits, positions = peaked_logits(texts, QWEN, device), torch.arange(texts, device=device) + 100
        each, of_all = options_of_texts(device, texts, rows=1)

        def ours() -> DraftSample:
            return draft_sample(logits, positions, k, **of_all)

        def one_by_one() -> list[DraftSample]:
            rows = zip(logits.split(1), positions.split(1), each, strict=True)
            return [draft_sample(row, position, k, **options) for row, position, options in rows]

        def check() -> None:
            expected = torch.cat([alone.tokens for alone in one_by_one()])
            assert torch.equal(ours().tokens, expected), "other tokens than a call for each text"

        return Built(ours, {"a call for each text": Peer(one_by_one)}, check)

    description = f"{texts} texts of a row of {QWEN}, peaked, float32, each with filters of its own, k {k}"
    return Case("draft_sample", description, build, texts * QWEN * 4)
