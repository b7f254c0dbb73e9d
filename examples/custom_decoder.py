"""A speculative decoder of one's own over two transformers models: specbranch_ext without the scheduler.

Each round the draft writes a chain of tokens, with its other candidates beside them (here width 2, depth 3):

    root ─┬─ a1 ─┬─ a2 ─┬─ a3
          └─ b1  └─ b2  └─ b3

The target scores the whole tree in one forward, `verify` walks it from the root as long as a node is the
token that the target chooses itself, and `kv_commit` moves the K/V rows of that path behind the prefix. Any
model that honours transformers' AttentionInterface can be used.

    python examples/custom_decoder.py --prompt "def main():"
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from specbranch_ext import ancestor_mask, draft_sample, kv_commit, tree_attention, verify


class Layer(CacheLayerMixin):
    """K and V of one layer, [1, kv_heads, capacity, head_dim]: the committed prefix, then the tree's rows."""

    is_compileable = False
    is_sliding = False

    def __init__(self, owner: TreeModel) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        values = key_states if value_states is None else value_states
        rows = self.owner.capacity
        self.keys = key_states.new_empty(*key_states.shape[:2], rows, key_states.shape[3])
        self.values = values.new_empty(*values.shape[:2], rows, values.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.owner.length
        end = begin + key_states.shape[2]
        self.keys[:, :, begin:end] = key_states
        self.values[:, :, begin:end] = value_states
        return self.keys, self.values  # all rows: which of them a query sees is the attention's business

    def get_seq_length(self) -> int:
        return self.owner.length

    def get_max_length(self) -> int:
        return self.owner.capacity

    get_max_cache_shape = get_max_length  # its name in older versions of transformers

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.length + query_length, 0


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    prefix: int,
    ancestors: Tensor | None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function; `prefix` and `ancestors` come from `TreeModel.forward`."""
    out = tree_attention(
        query[0].transpose(0, 1),  # [heads, n, head_dim] to [n, heads, head_dim]
        key[0],
        value[0],
        prefix,
        ancestors,
        scale=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    return out[None], None


AttentionInterface.register("custom_decoder", attention)


class TreeModel:
    """A transformers model with its own K/V buffers; `length` rows of them are committed."""

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        model.set_attn_implementation("custom_decoder")
        self.model, self.capacity, self.length = model, capacity, 0
        self.layers = [Layer(self) for _ in range(model.config.num_hidden_layers)]
        self.cache = Cache(layers=self.layers)
        named = inspect.signature(type(model).forward).parameters
        self.cache_argument = "cache" if "cache" in named else "past_key_values"  # its name before transformers 5.24

    @torch.inference_mode()
    def forward(self, tokens: Sequence[int], parents: Tensor | None = None) -> Tensor:
        """Logits [n, V] after each of n new rows behind the prefix: a tree, or without `parents` a chain."""
        mask = None if parents is None else ancestor_mask(parents)
        depths = torch.arange(len(tokens)) if mask is None else mask.depths
        output = self.model(
            input_ids=torch.tensor([list(tokens)]),
            position_ids=(self.length + depths)[None],
            prefix=self.length,
            ancestors=None if mask is None else mask.ancestors,
            **{self.cache_argument: self.cache},
        )
        logits: Tensor = output.logits[0]
        return logits

    def commit(self, path: Sequence[int]) -> None:
        """Move the rows of the tree nodes in `path` behind the prefix; all other tree rows are forgotten."""
        buffers = [buffer[0] for layer in self.layers for buffer in (layer.keys, layer.values)]
        kv_commit(buffers, self.length + torch.tensor(path), self.length)
        self.length += len(path)


def draft_tree(
    draft: TreeModel, text: Sequence[int], depth: int, width: int, sampling: dict[str, Any]
) -> tuple[list[int], list[int], list[int]]:
    """Tokens and parents of a tree below the last token of `text`, and the nodes of its main chain."""
    tokens, parents, chain = [text[-1]], [-1], [0]
    unseen = list(text[draft.length :])
    for step in range(depth):
        draft_logits = draft.forward(unseen)[-1:]
        draft.length += len(unseen)
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
        verifier.forward(prompt[:-1])
        verifier.length = len(prompt) - 1
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
        # The draft ran over its chain only; rolling back the rest of it is a smaller length.
        on_chain = sum(node == of_chain for node, of_chain in zip(path, chain[1:], strict=False))
        drafter.length = min(drafter.length, len(text) + on_chain)
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
