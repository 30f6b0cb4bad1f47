"""Whether a better start still shows after distillation: plain slicing and corrections, with the same tokens, data and seed.

    python benchmarks/starts.py --text ../shared/data/text/c4_1.jsonl --held-out ../shared/data/text/c4_2.jsonl

Prunes one shape twice, from the same scores and, for the corrected start, the statistics of the same pass; then distils each
start anew for every budget, with the learning rate's whole schedule inside it. Both see the same blocks in the same order.
"""

import argparse
import json
import tempfile
from pathlib import Path

import figure
import torch
from transformers import AutoTokenizer

from hf_minitron import (
    Architecture,
    DistillationArguments,
    DistillationTrainer,
    calibrate,
    load_text,
    make_plan,
    prune_model,
    token_blocks,
)
from hf_minitron.checkpoint.checkpoint import load_model
from hf_minitron.evaluation.text import perplexity
from hf_minitron.importance.residuals import read_residuals
from hf_minitron.memory import keep_freed_memory
from hf_minitron.pruning.compensate import DEFAULT_CORRECTIONS

BLOCK = 256


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="~/.cache/hf_minitron/SmolLM2-135M-Instruct")
    parser.add_argument("--text", required=True, help="split into calibration and training text")
    parser.add_argument("--held-out", required=True, nargs="+")
    parser.add_argument("--target", type=json.loads, default={"ffn": 768, "hidden": 504, "layers": 26})
    parser.add_argument("--budgets", type=int, nargs="+", default=[8_192, 24_576, 49_152], help="tokens")
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--merge", action="store_true", help="layer_merge in the corrected start as well")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the figures for the README")
    args = parser.parse_args()
    keep_freed_memory()
    teacher = load_model(args.model, torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(Path(args.model).expanduser())
    documents = load_text(args.text).train_test_split(test_size=0.2, seed=args.seed)
    calibration = token_blocks(documents["test"], tokenizer, 512, 16_384, seed=args.seed)
    training = token_blocks(documents["train"], tokenizer, BLOCK, max(args.budgets), seed=args.seed)
    texts = {Path(t).stem: token_blocks(load_text(t), tokenizer, 512, 8_192, seed=1) for t in args.held_out}
    shape = Architecture.of(teacher.config).shape
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        statistics = calibrate(teacher, calibration, moments=True)
        plan = make_plan(statistics.scores, shape, shape.cut_to(args.target))
        residuals = read_residuals(teacher, calibration, plan) if args.merge else None
        names = (*DEFAULT_CORRECTIONS, *(("layer_merge",) if args.merge else ()))
        for tokens in [0, *sorted(args.budgets)]:
            found = []
            for given in ((), (statistics, names, residuals)):
                start = prune_model(teacher, plan, *given)
                if tokens:
                    distil(start, teacher, training, tokens, args, Path(folder) / "out")
                found.append([perplexity(start.eval(), blocks).value for blocks in texts.values()])
            ratios = [after / before for before, after in zip(*found, strict=True)]
            lines.append(f"{tokens:,}: {found[0][0]:.1f}, {found[1][0]:.1f}")
            cells = zip(texts, *found, ratios, strict=True)
            print(f"{tokens:7,} tokens", *(f"{t} {p:8.1f} -> {c:8.1f} ({r:.2f})" for t, p, c, r in cells), flush=True)
    what = ", ".join(f"{axis} {size}" for axis, size in args.target.items())
    result = f"{next(iter(texts))} perplexity of the plain and the corrected start after so many tokens: {'; '.join(lines)}"
    command = f"benchmarks/starts.py{' --merge' if args.merge else ''}"
    figure.save(args.json, f"starts of {what}, distilled with the same tokens", command, result)


def distil(student, teacher, blocks, tokens: int, args: argparse.Namespace, out: Path) -> None:
    """Distil in place, with so many tokens."""
    batch = 8
    training = DistillationArguments(
        output_dir=str(out),
        max_steps=tokens // (batch * BLOCK),
        per_device_train_batch_size=batch,
        learning_rate=args.learning_rate,
        warmup_steps=2,
        bf16=True,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
    )
    student.float().train()
    DistillationTrainer(student, teacher, training, train_dataset=blocks).train()


if __name__ == "__main__":
    main()
