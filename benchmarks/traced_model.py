"""Models of real shapes without real weights: random ones, whose logits say what a recorded pair said.

A trace (specbranch record) holds, for every position of some texts, the target's token and the draft's candidates with
its probabilities. A traced model runs all of its own forward, and then puts those into its logits on the device, so
that its time is that of its shape and its acceptance is that of the recorded pair. Greedy decoding only: a trace's
candidates are those of one noise.

Token ids of the trace are folded into the model's vocabulary so that what was equal stays equal, and what was not, not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM

from specbranch.replay.record import TAIL, RecordedText
from specbranch.runtime.cache_argument import cache_argument

CERTAIN = 1e4  # a logit that no other one reaches


def llama(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        **UNENDING,
    )


def qwen2(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocabulary: int, tied: bool) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        **UNENDING,
    )


# Traced texts have a length, and no token that ends them.
UNENDING: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

SHAPES: dict[str, PreTrainedConfig] = {
    "llama-68m": llama(768, 2, 12, 12, 3072, 32000),
    "llama-7b": llama(4096, 32, 32, 32, 11008, 32000),
    "vicuna-68m": llama(768, 2, 12, 12, 3072, 32000),
    "vicuna-13b": llama(5120, 40, 40, 40, 13824, 32000),
    "deepseek-coder-1.3b": llama(2048, 24, 16, 16, 5504, 32256),
    "deepseek-coder-33b": llama(7168, 62, 56, 8, 19200, 32256),
    "qwen2.5-0.5b": qwen2(896, 24, 14, 2, 4864, 151936, tied=True),
    "qwen2.5-7b": qwen2(3584, 28, 28, 4, 18944, 152064, tied=False),
    "tiny-draft": llama(64, 1, 2, 2, 128, 1000),
    "tiny-target": llama(64, 4, 4, 2, 128, 1000),
}


class Trace:
    """One recorded text as tables on a device, by absolute position. The tables keep their addresses from text to text.

    text: int64 [L], the token at each position, prompt included. candidates: int64 [L, k], logits: float32 [L, k + 1],
    what the draft says there, the last logit being every other token's. tail_logits: the same behind a wrong token.
    """

    def __init__(self, length: int, k: int, vocabulary: int, device: torch.device) -> None:
        self.length, self.k, self.vocabulary = length, k, vocabulary
        self.text = torch.zeros(length, dtype=torch.int64, device=device)
        self.candidates = torch.zeros(length, k, dtype=torch.int64, device=device)
        self.logits = torch.zeros(length, k + 1, device=device)
        self.tail_logits = torch.zeros(length, k + 1, device=device)

    def load(self, text: RecordedText) -> tuple[list[int], list[int]]:
        """Take a text; returns its prompt and its new tokens, in this vocabulary. The prompt's ids are arbitrary."""
        new = [int(token) % self.vocabulary for token in text.tokens]
        prompt = [(7919 * i + 13) % self.vocabulary for i in range(text.prompt_tokens)]
        end = text.prompt_tokens + len(new)
        if end > self.length:
            raise ValueError(f"a text of {end} tokens; the tables hold {self.length}")
        self.text[:end] = torch.tensor([*prompt, *new])
        rows = [
            fold(said, int(token), self.vocabulary)
            for said, token in zip(text.proposals.tokens[:, : self.k].tolist(), text.tokens, strict=True)
        ]
        place = slice(text.prompt_tokens, end)
        self.candidates[place] = torch.tensor(rows)
        self.logits[place] = log_shares(text.proposals.agreement[:, : self.k], self.vocabulary)
        tails = text.tails.agreement.view(len(new), TAIL, -1)[:, 0, : self.k]
        wrong = tails.isfinite().all(1)
        tails = tails if not wrong.any() else torch.where(wrong[:, None], tails, tails[wrong].mean(0))
        self.tail_logits[place] = log_shares(tails.nan_to_num(0.1), self.vocabulary)
        return prompt, new

    def force(self, logits: Tensor, positions: Tensor) -> None:
        """The target's word, in place: logits [n, V] after tokens at `positions` [n]."""
        after = (positions + 1).clamp(max=self.length - 1)
        logits.scatter_(1, self.text[after][:, None], CERTAIN)

    def suggest(self, logits: Tensor, positions: Tensor, ids: Tensor) -> None:
        """The draft's word, in place, after tokens `ids` [n] at `positions` [n]: behind a token that is not the text's,
        it goes on with tokens that are not either."""
        after = (positions + 1).clamp(max=self.length - 1)
        right = (ids == self.text[positions.clamp(max=self.length - 1)])[:, None]
        other = (self.text[after][:, None] + 1 + torch.arange(self.k, device=ids.device)) % self.vocabulary
        tokens = torch.where(right, self.candidates[after], other)
        values = torch.where(right, self.logits[after], self.tail_logits[after]).to(logits.dtype)
        logits.copy_(values[:, -1:].expand_as(logits))
        logits.scatter_(1, tokens, values[:, :-1])


