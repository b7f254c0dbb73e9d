"""SpecBranch's draft inside vLLM, by its door for proposers of others (`custom_class`, vLLM 0.32, V1 runner).

    vllm serve TARGET --speculative-config '{"method": "custom_class",
        "model": "specbranch.integrations.vllm.SpecBranchProposer", "num_speculative_tokens": 8}'
        --additional-config '{"specbranch": {"draft": "DRAFT"}}'

vLLM loads the class, and calls `propose` after every step.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import nn

from specbranch.core.checks import choice, count, number, shown
from specbranch.core.errors import SpecBranchError
from specbranch.core.excerpt import check_draft_context
from specbranch.policies.branching import Hedging
from specbranch.policies.methods import make_policy
from specbranch.proposer.proposer import Proposer
from specbranch.proposer.recognition import Row
from specbranch.runtime.choices import draft_of
from specbranch.runtime.loading import load_model, load_tokenizer
from specbranch.runtime.packed import weight_format
from specbranch.runtime.packing import pack_loaded
from specbranch.runtime.threads import free_cores
from specbranch.runtime.weights import parameters_of_forward
from specbranch.text.vocabulary import check_vocabularies

KEY = "specbranch"  # of our options in vLLM's `additional_config`
LARGEST_SHARE = 0.5  # of the target's size, that a draft is taken to have until its steps are measured
OVERLAP = {"auto": None, "on": True, "off": False}

# A child of vLLM's logger: it has a format and a level.
logger = logging.getLogger("vllm.specbranch")


@dataclass(frozen=True)
class VllmOptions:
    """What `--additional-config '{"specbranch": {…}}'` says.

    draft: a directory, GGUF file or hub name, "bundled", or "self" for the target once more, in 4 bits. draft_weights,
    draft_arithmetic, draft_context: as for SpecBranch.from_pretrained; dtype: of the draft. draft_device: None is the
    target's. overlap: "on", "off" or "auto": whether the draft goes on while the target verifies. draft_threads: of the
    draft meanwhile, on a CPU. cache_gib: of the draft's caches together. policy: options of the policy, such as k_max
    or batch.
    """

    draft: str
    draft_weights: str = "auto"
    draft_arithmetic: str | None = None
    dtype: str = "auto"
    draft_device: str | None = None
    draft_context: str = "auto"
    draft_threads: int | None = 1
    overlap: str = "auto"
    cache_gib: float = 2.0
    policy: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises SpecBranchError for a value that cannot be used."""
        choice("overlap", self.overlap, list(OVERLAP))
        count("draft_threads", self.draft_threads)
        number("cache_gib", self.cache_gib, least=0)
        check_draft_context(self.draft_context)

    @classmethod
    def of(cls, config: object) -> VllmOptions:
        """From vLLM's `additional_config`. Raises SpecBranchError for what is missing, and for what is no option."""
        given = config.get(KEY) if isinstance(config, Mapping) else None
        if not isinstance(given, Mapping) or not given.get("draft"):
            raise SpecBranchError(
                f'expected a draft: --additional-config \'{{"{KEY}": {{"draft": "…"}}}}\' (found {shown(given)})'
            )
        names = [one.name for one in fields(cls)]
        if unknown := sorted(set(given) - set(names)):
            raise SpecBranchError(f"unknown option {unknown[0]!r}; expected one of {', '.join(names)}")
        return cls(**given)


