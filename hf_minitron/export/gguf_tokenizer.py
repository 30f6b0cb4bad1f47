"""A tokenizer as metadata of a GGUF file: tokens, merges or scores, special tokens, chat template."""

import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

# How text is split before merges are made, as tokenizer.json says it, and llama.cpp's name for it.
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CASES = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
          r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*")  # fmt: skip
SPLITS = {
    rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}": "llama-bpe",
    rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}": "qwen2",
    rf"{_CASES[0]}|{_CASES[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}": "tekken",
    rf"{_CASES[0]}{_ENDINGS}?|{_CASES[1]}{_ENDINGS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}": "gpt-4o",
}
PRE_TOKENIZERS = {
    ("ByteLevel regex",): "gpt-2",
    ("Digits", "ByteLevel regex"): "smollm",
    **{(pattern, "ByteLevel"): name for pattern, name in SPLITS.items()},
}
# llama.cpp takes a word that is a token as it is for some of these, as the tokenizer does with `ignore_merges`.
IGNORES_MERGES = {"llama-bpe": "dbrx"}  # and the name of the same split without that
# Kinds of tokens (`gguf.TokenType`).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPECIAL = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
           "pad_token": "padding_token_id"}  # fmt: skip


def tokenizer_metadata(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[str, Any]:
    """Return what llama.cpp reads of a tokenizer, by its keys.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A fast tokenizer: byte-level BPE, or BPE with byte fallback (SentencePiece's).
        vocab_size (`int`): Rows of the embedding; ids that the tokenizer has no token for get an unused one.

    Raises:
        ValueError: for another kind of tokenizer, and for a split of words that llama.cpp has no name for.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} has no tokenizer.json, from which the tokenizer of a GGUF file is made")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = state["model"], {token["id"]: token for token in state["added_tokens"]}
    byte_level = _splits(state["pre_tokenizer"])[-1:] in (["ByteLevel"], ["ByteLevel regex"])
    if model["type"] != "BPE" or not (byte_level or model.get("byte_fallback")):
        kind = model["type"] + (" without bytes" if model["type"] == "BPE" else "")
        raise ValueError(f"the tokenizer is {kind}, and GGUF files are written of byte-level BPE and BPE with byte fallback; "
                         "llama.cpp's own convert_hf_to_gguf.py may take it")  # fmt: skip
    ids = {id: token for token, id in model["vocab"].items()} | {id: token["content"] for id, token in added.items()}
    if max(ids) >= vocab_size:
        raise ValueError(f"the tokenizer has a token {max(ids)}, and the model {vocab_size} of them")
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    tokens = [ids.get(id, f"[PAD{id}]") for id in range(vocab_size)]
    unknown = model.get("unk_token")
    found = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            _kind(id, ids.get(id), added, unknown, not byte_level) for id in range(vocab_size)
        ],
        **(_byte_level(state, merges) if byte_level else _sentencepiece(tokenizer, tokens, merges)),
        **{f"tokenizer.ggml.{new}": tokenizer.convert_tokens_to_ids(token)
           for name, new in SPECIAL.items() if (token := getattr(tokenizer, name, None)) is not None},
        **_ends(tokenizer),
    }  # fmt: skip
    if isinstance(tokenizer.chat_template, str):
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found


def _byte_level(state: Mapping[str, Any], merges: list[tuple[str, str]]) -> dict[str, Any]:
    split = tuple(_splits(state["pre_tokenizer"]))
    name = PRE_TOKENIZERS.get(split)
    if name is None:
        raise ValueError(f"llama.cpp's name for this tokenizer's split of words is not known here: {' '.join(split)[:80]}")
    if name in IGNORES_MERGES and not state["model"].get("ignore_merges"):
        name = IGNORES_MERGES[name]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
    }


def _sentencepiece(tokenizer: PreTrainedTokenizerBase, tokens: list[str], merges: list[tuple[str, str]]) -> dict[str, Any]:
    """Scores stand for the order of merges: the earlier a token is made, the higher is its score."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [-float(ranks.get(token, len(merges))) for token in tokens],
        "tokenizer.ggml.add_space_prefix": first.startswith("▁"),
    }


def _kind(id: int, token: str | None, added: Mapping[int, Mapping[str, Any]], unknown: str | None, bytes_apart: bool) -> int:
    if token is None:
        return UNUSED
    if token == unknown:
        return UNKNOWN
    if id in added:
        return CONTROL if added[id]["special"] else USER_DEFINED
    return BYTE if bytes_apart and len(token) == 6 and token.startswith("<0x") else NORMAL


def _ends(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Return whether texts begin with the BOS token and end with the EOS token by themselves."""
    ids = tokenizer("a")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return {
        "tokenizer.ggml.add_bos_token": bos is not None and ids[0] == bos,
        "tokenizer.ggml.add_eos_token": eos is not None and len(ids) > 1 and ids[-1] == eos,
    }


def _splits(pre_tokenizer: Mapping[str, Any] | None) -> list[str]:
    """Return the steps of a pre-tokenizer, each as a word, or as its pattern."""
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in _splits(part)]
    kind = pre_tokenizer["type"]
    if kind == "ByteLevel" and not pre_tokenizer.get("add_prefix_space"):
        return ["ByteLevel regex" if pre_tokenizer.get("use_regex", True) else "ByteLevel"]
    if kind == "Split" and pre_tokenizer["behavior"] == "Isolated" and "Regex" in pre_tokenizer["pattern"]:
        return [pre_tokenizer["pattern"]["Regex"]]
    if kind == "Digits" and pre_tokenizer.get("individual_digits"):
        return ["Digits"]
    return [json.dumps(pre_tokenizer, ensure_ascii=False)]
