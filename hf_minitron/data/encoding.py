"""Documents to tokens, and which of them are predicted: all of a text, only the answers of a chat.

What a row holds is told by its columns, as in TRL's SFTTrainer: `text`; `messages`; `prompt` and `completion`, both texts or
both messages; `input_ids`, tokens already. Chats are written by the tokenizer's chat template. Where it marks answers
(`{% generation %}`) it says which tokens they are; else they are what the template adds for them, which is verified.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_minitron.data.columns import MASKS
from hf_minitron.data.messages import read_messages, with_tools
from hf_minitron.data.token_rows import read_tokens
from hf_minitron.errors import one_line

# Ids alone, of the text alone.
_PLAIN = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
_GENERATION = re.compile(r"\{%-?\s*generation\b")


class Tokens(NamedTuple):
    """Some documents as tokens, one after another: their ids, which of them starts a document, and which is predicted."""

    ids: np.ndarray
    starts: np.ndarray
    learnt: np.ndarray


class Refused(NamedTuple):
    """The first of some rows that is no document, and why."""

    number: int
    reason: str


@dataclass(frozen=True)
class Encoder:
    """Rows to tokens; a text is followed by the end token, a chat ends as its template ends it, and tokens are as they are.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        opening (`Sequence[int]`): What each text begins with: the BOS token, or nothing.
    """

    tokenizer: PreTrainedTokenizerBase
    opening: Sequence[int]

    @cached_property
    def dtype(self) -> type:
        """What ids are stored as."""
        return id_dtype(self.tokenizer)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Tokens | Refused:
        """Return the tokens of some rows."""
        try:
            documents = ENCODERS[kind_of(rows[0])](self, rows)
        except _RowError as error:
            return Refused(*error.args)
        lengths = np.array([len(ids) for ids, _ in documents])
        flat = np.concatenate([np.asarray(ids, self.dtype) for ids, _ in documents])
        starts = np.zeros(len(flat), bool)
        starts[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
        learnt = np.concatenate([np.ones(len(ids), bool) if mask is None else mask for ids, mask in documents])
        if self.opening:
            learnt[starts & (flat == self.opening[0])] = False  # given, not predicted
        return Tokens(flat, starts, learnt)

    def texts(self, rows: Sequence[Mapping]) -> "Documents":
        """Return the tokens of texts."""
        for number, row in enumerate(rows):
            if not isinstance(row["text"], str):
                raise _RowError(number, "holds no text. Leave it out, or set text_column")
        ids = self.tokenizer([row["text"] for row in rows], **_PLAIN)["input_ids"]
        return [([*self._opened(row), self.tokenizer.eos_token_id], None) for row in ids]

    def ready(self, rows: Sequence[Mapping]) -> "Documents":
        """Return tokens that are such already, without padding."""
        return [_each(number, read_tokens, row, np.iinfo(self.dtype).max) for number, row in enumerate(rows)]

    def pairs(self, rows: Sequence[Mapping]) -> "Documents":
        """Return the tokens of prompts with their completions, which are predicted: of texts with an end token, of messages."""
        if not isinstance(rows[0]["prompt"], str):
            return self._spans(_each_chat(self._written_pair, rows))
        end, texts = self.tokenizer.eos_token, []
        for number, row in enumerate(rows):
            prompt, completion = row["prompt"], row["completion"]
            if not (isinstance(prompt, str) and isinstance(completion, str)):
                raise _RowError(number, "has a prompt and a completion that are not both texts. Leave it out")
            texts.append((prompt + completion.removesuffix(end), [(len(prompt), len(prompt) + len(completion))]))
        documents = []
        for ids, learnt in self._spans(texts):
            opened = self._opened(ids)
            given = np.zeros(len(opened) - len(ids), bool)
            documents.append(([*opened, self.tokenizer.eos_token_id], np.concatenate([given, learnt, [True]])))
        return documents

    def chats(self, rows: Sequence[Mapping]) -> "Documents":
        """Return the tokens of conversations, in which the assistant's turns are predicted."""
        if _GENERATION.search(self.tokenizer.get_chat_template()):
            return _each_chat(self._marked_chat, rows)
        return self._spans(_each_chat(self._written_chat, rows))

    def prompt(self, row: Mapping) -> tuple[dict, list[int]]:
        """Return a conversation without its last answer, and the ids that an answer to it follows."""
        row = with_tools(row)
        messages = self._messages(row, "messages")
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages or messages[-1]["role"] == "system":
            raise ValueError("asks nothing: no turn of a user is before an answer. Leave it out")
        ids = self._template(messages, row, add_generation_prompt=True, return_dict=True)["input_ids"]
        return {**row, "messages": messages}, ids

    def _opened(self, ids: list[int]) -> list[int]:
        return [*self.opening, *ids] if ids[:1] != self.opening else ids  # one may begin so by itself

    def _marked_chat(self, row: Mapping) -> tuple[list[int], np.ndarray]:
        messages = self._messages(row, "messages")
        how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        made = self._template(messages, row, **how)
        learnt = np.array(made["assistant_masks"], bool)
        _some(learnt.nonzero()[0])
        return made["input_ids"], learnt

    def _written_chat(self, row: Mapping) -> tuple[str, list[tuple[int, int]]]:
        """Return a conversation as text, and where the assistant's turns begin and end in it."""
        messages = self._messages(row, "messages")
        whole, spans = self._template(messages, row, tokenize=False), []
        if messages[0]["role"] == "assistant":
            raise ValueError("begins with a turn of the assistant, before which nothing is asked. Leave it out")
        for number, turn in enumerate(messages):
            if turn["role"] == "assistant":
                before = self._template(messages[:number], row, tokenize=False, add_generation_prompt=True)
                spans.append((self._prefix(before, whole), self._end(messages, number, row, whole)))
        return whole, _some(spans)

    def _end(self, messages: list[dict], number: int, row: Mapping, whole: str) -> int:
        """Return where a turn ends in a conversation, which may write it in another way than as the last one: without thoughts.

        Then the end is told by what follows two other contents: as the last turn its own end, here that and all other turns.
        """
        through = self._template(messages[: number + 1], row, tokenize=False)
        if whole.startswith(through) or number + 1 == len(messages):
            return self._prefix(through, whole)
        endings = []
        for turns in (messages[: number + 1], messages):
            written = ([*turns[:number], {**turns[number], "content": content}, *turns[number + 1 :]] for content in "ab")
            first, second = (self._template(turn, row, tokenize=False)[::-1] for turn in written)
            endings.append(os.path.commonprefix([first, second])[::-1])
        own, rest = endings
        split = own and rest.startswith(own) and whole.endswith(rest)
        return len(whole) - len(rest) + len(own) if split else self._prefix(through, whole)

    def _written_pair(self, row: Mapping) -> tuple[str, list[tuple[int, int]]]:
        if isinstance(row["prompt"], str) or isinstance(row["completion"], str):
            raise ValueError("has a prompt and a completion that are not both messages. Leave it out")
        prompt, completion = self._messages(row, "prompt"), self._messages(row, "completion")
        if completion[0]["role"] != "assistant":
            raise ValueError("has a completion that does not begin with a turn of the assistant. Leave it out")
        whole = self._template([*prompt, *completion], row, tokenize=False)
        before = self._template(prompt, row, tokenize=False, add_generation_prompt=True)
        return whole, [(self._prefix(before, whole), len(whole))]

    def _messages(self, row: Mapping, column: str) -> list[dict]:
        return read_messages(row[column], self.tokenizer.get_chat_template(tools=row.get("tools")), _name(self.tokenizer))

    def _template(self, messages: list[dict], row: Mapping, **how: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, tools=row.get("tools"), **how)
        except Exception as error:  # whatever a template raises
            whole = all("content" in turn for turn in messages)
            way = "Leave it out" if whole else 'Give calls of tools the content "", or leave the document out'
            raise ValueError(
                f"is refused by the chat template of {_name(self.tokenizer)}: {one_line(error).rstrip('.')}. {way}"
            ) from error

    def _prefix(self, part: str, whole: str) -> int:
        if not whole.startswith(part):
            raise ValueError(f"cannot be split into turns: the chat template of {_name(self.tokenizer)} writes a turn "
                             "in another way once more follow. Give it one that marks answers by {% generation %}")  # fmt: skip
        return len(part)

    def _spans(self, texts: Sequence[tuple[str, list[tuple[int, int]]]]) -> "Documents":
        """Tokenize texts, and learn the tokens with a character in one of their spans."""
        made = self.tokenizer([text for text, _ in texts], return_offsets_mapping=True, **_PLAIN)
        documents = []
        for ids, offsets, (_, spans) in zip(made["input_ids"], made["offset_mapping"], texts, strict=True):
            first, last = np.array(offsets, int).reshape(-1, 2).T
            learnt = np.zeros(len(ids), bool)
            for begin, end in spans:
                learnt |= (last > begin) & (first < end)
            documents.append((ids, learnt))
        return documents


