"""SmolLM2-135M to 100M on millions of tokens: the published recipe and ours, and how fast a live and a cached teacher are.

    python benchmarks/gpu_race.py ../shared/data/text out/race        # minutes on a GPU

Both students have the same shape, text, seed, batch, schedule and learning rate. Trained on c4_1, stackexchange and code;
tested on c4_2 and on the tenth of the other two that was held out. The text is read several times: tokens seen and different
ones are both written down.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_minitron import load_text, token_blocks
from hf_minitron.__main__ import main as command
from hf_minitron.checkpoint.checkpoint import best_device
from hf_minitron.environment import environment
from hf_minitron.evaluation.text import perplexity
from hf_minitron.json_files import read_json

BLOCK = 512
TARGET = {"hidden": 512, "ffn": 1152}
VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {"score": {"metric": {"ffn": "contribution", "heads": "contribution"}}},
    "published": {"score": {"metric": "l2_mean"}, "prune": {"corrections": []}},
}


def main() -> None:
    """Train both, test them, and time a live and a cached teacher."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a folder with c4_1.jsonl, c4_2.jsonl, stackexchange.jsonl and code.jsonl")
    parser.add_argument("out", type=Path, help="where runs and race.json go")
    parser.add_argument("--model", default="~/.cache/hf_minitron/SmolLM2-135M-Instruct")
    parser.add_argument("--tokens", type=int, default=10_000_000, help="tokens that each student sees")
    parser.add_argument("--rows", type=int, default=32, help=f"packed sequences of {BLOCK} tokens a step")
    parser.add_argument("--test-tokens", type=int, default=65_536, help="of each test text")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tests, unique = split(args)
    rows, speeds = [], {}
    for name in VARIANTS:
        folder = run(args, name, VARIANTS[name], unique)
        for stage, student in (("pruned", folder / "prune/student"), ("distilled", folder / "distill/student")):
            rows += measured(args, student, tests, {"model": name, "stage": stage})
        speeds["live" if name == "ours" else "live, published"] = speed(folder)
        save(args, unique, rows, speeds)  # what is done is kept
    rows += measured(args, Path(args.model).expanduser(), tests, {"model": "teacher", "stage": ""})
    short = {"cache": {"method": "random", "draws": 50}, "distill": {"max_steps": 60 if args.rows > 2 else 2}}
    speeds["cached"] = speed(run(args, "cached", short, unique))
    save(args, unique, rows, speeds)


def save(args: argparse.Namespace, unique: int, rows: list[dict], speeds: dict[str, float]) -> None:
    """Write what is known so far, and print it."""
    found = {"environment": environment(), "tokens": args.tokens, "unique_tokens": unique, "target": TARGET, "rows": rows,
             "tokens_per_second": speeds, "learning_rate": args.learning_rate, "tokens_a_step": args.rows * BLOCK}  # fmt: skip
    (args.out / "gpu_race.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(*(f"{value:.2f}" if isinstance(value, float) else value for value in row.values()), flush=True)
    print({name: round(value) for name, value in speeds.items()}, flush=True)


def split(args: argparse.Namespace) -> tuple[dict[str, Dataset], int]:
    """Write what is trained on and what scores read; return the packed test texts and the tokens of the training text."""
    texts = {name: load_text(str(args.text / f"{name}.jsonl")) for name in ("c4_1", "stackexchange", "code")}
    parts = {name: text.train_test_split(test_size=0.1, seed=0) for name, text in texts.items()}
    train = concatenate_datasets([part["train"].select_columns("text") for part in parts.values()]).shuffle(seed=0)
    train.select(range(len(train) // 10)).to_json(args.out / "calibration.jsonl")
    train.to_json(args.out / "train.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(Path(args.model).expanduser())
    tests = {"c4_2": load_text(str(args.text / "c4_2.jsonl"))} | {n: parts[n]["test"] for n in ("stackexchange", "code")}
    packed = {name: token_blocks(text, tokenizer, BLOCK, max_tokens=args.test_tokens) for name, text in tests.items()}
    blocks = token_blocks(train, tokenizer, BLOCK)
    return packed, len(blocks) * BLOCK


def run(args: argparse.Namespace, name: str, changes: dict[str, dict], unique: int) -> Path:
    """Run a recipe's stages, as the command does; return its folder."""
    steps = max(args.tokens // (args.rows * BLOCK), 1)
    recipe: dict[str, Any] = {
        "model": args.model,
        "run": str(args.out / name),
        "seed": 0,
        "score": {"text": str(args.out / "calibration.jsonl"), "tokens": min(65_536, args.test_tokens), "block_size": BLOCK},
        "prune": {"target": TARGET},
        "distill": {
            "text": str(args.out / "train.jsonl"),
            "block_size": BLOCK,
            "num_train_epochs": args.tokens / unique,
            "per_device_train_batch_size": args.rows,
            "learning_rate": args.learning_rate,
            "warmup_steps": 0.05,
            "logging_steps": max(steps // 60, 1),
            "save_strategy": "no",
            "report_to": "none",
        },
    }
    for section, values in changes.items():
        recipe[section] = {**recipe.get(section, {}), **values}
    if "max_steps" in recipe["distill"]:
        del recipe["distill"]["num_train_epochs"]
    path = args.out / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    start = time.perf_counter()
    for stage in ("score", "prune", *(["cache"] if "cache" in recipe else []), "distill"):
        if command([stage, str(path)]):
            raise SystemExit(f"{name}: {stage} failed")
    print(f"{name}: {time.perf_counter() - start:.0f} s in all", flush=True)
    return args.out / name


def speed(folder: Path) -> float:
    """Return the tokens that a distillation learnt from in a second, evaluation and loading left out."""
    log = read_json(folder / "distill/log.json")
    runtime = next(entry["train_runtime"] for entry in reversed(log["history"]) if "train_runtime" in entry)
    return log["tokens"] / runtime


def measured(args: argparse.Namespace, folder: Path, tests: dict[str, Dataset], facts: dict[str, str]) -> list[dict]:
    """Return a model's perplexity on every test text, with its interval."""
    device = best_device()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    entries = {name: perplexity(model, blocks) for name, blocks in tests.items()}
    facts = {**facts, "parameters": model.num_parameters()}
    return [{**facts, "text": t, "perplexity": e.value, "interval": e.interval} for t, e in entries.items()]


if __name__ == "__main__":
    main()
