"""A text of one's own in a draft: how long it is, which of its splits are read for what, and whether they can be.

Each function imports `datasets`, which a draft of no such text does without.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from logging import CRITICAL
from pathlib import Path
from typing import Any

from hf_minitron.errors import told
from hf_minitron.planning.costs import value_of

TOKEN_BYTES = 4  # of text, about
COMPRESSED = 3  # bytes of text for one of a compressed file, about
HELD_OUT = ("test", "validation", "valid", "dev", "eval")  # how splits are called, or begin


def tokens_of(text: str) -> int | None:
    """Return about how many tokens the files of a text have to train on; `None` for one on the Hub.

    Args:
        text (`str`): As for `load_text`.

    Raises:
        ValueError: when there is no such text.
    """
    from hf_minitron.data.formats import text_files

    files = text_files(text)
    if files is None:
        return None
    if files[0].is_dir():
        inside = [
            file for file in files[0].rglob("*") if file.is_file() and not file.relative_to(files[0]).name.startswith(".")
        ]
        files = [file for file in inside if not _is_held_out(file.relative_to(files[0]))] or inside
    return max(sum(map(_bytes, files)) // TOKEN_BYTES, 1)


def _is_held_out(file: Path) -> bool:
    return any(part.startswith(HELD_OUT) for part in file.parts)


def _bytes(file: Path) -> int:
    """Return about how many bytes of text a file holds: of other kinds in a folder, such as a card, none."""
    from hf_minitron.data.formats import COMPRESSIONS, format_of

    if file.suffix == ".parquet":
        import pyarrow.parquet

        with suppress(pyarrow.ArrowException, OSError):  # whoever reads it says what is wrong
            footer = pyarrow.parquet.read_metadata(file)
            return sum(footer.row_group(number).total_byte_size for number in range(footer.num_row_groups))
    known = format_of(file) or file.suffix in (".arrow", ".bin")
    return file.stat().st_size * (COMPRESSED if file.suffix.lower() in COMPRESSIONS else 1) if known else 0


def splits_for(text: str) -> tuple[str, str | None]:
    """Return the split of a text that is trained on, and one that is held out; `None` where nobody knows of one."""
    from hf_minitron.data.texts import splits_of

    there = [str(split) for split in splits_of(text)]
    train = _called(there, ["train"]) or next(iter(there), "train")
    others, kind = [split for split in there if split != train], train.removeprefix("train")
    return train, _called(others, [name + kind for name in HELD_OUT]) or _called(others, HELD_OUT)


def _called(splits: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the split that is called as the first of some names that one is, or else begins so, as `train_sft` does."""
    found = [split for name in names for split in splits if split == name]
    found += [split for name in names for split in splits if split.startswith(name)]
    return next(iter(found), None)


def check_texts(recipe: Mapping[str, Any], folder: Path, path: Path) -> None:
    """Refuse local texts that the stages of a recipe will refuse, by their check.

    Args:
        recipe (`Mapping`): A draft.
        folder (`Path`): The model's; without a tokenizer only what needs none is checked.
        path (`Path`): Where the draft was written.

    Raises:
        RecipeError: naming the stage.
    """
    from datasets import logging
    from transformers import AutoTokenizer

    from hf_minitron.data.formats import text_files
    from hf_minitron.data.packing import check_first_block
    from hf_minitron.data.texts import load_text

    logging.set_verbosity(CRITICAL)  # of a broken file, which is told in one line
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
    for stage in ("score", "distill", "evaluate"):
        text, split, column = (value_of(recipe, stage, key) for key in ("text", "split", "text_column"))
        if text_files(text) is None:
            continue
        with told(f"{path} is written, but {stage} cannot read its text: "):
            if tokenizer:
                check_first_block(text, tokenizer, value_of(recipe, stage, "block_size"), None, split, column, streaming=True)
            else:
                load_text(text, split, column, streaming=True)
