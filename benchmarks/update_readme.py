"""Write the README's figures from what was measured: no number in it is typed by hand.

    python benchmarks/update_readme.py --run runs/smollm2-135m-width

Reads the run's report, plan and training log and `benchmarks/results/*.json`; writes what stands between the markers
`<!-- NAME:begin -->` and `<!-- NAME:end -->`, copies the run's pictures beside its recipe and its card to `model_cards/`.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

from claims import PAPER
from keep_cards import keep

from hf_minitron import Report
from hf_minitron.__main__ import STAGES
from hf_minitron.hub.card import load_log, markdown_table, quality_rows, speed_rows

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = ROOT / "benchmarks/results/claims.json"


def demo_block(run: Path, recipe: Path) -> str:
    """Return the demo's table, pictures and times."""
    report, log = Report.load(run / "evaluate/report.json"), load_log(run / "distill/log.json")
    seconds = {
        stage: json.loads((run / stage / "done.json").read_text())["seconds"] for stage in STAGES if (run / stage).is_dir()
    }
    times = ", ".join(f"{stage} {time:.0f} s" for stage, time in seconds.items())
    picture = recipe.relative_to(ROOT)
    return "\n\n".join(
        [
            markdown_table(quality_rows(report)),
            "Held-out text, ± standard error; *pruned* is the student before it learns, "
            f"*distilled* after {log['tokens']:,} tokens.",
            markdown_table(speed_rows(report)),
            f"| what was cut | what was learnt |\n| --- | --- |\n| ![Sizes before and after]({picture}/shapes.png) "
            f"| ![Distillation loss]({picture}/loss.png) |",
            f"2 CPU cores, {sum(seconds.values()) / 60:.1f} minutes after installing: {times}.",
        ]
    )


def benchmark_block(results: Path) -> str:
    """Return the benchmarks' ratios."""
    rows = [["what", "command", "result"]]
    for path in sorted(results.glob("*.json")):
        found = json.loads(path.read_text())
        if path == CLAIMS:
            continue
        rows.append([found["what"], f"`{found['command']}`", found["result"]])
    return markdown_table(rows)


def claims_block(claims: dict) -> str:
    """Return the papers' claims beside ours: reductions, rounds of estimation, choices of layers."""
    order = sorted(claims["reductions"], key=claims["reductions"].get)
    paper = sorted(PAPER, key=PAPER.get)
    rows = [["metric", "perplexity", "place among the nine", "paper's loss", "paper's place"]]
    ours = [name for name in order if name in PAPER]
    for name in order:
        places = [str(ours.index(name) + 1), f"{PAPER[name]}", str(paper.index(name) + 1)] if name in PAPER else [""] * 3
        rows.append([f"`{name}`", f"{claims['reductions'][name]:,.1f}", *places])
    target = ", ".join(f"{axis} {size}" for axis, size in claims["target"].items())
    rounds = ", ".join(f"{count} round{'s' * (count != '1')} {value:,.1f}" for count, value in claims["rounds"].items())
    depth = [["8 of 30 layers dropped, chosen by", "perplexity"]]
    depth += [[name, f"{value:,.1f}"] for name, value in claims["depth"].items()]
    return (
        f"Cut to {target}; the teacher has {claims['teacher']}.\n\n{markdown_table(rows)}\n\n"
        f"Iterative estimation (ffn 768): {rounds}; the paper found no gain that lasts.\n\n{markdown_table(depth)}"
    )


def main() -> None:
    """Rewrite the blocks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "runs/smollm2-135m-width")
    run = parser.parse_args().run.resolve()
    recipe = ROOT / "recipes" / run.name
    for name in ("loss.png", "shapes.png"):
        shutil.copyfile(run / "publish/model" / name, recipe / name)
    keep(run, run.name)
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    blocks = {"demo": demo_block(run, recipe), "benchmarks": benchmark_block(CLAIMS.parent)}
    if CLAIMS.is_file():
        blocks["claims"] = claims_block(json.loads(CLAIMS.read_text()))
    for name, block in blocks.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        assert pattern.search(text), f"README.md has no {begin} ... {end}"
        text = pattern.sub(lambda _, b=block, s=begin, e=end: f"{s}\n{b}\n{e}", text)
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
