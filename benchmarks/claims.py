"""The papers' claims about importance beside ours, measured right after pruning, by plain slicing, on held-out text.

    python benchmarks/claims.py --calibration ../shared/data/text/c4_1.jsonl --held-out ../shared/data/text/c4_2.jsonl

Three tables: the nine reductions of 2407.14679, table 11 (a 15B model there), with other metrics and baselines; single-shot
against iterative estimation (its table 12); layers one by one against a contiguous block (2408.11796, figures 8 and 9).
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from hf_minitron import Architecture, calibrate, load_text, make_plan, prune_model, token_blocks
from hf_minitron.checkpoint.checkpoint import load_model
from hf_minitron.evaluation.text import perplexity
from hf_minitron.importance.activation import OVER
from hf_minitron.importance.removal import greedy_removal, layer_scores, removal_costs, removal_scores
from hf_minitron.memory import keep_freed_memory

# 2407.14679, table 11: zero-shot loss on the 8T blend, batch first.
PAPER = {
    "l2_l2": 8.73, "l2_mean": 7.18, "l2_variance": 8.18, "mean_l2": 8.41, "mean_mean": 7.21, "mean_variance": 7.94,
    "variance_l2": 9.01, "variance_mean": 8.34, "variance_variance": 10.55,
}  # fmt: skip
OTHERS = {
    "contribution (ffn, heads)": {"ffn": "contribution", "heads": "contribution"},
    "contribution_abs (ffn, heads)": {"ffn": "contribution_abs", "heads": "contribution_abs"},
    "fluctuation (ffn, heads)": {"ffn": "fluctuation", "heads": "fluctuation"},
    "magnitude": "magnitude",
    "random": "random",
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="~/.cache/hf_minitron/SmolLM2-135M-Instruct")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--held-out-tokens", type=int, default=4_096)
    parser.add_argument("--depth-tokens", type=int, default=1_024, help="for costs of removal")
    parser.add_argument("--target", type=json.loads, default={"hidden": 504, "ffn": 1152, "heads": 6, "kv_heads": 3})
    parser.add_argument("--drop", type=int, default=8, help="layers to drop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the tables for the README")
    args = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(args.seed)
    model = load_model(args.model, torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(Path(args.model).expanduser())
    blocks = token_blocks(load_text(args.calibration), tokenizer, 512, args.tokens, seed=0)
    held_out = token_blocks(load_text(args.held_out), tokenizer, 512, args.held_out_tokens, seed=1)
    before = Architecture.of(model.config).shape

    def quality(student) -> float:
        return round(perplexity(student, held_out).value, 1)

    def sliced(scores, target, teacher=model):
        shape = Architecture.of(teacher.config).shape
        return prune_model(teacher, make_plan(scores, shape, shape.cut_to(target)))

    tables = {"teacher": quality(model), "target": args.target, "reductions": {}, "rounds": {}, "depth": {}}
    reductions = [f"{batch}_{sequence}" for batch in OVER for sequence in OVER]
    for name, metric in {**{name: name for name in reductions}, **OTHERS}.items():
        tables["reductions"][name] = quality(sliced(calibrate(model, blocks, metric=metric).scores, args.target))
        print(f"{name:32} {tables['reductions'][name]:12,.1f}   paper's loss {PAPER.get(name, '')}", flush=True)
    for rounds in (1, 2, 4):
        student = model
        for done in range(1, rounds + 1):
            target = {axis: step(before[axis], size, done / rounds) for axis, size in {"ffn": 768}.items()}
            student = sliced(calibrate(student, blocks).scores, target, student)
        tables["rounds"][rounds] = quality(student)
        print(f"ffn 768 in {rounds} rounds of scoring and pruning: {tables['rounds'][rounds]:,.1f}", flush=True)
    scores, some = calibrate(model, blocks).scores, blocks.select(range(args.depth_tokens // 512))
    removed, costs = greedy_removal(model, some, "loss", args.drop)
    ways = {
        "block_importance, single layers": scores["layers"],
        "block_importance, one block": layer_scores(removal_costs(model, some, "block_importance", args.drop), args.drop),
        "loss, single layers": layer_scores(removal_costs(model, some, "loss")),
        "loss, one block": layer_scores(removal_costs(model, some, "loss", args.drop), args.drop),
        "loss, one by one": removal_scores(removed, costs),
    }
    for name, by_layer in ways.items():
        student = sliced({**scores, "layers": by_layer}, {"layers": before["layers"] - args.drop})
        tables["depth"][name] = quality(student)
        print(f"{args.drop} layers by {name:32} {tables['depth'][name]:12,.1f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")


def step(before: int, after: int, share: float) -> int:
    """Return a size on the way from one to the other, a multiple of 8."""
    return round((before + (after - before) * share) / 8) * 8


if __name__ == "__main__":
    main()
