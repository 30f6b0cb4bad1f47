"""Cutting the vocabulary of a model's folder: which tokens stay, and the tokenizer of these."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import GENERATION_CONFIG_NAME, PROCESSOR_NAME

from hf_minitron.architecture.config import NewIds, named_ids
from hf_minitron.checkpoint.model_files import resolve
from hf_minitron.data.tokens import TOKENIZER_FILE, Tokens, token_scores
from hf_minitron.data.vocabulary import PROBE
from hf_minitron.shape import Shape
from hf_minitron.statistics import Statistics

# Entries of generation_config.json in which ids stand among other numbers.
OTHER_IDS = ("forced_decoder_ids", "sequence_bias")
# The files beside a model in which entries may name tokens by their ids.
NAMING_FILES = (TOKENIZER_CONFIG_FILE, GENERATION_CONFIG_NAME, f"*{PROCESSOR_NAME}")
# What is stored beside tokenizer.json and says the same of all tokens.
OLDER_FILES = ("vocab*", "merges.txt", "added_tokens.json", "*.model", "tokenizer.[!j]*")


def vocab_scores(model: str | Path, counts: Tensor, count: int) -> Tensor:
    """Return `token_scores` of a model's folder or Hub id, in which the tokens that its configs name stay."""
    folder = resolve(model)
    config, naming = AutoConfig.from_pretrained(folder), _naming(folder)
    generation = folder / GENERATION_CONFIG_NAME
    if unread := [name for name in OTHER_IDS if naming.get(generation, {}).get(name)]:
        raise ValueError(f"vocab: {unread[0]} in {generation} names tokens by their ids, which would be others; take it out, "
                         "or leave vocab out")  # fmt: skip
    named = named_ids(config.to_dict(), *naming.values())
    return token_scores(folder, counts, count, {index for index in named if index < len(counts)})


def scores_for(model: str | Path, statistics: Statistics, before: Shape, after: Shape) -> Mapping[str, Tensor]:
    """Return the scores of a cut: those of statistics and, where the vocabulary is cut, those of its tokens.

    Raises:
        ValueError: for statistics without the counts of tokens.
    """
    if after.sizes.get("vocab") == before.sizes.get("vocab"):
        return statistics.scores
    if statistics.token_counts is None or len(statistics.token_counts) != before["vocab"]:
        raise ValueError("vocab: the statistics do not count the tokens of this model's text; score the model again")
    return {**statistics.scores, "vocab": vocab_scores(model, statistics.token_counts, after["vocab"])}


def cut_tokenizer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], size: int) -> PreTrainedTokenizerBase:
    """Return a tokenizer of some tokens, which writes every text as one with the others does.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The teacher's.
        ids (`Sequence[int]`): What stays, `plan.keep["vocab"]`.
        size (`int`): The teacher's vocabulary, `plan.before["vocab"]`.
    """
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        cut_tokenizer_files(Path(folder), ids, size)
        return AutoTokenizer.from_pretrained(folder)


def cut_tokenizer_files(folder: Path, ids: Sequence[int], size: int) -> None:
    """Write the tokenizer of a folder, and what its other small files say of tokens, again for some tokens.

    Raises:
        ValueError: for a tokenizer that cannot be cut, or writes another text then.
    """
    new, before = NewIds(ids, size), AutoTokenizer.from_pretrained(folder)
    _write(folder / TOKENIZER_FILE, Tokens.of(folder).cut(ids, size))
    for path, content in _naming(folder).items():
        if added := content.get("added_tokens_decoder"):
            content["added_tokens_decoder"] = {str(new(int(index))): token for index, token in added.items()}
        _write(path, content | new.changes(content))
    for path in {path for pattern in OLDER_FILES for path in folder.glob(pattern)}:
        path.unlink()
    after = AutoTokenizer.from_pretrained(folder)
    texts = [side.decode(side(PROBE, add_special_tokens=False)["input_ids"]) for side in (before, after)]
    if texts[0] != texts[1]:
        raise ValueError(f"vocab: {type(before).__name__} with {len(ids):,} tokens gives another text back than with all: "
                         "leave vocab out")  # fmt: skip


def _naming(folder: Path) -> dict[Path, dict[str, Any]]:
    """Return the content of the files beside a model that may name tokens."""
    paths = sorted({path for pattern in NAMING_FILES for path in folder.glob(pattern)})
    return {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
