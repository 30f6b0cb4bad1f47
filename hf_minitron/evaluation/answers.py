"""What models write after the same prompts, side by side: greedy, so that it can be repeated."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_minitron.data.encoding import Encoder
from hf_minitron.distillation.prompts import asked, start_ids
from hf_minitron.distillation.synthesis import generate_batch, generating, sampling

HIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # signs that no page shows, or that turn others round
NEW_TOKENS = 64  # of an answer, where nothing else is said


@dataclass(frozen=True)
class Prompts:
    """What models are asked to go on with, and how.

    Args:
        texts (`Sequence[str]`): Beginnings of texts, or what a user says.
        max_new_tokens (`int`, *optional*, defaults to 64): Tokens of an answer, at most.
        chat_template (`bool`, *optional*, defaults to `False`): Put each text into the chat template, as what the user says.
        add_bos_token (`bool`, *optional*): Whether a text begins with the BOS token; as the tokenizer does when left out.
    """

    texts: Sequence[str]
    max_new_tokens: int = NEW_TOKENS
    chat_template: bool = False
    add_bos_token: bool | None = None


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts) -> list[tuple[str, str]]:
    """Return each prompt and what a model writes after it, always its most probable token."""
    if prompts.chat_template:
        starts = [Encoder(tokenizer, []).prompt(asked(text))[1] for text in prompts.texts]
    else:
        longest = max(len(ids) for ids in tokenizer(list(prompts.texts))["input_ids"])
        starts = start_ids(tokenizer, prompts.texts, longest + 1, prompts.add_bos_token)
    with generating(model):
        new = generate_batch(model, starts, sampling(model, tokenizer, prompts.max_new_tokens, temperature=0), seed=0)
    return [(prompt, tokenizer.decode(ids, skip_special_tokens=True).strip())
            for prompt, ids in zip(prompts.texts, new, strict=True)]  # fmt: skip


def verbatim(text: str) -> str:
    """Return a text as one line of Markdown that shows it as it is, whatever signs it holds."""
    line = HIDDEN.sub("\ufffd", " ".join(text.split()))
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", line)
