"""What pruning from disk to disk costs: memory over the bare interpreter, and time against a plain copy of the same bytes.

    python benchmarks/prune_stream.py                  # checkpoints of 2, 4 and 8 GB in a temporary folder; needs 16 GB of disk

Builds synthetic bf16 checkpoints with the tensors of Llama-3.1-8B (tied, as many layers as fit), and cuts hidden, ffn, heads
and layers together. Memory is the largest RssAnon seen (every 10 ms, in a process of its own) over that of an interpreter that
has imported torch; mapped file pages are not in it. The copy reads the bytes that pruning reads and writes as many as it
writes; both are timed until the disk has everything, in turn, and the shortest times are compared
(what a shared disk does varies).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import figure
import torch
from watch import Peak, anonymous_bytes

SIZES = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 128256, "tie_word_embeddings": True, "max_position_embeddings": 131072, "dtype": "bfloat16",
}  # fmt: skip
TARGET = {"hidden": 3072, "ffn": 9216, "heads": 24}
CHUNK = 16 * 2**20


def build(folder: Path, layers: int) -> None:
    """Write a checkpoint of random numbers, shard by shard."""
    from transformers import LlamaConfig

    from hf_minitron.architecture.outline import outline
    from hf_minitron.checkpoint.checkpoint import TensorSpec, write_tensors

    config = LlamaConfig(num_hidden_layers=layers, architectures=["LlamaForCausalLM"], **SIZES)
    specs = {name: TensorSpec("BF16", shape) for name, shape in outline(config).parameters.items()}
    noise = torch.randn(2**20).bfloat16()

    def tensors() -> Iterator[tuple[str, list[torch.Tensor]]]:
        for name, spec in specs.items():
            count = torch.Size(spec.shape).numel()
            yield name, [noise.repeat(-(-count // len(noise)))[:count]]

    folder.mkdir(parents=True)
    write_tensors(folder, specs, tensors(), 2_000_000_000)
    config.save_pretrained(folder)


def prune(source: Path, target: Path) -> None:
    """Prune `source` and print what it took, in a process of its own."""
    base = anonymous_bytes()
    peak = Peak()
    from transformers import AutoConfig

    from hf_minitron import Architecture, make_plan, prune_checkpoint

    config = AutoConfig.from_pretrained(source)
    shape = Architecture.of(config).shape
    layers = shape["layers"]
    scores = {axis: torch.rand(layers, shape[axis]) for axis in ("ffn", "heads")}
    scores |= {axis: torch.rand(shape[axis]) for axis in ("hidden", "layers")}
    plan = make_plan(scores, shape, shape.cut_to({**TARGET, "layers": layers * 3 // 4}))
    imported = anonymous_bytes()
    os.sync()  # what was written before must not slow down what is written now
    start = time.perf_counter()
    prune_checkpoint(source, plan, target)
    os.sync()
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak": peak.stop() - base, "imports": imported - base, "layers": plan.kept_layers}))


def copy(files: list[Path], read_bytes: int, written_bytes: int, target: Path) -> float:
    """Read so many bytes and write so many of them; return the seconds."""
    os.sync()
    start = time.perf_counter()
    with target.open("wb") as out:
        for file in files:
            with file.open("rb") as source:
                while read_bytes > 0 and (chunk := source.read(min(CHUNK, read_bytes))):
                    read_bytes -= len(chunk)
                    written_bytes -= out.write(chunk[: max(0, written_bytes)])
    os.sync()
    return time.perf_counter() - start


def measure(folder: Path, layers: int, rounds: int) -> dict:
    """Prune one checkpoint and copy the same bytes, in turn; return the shortest times."""
    from hf_minitron.checkpoint.checkpoint import Checkpoint

    build(folder / "teacher", layers)
    teacher = Checkpoint(folder / "teacher")
    total = sum(spec.num_bytes for spec in teacher.specs.values())
    largest = max(spec.num_bytes for spec in teacher.specs.values())
    found = []
    for _ in range(rounds):
        command = [sys.executable, __file__, "--prune", str(folder / "teacher"), str(folder / "student")]
        pruned = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        student = Checkpoint(folder / "student")
        written = sum(spec.num_bytes for spec in student.specs.values())
        kept = [f".layers.{i}." for i in pruned["layers"]]
        read = sum(s.num_bytes for n, s in teacher.specs.items() if ".layers." not in n or any(k in n for k in kept))
        shutil.rmtree(folder / "student")
        pruned["copy"] = copy(sorted((folder / "teacher").glob("*.safetensors")), read, written, folder / "copy")
        (folder / "copy").unlink()
        found.append(pruned | {"read": read, "written": written})
    shutil.rmtree(folder / "teacher")
    return {
        "bytes": total,
        "largest": largest,
        "peak": max(f["peak"] for f in found),
        "seconds": min(f["seconds"] for f in found),
        "copy_seconds": min(f["copy"] for f in found),
        "read": found[0]["read"],
        "written": found[0]["written"],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 7, 16], help="layers of each checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder when left out")
    parser.add_argument("--json", type=Path, help="where to write the figures for the README")
    parser.add_argument("--prune", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prune:
        prune(*args.prune)
        return
    lines = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for layers in args.layers:
            found = measure(Path(folder), layers, args.rounds)
            bound = 2 * found["largest"] + 300_000_000
            ratio = found["seconds"] / found["copy_seconds"]
            lines.append((found, ratio))
            print(
                f"{found['bytes'] / 1e9:.1f} GB: peak {found['peak'] / 1e9:.2f} GB (bound {bound / 1e9:.2f}: largest tensor "
                f"{found['largest'] / 1e9:.2f}), {found['seconds']:.1f} s, {ratio:.2f} of a copy that reads "
                f"{found['read'] / 1e9:.1f} and writes {found['written'] / 1e9:.1f} GB ({found['copy_seconds']:.1f} s)",
                flush=True,
            )
    peaks = ", ".join(f"{f['peak'] / 1e9:.2f} GB of memory for {f['bytes'] / 1e9:.1f} GB" for f, _ in lines)
    ratios = ", ".join(f"{ratio:.2f}" for _, ratio in lines)
    result = f"{peaks} (largest tensor {lines[0][0]['largest'] / 1e9:.2f} GB); {ratios} of the time of a plain copy"
    figure.save(args.json, "pruning a checkpoint, disk to disk", "benchmarks/prune_stream.py", result)


if __name__ == "__main__":
    main()
