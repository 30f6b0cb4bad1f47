"""Time and peak memory of one training step: DistillationTrainer against plain scripts on transformers, in one run.

    python benchmarks/kd_step.py                      # the demo's teacher, student with ffn 768, 4 x 512 tokens, fp32
    python benchmarks/kd_step.py --dtype bfloat16

`full` is distillation with both models' logits of the whole batch, as a script would write it; `chunked` is
DistillationTrainer, live; `states` adds the paper's losses on states to it; `cached` reads a teacher's precomputed outputs
(random sampling) from the disk. Beside them stand `ce`, training without a teacher by the model's own loss, and `teacher_ce`,
the same after a forward pass of the teacher: what no live distillation can undercut. `full_float32` is `full` in float32,
whatever the rest is.

Each variant runs in processes of its own, taking turns, so that none finds memory that another has left behind. Beside
DistillationTrainer the allocator is told to keep freed memory, as the command does (`--keep-memory` gives that to the scripts
as well: the rest is then the loss alone). A step is forward and backward; the optimizer is the same for all and left out.
Memory is the peak resident size during a step over that before it (weights loaded).
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import figure
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.checkpoint import load_model
from hf_minitron.distillation.cache import write_cache
from hf_minitron.distillation.cached import CachedTeacher
from hf_minitron.distillation.config import DistillationArguments
from hf_minitron.distillation.trainer import DistillationTrainer, collate
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


def cross_entropy(student, teacher, batch):
    """Training without a teacher, by the model's own loss."""
    return student(**batch, use_cache=False).loss


def teacher_and_cross_entropy(student, teacher, batch):
    """What a live distillation step cannot do without."""
    with torch.no_grad():
        teacher(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=1)
    return cross_entropy(student, teacher, batch)


def trl_loss(student, teacher, batch):
    """TRL's own chunked divergence, on the last hidden states of both."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    with torch.no_grad():
        teacher_hidden = teacher.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state[:, :-1]
    student_hidden = student.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state[:, :-1]
    heads = [(model.lm_head.weight, model.lm_head.bias) for model in (student, teacher)]
    divergence, _ = ChunkedDivergenceFunction.apply(
        student_hidden.flatten(0, 1), *heads[0], teacher_hidden.flatten(0, 1), *heads[1], 0.0
    )
    return divergence.mean()


def modelopt_loss(student, teacher, batch):
    """ModelOpt's own loss on logits."""
    from modelopt.torch.distill.losses import LogitsDistillationLoss

    with torch.no_grad():
        teacher_logits = teacher(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].float().flatten(0, 1)
    student_logits = student(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].float().flatten(0, 1)
    return LogitsDistillationLoss(reduction="batchmean")(student_logits, teacher_logits)


# Plain scripts, and the losses that DistillationTrainer is given.
SCRIPTS = {
    "full": full_logit_loss,
    "full_float32": full_logit_loss,
    "ce": cross_entropy,
    "teacher_ce": teacher_and_cross_entropy,
}
# Of the optional group `bench`, measured where it is installed.
SCRIPTS |= {"trl": trl_loss} if find_spec("trl") else {}
SCRIPTS |= {"modelopt": modelopt_loss} if find_spec("modelopt") else {}
LIVE = {"forward_kl": 1.0}
TRAINERS = {"chunked": LIVE, "states": LIVE | {"embedding": 1.0, "block": 1.0, "mlp_input": 1.0}, "cached": LIVE}
# The question, the variant and what it is compared with.
RATIOS = [
    ("live", "chunked", "full"),
    ("live, over full logits in float32", "chunked", "full_float32"),
    ("live, over a teacher's pass and cross-entropy", "chunked", "teacher_ce"),
    ("live, over TRL's loss", "chunked", "trl"),
    ("live, over ModelOpt's loss", "chunked", "modelopt"),
    ("losses on states too, over live", "states", "chunked"),
    ("cached, over plain cross-entropy", "cached", "ce"),
]


def measure(args) -> None:
    """Run one variant in this process and print its figures as JSON."""
    torch.manual_seed(0)
    dtype = torch.float32 if args.variant == "full_float32" else getattr(torch, args.dtype)
    teacher = load_model(args.teacher, torch.float32)
    shape = Architecture.of(teacher.config).shape
    after = shape.cut_to({"ffn": args.ffn})
    student = prune_model(teacher, Plan(shape, after, {"ffn": [list(range(args.ffn))] * shape["layers"]})).train()
    teacher = teacher.to(dtype).requires_grad_(False)
    ids = torch.randint(0, len(AutoTokenizer.from_pretrained(Path(args.teacher).expanduser())), (args.batch, args.seq))
    batch = collate([{"input_ids": row} for row in ids])
    if args.keep_memory or args.variant in TRAINERS:
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        if args.variant == "cached":
            write_cache(teacher, Dataset.from_dict({"input_ids": ids.tolist()}), folder, {"random": 50})
            teacher = CachedTeacher(folder)
        step = SCRIPTS.get(args.variant)
        if step is None:
            losses = TRAINERS[args.variant]
            settings = DistillationArguments(folder, use_cpu=True, bf16=dtype != torch.float32, report_to=[], losses=losses)
            trainer = DistillationTrainer(student, teacher, settings)
        if args.variant in ("ce", "cached"):
            teacher = None  # needs no memory
        times, peaks, loss = [], [], 0.0
        for _ in range(args.steps + 1):
            student.zero_grad()
            before = memory("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present size
            start = time.perf_counter()
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                loss = step(student, teacher, batch) if step else trainer.compute_loss(student, batch)
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
    parser.add_argument("--keep-memory", action="store_true", help="let scripts keep freed memory as well")
    parser.add_argument("--variants", nargs="+", choices=[*SCRIPTS, *TRAINERS], default=[*SCRIPTS, *TRAINERS])
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        return measure(args)
    runs = {variant: [] for variant in args.variants if args.dtype != "float32" or variant != "full_float32"}
    for _ in range(args.rounds):
        for variant in runs:
            command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs[variant].append(json.loads(output.splitlines()[-1]))
    seconds = {v: statistics.median(s for run in r for s in run["seconds"]) for v, r in runs.items()}
    gigabytes = {v: statistics.median(run["bytes"] for run in r) / 1e9 for v, r in runs.items()}
    for variant, r in runs.items():
        print(f"{variant:12} {seconds[variant]:6.2f} s  {gigabytes[variant]:5.2f} GB over the weights  loss {r[0]['loss']:.6f}")
    found = []
    for question, variant, other in RATIOS:
        if {variant, other} <= runs.keys():
            time_ratio, memory_ratio = (figures[variant] / figures[other] for figures in (seconds, gigabytes))
            found.append(f"{question}: {time_ratio:.2f} of the time, {memory_ratio:.2f} of the memory")
    print(*found, sep="\n")
    keeps = ", scripts keep freed memory too" if args.keep_memory else ""
    command = f"benchmarks/kd_step.py --dtype {args.dtype}{' --keep-memory' if args.keep_memory else ''}"
    figure.save(args.json, f"a training step, {args.dtype}{keeps}", command, "; ".join(found))


if __name__ == "__main__":
    main()
