"""Time and peak memory of one distillation step: chunked loss against the full-logit loss, in one run.

    python benchmarks/kd_step.py                      # the demo's teacher, student with ffn 768, 4 x 512 tokens, fp32
    python benchmarks/kd_step.py --dtype bfloat16

Each variant runs in processes of its own, taking turns, so that neither finds memory that the other has left behind. The
full-logit variant is what a script on plain transformers does; the chunked one is DistillationTrainer, which also tells the
allocator to keep freed memory (`--keep-memory` gives that to the other as well: the rest is then the loss alone). A step is
the teacher's forward pass, the student's forward and backward pass; the optimizer is the same for both and left out. Memory is
the peak resident size during a step over that before it (weights loaded).
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import figure
import torch
from transformers import AutoTokenizer

from hf_minitron.checkpoint import load_model
from hf_minitron.distillation.config import DistillationArguments
from hf_minitron.distillation.trainer import DistillationTrainer, collate
from hf_minitron.families.family import family_of
from hf_minitron.memory import keep_freed_memory
from hf_minitron.plan import Plan
from hf_minitron.pruning.prune import prune_model

DEMO_TEACHER = "~/.cache/hf_minitron/SmolLM2-135M-Instruct"


def full_logit_loss(student, teacher, batch):
    """The textbook way: both models' logits of the whole batch."""
    with torch.no_grad():
        teacher_logits = teacher(input_ids=batch["input_ids"], use_cache=False).logits
    student_logits = student(input_ids=batch["input_ids"], use_cache=False).logits
    student_logp = student_logits[:, :-1].float().flatten(0, 1).log_softmax(-1)
    teacher_logp = teacher_logits[:, :-1].float().flatten(0, 1).log_softmax(-1)
    return torch.nn.functional.kl_div(student_logp, teacher_logp, reduction="batchmean", log_target=True)


def memory(key: str) -> int:
    """Read VmRSS or VmHWM in bytes."""
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def measure(args) -> None:
    """Run one variant in this process and print its figures as JSON."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    teacher = load_model(args.teacher, torch.float32)
    shape = family_of(teacher.config).shape_of(teacher.config)
    after = shape.cut_to({"ffn": args.ffn})
    student = prune_model(teacher, Plan(shape, after, {"ffn": [list(range(args.ffn))] * shape["layers"]})).train()
    teacher = teacher.to(dtype).requires_grad_(False)
    ids = torch.randint(0, len(AutoTokenizer.from_pretrained(Path(args.teacher).expanduser())), (args.batch, args.seq))
    batch = collate([{"input_ids": row} for row in ids])
    if args.keep_memory:
        keep_freed_memory()
    if args.variant == "chunked":
        settings = DistillationArguments("/tmp/kd_step", use_cpu=True, bf16=dtype != torch.float32, report_to=[])
        trainer = DistillationTrainer(student, teacher, settings)
    times, peaks, loss = [], [], 0.0
    for _ in range(args.steps + 1):
        student.zero_grad()
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present size
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            if args.variant == "full":
                loss = full_logit_loss(student, teacher, batch)
            else:
                loss = trainer.compute_loss(student, batch)
        loss.backward()
        times.append(time.perf_counter() - start)
        peaks.append(memory("VmHWM") - before)
    # the first step makes buffers that later ones find ready: it counts for memory, not for time
    print(json.dumps({"seconds": times[1:], "bytes": max(peaks), "loss": loss.item()}))


def main() -> None:
    """Alternate the variants and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=DEMO_TEACHER, help="teacher folder (default: that of `make demo`)")
    parser.add_argument("--ffn", type=int, default=768)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each variant")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--keep-memory", action="store_true", help="let the full-logit variant keep freed memory as well")
    parser.add_argument("--variant", choices=["full", "chunked"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        return measure(args)
    runs = {"full": [], "chunked": []}
    for _ in range(args.rounds):
        for variant in runs:
            command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs[variant].append(json.loads(output.splitlines()[-1]))
    seconds = {v: statistics.median(s for run in r for s in run["seconds"]) for v, r in runs.items()}
    gigabytes = {v: statistics.median(run["bytes"] for run in r) / 1e9 for v, r in runs.items()}
    for variant, r in runs.items():
        print(f"{variant:8} {seconds[variant]:6.2f} s  {gigabytes[variant]:5.2f} GB over the weights  loss {r[0]['loss']:.6f}")
    time_ratio, memory_ratio = (figures["chunked"] / figures["full"] for figures in (seconds, gigabytes))
    result = f"{time_ratio:.2f} of the time, {memory_ratio:.2f} of the memory of full logits"
    print(f"{args.dtype}: chunked takes {result}")
    keeps = " that keep freed memory too" if args.keep_memory else ""
    command = f"benchmarks/kd_step.py --dtype {args.dtype}{' --keep-memory' if args.keep_memory else ''}"
    figure.save(args.json, f"distillation step, {args.dtype}: chunked loss", command, result + keeps)


if __name__ == "__main__":
    main()
