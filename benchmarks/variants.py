"""The README's variants: SmolLM2-135M at two sizes, every way of making them with the same tokens, data and seed.

    python benchmarks/variants.py ../shared/data runs/variants      # hours on 2 cores; killed, it goes on where it was

Every model is a recipe that the `hf-minitron` command runs, written to `<out>/<size>/<variant>.yaml`; they share
scoring passes. `ours` is then measured beside all the others of its size: held-out text and lm-eval tasks, sample by sample.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
import yaml
from matplotlib import pyplot as plt
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from hf_minitron import load_text
from hf_minitron.checkpoint.saving import save_config
from hf_minitron.hub import plots
from hf_minitron.json_files import read_json
from hf_minitron.recipe import load_recipe
from hf_minitron.run import Run
from hf_minitron.stages.every import STAGES
from hf_minitron.stages.search import start

# Sizes of the body: by width as the paper's recipe cuts it, by depth, and the share of the layers' parameters that stays.
SIZES = {
    "100m": {"width": {"hidden": 504, "ffn": 1152}, "depth": {"layers": 20}, "share": 0.675},
    "70m": {"width": {"hidden": 432, "ffn": 768}, "depth": {"layers": 12}, "share": 0.393},
}
STEPS, BATCH, BLOCK = 36, 4, 256
PLAIN: dict[str, Any] = {"score": {"metric": "l2_mean"}, "prune": {"corrections": []}}
UNEVEN = {"prune": {"target": {}, "nonuniform": "share"}}
THIRD = {"distill": {"max_steps": STEPS // 3}}
# What each variant says otherwise than `ours`: width, chosen by contribution and corrected, forward KL from the live teacher.
VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {},
    "published": PLAIN,
    "ours-third": THIRD,
    "random": PLAIN,  # the same shape, its weights drawn anew
    "depth": {**PLAIN, "prune": {"target": "depth", **PLAIN["prune"]}},
    "nonuniform": UNEVEN,
    "nonuniform-third": {**UNEVEN, **THIRD},
    "cross-entropy": {"distill": {"losses": {"cross_entropy": 1.0}}},
    "cached": {"cache": {"method": "random", "draws": 50}},
    "teacher-corrected": {"correct": {"max_steps": STEPS // 2, "learning_rate": 2e-5}},
}
ONLY = {"70m": ["ours", "published", "ours-third", "random", "depth", "nonuniform", "nonuniform-third"]}
RESULTS = Path(__file__).with_name("results") / "models"
TASKS = {"tasks": ["local_arc_easy", "local_piqa", "local_lambada"], "limit": 200}


def main() -> None:
    """Make every model, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder with text/c4_1.jsonl, text/c4_2.jsonl and tasks/")
    parser.add_argument("out", type=Path, help="where the runs go")
    parser.add_argument("--model", default="~/.cache/hf_minitron/SmolLM2-135M-Instruct")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--train-only", action="store_true", help="leave the measuring to a later start")
    args = parser.parse_args()
    args.data, args.out = args.data.resolve(), args.out.resolve()
    split_text(args.data / "text/c4_1.jsonl", args.out)
    scored: dict[str, Path] = {}  # a `score:` section to the recipe that has it first
    for size in args.sizes:
        names = [name for name in args.variants if name in ONLY.get(size, VARIANTS)]
        for name in names:
            path = write_recipe(args, size, name, names)
            make(path, scored.setdefault(str(read(path).section("score")), path), name)
    for size in args.sizes if not args.train_only else ():
        command("run", args.out / size / "ours.yaml", args.data / "tasks")  # their files name the data beside them
        summarize(args.out / size, size)