def fold(candidates: list[int], target: int, vocabulary: int) -> list[int]:
    """Candidates in another vocabulary: the target's token where it is, and else different tokens."""
    folded: list[int] = []
    for token in candidates:
        own = token % vocabulary
        while own in folded or (own == target % vocabulary) != (token == target):
            own = (own + 1) % vocabulary
        folded.append(own)
    return folded


def log_shares(agreement: Tensor, vocabulary: int) -> Tensor:
    """Probabilities [n, k] to logits [n, k + 1]: the candidates', and that of each of the other tokens."""
    shares = agreement.float().clamp(min=1e-6)
    rest = (1 - shares.sum(1, keepdim=True)).clamp(min=1e-6) / (vocabulary - shares.shape[1])
    return torch.cat([shares, rest], 1).log()


class Traced:
    """Mixed into a causal language model: its logits are what `trace` says, as a target or as a draft.

    A twin that is made from the configuration alone, to see whether its steps can be captured, has no trace.
    """

    trace: Trace | None = None
    is_target: bool = False

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        logits_to_keep: int | slice | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        if position_ids is None:
            cache = kwargs.get(cache_argument(type(self)))
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(seen, seen + input_ids.shape[1], device=input_ids.device)[None]
        parent: Any = super()
        output = parent.forward(
            input_ids=input_ids,
            position_ids=position_ids,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        if self.trace is None:
            return output
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, positions = output.logits[0], position_ids[0, keep]
        if self.is_target:
            self.trace.force(logits, positions)
        else:
            self.trace.suggest(logits, positions, input_ids[0, keep])
        return output


class TracedLlama(Traced, LlamaForCausalLM):
    pass


class TracedQwen2(Traced, Qwen2ForCausalLM):
    pass


CLASSES: dict[type, Any] = {LlamaConfig: TracedLlama, Qwen2Config: TracedQwen2}


def traced_model(
    shape: str, trace: Trace, is_target: bool, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """A model of a shape with random weights on a device, whose logits are the trace's."""
    model: Any = plain_model(shape, dtype, device)
    model.trace, model.is_target = trace, is_target
    traced: PreTrainedModel = model
    return traced


def plain_model(shape: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model of a shape with random weights on a device. Raises SystemExit where they do not fit."""
    config = SHAPES[shape]
    if device.type == "cuda":
        check_memory(shape, dtype, device)
    torch.manual_seed(0)
    with device:
        model: PreTrainedModel = CLASSES[type(config)]._from_config(config, dtype=dtype)
    model.eval()
    return model


def check_memory(shape: str, dtype: torch.dtype, device: torch.device) -> None:
    with torch.device("meta"):
        weights = CLASSES[type(SHAPES[shape])]._from_config(SHAPES[shape], dtype=dtype)
    needed, (free, _) = sum(weight.nbytes for weight in weights.parameters()), torch.cuda.mem_get_info(device)
    if needed > free:
        raise SystemExit(f"{shape} needs {needed / 2**30:.1f} GiB; {free / 2**30:.1f} GiB of {device} are free")


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes that a forward reads: all weights but the input embedding's, unless it is the output's too."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding is not None
    total = sum(weight.nbytes for weight in model.parameters())
    if output is not None and output.weight is embedding.weight:
        return total
    weight: Any = embedding.weight
    return total - int(weight.nbytes)


def kv_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of keys and values of so many tokens."""
    config: Any = model.config
    width = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    return int(2 * config.num_hidden_layers * width * tokens * model.dtype.itemsize)