class SpecBranchProposer:
    """What vLLM makes once for each engine and asks for tokens after every step."""

    def __init__(self, vllm_config: Any) -> None:
        """Raises SpecBranchError for options that cannot be used."""
        model, speculative = vllm_config.model_config, vllm_config.speculative_config
        self._options = VllmOptions.of(vllm_config.additional_config)
        ranks = vllm_config.parallel_config.world_size
        if ranks != 1:
            raise SpecBranchError(f"vLLM runs the target in {ranks} workers; expected 1")
        self._policy = make_policy(
            str(Hedging.name),
            {**self._options.policy, "siblings": 0, "max_trunk": speculative.num_speculative_tokens},
        )
        self._target, self._tokenizer = model.model, model.tokenizer
        self._trust = bool(model.trust_remote_code)
        self._most: int = speculative.num_speculative_tokens
        self._context: int = model.max_model_len
        self._vocabulary: int = model.get_vocab_size()
        self._proposer: Proposer | None = None

    def load_model(self, target: nn.Module) -> None:
        """Load the draft; vLLM calls it once the target is there. Raises SpecBranchError for a draft that cannot be
        used with it."""
        options = self._options
        source, weights = draft_of(self._target, options.draft, options.draft_weights)
        if source != self._target:
            tokenizer = load_tokenizer(self._tokenizer, "target", self._trust)
            check_vocabularies(tokenizer, load_tokenizer(source, "draft", self._trust))
        device = options.draft_device or str(next(target.parameters()).device)
        arithmetic = options.draft_arithmetic
        draft = load_model(source, "draft", options.dtype, device, None, self._trust, arithmetic)
        pack_loaded(source, draft, "draft", weights, arithmetic)
        draft.eval()
        overlap, cores = OVERLAP[options.overlap], list[int]()
        if draft.device.type == next(target.parameters()).device.type == "cpu":
            overlap, cores = with_cores(overlap, free_cores())
        # Of weights that vLLM has packed there are fewer numbers; a draft that seems larger would never be tried.
        share = parameters_of_forward(draft) / max(1, sum(weight.numel() for weight in target.parameters()))
        self._proposer = Proposer(
            draft,
            self._policy,
            most=self._most,
            vocabulary=self._vocabulary,
            context=self._context,
            size=min(share, LARGEST_SHARE),
            say=logger.warning,
            excerpt=check_draft_context(options.draft_context),
            overlap=overlap,
            cache_bytes=round(options.cache_gib * 2**30),
            threads=options.draft_threads if draft.device.type == "cpu" else None,
            cores=cores,
        )
        kept = weight_format(draft) or str(draft.dtype).removeprefix("torch.")
        logger.info("SpecBranch drafts with %s (%s, %s)", source, kept, draft.device)
        if loses_sampling_parameters(next(target.parameters()).device):
            logger.warning("this vLLM loses temperatures and filters when it verifies drafts: use it for greedy texts")

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: np.ndarray[Any, Any],
        token_ids_cpu: np.ndarray[Any, Any],
        slot_mappings: object = None,
    ) -> list[list[int]]:
        """Tokens for each request to verify in its next step, none for some.

        sampled_token_ids: of each row what it got in this step; none where a prompt is not read to its end.
        num_tokens_no_spec: int [rows], and token_ids_cpu: int32 [rows, most tokens], what every row has by now.
        Raises nothing: after a fault of our own there are no drafts any more, and one line in the log.
        """
        nothing: list[list[int]] = [[] for _ in sampled_token_ids]
        if self._proposer is None:
            return nothing
        try:
            return self._proposer.propose(
                [
                    Row(token_ids_cpu[i, : int(num_tokens_no_spec[i])], len(sampled)) if len(sampled) else None
                    for i, sampled in enumerate(sampled_token_ids)
                ]
            )
        except Exception:
            logger.exception("SpecBranch drafts no more, after a fault of its own; vLLM goes on without drafts")
            proposer, self._proposer = self._proposer, None
            with suppress(Exception):  # which is said already
                proposer.close()
            return nothing


def with_cores(overlap: bool | None, free: list[int]) -> tuple[bool | None, list[int]]:
    """Whether the draft goes on beside the target, and where. free: cores of both that the target leaves. Where there
    are none, each thread would wait for others that have no core."""
    if overlap and not free:
        logger.warning("overlap is on, and vLLM computes on all cores: the draft will slow the target down")
    return False if overlap is None and not free else overlap, free


def loses_sampling_parameters(device: torch.device) -> bool:
    """Whether vLLM verifies the drafts of sampled requests with uninitialised parameters, whoever drafts: 0.32.0 does
    on a CPU, where it spreads them over the drafted tokens of each request in a copy."""
    try:
        from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

        spread = expand_batch_to_tokens(
            torch.tensor([0.5, 2.0], device=device), torch.tensor([1, 3], dtype=torch.int32, device=device), 3
        )
    except Exception:  # no vLLM, or another one
        return False
    return bool(spread.tolist() != [0.5, 2.0, 2.0])
