"""Nonuniform against uniform students with the same number of parameters: right after pruning and after the same distillation.

    python benchmarks/nonuniform.py --text ../shared/data/text/c4_1.jsonl --held-out ../shared/data/text/c4_2.jsonl

The uniform student is cut in `ffn` and, in the same proportion where they allow it, in heads; both keep the hidden size and get
the same corrections, the same blocks and the same seed.
"""

import argparse
import tempfile
from pathlib import Path

import figure
import torch
from starts import BLOCK, distil
from transformers import AutoTokenizer

from hf_minitron import calibrate, load_text, make_plan, prune_model, token_blocks
from hf_minitron.architecture.architecture import Architecture
from hf_minitron.checkpoint.checkpoint import load_model
from hf_minitron.checkpoint.tensors import tensors_of
from hf_minitron.evaluation.text import perplexity
from hf_minitron.hub.plots import plot_kept
from hf_minitron.importance.removal import sublayer_costs
from hf_minitron.memory import keep_freed_memory
from hf_minitron.plan import make_nonuniform_plan
from hf_minitron.pruning.nonuniform import allocate_layers, error_curves, layer_parameters


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="~/.cache/hf_minitron/SmolLM2-135M-Instruct")
    parser.add_argument("--text", required=True, help="split into calibration and training text")
    parser.add_argument("--held-out", required=True, nargs="+")
    parser.add_argument("--cuts", type=float, nargs="+", default=[0.25, 0.5], help="shares of the body that go")
    parser.add_argument("--tokens", type=int, default=24_576, help="of the distillation; 0 for none")
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=Path, help="a folder for the heat maps of kept sizes")
    parser.add_argument("--json", type=Path, help="where to write the figures for the README")
    args = parser.parse_args()
    keep_freed_memory()
    teacher = load_model(args.model, torch.bfloat16)
    tokenizer, tensors = AutoTokenizer.from_pretrained(Path(args.model).expanduser()), tensors_of(teacher)
    documents = load_text(args.text).train_test_split(test_size=0.2, seed=args.seed)
    calibration = token_blocks(documents["test"], tokenizer, 512, 16_384, seed=args.seed)
    training = token_blocks(documents["train"], tokenizer, BLOCK, max(args.tokens, BLOCK), seed=args.seed)
    texts = {Path(t).stem: token_blocks(load_text(t), tokenizer, 512, 8_192, seed=1) for t in args.held_out}
    before, lines = tensors.architecture.shape, []
    with tempfile.TemporaryDirectory() as folder:
        statistics = calibrate(teacher, calibration, moments=True)
        scores = statistics.scores
        costs = sublayer_costs(teacher, calibration.select(range(3)), batch_size=3)
        curves = error_curves(tensors, statistics)
        for cut in args.cuts:
            uniform = make_plan(scores, before, before.cut_to(uniform_target(tensors.architecture, cut)))
            budget = layer_parameters(tensors.architecture, uniform.after.sizes) * before["layers"]
            nonuniform = make_nonuniform_plan(scores, before, allocate_layers(curves, costs, tensors.architecture, budget))
            if args.pictures:
                plot_kept(before, nonuniform.sizes_by_layer, args.pictures / f"kept_{cut * 100:.0f}.png")
            found = {}
            for name, plan in {"uniform": uniform, "nonuniform": nonuniform}.items():
                student = prune_model(teacher, plan, statistics)
                found[name] = [[perplexity(student.eval(), blocks).value for blocks in texts.values()]]
                if args.tokens:
                    distil(student, teacher, training, args.tokens, args, Path(folder) / "out")
                    found[name].append([perplexity(student.eval(), blocks).value for blocks in texts.values()])
                body = student.num_parameters() - student.get_input_embeddings().weight.numel()
                print(f"{cut:.0%} {name:10} body {body:,}", *(f"{p:.1f}" for row in found[name] for p in row), flush=True)
            pairs = [f"{n[0]:.1f} vs {u[0]:.1f}" for u, n in zip(found["uniform"], found["nonuniform"], strict=True)]
            lines.append(f"{cut:.0%} of the body cut: {', then '.join(pairs)}")
    when = f"before and after {args.tokens:,} tokens" if args.tokens else "after pruning"
    result = f"{next(iter(texts))} perplexity {when}, nonuniform vs uniform: {'; '.join(lines)}"
    figure.save(args.json, "layers of different sizes", "benchmarks/nonuniform.py", result)


def uniform_target(architecture: Architecture, cut: float) -> dict[str, int]:
    """Return the uniform cut of `ffn` (multiples of 8), and from a half of the body on of heads, nearest to a share."""
    before = architecture.shape
    heads = {"heads": before["heads"] * 2 // 3, "kv_heads": before["kv_heads"]} if cut >= 0.5 else {}
    wanted = (1 - cut) * layer_parameters(architecture, before.sizes)
    options = range(8, before["ffn"] + 1, 8)
    best = min(options, key=lambda ffn: abs(layer_parameters(architecture, {**before.sizes, **heads, "ffn": ffn}) - wanted))
    return {**heads, "ffn": best}


if __name__ == "__main__":
    main()
