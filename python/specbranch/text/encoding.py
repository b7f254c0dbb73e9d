"""From a prompt's text, or chat messages, to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from specbranch.core.checks import flag, shown
from specbranch.core.errors import SpecBranchError

Message = Mapping[str, Any]  # "role" and "content"


def encode(tokenizer: PreTrainedTokenizerBase | None, prompt: str | Sequence[Message], chat: bool = False) -> list[int]:
    """Token ids of a prompt: a text, with `chat` as a user's message in the tokenizer's chat template, or the messages
    of a chat, whose answer comes next.

    Raises SpecBranchError for anything else, without a tokenizer, without a chat template when one is needed, and for a
    prompt that the tokenizer or the template refuses.
    """
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}] if flag("chat", chat) else None
    elif is_chat(prompt):
        messages = [_checked(message, f"prompt[{place}]") for place, message in enumerate(prompt)]
    else:
        raise SpecBranchError(f"the prompt is {shown(prompt)}; expected text, or a list of chat messages")
    if tokenizer is None:
        raise SpecBranchError("the target came without a tokenizer: pass tokenizer= or token ids")
    if messages is None:
        return _tokenize(tokenizer, prompt)
    if tokenizer.chat_template is None:
        raise SpecBranchError("the target's tokenizer has no chat template: use prompts without chat")
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # whatever a template raises
        raise SpecBranchError(f"the chat template cannot be applied: {error}") from error
    return _tokenize(tokenizer, text, add_special_tokens=False)


def is_chat(prompt: object) -> bool:
    """Whether it is meant as chat messages."""
    return isinstance(prompt, (list, tuple)) and bool(prompt) and isinstance(prompt[0], Mapping)


def _checked(message: object, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise SpecBranchError(f'{name} is {shown(message)}; expected a message like {{"role": "user", "content": …}}')
    content = message.get("content")
    if not isinstance(content, (str, list)) and not (content is None and len(message) > 2):  # tool calls have none
        raise SpecBranchError(f"{name}: content is {shown(content)}; expected text")
    return dict(message)


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: Any, **options: bool) -> list[int]:
    try:
        return [int(token) for token in tokenizer(text, **options)["input_ids"]]
    except Exception as error:  # half a surrogate pair, for example, is no text
        raise SpecBranchError(f"the prompt cannot be tokenized: {error}") from error
