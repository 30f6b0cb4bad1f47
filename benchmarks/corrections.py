"""What corrections are worth right after pruning: held-out perplexity beside plain slicing of the same scores, in one run.

    python benchmarks/corrections.py --calibration ../shared/data/text/c4_1.jsonl --held-out ../shared/data/text/c4_2.jsonl

Calibrates once, then prunes every shape twice and reads the same held-out blocks; the ratio is that of the perplexities. The
body is all parameters but the embedding.
"""

import argparse
from pathlib import Path

import figure
import torch
from transformers import AutoTokenizer

from hf_minitron import Architecture, calibrate, load_text, make_plan, prune_model, token_blocks
from hf_minitron.checkpoint.checkpoint import load_model
from hf_minitron.evaluation.text import perplexity
from hf_minitron.importance.residuals import read_residuals
from hf_minitron.memory import keep_freed_memory
from hf_minitron.pruning.compensate import DEFAULT_CORRECTIONS

# A name, the target and the corrections beyond the default.
CASES = [
    ("ffn 768", {"ffn": 768}, ()),
    ("hidden 448, tied", {"hidden": 448}, ()),
    ("hidden 448, rotated and untied", {"hidden": 448}, ("rotation",)),
    ("heads 9 to 6", {"heads": 6, "kv_heads": 3}, ()),
    ("22 of 30 layers, merged", {"layers": 22}, ("layer_merge",)),
    ("hidden 504, ffn 1152", {"hidden": 504, "ffn": 1152}, ()),
    ("all axes, half of the body", {"layers": 27, "hidden": 480, "ffn": 960, "heads": 6, "kv_heads": 3}, ("layer_merge",)),
]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="~/.cache/hf_minitron/SmolLM2-135M-Instruct")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--held-out", required=True, nargs="+")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--held-out-tokens", type=int, default=16_384)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path, help="where to write the figures for the README")
    args = parser.parse_args()
    keep_freed_memory()
    model = load_model(args.model, getattr(torch, args.dtype))
    tokenizer = AutoTokenizer.from_pretrained(Path(args.model).expanduser())
    blocks = token_blocks(load_text(args.calibration), tokenizer, 512, args.tokens, seed=0)
    texts = {Path(t).stem: token_blocks(load_text(t), tokenizer, 512, args.held_out_tokens, seed=1) for t in args.held_out}
    shape, results = Architecture.of(model.config).shape, {}
    statistics = calibrate(model, blocks, moments=True)
    for name, target, more in CASES:
        plan = make_plan(statistics.scores, shape, shape.cut_to(target))
        residuals = read_residuals(model, blocks, plan) if "layers" in target else None
        plain = prune_model(model, plan)
        corrected = prune_model(model, plan, statistics, (*DEFAULT_CORRECTIONS, *more), residuals)
        for text, held_out in texts.items():
            before, after = (perplexity(student, held_out).value for student in (plain, corrected))
            results[name, text] = after / before
            print(f"{name:32} {text:14} {before:9.1f} -> {after:9.1f}  {after / before:.2f}", flush=True)
    first, *_ = texts
    result = ", ".join(f"{name}: {ratio:.2f}" for (name, text), ratio in results.items() if text == first)
    figure.save(args.json, "perplexity right after pruning, corrected over plain", "benchmarks/corrections.py", result)


if __name__ == "__main__":
    main()
