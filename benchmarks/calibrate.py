"""What scoring costs: a calibration pass against a bare forward pass over the same blocks, in one run.

    python benchmarks/calibrate.py                     # the demo's teacher and text, fp32
    python benchmarks/calibrate.py --dtype bfloat16

Both passes run the decoder without its head. They take turns, and the ratio is that of the medians.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from hf_minitron import calibrate, load_text, token_blocks
from hf_minitron.checkpoint import load_model

CACHE = "~/.cache/hf_minitron"


def main() -> None:
    """Alternate the two passes and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=f"{CACHE}/SmolLM2-135M-Instruct")
    parser.add_argument("--text", default=f"{CACHE}/stdlib/calibration.jsonl")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args()
    model = load_model(args.model, getattr(torch, args.dtype))
    tokenizer = AutoTokenizer.from_pretrained(Path(args.model).expanduser())
    blocks = token_blocks(load_text(args.text), tokenizer, 512, args.tokens, seed=0)

    def bare() -> None:
        with torch.inference_mode():
            for batch in blocks.iter(args.batch):
                model.base_model(input_ids=batch["input_ids"], use_cache=False)

    passes = {"bare forward": bare, "calibrate": lambda: calibrate(model, blocks, args.batch)}
    seconds = {name: [] for name in passes}
    for turn in range(args.rounds + 1):
        for name, work in passes.items():
            start = time.perf_counter()
            work()
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = medians["calibrate"] / medians["bare forward"]
    for name, median in medians.items():
        print(f"{name:13} {median:6.2f} s for {args.tokens:,} tokens")
    print(f"{args.dtype}: scoring every axis costs {ratio - 1:+.1%} over a bare forward pass")
    if args.json:
        result = f"{ratio - 1:+.1%} over a bare forward pass"
        command = f"benchmarks/calibrate.py --dtype {args.dtype}"
        facts = {"what": f"scoring every axis, {args.dtype}", "command": command, "result": result}
        args.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
