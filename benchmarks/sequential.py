"""What sequential least squares is worth right after pruning, by domain, and what it costs beside forward passes.

    python benchmarks/sequential.py --calibration ../shared/data/text/{c4_1,stackexchange,code}.jsonl \
        --held-out ../shared/data/text/{c4_2,stackexchange,code}.jsonl ~/.cache/hf_minitron/stdlib/held_out.jsonl

Prunes one shape plainly, with the default corrections, and with sequential least squares after these, calibrated on few tokens
and on more. Of a file that is in both lists, three of ten documents are held out. Weights are in bfloat16 where the processor
has it; times are processor times.
"""

import argparse
import json
import time
from pathlib import Path

import figure
import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoTokenizer

from hf_minitron import Architecture, calibrate, load_text, make_plan, prune_model, token_blocks
from hf_minitron.checkpoint.checkpoint import best_dtype, load_model
from hf_minitron.evaluation.text import perplexity
from hf_minitron.importance.sequential import sequential_least_squares
from hf_minitron.importance.taps import run_batch
from hf_minitron.memory import keep_freed_memory


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="~/.cache/hf_minitron/SmolLM2-135M-Instruct")
    parser.add_argument("--calibration", required=True, nargs="+", type=Path)
    parser.add_argument("--held-out", required=True, nargs="+", type=Path)
    parser.add_argument("--target", type=json.loads, default={"hidden": 504, "ffn": 1152})
    parser.add_argument("--tokens", type=int, nargs="+", default=[12_288, 65_536])
    parser.add_argument("--held-out-tokens", type=int, default=3_072, help="of each text")
    parser.add_argument("--json", type=Path, help="where to write the figures for the docs")
    parser.add_argument("--save", type=Path, help="a folder for the students")
    args = parser.parse_args()
    keep_freed_memory()
    model = load_model(args.model, best_dtype(torch.device("cpu")))  # as the stages do
    tokenizer = AutoTokenizer.from_pretrained(Path(args.model).expanduser())
    texts = {
        name_of(path): token_blocks(documents(path, args.calibration, 1), tokenizer, 512, args.held_out_tokens, seed=1)
        for path in args.held_out
    }
    shape, results = Architecture.of(model.config).shape, {}

    def measure(name: str, student) -> None:
        results[name] = {text: perplexity(student, held_out).value for text, held_out in texts.items()}
        print(f"{name:12}", *(f"{text} {value:8.1f}" for text, value in results[name].items()), flush=True)
        if args.save:
            student.save_pretrained(args.save / name)

    for tokens in args.tokens:
        each = tokens // len(args.calibration)
        parts = [token_blocks(documents(path, args.held_out, 0), tokenizer, 512, each, seed=0) for path in args.calibration]
        blocks = concatenate_datasets(parts)
        statistics = calibrate(model, blocks, moments=True, metric={"ffn": "contribution", "heads": "contribution"})
        plan = make_plan(statistics.scores, shape, shape.cut_to(args.target))
        student = prune_model(model, plan, statistics)
        if not results:
            measure("plain", prune_model(model, plan))
            measure("default corrections", student)
        passed = forward_pass(model, blocks)
        fitted = time.process_time()
        sequential_least_squares(model, student, plan, blocks, tokens)
        fitted = time.process_time() - fitted
        measure(f"sequential too, {len(blocks) * 512:,} tokens", student)
        print(f"{fitted:.0f} s of processor time, {fitted / passed:.1f} forward passes of the teacher", flush=True)
    rows = [
        f"{text}: {', '.join(f'{name} {of[text]:.1f}{beside(of, text, results)}' for name, of in results.items())}"
        for text in texts
    ]
    what = f"perplexity after sequential least squares, {', '.join(f'{axis} {size}' for axis, size in args.target.items())}"
    given = f"calibrated on text of {', '.join(map(name_of, args.calibration))}"
    given += f"; the default corrections with {args.tokens[0]:,} tokens"
    cost = f"{fitted / passed:.1f} times the processor time of a forward pass over the calibration text"
    figure.save(args.json, what, "benchmarks/sequential.py", "; ".join([*rows, given, cost]))


def beside(of: dict[str, float], text: str, results: dict[str, dict[str, float]]) -> str:
    """Say what share of the default corrections' perplexity a sequential fit has."""
    if of in (results["plain"], results["default corrections"]):
        return ""
    return f" ({of[text] / results['default corrections'][text]:.2f} of the default's)"


def name_of(path: Path) -> str:
    """Return what a text is called: a held-out part of a folder by the folder."""
    return f"{path.parent.name}, not calibrated on" if path.stem == "held_out" else path.stem


def documents(path: Path, others: list[Path], part: int) -> Dataset:
    """Return the documents of a file, of one that another list has, too, its own part."""
    found = load_text(str(path.expanduser()))
    return found.train_test_split(test_size=0.3, seed=0)[("train", "test")[part]] if path in others else found


def forward_pass(model, blocks: Dataset) -> float:
    """Return the processor time of a pass over the text."""
    start = time.process_time()
    with torch.inference_mode():
        for batch in blocks.with_format("torch").iter(4):
            run_batch(model, batch, torch.device("cpu"))
    return time.process_time() - start


if __name__ == "__main__":
    main()
