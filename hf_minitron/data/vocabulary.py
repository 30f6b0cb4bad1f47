"""Whether two tokenizers are the same for the ids that models have, and whether a text keeps to these ids."""

import json
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_minitron.architecture.config import text_config

# What tokenizers with the same tokens may split in different ways: case, accents, spaces, digits, scripts, signs.
PROBE = (
    "The Quick brown fox's 12,345.678 jumps  over\tthe lazy dog!\n\n    def f(x_1): return x**2 # ok\r\n"
    "caf\u00e9 cafe\u0301 \ufb01ne \u2460 na\u00efve \u00a0stra\u00dfe \u4f60\u597d\uff0c\u4e16\u754c "
    "\u043f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947 "
    "\ud55c\uad6d\uc5b4 \U0001f600\U0001f468\u200d\U0001f469 </a> $x_i$ trailing  "
)


def difference(
    first: PreTrainedTokenizerBase,
    second: PreTrainedTokenizerBase,
    vocab_size: int | None = None,
    names: tuple[str, str] = ("the first", "the second"),
) -> str:
    """Return how two tokenizers differ; an empty text when they give the same ids.

    Tokens whose ids no model has (a sign for images, a padding token that was added behind the vocabulary) do not count. Equal
    tokens are not enough: merges, normalizer and pre-tokenizer decide which of them a text becomes. What a tokenizer adds
    around a text does not matter, for texts are tokenized without it.

    Args:
        first (`PreTrainedTokenizerBase`): A tokenizer.
        second (`PreTrainedTokenizerBase`): Another one.
        vocab_size (`int`, *optional*): Ids from here on do not count; the smaller of the models' vocabularies.
        names (`tuple[str, str]`, *optional*): What they are called.
    """
    ours, theirs = (
        {token: index for token, index in tokenizer.get_vocab().items() if vocab_size is None or index < vocab_size}
        for tokenizer in (first, second)
    )
    different = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if different:
        ids = [f"{side.get(different[0])} ({name})" for side, name in zip((ours, theirs), names, strict=True)]
        return f"{len(different):,} tokens differ, such as {different[0]!r} with id {' and '.join(ids)}"
    rules = [_rules(tokenizer) for tokenizer in (first, second)]
    if all(rules):
        unlike = [part for part in rules[0] if rules[0][part] != rules[1][part]]
        return f"they have the same tokens, but another {unlike[0]}" if unlike else ""
    probes = [tokenizer(PROBE, add_special_tokens=False)["input_ids"] for tokenizer in (first, second)]
    return "" if probes[0] == probes[1] else "they have the same tokens, but split a text in different ways"


def _rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """Return what a fast tokenizer makes tokens by; `None` of one in Python, which can only be tried."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    state = json.loads(backend.to_str())
    model = state["model"]
    scores = model.get("vocab") if isinstance(model.get("vocab"), list) else None  # of a unigram model
    parts = {"normalizer": state["normalizer"], "pre_tokenizer": state["pre_tokenizer"], "model type": model.get("type")}
    return parts | {"list of merges": model.get("merges"), "scores": scores}


def teacher_ids(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, teacher_size: int, student_size: int
) -> list[int]:
    """Return the teacher's ids of the tokens of a student that has some of them, in the order of the student's ids.

    Args:
        teacher (`PreTrainedTokenizerBase`): The teacher's tokenizer.
        student (`PreTrainedTokenizerBase`): The student's, cut out of it.
        teacher_size (`int`): Of the teacher's vocabulary.
        student_size (`int`): Of the student's; its ids without a token are those of the teacher that have none.

    Raises:
        ValueError: for a student with tokens that the teacher lacks, or with other rules.
    """
    theirs, ours = teacher.get_vocab(), {index: token for token, index in student.get_vocab().items() if index < student_size}
    rules = [_rules(tokenizer) or {} for tokenizer in (teacher, student)]
    unlike = [part for part in ("normalizer", "pre_tokenizer", "model type") if rules[0].get(part) != rules[1].get(part)]
    unknown = sorted(token for token in ours.values() if theirs.get(token, teacher_size) >= teacher_size)
    free = sorted(set(range(teacher_size)) - set(theirs.values()))[: student_size - len(ours)]
    if unknown or unlike or len(free) < student_size - len(ours):
        reason = f"it has no {unknown[0]!r}" if unknown else f"it has another {unlike[0]}" if unlike else "it has fewer ids"
        raise ValueError(f"The student's vocabulary of {student_size:,} is no part of the teacher's of {teacher_size:,}: "
                         f"{reason}. Distill from the model that it was cut out of, or one with its tokenizer")  # fmt: skip
    rest = iter(free)
    return [theirs[ours[index]] if index in ours else next(rest) for index in range(student_size)]


def check_ids(blocks: Dataset, vocab_size: int, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Refuse blocks with ids that a model does not have.

    Args:
        blocks (`Dataset`): `input_ids` per row.
        vocab_size (`int`): The model's.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Names the token in the error.
    """
    for rows in blocks.with_format("numpy").iter(batch_size=256):
        for ids in rows["input_ids"]:
            check_row_ids(ids, vocab_size, tokenizer)


def check_row_ids(ids: Any, vocab_size: int, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Refuse a row of ids, a tensor or an array, with one that a model does not have."""
    for wrong in (int(ids.max()), int(ids.min())) if len(ids) else ():
        if not 0 <= wrong < vocab_size:
            token = f" ({tokenizer.convert_ids_to_tokens(wrong)!r})" if tokenizer and wrong >= 0 else ""
            raise ValueError(f"The text holds id {wrong:,}{token}, but the model's vocabulary has {vocab_size:,}: take it "
                             "out of the text, or use the model's own tokenizer")  # fmt: skip


def check_vocabularies(models: Mapping[str, Any], tokenizer: object, blocks: object = None) -> int:
    """Refuse models whose vocabularies differ by more than padding and added tokens that a text does not use.

    Args:
        models (`Mapping[str, Any]`): Teacher and student, or the student alone.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Theirs; anything else that processes is not looked at.
        blocks (`Dataset`, *optional*): The text; that of a stream is looked at batch by batch.

    Returns:
        `int`: The size of the smallest vocabulary.
    """
    sizes = {name: text_config(model.config).vocab_size for name, model in models.items()}
    least = min(sizes.values())
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or len(tokenizer) <= least:
        return least
    added = tokenizer.get_added_vocab()
    beyond = sorted(token for token, index in tokenizer.get_vocab().items() if index >= least and token not in added)
    if beyond:
        raise ValueError(
            f"The tokenizer has {len(tokenizer):,} tokens, but vocabularies are {sizes}: they differ by more than "
            f"padding ({beyond[0]!r} is beyond). Use a teacher and a student with the same tokenizer"
        )
    if isinstance(blocks, Dataset):
        check_ids(blocks, least, tokenizer)
    return least
