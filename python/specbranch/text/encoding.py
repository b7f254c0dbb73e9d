"""From a prompt's text to token ids."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from specbranch.core.errors import SpecBranchError


def encode(tokenizer: PreTrainedTokenizerBase | None, prompt: str, chat: bool = False) -> list[int]:
    """Token ids of a prompt; chat: as a user's message in the tokenizer's chat template.

    Raises SpecBranchError without a tokenizer, without a chat template when one is needed, and for a prompt that the
    tokenizer or the template refuses.
    """
    if tokenizer is None:
        raise SpecBranchError("the target came without a tokenizer: pass tokenizer= or token ids")
    if not chat:
        return _tokenize(tokenizer, prompt)
    if tokenizer.chat_template is None:
        raise SpecBranchError("the target's tokenizer has no chat template: use prompts without chat")
    message = [{"role": "user", "content": prompt}]
    try:
        text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # whatever a template raises
        raise SpecBranchError(f"the chat template cannot be applied: {error}") from error
    return _tokenize(tokenizer, text, add_special_tokens=False)


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> list[int]:
    try:
        return [int(token) for token in tokenizer(text, **options)["input_ids"]]
    except (TypeError, ValueError) as error:  # half a surrogate pair, for example, is no text
        raise SpecBranchError(f"the prompt cannot be tokenized: {error}") from error
