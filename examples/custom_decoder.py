"""A speculative decoder of one's own over two transformers models: specbranch_ext without the scheduler.

Each round the draft writes a chain of tokens, with its other candidates beside them (here width 2, depth 3):

    root ─┬─ a1 ─┬─ a2 ─┬─ a3
          └─ b1  └─ b2  └─ b3

The target scores the whole tree in one forward, `verify` walks it from the root as long as a node is the
token that the target chooses itself, and `commit` makes the K/V rows of that path part of the text. Any model
that TreeModel runs can be used.

    python examples/custom_decoder.py --prompt "def main():"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from specbranch_ext import ancestor_mask, draft_sample, verify
from specbranch_ext.integrations.transformers import TreeModel


def draft_tree(
    draft: TreeModel, text: Sequence[int], depth: int, width: int, sampling: dict[str, Any]
) -> tuple[list[int], list[int], list[int]]:
    """Tokens and parents of a tree below the last token of `text`, and the nodes of its main chain."""
    tokens, parents, chain = [text[-1]], [-1], [0]
    unseen = list(text[draft.length :])
    for step in range(depth):
        draft_logits = draft.forward(unseen, logits_to_keep=1)
        draft.commit(range(len(unseen)))
        guesses = draft_sample(draft_logits, torch.tensor([len(text) + step]), width, **sampling).tokens[0]
        parent = chain[-1]
        chain.append(len(tokens))
        for token in guesses.tolist():
            if token >= 0:  # fewer than `width` are left when the filters are narrow
                tokens.append(token)
                parents.append(parent)
        unseen = [tokens[chain[-1]]]
    return tokens, parents, chain


def generate(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    depth: int = 4,
    width: int = 2,
    **sampling: Any,
) -> tuple[list[int], int]:
    """New tokens after `prompt`, and the number of target forwards they took.

    sampling: seed, temperature, top_k, top_p, min_p. The tokens depend on the target and on them alone:
    depth 0 is plain decoding and gives the same ones.
    """
    capacity = len(prompt) + max_new_tokens + (depth + 1) * (width + 1)
    verifier, drafter = TreeModel(target, capacity), TreeModel(draft, capacity)
    if len(prompt) > 1:
        verifier.forward(prompt[:-1], logits_to_keep=1)
        verifier.commit(range(len(prompt) - 1))
    text, forwards, ends = list(prompt), 0, _end_tokens(target)
    while len(text) < len(prompt) + max_new_tokens:
        tokens, parents, chain = draft_tree(drafter, text, depth, width, sampling)
        parent_tensor = torch.tensor(parents)
        target_logits = verifier.forward(tokens, parent_tensor)
        positions = len(text) + ancestor_mask(parent_tensor).depths  # of the token that each row predicts
        verdict = verify(target_logits, torch.tensor(tokens), parent_tensor, positions, **sampling)
        forwards += 1

        path = verdict.path[: int(verdict.accepted)].tolist()
        verifier.commit([0, *path])
        # The draft committed its whole chain.
        on_chain = sum(node == of_chain for node, of_chain in zip(path, chain[1:], strict=False))
        drafter.rollback(min(drafter.length, len(text) + on_chain))
        for token in [*(tokens[node] for node in path), int(verdict.next_token)]:
            text.append(token)
            if token in ends:
                return text[len(prompt) :][:max_new_tokens], forwards
    return text[len(prompt) :][:max_new_tokens], forwards


def _end_tokens(model: PreTrainedModel) -> set[int]:
    eos = model.generation_config.eos_token_id
    return set() if eos is None else set(eos) if isinstance(eos, list) else {eos}


def main() -> None:
    parser = argparse.ArgumentParser(description="A small tree decoder on specbranch_ext.")
    parser.add_argument("--target", help="default: the bundled target")
    parser.add_argument("--draft", help="default: the bundled draft")
    parser.add_argument("--prompt", default="def main():\n")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--width", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    from specbranch import bundled

    target_path = args.target or bundled.path("target")
    tokenizer = AutoTokenizer.from_pretrained(target_path)
    target = AutoModelForCausalLM.from_pretrained(target_path).eval()
    draft = AutoModelForCausalLM.from_pretrained(args.draft or bundled.path("draft")).eval()
    tokens, forwards = generate(
        target,
        draft,
        tokenizer(args.prompt).input_ids,
        max_new_tokens=args.max_new_tokens,
        depth=args.depth,
        width=args.width,
        temperature=args.temperature,
        seed=args.seed,
    )
    print(args.prompt + tokenizer.decode(tokens, skip_special_tokens=True))
    print(f"\n{len(tokens)} tokens in {forwards} target forwards")


if __name__ == "__main__":
    main()
