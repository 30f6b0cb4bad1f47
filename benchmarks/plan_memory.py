"""Peak memory of a training run on the CPU beside what `hf-minitron plan` counts for it.

    python benchmarks/plan_memory.py            # a random Llama of 41 M parameters and a mixture of 90 M
    python benchmarks/plan_memory.py --case bf16 --json results.json

Each case runs in a process of its own: student and live teacher of random weights, two optimizer steps of DistillationTrainer.
Memory is the peak resident size over that before the models were made; freed memory is given back at once, so that what the
allocator keeps is not counted.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import figure

SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 16_384, "tie_word_embeddings": True}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 384, "num_experts": 16, "num_experts_per_tok": 4}
BATCH, BLOCK = 4, 256
# Settings of training by the name of the case; those of a mixture train a Qwen3 with experts.
CASES = {
    "float32": {"bf16": False},
    "checkpointing": {"bf16": False, "gradient_checkpointing": True},
    "bf16": {"bf16": True},
    "accumulation": {"bf16": False, "gradient_accumulation_steps": 2},
    "mixture": {"bf16": False},
    "mixture, bf16": {"bf16": True},
    "mixture, bf16, checkpointing": {"bf16": True, "gradient_checkpointing": True},
}


def resident(key: str) -> int:
    """Read VmRSS or VmHWM in bytes."""
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def measure(case: str) -> dict[str, float]:
    """Train in this process; return the peak and what was counted for it."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

    from hf_minitron.architecture.architecture import Architecture
    from hf_minitron.distillation.config import DistillationArguments
    from hf_minitron.distillation.trainer import DistillationTrainer
    from hf_minitron.planning.resources import FLOAT, Training, training_memory

    config = Qwen3MoeConfig(**SHAPE | EXPERTS) if "mixture" in case else LlamaConfig(**SHAPE)
    ids = torch.randint(0, config.vocab_size, (8 * BATCH, BLOCK))
    blocks = Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True}
        settings = DistillationArguments(folder, max_steps=2, per_device_train_batch_size=BATCH, **quiet, **CASES[case])
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present size
        student, teacher = (AutoModelForCausalLM.from_config(config, dtype=torch.float32) for _ in range(2))
        DistillationTrainer(student, teacher, settings, train_dataset=blocks).train()
        peak = resident("VmHWM") - before
    architecture = Architecture.of(config)
    weights = FLOAT * architecture.shape.num_parameters(architecture.rows)
    training = Training(BATCH, BLOCK, settings.gradient_accumulation_steps, bool(settings.bf16),
                        bool(settings.gradient_checkpointing), str(settings.optim), settings.chunk_size)  # fmt: skip
    parts = training_memory(architecture, training, weights)
    return {"measured": peak, "counted": sum(parts.values()), "ratio": sum(parts.values()) / peak, "parts": parts}


def in_a_process(case: str) -> dict:
    """Run a case in a process whose allocator gives freed memory back."""
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, __file__, "--measure", case]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | settings).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    """Print measured and counted memory of every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="only this one")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    found = {case: in_a_process(case) for case in ([args.case] if args.case else CASES)}
    for case, figures in found.items():
        parts = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in figures["parts"].items())
        print(f"{case:28} measured {figures['measured'] / 1e6:7,.0f} MB, counted {figures['counted'] / 1e6:7,.0f} MB "
              f"({figures['ratio']:.2f}): {parts}")  # fmt: skip
    ratios = ", ".join(f"{case} {figures['ratio']:.2f}" for case, figures in found.items())
    largest = max(figures["measured"] for figures in found.values()) / 1e9
    what = "memory of training that `hf-minitron plan` counts, over its measured peak"
    figure.save(args.json, what, "benchmarks/plan_memory.py", f"{ratios} (up to {largest:.1f} GB)")


if __name__ == "__main__":
    main()
