"""`hf-minitron export`: a model folder for other runtimes."""

import argparse
from collections.abc import Mapping
from pydoc_data import topics
from typing import Any

from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from hf_minitron.checkpoint.checkpoint import resolve
from hf_minitron.data.packing import token_blocks
from hf_minitron.data.texts import load_text
from hf_minitron.errors import RecipeError, told
from hf_minitron.export.compare import export_rows
from hf_minitron.export.export import FACTS, Texts, check_export, export_model, file_name
from hf_minitron.pruning.export import export as export_stock
from hf_minitron.tables import markdown_table
from hf_minitron.terminal import quiet_libraries

BLOCK = 512
PYTHON = "Python's documentation"  # which every machine has


def main(args: argparse.Namespace, overrides: Mapping[str, Any]) -> int:
    """Export a model and print what came of it; return the command's exit code."""
    formats = [format for format in args.to if format != "stock"]
    with told():
        if overrides:
            raise RecipeError(f"--{next(iter(overrides))} is not an option of export")
        folder = resolve(args.model)
        config = AutoConfig.from_pretrained(folder)
        if formats:
            check_export(config, formats, args.types)
    quiet_libraries()
    if "stock" in args.to:
        export_stock(folder, args.output / "stock")
        print(f"{args.output / 'stock'}: a stock checkpoint with equal logits")
    if formats:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = read_texts(tokenizer, args.text, args.tokens, getattr(config, "max_position_embeddings", None) or BLOCK)
        facts = export_model(folder, args.output, file_name(str(args.model)), texts, formats, args.types)
        print(f"{facts_text(facts)}\nFiles and {FACTS}: {args.output}")
    return 0


def read_texts(tokenizer: PreTrainedTokenizerBase, text: str | None, tokens: int, positions: int) -> Texts:
    """Return the texts that exports are calibrated on and measured on: every other block of one text each.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        text (`str`, *optional*): As for `load_text`; Python's documentation when left out.
        tokens (`int`): Of each.
        positions (`int`): Tokens that the model reads at most.
    """
    documents = (
        load_text(text) if text else Dataset.from_dict({"text": [topics.topics[name] for name in sorted(topics.topics)]})
    )
    blocks = token_blocks(documents, tokenizer, min(BLOCK, positions), 2 * tokens, seed=0)["input_ids"]
    blocks = [list(map(int, ids)) for ids in blocks]
    return Texts(text or PYTHON, blocks[::2], blocks[1::2])


def facts_text(facts: Mapping[str, Any]) -> str:
    """Say what was measured of exports, as a table."""
    return f"{markdown_table(export_rows(facts))}\n\nOn {facts['tokens']:,} tokens of {facts['text']}."
