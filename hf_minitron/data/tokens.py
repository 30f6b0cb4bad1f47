"""The tokens of a tokenizer: which of them a text needs, and a tokenizer of these alone, which still writes every text.

What is always kept: added and special tokens, those that a config names, and what any text can be written with: bytes, or
single characters where a tokenizer has no bytes. Beside these a token of BPE needs the two parts that it is merged of.
"""

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_minitron.architecture.config import NewIds
from hf_minitron.shape import ShapeError

TOKENIZER_FILE = "tokenizer.json"
MODELS = ("BPE", "Unigram", "WordPiece")
BYTE = re.compile("<0x[0-9A-F]{2}>")


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of a `tokenizer.json`.

    Args:
        state (`Mapping[str, Any]`): Its content.
    """

    state: Mapping[str, Any]

    @classmethod
    def of(cls, folder: str | Path) -> "Tokens":
        """Read the tokenizer of a folder.

        Raises:
            ValueError: for one that cannot be cut: without `tokenizer.json`, or of another kind than `MODELS`.
        """
        file = Path(folder) / TOKENIZER_FILE
        if not file.is_file():
            raise ValueError(f"vocab: {folder} has no {TOKENIZER_FILE}, by which tokens are cut; save a fast tokenizer with it "
                             "(AutoTokenizer.from_pretrained, save_pretrained), or leave vocab out")  # fmt: skip
        state = json.loads(file.read_text(encoding="utf-8"))
        kind = state["model"].get("type") or ("BPE" if "merges" in state["model"] else None)
        if kind not in MODELS:
            raise ValueError(f"vocab: the tokenizer is a {kind}, which cannot write a text with fewer tokens; those of "
                             f"{', '.join(MODELS)} can. Leave vocab out")  # fmt: skip
        return cls(state)

    @cached_property
    def ids(self) -> dict[str, int]:
        """The tokens of the model with their ids; added ones are beside them."""
        vocab = self.state["model"]["vocab"]
        return dict(vocab) if isinstance(vocab, Mapping) else {token: index for index, (token, _) in enumerate(vocab)}

    @cached_property
    def names(self) -> dict[int, str]:
        """The tokens by id, added ones too."""
        added = {token["id"]: token["content"] for token in self.state["added_tokens"]}
        return {index: token for token, index in self.ids.items()} | added

    @cached_property
    def always(self) -> set[int]:
        """The ids that cannot go."""
        model, found = self.state["model"], {token["id"] for token in self.state["added_tokens"]}
        found |= _ids_in(self.state["post_processor"]) | {(self.state.get("padding") or {}).get("pad_id")}
        found |= {model.get("unk_id"), self.ids.get(model.get("unk_token"))}
        found |= {index for token, index in self.ids.items() if self._writes_any_text(token)}
        return found - {None}

    def _writes_any_text(self, token: str) -> bool:
        """Return whether some text could not be written without a token."""
        prefix, text = self._plain(token)
        if self._has_bytes:
            return bool(BYTE.fullmatch(token)) or text in self._replaced
        if len(text) == 1:
            return True
        if self.state["model"].get("type") == "BPE":  # it is merged of others
            return False
        starts = [prefix, *[self._prefix] * (len(text) - 1)]
        return not all(start + character in self.ids for start, character in zip(starts, text, strict=True))

    @cached_property
    def _has_bytes(self) -> bool:
        """Whether bytes stand in for characters that are no tokens."""
        return bool(self.state["model"].get("byte_fallback")) and sum(map(bool, map(BYTE.fullmatch, self.ids))) == 256

    @property
    def _prefix(self) -> str:
        """What the tokens inside of a word begin with."""
        return self.state["model"].get("continuing_subword_prefix") or ""

    def _plain(self, token: str) -> tuple[str, str]:
        """Return the prefix of a token inside of a word, and the text of the token without it."""
        prefix, suffix = self._prefix, self.state["model"].get("end_of_word_suffix") or ""
        prefix = prefix if token.startswith(prefix) and token != prefix else ""
        text = token.removeprefix(prefix)
        return prefix, text.removesuffix(suffix) if text != suffix else text

    @cached_property
    def _replaced(self) -> set[str]:
        """The characters that stand for others, such as the one for a space, which bytes do not stand in for."""
        parts = (self.state[part] for part in ("normalizer", "pre_tokenizer", "decoder"))
        return {text for part in parts for text in _texts(part) if len(text) == 1}

    @cached_property
    def _merges(self) -> dict[tuple[str, str], int]:
        """The merges of BPE by their rank."""
        merges = self.state["model"].get("merges") or ()
        return {tuple(merge.split(" ") if isinstance(merge, str) else merge): rank for rank, merge in enumerate(merges)}

    def _merged(self, pair: tuple[str, str]) -> str:
        return pair[0] + pair[1].removeprefix(self._prefix)

    @cached_property
    def _pairs(self) -> dict[str, list[tuple[str, str]]]:
        """The pairs that every token can be merged of, those of the first merges first."""
        found: dict[str, list[tuple[str, str]]] = {}
        for pair in self._merges:
            found.setdefault(self._merged(pair), []).append(pair)
        return found

    def _parts(self, token: str) -> tuple[str, ...]:
        """Return what a token is merged of when it is written by itself; nothing where it is not merged."""
        pairs = self._pairs.get(token, ())
        if len(pairs) < 2 or self._prefix or self.state["model"].get("end_of_word_suffix"):
            return pairs[0] if pairs else ()
        symbols = list(token)
        while len(symbols) > 2:
            ranked = [(self._merges[pair], at) for at, pair in enumerate(zip(symbols, symbols[1:], strict=False))
                      if pair in self._merges]  # fmt: skip
            if not ranked:
                return ()
            _, at = min(ranked)
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        return tuple(symbols) if tuple(symbols) in self._merges else ()

    def in_order(self, counts: Sequence[int], named: Iterable[int] = ()) -> Iterator[tuple[int, bool]]:
        """Yield the ids of a model as they are needed, each behind its parts, and whether it always stays.

        First those that always stay, then by falling count; of those that the text does not have the first ones, which
        tokenizers learn from the commonest words; at last ids without a token.

        Args:
            counts (`Sequence[int]`): How often each id of the model is in the text.
            named (`Iterable[int]`): Ids that stay as well.
        """
        size, seen = len(counts), set()

        def with_parts(index: int) -> Iterator[int]:
            if index in seen or index >= size:
                return
            seen.add(index)
            for part in self._parts(self.names.get(index, "")):
                yield from with_parts(self.ids[part])
            yield index

        for index in sorted({*self.always, *named}):
            yield from ((found, True) for found in with_parts(index))
        for index in sorted(range(size), key=lambda index: (-counts[index], index not in self.names, index)):
            yield from ((found, False) for found in with_parts(index))

    def cut(self, ids: Sequence[int], size: int) -> dict[str, Any]:
        """Return the content of the tokenizer of some ids.

        Args:
            ids (`Sequence[int]`): What stays, ascending.
            size (`int`): Of the vocabulary before.

        Raises:
            ValueError: for ids without a token that cannot go, or without the parts of another one.
        """
        new, stay = NewIds(ids, size), {*ids, *(index for index in self.names if index >= size)}
        needed = {*self.always, *(self.ids[part] for index in ids for part in self._parts(self.names.get(index, "")))}
        if missing := sorted(needed - stay):
            raise ValueError(f"vocab: token {self.names[missing[0]]!r} (id {missing[0]}) and {len(missing) - 1} others are not "
                             "kept, without which some text cannot be written; choose by token_scores")  # fmt: skip
        state = copy.deepcopy(dict(self.state))
        model, kept = state["model"], {token: index for token, index in self.ids.items() if index in stay}
        if isinstance(model["vocab"], list):
            model["vocab"] = [model["vocab"][index] for index in sorted(kept.values())]
        else:
            model["vocab"] = {token: new(index) for token, index in kept.items()}
        if model.get("merges"):
            merges = zip(model["merges"], self._merges, strict=True)
            model["merges"] = [merge for merge, pair in merges if {*pair, self._merged(pair)} <= kept.keys()]
        if model.get("unk_id") is not None:
            model["unk_id"] = new(model["unk_id"])
        for token in state["added_tokens"]:
            token["id"] = new(token["id"])
        if state.get("padding"):
            state["padding"]["pad_id"] = new(state["padding"]["pad_id"])
        state["post_processor"] = _with_new_ids(state["post_processor"], new)
        return state


def token_scores(
    tokenizer: PreTrainedTokenizerBase | str | Path, counts: Tensor, count: int, named: Iterable[int] = ()
) -> Tensor:
    """Score tokens by how much a text needs them, for `make_plan`: the best so many can write every text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`, `str` or `Path`): The teacher's, or the folder that it lies in.
        counts (`Tensor` of shape `(vocab,)`): How often each token is in the text, `statistics.token_counts`.
        count (`int`): How many stay, `prune.target.vocab`.
        named (`Iterable[int]`, *optional*): Ids that stay as well, `named_ids(config.to_dict())`.

    Returns:
        `Tensor` of shape `(vocab,)`: 0 for those that go.

    Raises:
        ValueError: for a tokenizer that cannot be cut, or fewer tokens than always stay.
    """
    with TemporaryDirectory() as scratch:
        folder = tokenizer
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer.save_pretrained(folder := scratch)
        found = list(islice(Tokens.of(folder).in_order(counts.tolist(), named), max(count, 0) + 1))
        if len(found) > count and found[count][1]:
            floor = sum(always for _, always in Tokens.of(folder).in_order(counts.tolist(), named))
            raise ShapeError(f"vocab: {count:,} is fewer than the {floor:,} tokens that always stay: special and added ones, "
                             f"bytes or characters, and what a config names. Use {floor:,} or more")  # fmt: skip
    scores = torch.zeros(len(counts))
    for rank, (index, _) in enumerate(found[:count]):
        scores[index] = count - rank
    return scores


def _texts(content: Any) -> Iterator[str]:
    """Yield every text in some JSON."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, Mapping | list):
        for item in content.values() if isinstance(content, Mapping) else content:
            yield from _texts(item)


def _ids_in(processor: Any) -> set[int]:
    """Return the ids that a post-processor adds to a text."""
    found: set[int] = set()
    _with_new_ids(processor, lambda index: found.add(index) or index)
    return found


def _with_new_ids(processor: Any, new: Any) -> Any:
    """Return a post-processor with new ids: of templates `ids`, of BERT's and RoBERTa's `[token, id]`."""
    if isinstance(processor, Mapping):
        return {
            key: [new(index) for index in value] if key == "ids"
            else [value[0], new(value[1])] if key in ("sep", "cls") and isinstance(value, list)
            else _with_new_ids(value, new)
            for key, value in processor.items()
        }  # fmt: skip
    return [_with_new_ids(item, new) for item in processor] if isinstance(processor, list) else processor
