"""What a checkpoint's generation_config asks for: it counts as in transformers' `generate`, and what the engine
lacks is named in a warning.

Values are resolved as transformers resolves them: the caller's, else the checkpoint's, else transformers' own default.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from specbranch.core.checks import flag, number, shown, whole
from specbranch.core.errors import SpecBranchError, SpecBranchWarning
from specbranch.core.sampling import Sampling

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

NEW_TOKENS = 128  # transformers' own default is 20
ANSWER_TOKENS = 1024  # of a server and a chat, whose users name no number
GREEDY: dict[str, Any] = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}  # transformers' defaults
LEAST_TOP_P = 1e-30
OWNER = "the checkpoint's generation_config"

Acts = Callable[[Any], bool]


def _above(bound: float) -> Acts:
    return lambda value: not isinstance(value, (int, float)) or value > bound


def _other_than(neutral: object) -> Acts:
    return lambda value: bool(value != neutral)


def _set(value: object) -> bool:
    return True


def _inside(low: float, high: float) -> Acts:
    return lambda value: not isinstance(value, (int, float)) or low < value < high


# Fields that become a logits processor or a stopping criterion: whether a value (never None) acts.
PROCESSED: dict[str, Acts] = {
    "repetition_penalty": _other_than(1),
    "encoder_repetition_penalty": _other_than(1),  # of the prompt, for a decoder-only model
    "no_repeat_ngram_size": _above(0),
    "encoder_no_repeat_ngram_size": _above(0),
    "bad_words_ids": bool,
    "sequence_bias": bool,
    "suppress_tokens": bool,
    "begin_suppress_tokens": bool,
    "forced_bos_token_id": _set,
    "forced_eos_token_id": _set,
    "min_length": _above(0),
    "min_new_tokens": _above(0),
    "exponential_decay_length_penalty": bool,
    "max_time": _set,
    "guidance_scale": _other_than(1),
    "watermarking_config": _set,
}
# The same, where tokens are sampled.
PROCESSED_IN_SAMPLING: dict[str, Acts] = {
    "top_h": _set,
    "typical_p": lambda value: not isinstance(value, (int, float)) or value < 1,
    "epsilon_cutoff": _inside(0, 1),
    "eta_cutoff": _inside(0, 1),
}
# Fields that change a text of transformers' and that the engine does not have.
LACKING: dict[str, Acts] = {
    "token_healing": bool,
    "num_beams": _above(1),
    "num_beam_groups": _above(1),
    "num_return_sequences": _above(1),
    "constraints": bool,
    "force_words_ids": bool,
    "penalty_alpha": _above(0),
    "dola_layers": _set,
    "cache_implementation": lambda value: value == "quantized",  # which rounds keys and values
}


def lacking(config: object) -> dict[str, Any]:
    """The fields of a GenerationConfig, with their values, that change transformers' text and that the engine does not
    have."""
    return _acting(config, LACKING)


def processed(config: object, sampled: bool) -> dict[str, Any]:
    """The fields of a GenerationConfig, with their values, for which transformers has processors and criteria. sampled:
    whether tokens are sampled."""
    return _acting(config, {**PROCESSED, **(PROCESSED_IN_SAMPLING if sampled else {})})


def _acting(config: object, fields: dict[str, Acts]) -> dict[str, Any]:
    values = {name: getattr(config, name, None) for name in fields}
    return {name: value for name, value in values.items() if value is not None and fields[name](value)}


def sampling(
    config: object,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
) -> Sampling:
    """How transformers' `generate` would sample; None: as the checkpoint says. A temperature above 0 stands for
    do_sample=True, and 0 for do_sample=False.

    config: a GenerationConfig. Raises SpecBranchError for a value that cannot be used.
    """
    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    given = {name: value for name, value in asked.items() if value is not None}
    if temperature is None:
        sampled = _own(config, "do_sample", flag, False)
    else:
        sampled = number("temperature", temperature, least=0) > 0
    if not sampled:
        return Sampling(**{**GREEDY, **given, "seed": seed})
    own = {
        "temperature": _own(config, "temperature", number, SAMPLED["temperature"], least=0),
        "top_k": _own(config, "top_k", whole, SAMPLED["top_k"], least=0),
        # transformers takes 1 and more as none, and 0 as the likeliest token alone
        "top_p": min(max(_own(config, "top_p", number, SAMPLED["top_p"], least=0), LEAST_TOP_P), 1.0),
        "min_p": _own(config, "min_p", number, SAMPLED["min_p"], least=0, most=1),
    }
    return Sampling(**{**own, **given, "seed": seed})


def new_tokens(config: object, asked: int | None, prompt: int, context: int | None, usual: int = NEW_TOKENS) -> int:
    """The most new tokens after a prompt of so many: what was asked for, else what transformers' `generate` takes from
    the checkpoint, else the usual and no more than the model's context has room for.

    Raises SpecBranchError for a value that cannot be used, and where the prompt alone is longer than the checkpoint's
    max_length.
    """
    if asked is not None:
        return whole("max_new_tokens", asked, least=1)
    if (own := _own(config, "max_new_tokens", whole, None)) is not None:
        return whole(f"{OWNER}: max_new_tokens", own, least=1)
    if (length := _own(config, "max_length", whole, None)) is not None:
        if length <= prompt:
            raise SpecBranchError(
                f"the prompt has {prompt} tokens, and {OWNER} ends a text at max_length {length}: pass max_new_tokens"
            )
        return int(length - prompt)
    return usual if context is None else max(1, min(usual, context - prompt))


def _own(config: object, name: str, check: Callable[..., Any], default: Any, **limits: float) -> Any:
    """A value of the checkpoint's, checked."""
    value = getattr(config, name, None)
    return default if value is None else check(f"{OWNER}: {name}", value, **limits)


