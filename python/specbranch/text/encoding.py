"""From a prompt's text to token ids."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from specbranch.core.errors import SpecBranchError


def encode(tokenizer: PreTrainedTokenizerBase | None, prompt: str, chat: bool = False) -> list[int]:
    """Token ids of a prompt; chat: as a user's message in the tokenizer's chat template.

    Raises SpecBranchError without a tokenizer, or without a chat template when one is needed.
    """
    if tokenizer is None:
        raise SpecBranchError("the target came without a tokenizer: pass tokenizer= or token ids")
    if not chat:
        return [int(token) for token in tokenizer(prompt)["input_ids"]]
    if tokenizer.chat_template is None:
        raise SpecBranchError("the target's tokenizer has no chat template: use prompts without chat")
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
