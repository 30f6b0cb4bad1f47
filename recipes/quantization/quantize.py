# /// script
# requires-python = ">=3.10"
# dependencies = ["llmcompressor", "hf_minitron"]
# ///
"""Quantize a student with llm-compressor, for vLLM: a recipe of that library applied to a folder, into another one.

README.md has the commands.
"""

import argparse
from pathlib import Path

from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_minitron import load_text, token_blocks


def main() -> None:
    """Quantize a model and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the student's folder")
    parser.add_argument("--scheme", type=Path, required=True, help="a recipe of llm-compressor")
    parser.add_argument("--text", help="calibration text, for schemes that need it: that of distillation")
    parser.add_argument("--samples", type=int, default=512, help="packed sequences of it (default 512)")
    parser.add_argument("--block-size", type=int, default=2048, help="tokens of each (default 2048)")
    parser.add_argument("--output", type=Path, help="where to (default: beside the model, with the scheme's name)")
    args = parser.parse_args()
    output = args.output or args.model.with_name(f"{args.model.name}-{args.scheme.stem}")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    calibration = None
    if args.text:
        blocks = token_blocks(
            load_text(args.text), tokenizer, block_size=args.block_size, max_tokens=args.samples * args.block_size
        )
        ids = [[int(token) for token in block["input_ids"]] for block in blocks]
        calibration = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(block) for block in ids]})
    oneshot(model=model, recipe=str(args.scheme), dataset=calibration, num_calibration_samples=args.samples,
            max_seq_length=args.block_size)  # fmt: skip
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"Quantized: {output}")


if __name__ == "__main__":
    main()