class Layered:
    """What a caller's GenerationConfig says, and else the checkpoint's: only what is None there is looked up here."""

    def __init__(self, given: object, own: object) -> None:
        self._layers = [layer for layer in (given, own) if layer is not None]

    def __getattr__(self, name: str) -> Any:
        values = (getattr(layer, name, None) for layer in self._layers)
        return next((value for value in values if value is not None), None)


class CheckpointSettings:
    """The generation_config of a model, as it is at each call."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._told: set[str] = set()  # fields that were warned of

    def under(self, given: object) -> Layered:
        """The settings of a call that comes with a GenerationConfig of its own, or None."""
        if given is not None and not hasattr(given, "do_sample"):
            raise SpecBranchError(f"generation_config is {shown(given)}; expected a GenerationConfig")
        return Layered(given, self._model.generation_config)

    def sampling(
        self,
        config: object,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
        min_p: float | None,
        seed: int,
    ) -> Sampling:
        """See `sampling`; warns, once each, of fields that the engine does not have, and of filters without effect."""
        chosen = sampling(config, temperature, top_k, top_p, min_p, seed)
        missed = lacking(config)
        if fresh := {name: value for name, value in missed.items() if name not in self._told}:
            self._told |= fresh.keys()
            fields = ", ".join(f"{name} {shown(value)}" for name, value in fresh.items())
            warnings.warn(
                f"{OWNER} has {fields}, which specbranch does not have: the text will differ from that of "
                "transformers' generate",
                SpecBranchWarning,
                stacklevel=3,
            )
        if chosen.without_effect:
            message = f"no effect at temperature 0: {', '.join(chosen.without_effect)}"
            warnings.warn(message, SpecBranchWarning, stacklevel=3)
        return chosen

    def new_tokens(self, config: object, asked: int | None, prompt: int) -> int:
        """See `new_tokens`."""
        context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        return new_tokens(config, asked, prompt, context)


def bare(model: PreTrainedModel) -> GenerationConfig:
    """The special tokens of a model's own config, no more; without a padding token EOS pads."""
    from transformers import GenerationConfig

    own = model.generation_config
    eos = own.eos_token_id
    pad = own.pad_token_id
    if pad is None:
        pad = eos[0] if isinstance(eos, list) else eos
    return GenerationConfig(bos_token_id=own.bos_token_id, eos_token_id=eos, pad_token_id=pad)