Documents = list[tuple[Sequence[int], np.ndarray | None]]
# What a row holds, by the column that says so.
ENCODERS: dict[str, Callable[[Encoder, Sequence[Mapping]], Documents]] = {
    "text": Encoder.texts,
    "messages": Encoder.chats,
    "completion": Encoder.pairs,
    "input_ids": Encoder.ready,
}


def small_dtype(count: int) -> type:
    """Return the type of two or four bytes that holds so many numbers from 0 on."""
    return np.uint16 if count <= 2**16 else np.uint32


def id_dtype(tokenizer: PreTrainedTokenizerBase) -> type:
    """Return the type of two or four bytes that holds all ids of a tokenizer, some of which may be left out."""
    return small_dtype(max(tokenizer.get_vocab().values()) + 1)


def kind_of(columns: Sequence[str]) -> str:
    """Return what rows hold, one of `ENCODERS`, by their columns."""
    for kind in ENCODERS:
        if kind in columns:
            return kind
    raise ValueError(
        f"the columns {', '.join(columns)} hold no documents: want text, messages, prompt and completion, or input_ids"
    )


def is_chat(columns: Sequence[str], row: Mapping) -> bool:
    """Return whether a row of these columns holds messages: a conversation, or a prompt of such with its completion."""
    kind = kind_of(columns)
    return kind == "messages" or (kind == "completion" and not isinstance(row.get("prompt"), str))


