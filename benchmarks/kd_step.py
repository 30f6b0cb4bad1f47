"""Time and peak memory of one training step: DistillationTrainer against plain scripts on transformers, in one run.

    python benchmarks/kd_step.py                      # the demo's teacher, student with ffn 768, 4 x 512 tokens, fp32
    python benchmarks/kd_step.py --dtype bfloat16
    python benchmarks/kd_step.py --dtype bfloat16 --shape llama-3.2-1b --batch 8 --seq 2048     # on a GPU, random weights

`full` is distillation with both models' logits of the whole batch, as a script would write it; `chunked` is
DistillationTrainer, live; `states` adds the paper's losses on states to it; `cached` reads a teacher's precomputed outputs
(random sampling) from the disk. Beside them stand `ce`, training without a teacher by the model's own loss, and `teacher_ce`,
the same after a forward pass of the teacher: what no live distillation can undercut. `full_float32` is `full` in float32,
whatever the rest is.

On a GPU the student's weights stay in float32 and the teacher's are of the dtype, each variant is measured in the same
process, and its memory is what torch has allocated at most, weights and gradients left out. MFU: model FLOPs, forward and
backward of the student and forward of a live teacher, over the time and the bf16 peak of the card.

On a CPU each variant runs in processes of its own, taking turns, so that none finds memory that another has left behind. Beside
DistillationTrainer the allocator is told to keep freed memory, as the command does (`--keep-memory` gives that to the scripts
as well: the rest is then the loss alone). A step is forward and backward; the optimizer is the same for all and left out.
Memory is the peak resident size during a step over that before it (weights loaded).
"""

import argparse
import gc
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
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.checkpoint.checkpoint import load_model
from hf_minitron.distillation.cache import write_cache
from hf_minitron.distillation.cached import CachedTeacher
from hf_minitron.distillation.config import DistillationArguments
from hf_minitron.distillation.trainer import DistillationTrainer, collate
from hf_minitron.memory import keep_freed_memory
from hf_minitron.plan import Plan
from hf_minitron.pruning.prune import prune_model

DEMO_TEACHER = "~/.cache/hf_minitron/SmolLM2-135M-Instruct"


# A teacher of random weights in the shape of a published model, and the student's sizes.
SHAPES = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
             "intermediate_size": 256, "vocab_size": 1_024, "tie_word_embeddings": True},
    "llama-3.2-1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
                     "head_dim": 64, "intermediate_size": 8192, "vocab_size": 128_256, "tie_word_embeddings": True},
    "llama-3.2-3b": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8,
                     "head_dim": 128, "intermediate_size": 8192, "vocab_size": 128_256, "tie_word_embeddings": True},
}  # fmt: skip
# Dense bf16 peaks of GPUs, FLOP/s, by a part of their names.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


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


