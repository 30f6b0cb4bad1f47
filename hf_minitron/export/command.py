"""`hf-minitron export`: a model folder for other runtimes."""

import argparse
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from hf_minitron.architecture.config import text_config
from hf_minitron.checkpoint.checkpoint import resolve
from hf_minitron.data.mixture import Source
from hf_minitron.errors import RecipeError, told
from hf_minitron.evaluation.wording import scored
from hf_minitron.export.compare import export_rows
from hf_minitron.export.export import FACTS, check_export, export_model, file_name
from hf_minitron.export.texts import BLOCK, PYTHON, Texts, read_blocks
from hf_minitron.pruning.export import export as export_stock
from hf_minitron.tables import markdown_table
from hf_minitron.terminal import quiet_libraries


def main(args: argparse.Namespace, overrides: Mapping[str, Any]) -> int:
    """Export a model and print what came of it; return the command's exit code."""
    formats = [format for format in args.to if format != "stock"]
    with told():
        if overrides:
            raise RecipeError(f"--{next(iter(overrides))} is not an option of export")
        if args.tokens < 2:
            raise RecipeError(f"tokens: {args.tokens} must be at least 2, of which one is predicted")
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
        positions = getattr(text_config(config), "max_position_embeddings", None) or BLOCK
        sources = [Source(args.text)] if args.text else []
        blocks, labels = read_blocks(sources, tokenizer, min(positions, args.tokens), 2 * args.tokens)
        texts = Texts(args.text or PYTHON, blocks[::2], blocks[1::2], labels[::2])
        facts = export_model(folder, args.output, file_name(str(args.model)), texts, formats, args.types)
        print(f"{facts_text(facts)}\nFiles and {FACTS}: {args.output}")
    return 0


def facts_text(facts: Mapping[str, Any]) -> str:
    """Say what was measured of exports, as a table."""
    return f"{markdown_table(export_rows(facts))}\n\nOn {scored(facts['tokens'], facts['answers'])} of {facts['text']}."
