"""What correcting one decoder layer of Llama-3.1-8B's shape takes: as pruning does it, beside one thread of float64 a matrix.

    python benchmarks/correct_layer.py        # some minutes on 2 cores, 10 GB of memory

Seven random projections and their four moments; hidden 4096 -> 3072, ffn 14336 -> 9216, heads 32 -> 24. The baseline is the
method of before: every projection factorises its own moment, all in float64, in one thread. Seconds are those of the cores, so
that what else the machine does does not count.
"""

import argparse
import time
from pathlib import Path

import figure
import torch
from torch import Tensor

from hf_minitron.pruning.reconstruction import RIDGE, factorised, least_squares

# Input of projections: its size, how many of it stay, and the outputs of the projections that read it.
READ = {
    "attention": (4096, 3072, (4096, 1024, 1024)),
    "output": (4096, 3072, (4096,)),
    "mlp": (4096, 3072, (14336, 14336)),
    "down": (14336, 9216, (4096,)),
}


def inputs(scale: int) -> dict[str, tuple[Tensor, Tensor, list[Tensor]]]:
    """Return each moment, the inputs that stay, and the projections in bfloat16; all sizes divided by `scale`."""
    torch.manual_seed(0)
    made = {}
    for name, (size, kept, outputs) in READ.items():
        size, kept = size // scale, kept // scale
        samples = torch.randn(size // 2, size)  # a moment of fewer samples than channels, as of a short text
        moment = samples.T @ samples / len(samples)
        made[name] = (
            moment,
            torch.randperm(size)[:kept].sort().values,
            [torch.randn(out // scale, size).bfloat16() for out in outputs],
        )
    return made


def before(layer: dict[str, tuple[Tensor, Tensor, list[Tensor]]]) -> list[Tensor]:
    """Correct a layer matrix by matrix in float64."""
    return [least_squares(weight, moment, kept, RIDGE) for moment, kept, weights in layer.values() for weight in weights]


def now(layer: dict[str, tuple[Tensor, Tensor, list[Tensor]]]) -> list[Tensor]:
    """Correct a layer as pruning does."""
    found = []
    for moment, kept, weights in layer.values():
        solve = factorised(moment, kept, RIDGE)
        found += [solve(weight).to(weight) for weight in weights]
    return found


def timed(function, layer: dict, threads: int) -> tuple[float, float, list[Tensor]]:
    """Return seconds, seconds of all cores together, and the result."""
    torch.set_num_threads(threads)
    start, cpu = time.perf_counter(), time.process_time()
    result = function(layer)
    return time.perf_counter() - start, time.process_time() - cpu, result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=1, help="divide all sizes by this, for a try")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of pruning; the baseline has one")
    parser.add_argument("--json", type=Path, help="where to write the figures for the README")
    args = parser.parse_args()
    now(inputs(32))  # libraries are loaded
    layer = inputs(args.scale)
    seconds, cpu, new = timed(now, layer, args.threads)
    print(f"now: {seconds:.1f} s, {cpu:.1f} s of {args.threads} cores", flush=True)
    old_seconds, old_cpu, old = timed(before, layer, 1)
    print(f"before: {old_seconds:.1f} s, {old_cpu:.1f} s of one core")
    worst = max(((a - b).float().norm() / b.float().norm()).item() for a, b in zip(new, old, strict=True))
    text = (f"{cpu / args.threads:.0f} s of each of {args.threads} cores, {old_cpu / cpu * args.threads:.1f} times as fast as "
            f"matrix by matrix in one thread of float64 ({old_cpu:.0f} s); weights differ by {worst:.0e} of their norm, as "
            "bfloat16 rounds")  # fmt: skip
    print(text)
    figure.save(args.json, "correcting a layer of Llama-3.1-8B", "benchmarks/correct_layer.py", text)


if __name__ == "__main__":
    main()