def liger_loss(student, teacher, batch):
    """Liger's fused head and Jensen-Shannon divergence, at beta 0 the forward KL."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    with torch.no_grad():
        teacher_hidden = teacher.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state[:, :-1]
    student_hidden = student.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state[:, :-1]
    dtype = teacher.dtype
    loss = LigerFusedLinearJSD(jsd_beta=0.0)
    return loss(student_hidden.flatten(0, 1).to(dtype), student.lm_head.weight.to(dtype), teacher_hidden.flatten(0, 1),
                teacher.lm_head.weight, None)  # fmt: skip


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
SCRIPTS |= {"liger": liger_loss} if find_spec("liger_kernel") and torch.cuda.is_available() else {}
LIVE = {"forward_kl": 1.0}
TRAINERS = {"chunked": LIVE, "states": LIVE | {"embedding": 1.0, "block": 1.0, "mlp_input": 1.0}, "cached": LIVE}
# The question, the variant and what it is compared with.
RATIOS = [
    ("live", "chunked", "full"),
    ("live, over full logits in float32", "chunked", "full_float32"),
    ("live, over a teacher's pass and cross-entropy", "chunked", "teacher_ce"),
    ("live, over TRL's loss", "chunked", "trl"),
    ("live, over ModelOpt's loss", "chunked", "modelopt"),
    ("live, over Liger's loss", "chunked", "liger"),
    ("losses on states too, over live", "states", "chunked"),
    ("cached, over plain cross-entropy", "cached", "ce"),
]


def pair(args) -> tuple:
    """Return student and teacher, float32, on the device: of a folder, pruned to `--ffn`; or of `--shape`, at random."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not args.shape:
        teacher = load_model(args.teacher, torch.float32).to(device)
        shape = Architecture.of(teacher.config).shape
        after = shape.cut_to({"ffn": args.ffn})
        return prune_model(teacher, Plan(shape, after, {"ffn": [list(range(args.ffn))] * shape["layers"]})), teacher
    config = LlamaConfig(**SHAPES[args.shape], max_position_embeddings=8192)
    smaller = LlamaConfig(**SHAPES[args.shape] | {"intermediate_size": config.intermediate_size // 2})
    with device:
        teacher = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
        return AutoModelForCausalLM.from_config(smaller, dtype=torch.float32), teacher


def measure(args, variant: str) -> dict:
    """Run one variant in this process and return its figures."""
    torch.manual_seed(0)
    dtype = torch.float32 if variant == "full_float32" else getattr(torch, args.dtype)
    student, teacher = pair(args)
    student, teacher = student.train(), teacher.to(dtype).requires_grad_(False).eval()
    on_cpu = student.device.type == "cpu"
    if args.checkpointing:
        student.gradient_checkpointing_enable()
    flops = 6 * student.num_parameters() + 2 * teacher.num_parameters() * (variant not in ("ce", "cached"))
    ids = torch.randint(0, teacher.config.vocab_size, (args.batch, args.seq))
    batch = {name: value.to(student.device) for name, value in collate([{"input_ids": row} for row in ids]).items()}
    if on_cpu and (args.keep_memory or variant in TRAINERS):
        keep_freed_memory()
    meter = HostMemory if on_cpu else GPUMemory
    with tempfile.TemporaryDirectory() as folder:
        if variant == "cached":
            write_cache(teacher, Dataset.from_dict({"input_ids": ids.tolist()}), folder, {"random": 50})
            teacher = CachedTeacher(folder)
            batch |= {name: value.to(student.device) for name, value in teacher.columns(batch).items()}  # as the collator does
        step = SCRIPTS.get(variant)
        if step is None:
            settings = DistillationArguments(folder, bf16=dtype != torch.float32, report_to=[], losses=TRAINERS[variant])
            trainer = DistillationTrainer(student, teacher, settings)
        if variant in ("ce", "cached"):
            teacher = None  # needs no memory
        times, peaks, loss = [], [], 0.0
        for _ in range(args.steps + 1):
            student.zero_grad(set_to_none=on_cpu)  # on a GPU gradients stay, as with accumulation
            memory = meter()
            start = time.perf_counter()
            with torch.autocast(student.device.type, dtype=dtype, enabled=dtype != torch.float32):
                loss = step(student, teacher, batch) if step else trainer.compute_loss(student, batch)
            loss.backward()
            value = loss.item()  # waits for the GPU
            times.append(time.perf_counter() - start)
            peaks.append(memory.peak())
    # the first step makes buffers that later ones find ready: on a CPU it counts for memory, not for time
    figures = {"seconds": times[1:], "bytes": max(peaks) if on_cpu else max(peaks[1:]), "loss": value}
    return figures | {"flops": flops * ids.numel()}


class HostMemory:
    """The peak resident size over that at the start."""

    def __init__(self):
        self._before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present size

    def peak(self) -> int:
        """Return it in bytes."""
        return memory("VmHWM") - self._before


class GPUMemory:
    """The peak of what torch has allocated over that at the start."""

    def __init__(self):
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def peak(self) -> int:
        """Return it in bytes."""
        return torch.cuda.max_memory_allocated() - self._before


def measure_all(args, variants: list[str]) -> dict[str, list[dict]]:
    """Measure every variant: on a GPU here, one after the other; on a CPU in processes of its own, taking turns."""
    runs: dict[str, list[dict]] = {variant: [] for variant in variants}
    if not torch.cuda.is_available():
        for _ in range(args.rounds):
            for variant in runs:
                command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                runs[variant].append(json.loads(output.splitlines()[-1]))
        return runs
    for variant in runs:
        try:
            runs[variant].append(measure(args, variant))
        except Exception as error:  # the others are still worth their time
            words = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {error}"
            print(f"{variant:12} {words.splitlines()[0][:200]}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    return {variant: found for variant, found in runs.items() if found}


def main() -> None:
    """Alternate the variants and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=DEMO_TEACHER, help="teacher folder (default: that of `make demo`)")
    parser.add_argument("--ffn", type=int, default=768)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--shape", choices=SHAPES, help="random weights of a published shape, ffn halved in the student")
    parser.add_argument("--checkpointing", action="store_true", help="recompute the student's activations")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each variant")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--keep-memory", action="store_true", help="let scripts keep freed memory as well")
    parser.add_argument("--variants", nargs="+", choices=[*SCRIPTS, *TRAINERS], default=[*SCRIPTS, *TRAINERS])
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(measure(args, args.variant)))
        return
    runs = measure_all(args, [v for v in args.variants if args.dtype != "float32" or v != "full_float32"])
    seconds = {v: statistics.median(s for run in r for s in run["seconds"]) for v, r in runs.items()}
    gigabytes = {v: statistics.median(run["bytes"] for run in r) / 1e9 for v, r in runs.items()}
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((flops for part, flops in PEAKS.items() if part in card), None)
    for variant, r in runs.items():
        used = f"  MFU {r[0]['flops'] / seconds[variant] / peak:.0%}" if peak else ""
        per_second = f"{args.batch * args.seq / seconds[variant]:,.0f} tokens/s"
        print(f"{variant:12} {seconds[variant]:8.3f} s  {gigabytes[variant]:6.2f} GB over the weights  "
              f"loss {r[0]['loss']:.6f}  {per_second}{used}")  # fmt: skip
    found = []
    for question, variant, other in RATIOS:
        if {variant, other} <= runs.keys():
            time_ratio, memory_ratio = (figures[variant] / figures[other] for figures in (seconds, gigabytes))
            found.append(f"{question}: {time_ratio:.2f} of the time, {memory_ratio:.2f} of the memory")
    print(*found, sep="\n")
    keeps = ", scripts keep freed memory too" if args.keep_memory else ""
    shape = f", {args.shape} shape, {args.batch} x {args.seq} tokens" if args.shape else ""
    command = f"benchmarks/kd_step.py --dtype {args.dtype}{' --keep-memory' if args.keep_memory else ''}"
    command += f" --shape {args.shape} --batch {args.batch} --seq {args.seq}" if args.shape else ""
    command += " --checkpointing" if args.checkpointing else ""
    where = f", {card}" if card else ""
    figure.save(args.json, f"a training step, {args.dtype}{keeps}{shape}{where}", command, "; ".join(found))


if __name__ == "__main__":
    main()
