"""What models write after the same prompts, side by side: greedy, so that it can be repeated."""

import re
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_minitron.distillation.synthesis import generate_batch, generating, sampling, start_ids


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    chat: bool = False,
    add_bos_token: bool | None = None,
) -> list[str]:
    """Return what a model writes after some prompts, always its most probable token.

    Args:
        model (`PreTrainedModel`): The model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        prompts (`Sequence[str]`): Beginnings of texts, or what a user says.
        max_new_tokens (`int`): Tokens of an answer, at most.
        chat (`bool`, *optional*, defaults to `False`): Put each prompt into the chat template, as what the user says.
        add_bos_token (`bool`, *optional*): Whether a prompt begins with the BOS token; as the tokenizer does when left out.
    """
    longest = max(len(ids) for ids in tokenizer(list(prompts))["input_ids"])
    starts = start_ids(tokenizer, prompts, longest + 1, chat, None if chat else add_bos_token)
    with generating(model):
        new = generate_batch(model, starts, sampling(model, tokenizer, max_new_tokens, temperature=0), seed=0)
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in new]


def verbatim(text: str) -> str:
    """Return a text as one line of Markdown that shows it as it is, whatever signs it holds."""
    line = " ".join(text.split())
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", line)