def split_text(text: Path, out: Path) -> None:
    """Split the text into what scores read and what students learn from."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "train.jsonl").is_file():
        documents = load_text(str(text)).train_test_split(test_size=0.2, seed=0)
        documents["test"].to_json(out / "calibration.jsonl")
        documents["train"].to_json(out / "train.jsonl")


def write_recipe(args: argparse.Namespace, size: str, name: str, names: list[str]) -> Path:
    """Write one variant's recipe."""
    train = {
        "text": str(args.out / "train.jsonl"),
        "block_size": BLOCK,
        "per_device_train_batch_size": BATCH,
        "warmup_steps": 3,
        "logging_steps": 2,
        "logging_first_step": True,
        "save_steps": 12,
        "save_total_limit": 1,
        "report_to": "none",
    }
    recipe: dict[str, Any] = {
        "model": args.model,
        "run": str(args.out / size / (f"smollm2-135m-{size}" if name == "ours" else name)),  # the card's title
        "seed": 0,
        "score": {
            "text": str(args.out / "calibration.jsonl"),
            "tokens": 16_384,
            "sublayers": True,
            "layers_limit": 4,
            "metric": {"ffn": "contribution", "heads": "contribution"},
        },
        "prune": {"target": "width"},
        "distill": {**train, "max_steps": STEPS, "learning_rate": 6e-4, "max_grad_norm": 1.0},
        "evaluate": {
            "text": str(args.data / "text/c4_2.jsonl"),
            "tokens": 16_384,
            **TASKS,
            "include_path": str(args.data / "tasks"),
        },
        "publish": {
            "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "license": "apache-2.0",
            "language": "en",
            "notes": "A measurement: distilled on a little web text, where a useful model takes billions of tokens. The "
            "teacher's weights went through 4-bit quantization before (a GGUF file).",
        },
    }
    for section, changes in VARIANTS[name].items():
        recipe[section] = {**(train if section == "correct" else {}), **recipe.get(section, {}), **changes}
    prune = recipe["prune"]
    recipe["prune"] = {key: SIZES[size][value] if isinstance(value, str) else value for key, value in prune.items()}
    if name == "ours":
        others = {other: str(args.out / size / other / "distill/student") for other in names if other != "ours"}
        if "teacher-corrected" in others:
            others["corrected-teacher"] = str(args.out / size / "teacher-corrected/correct/teacher")
        recipe["evaluate"]["models"] = others
    path = args.out / size / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def make(path: Path, first: Path, name: str) -> None:
    """Score (or share the scores of the first recipe), prune and distill; finished stages are skipped."""
    run = read(path)
    if path == first:
        command("score", path)
    else:
        start(run, read(first))
    command("prune", path)
    if name == "random" and not run.path("distill").is_dir():
        draw_anew(run.path("prune") / "student")
    for stage in ("correct", "cache", "distill"):
        if stage in run.recipe:
            command(stage, path)


def read(path: Path) -> Run:
    """Read a recipe."""
    return load_recipe(path, {}, {name: stage.args for name, stage in STAGES.items()})


def draw_anew(folder: Path) -> None:
    """Replace a student's weights by such as training from nothing begins with."""
    set_seed(0)
    config = AutoConfig.from_pretrained(folder)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(torch.bfloat16).save_pretrained(folder)
    save_config(config, folder, dtype=torch.bfloat16)


def command(stage: str, path: Path, folder: Path | None = None) -> None:
    """Run `hf-minitron`, in a folder."""
    subprocess.run([sys.executable, "-m", "hf_minitron", stage, str(path)], check=True, cwd=folder)


def summarize(folder: Path, size: str) -> None:
    """Write the curves of one size; what was measured is kept beside its card (`keep_cards.py`)."""
    curves = {}
    for path in sorted(folder.glob("*/distill/log.json")):
        log = read_json(path)
        steps = [entry for entry in log["history"] if "forward_kl" in entry and "loss" in entry]
        name = "ours" if path.parts[-3] == f"smollm2-135m-{size}" else path.parts[-3]
        if steps and name != "cached":  # whose loss is too high by a number that no student changes
            curves[name] = [(entry["step"] * BATCH * BLOCK, entry["forward_kl"]) for entry in steps]
    content = {"tokens": STEPS * BATCH * BLOCK, "curves": curves}
    (RESULTS / f"{size}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    plot_curves(curves, RESULTS / f"{size}.png")


def plot_curves(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Draw the distillation losses of several students on the same text, readable on light and dark pages."""
    with plots.style():
        figure, axes = plt.subplots(figsize=(8, 3.4))
        for number, (name, points) in enumerate(sorted(curves.items(), key=lambda item: -item[1][-1][1])):
            wide = 3 if name == "ours" else 1.6
            axes.plot([t / 1e3 for t, _ in points], [loss for _, loss in points], label=name, lw=wide, color=f"C{number}")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,.3g}")
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axes.set_xlabel("thousand tokens")
        axes.set_ylabel("forward KL, nats per token")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
        plots.save(figure, path)


if __name__ == "__main__":
    main()
