"""A transformers model with its branch cache: prefill, tree forwards, commit."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specbranch.attention import NO_MASK, TreeContext, attached
from specbranch.cache import BranchCache
from specbranch.errors import SpecBranchError
from specbranch.tree import Tree
from specbranch_ext import ancestor_mask, build_info

PREFILL_CHUNK = 256  # rows: enough to be bound by arithmetic, few enough to keep activations small
TREE_ROWS = 128  # rows kept free behind the text for tree nodes

# Layers whose state is a K/V row per token; anything else (state space, linear attention) cannot roll back.
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


class CachedModel:
    """One of the two models, `role` "target" or "draft", with the K/V of the committed text and of tree nodes."""

    def __init__(self, model: PreTrainedModel, role: str) -> None:
        self.model = model
        self.role = role
        self.device = model.device
        self.layers = model.config.get_text_config().num_hidden_layers
        self.vocabulary = model.config.get_text_config().vocab_size
        self.cache = BranchCache(self.layers, 0, self.device)
        check_supported(model, role)

    def attached(self) -> AbstractContextManager[None]:
        """The context in which the forwards below may run."""
        return attached(self.model)

    def reset(self, tokens: int) -> None:
        """Start a new text of at most `tokens` tokens; the buffers are kept when they are large enough.

        Raises SpecBranchError when the model's context or the memory is too small.
        """
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise SpecBranchError(
                f"prompt and new tokens together are {tokens} tokens; the {self.role} model's context holds {limit}"
            )
        if tokens + TREE_ROWS > self.cache.capacity:
            self.cache = BranchCache(self.layers, 0, self.device)  # free the old buffers first
            self.cache = BranchCache(self.layers, tokens + TREE_ROWS, self.device)
        self.cache.rollback(0)

    def prefill(self, tokens: Sequence[int]) -> None:
        """Commit a chain of tokens behind the prefix, in chunks."""
        for start in range(0, len(tokens), PREFILL_CHUNK):
            chunk = tokens[start : start + PREFILL_CHUNK]
            self._forward(chunk, range(self.cache.length, self.cache.length + len(chunk)), None, keep=1)
            self.cache.length += len(chunk)

    def score(self, tree: Tree, nodes: Sequence[int], backlog: Sequence[int] = ()) -> Tensor:
        """Logits after each of `nodes`: [len(nodes), V], in the model's dtype.

        Each node's parent must have a row already or stand earlier in `nodes`. backlog: committed tokens that the
        cache lacks; they become part of the prefix, in the same forward, and then `nodes` may only be the root.
        """
        cache, count = self.cache, len(nodes)
        if backlog:
            if list(nodes) != [0] or cache.nodes:
                raise ValueError("a backlog can only be caught up together with the root")
            positions = range(cache.length, cache.length + len(backlog) + 1)
            logits = self._forward([*backlog, tree.nodes[0].token], positions, None, keep=1)
            cache.length += len(backlog)
            cache.nodes = [0]
        else:
            rows = [*cache.nodes, *nodes]
            row_of = {node: row for row, node in enumerate(rows)}
            parents = torch.tensor([row_of.get(tree.nodes[node].parent, -1) for node in rows])
            ancestors = ancestor_mask(parents).ancestors[-count:].to(self.device)
            positions_of = [tree.position + tree.nodes[node].depth for node in nodes]
            logits = self._forward(tree.tokens(nodes), positions_of, ancestors, keep=count)
            cache.nodes = rows
        return logits

    @torch.inference_mode()
    def _forward(self, tokens: Sequence[int], positions: Sequence[int], ancestors: Tensor | None, keep: int) -> Tensor:
        """One forward over new cache rows; logits of the last `keep` of them, [keep, V]."""
        self.cache.reserve(len(tokens))
        # Only a draft with fewer padding ids than the target can meet a token that it lacks; it then guesses worse.
        known = [min(token, self.vocabulary - 1) for token in tokens]
        context = TreeContext(torch.tensor(self.cache.length, device=self.device), ancestors)
        out = self.model(
            input_ids=torch.tensor([known], device=self.device),
            position_ids=torch.tensor([list(positions)], device=self.device),
            attention_mask=NO_MASK,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
            specbranch=context,
        )
        if context.calls != self.layers:
            raise SpecBranchError(
                f"{type(self.model).__name__} called the registered attention in {context.calls} of "
                f"{self.layers} layers: specbranch cannot run it"
            )
        logits: Tensor = out.logits[0]
        return logits


def check_supported(model: PreTrainedModel, role: str) -> None:
    """Refuse, by name, what cannot be decoded with a branch cache and a registered attention."""
    name = type(model).__name__
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder or not model.can_generate():
        raise SpecBranchError(f"{role} model {name}: expected a decoder-only causal language model")
    if not model._can_set_attn_implementation():
        raise SpecBranchError(
            f"{role} model {name} does not honour transformers' AttentionInterface: specbranch cannot run it"
        )
    if model.device.type != "cpu" and not build_info()["cuda"]:
        raise SpecBranchError(
            f"{role} model on {model.device}: this build of specbranch_ext runs on the CPU only "
            f"({build_info()['cuda_reason']})"
        )
    others = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if others:
        raise SpecBranchError(f"{role} model {name} has {', '.join(sorted(others))} layers, which cannot roll back")
