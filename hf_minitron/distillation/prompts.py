"""What generation starts from: nothing, beginnings of texts, or conversations that wait for an answer."""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_minitron.data.encoding import Encoder, check_encoder
from hf_minitron.data.packing import adds_bos_token
from hf_minitron.data.texts import load_utf8


class Start(NamedTuple):
    """The ids that an answer follows, and the conversation that it belongs to, as a row of a text; `None` for a plain text."""

    ids: list[int]
    chat: dict | None = None

    def with_answer(self, answer: str) -> dict:
        """Return a conversation that was answered, as a row of a text: its tools as JSON, for they differ in what they hold."""
        row = {"messages": [*self.chat["messages"], {"role": "assistant", "content": answer}]}
        return row | ({"tools": json.dumps(self.chat["tools"])} if self.chat["tools"] else {})


def start_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str] | None, max_tokens: int, add_bos_token: bool | None = None
) -> list[list[int]]:
    """Return the ids that a text starts from.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        prompts (`Sequence[str]` or `None`): Documents, whose beginning is used; `None` to start from nothing: the token that
            begins a text, or the one that ends the text before.
        max_tokens (`int`): Tokens taken from the start of each document.
        add_bos_token (`bool`, *optional*): Whether each begins with the BOS token; as the tokenizer does when left out.
    """
    if prompts is None:
        first = None if add_bos_token is False else tokenizer.bos_token_id
        return [[tokenizer.eos_token_id if first is None else first]]
    opening = [tokenizer.bos_token_id] if adds_bos_token(tokenizer, add_bos_token) else []
    return [[*opening, *row][:max_tokens] for row in _beginnings(tokenizer, prompts, max_tokens)]


def _beginnings(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=max_tokens)["input_ids"]


def asked(text: str) -> dict:
    """Return the conversation in which a user says one thing, as a row of a text."""
    return {"messages": [{"role": "user", "content": text}]}


class Prompts:
    """What the documents of a text ask, batch by batch, round and round in an order that a seed decides.

    Args:
        source, split, column (`str`): As for `load_text`. Documents are texts, or conversations; of these the last answer is
            left away.
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        max_tokens (`int`): Tokens taken from the start of each text; conversations are taken as a whole.
        chat (`bool`): Whether texts are put into the chat template, as what the user says.
        add_bos_token (`bool`, *optional*): Whether plain texts begin with the BOS token; as the tokenizer does when left out.
        seed (`int`): Of the order.

    Raises:
        ValueError: for a source without a text, or a tokenizer that writes no chats where there are such.
    """

    def __init__(
        self,
        source: str,
        split: str,
        column: str,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        chat: bool,
        add_bos_token: bool | None,
        seed: int,
    ):
        self._source, self._documents = source, load_utf8(source, split, column, prompts=True)
        self._tokenizer, self._max_tokens, self._bos = tokenizer, max_tokens, add_bos_token
        self._texts = "text" in self._documents.column_names
        self.chats = chat or not self._texts
        if self.chats:
            check_encoder(["messages"], {}, tokenizer, source)
            self._encoder = Encoder(tokenizer, [])
        numbers = range(len(self._documents))
        if self._texts:
            numbers = [number for number, text in zip(numbers, self._documents["text"], strict=True) if text.strip()]
        if not numbers:
            raise ValueError(f"prompts: {source} holds no text in {column!r}")
        self._order = np.random.default_rng(seed).permutation(numbers)

    def batch(self, number: int, size: int) -> list[Start]:
        """Return the starts of a batch.

        Raises:
            ValueError: for a conversation that cannot be answered, by its number.
        """
        places = [int(self._order[place % len(self._order)]) for place in range(number * size, (number + 1) * size)]
        rows = [self._documents[place] for place in places]
        if self._texts:
            texts = [row["text"] for row in rows]
            if not self.chats:
                return [Start(ids) for ids in start_ids(self._tokenizer, texts, self._max_tokens, self._bos)]
            rows = [asked(self._tokenizer.decode(ids)) for ids in _beginnings(self._tokenizer, texts, self._max_tokens)]
        return [self._chat(row, place) for row, place in zip(rows, places, strict=True)]

    def _chat(self, row: dict, place: int) -> Start:
        try:
            chat, ids = self._encoder.prompt(row)
        except ValueError as error:
            raise ValueError(f"prompts: {self._source}: document {place:,} (from 0) {error}") from error
        return Start(ids, chat)