def has_labels(columns: Sequence[str]) -> bool:
    """Return whether some tokens of rows with these columns are not predicted."""
    return kind_of(columns) in ("messages", "completion") or any(mask in columns for mask in MASKS[:3])


def check_encoder(columns: Sequence[str], row: Mapping, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer that cannot say which tokens of a chat are answers."""
    if not has_labels(columns) or kind_of(columns) == "input_ids":
        return
    if not tokenizer.is_fast:
        raise ValueError(
            f"{name} holds chats or completions, whose tokens only a fast tokenizer places: {_name(tokenizer)} is none"
        )
    if is_chat(columns, row) and not tokenizer.chat_template:
        raise ValueError(
            f"{name} holds chats, and {_name(tokenizer)} has no chat template: give it one, or write the chats as text"
        )


class _RowError(Exception):
    pass


def _each(number: int, encode: Callable, *args: Any) -> Any:
    try:
        return encode(*args)
    except ValueError as error:
        raise _RowError(number, str(error)) from error


def _each_chat(encode: Callable[[Mapping], Any], rows: Sequence[Mapping]) -> list:
    """Encode conversations, with their tools as templates read them."""
    return [_each(number, lambda row: encode(with_tools(row)), row) for number, row in enumerate(rows)]


def _some(learnt: Sequence) -> Sequence:
    """Return what of a conversation is learnt, its turns or its tokens, unless there is none."""
    if not len(learnt):
        raise ValueError("has no turn of the assistant, so nothing in it is learnt. Leave it out")
    return learnt


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or "the tokenizer"
