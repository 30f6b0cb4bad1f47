"""What scoring costs, in one run: a calibration pass against a bare forward pass over the same blocks, and layer by layer from
disk against the model in memory.

    python benchmarks/calibrate.py                     # the demo's teacher and text, fp32
    python benchmarks/calibrate.py --dtype bfloat16
    python benchmarks/calibrate.py --layer-by-layer    # the second comparison

All passes run the decoder without its head. They take turns; the first ratio is the median of the turns' ratios. Memory is the
largest RssAnon over that of the process before it reads the model (mapped file pages apart); every pass has its own process.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import figure
import torch
from transformers import AutoTokenizer
from watch import Peak, anonymous_bytes

from hf_minitron import Statistics, calibrate, load_text, token_blocks
from hf_minitron.checkpoint.checkpoint import load_model
from hf_minitron.memory import keep_freed_memory

CACHE = "~/.cache/hf_minitron"


def main() -> None:
    """Compare, print, and write the README's figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=f"{CACHE}/SmolLM2-135M-Instruct")
    parser.add_argument("--text", default=f"{CACHE}/stdlib/calibration.jsonl")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--layer-by-layer", action="store_true", help="compare layer by layer from disk with the model in memory"
    )
    parser.add_argument("--state-bytes", type=int, default=10_000_000, help="memory for states between layers")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--pass", dest="kind", choices=["resident", "streamed"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        one_pass(args)
        return
    result = by_layer(args) if args.layer_by_layer else over_bare(args)
    what = "scoring layer by layer from disk" if args.layer_by_layer else "scoring every axis"
    print(f"{what}, {args.dtype}: {result}")
    command = f"benchmarks/calibrate.py --dtype {args.dtype}{' --layer-by-layer' if args.layer_by_layer else ''}"
    figure.save(args.json, f"{what}, {args.dtype}", command, result)


def blocks_of(args: argparse.Namespace):
    """Return the calibration text in blocks."""
    tokenizer = AutoTokenizer.from_pretrained(Path(args.model).expanduser())
    return token_blocks(load_text(args.text), tokenizer, 512, args.tokens, seed=0)


def over_bare(args: argparse.Namespace) -> str:
    """Alternate a bare forward pass with a scoring one."""
    model, blocks = load_model(args.model, getattr(torch, args.dtype)), blocks_of(args)

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
    for name, median in medians.items():
        print(f"{name:13} {median:6.2f} s for {args.tokens:,} tokens")
    ratio = statistics.median(own / bare for own, bare in zip(seconds["calibrate"], seconds["bare forward"], strict=True))
    return f"{ratio - 1:+.1%} over a bare forward pass"


def by_layer(args: argparse.Namespace) -> str:
    """Alternate processes that score the model in memory and layer by layer; compare their time, memory and scores."""
    found = {"resident": [], "streamed": []}
    own = [f"--{key}={getattr(args, key)}" for key in ("model", "text", "tokens", "batch", "dtype")]
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for kind, measured in found.items():
                command = [sys.executable, __file__, *own, f"--state-bytes={args.state_bytes}", "--pass", kind, "--out", folder]
                measured.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        scores = {kind: Statistics.load(Path(folder) / kind).scores for kind in found}
    seconds = {kind: statistics.median(m["seconds"] for m in measured) for kind, measured in found.items()}
    peaks = {kind: max(m["peak"] for m in measured) / 1e6 for kind, measured in found.items()}
    apart = max(((scores["streamed"][a] - t).abs() / t).max().item() for a, t in scores["resident"].items())
    for kind in found:
        print(f"{kind:9} {seconds[kind]:6.2f} s for {args.tokens:,} tokens, {peaks[kind]:,.0f} MB of memory")
    return (
        f"{peaks['streamed'] / peaks['resident']:.2f} of the memory ({peaks['streamed']:,.0f} MB), "
        f"{seconds['streamed'] / seconds['resident']:.2f} of the time of the model in memory, scores within {apart:.0e}"
    )


def one_pass(args: argparse.Namespace) -> None:
    """Score once and print seconds and memory."""
    keep_freed_memory()
    blocks, dtype = blocks_of(args), getattr(torch, args.dtype)
    torch.randn(64, 64) @ torch.randn(64, 64)  # what torch makes for its own use
    base, peak, start = anonymous_bytes(), Peak(), time.perf_counter()
    if args.kind == "resident":
        measured = calibrate(load_model(args.model, dtype), blocks, args.batch)
    else:
        measured = calibrate(Path(args.model).expanduser(), blocks, args.batch, dtype, state_bytes=args.state_bytes)
    print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak.stop() - base}))
    measured.save(args.out / args.kind)


if __name__ == "__main__":
    main()
