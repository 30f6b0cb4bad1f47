# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_minitron"]
# ///
"""Run a recipe on a rented GPU of HF Jobs.

A job's disk ends with it, so the run's folder is pushed to a private repository after every stage, and every half hour while a
stage works; the same command, started again, goes on from there. README.md has the commands.
"""

import argparse
import logging
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import HfApi, JobHardwareInfo, snapshot_download

from hf_minitron.errors import RecipeError
from hf_minitron.hub.retry import retry
from hf_minitron.planning.costs import Machine, costs
from hf_minitron.recipe_file import KEYS, read_overrides, read_recipe
from hf_minitron.stages.share import with_sizes
from hf_minitron.tables import markdown_table

logger = logging.getLogger("run_recipe")
SCRIPT = "recipes/jobs/run_recipe.py"
NOT_PUSHED = ["run/run.lock", "*.part"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a recipe, or list what it may run on; return the exit code."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="the recipe, a YAML file, which `hf jobs uv run` sends along")
    parser.add_argument("--repo", metavar="OWNER/NAME", help="private repository that holds the run's folder")
    parser.add_argument("--flavors", action="store_true", help="list the machines that hold the recipe, and start nothing")
    parser.add_argument("--folder", type=Path, default=Path("job"), help="where to work (default job)")
    parser.add_argument("--push-minutes", type=float, default=30, help="how often an unfinished stage is pushed (default 30)")
    parser.add_argument("--accelerate-config", type=Path, metavar="FILE", help="such as recipes/accelerate/fsdp2.yaml")
    args, rest = parser.parse_known_args(argv)
    try:
        if args.flavors:
            print(flavors(args.recipe, rest))
            return 0
        if args.repo is None:
            raise RecipeError("--repo is missing: the private repository, owner/name, that holds the run's folder")
        return run(args, rest)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def flavors(path: Path, overrides: Sequence[str] = ()) -> str:
    """Return the machines of HF Jobs that hold every stage of a recipe as `plan` counts it, the cheapest first.

    Memory and price are what the Hub says of them today.
    """
    recipe = with_sizes(read_recipe(path, read_overrides(overrides), dict.fromkeys(KEYS["stages"])))
    rows = [["flavor", "GPUs", "GB each", "GB needed", "USD an hour"]]
    for hardware in sorted((found for found in HfApi().list_jobs_hardware() if found.accelerator), key=hourly):
        gpus = int(hardware.accelerator.quantity)
        memory = float(hardware.accelerator.vram.split()[0]) * 1e9 / gpus
        needed = max(cost.gpu_bytes for cost in costs(recipe, Machine(gpus, memory)))
        if needed <= memory:
            price = f"{hourly(hardware):,.2f}"
            rows.append([hardware.name, str(gpus), f"{memory / 1e9:,.0f}", f"{needed / 1e9:,.1f}", price])
    if len(rows) == 1:
        raise RecipeError(f"{path}: no machine of HF Jobs holds it; hf-minitron plan {path} --gpu-memory 80GB says what helps")
    command = f"hf jobs uv run --flavor {rows[1][0]} --secrets HF_TOKEN --timeout 24h {SCRIPT} {path} --repo me/my-run"
    return f"{markdown_table(rows)}\n\n{command}"


def hourly(hardware: JobHardwareInfo) -> float:
    """Return the price of an hour in US dollars."""
    return hardware.unit_cost_usd * {"second": 3600, "minute": 60, "hour": 1}[hardware.unit_label]


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Fetch what an earlier job has pushed, go on from it, and push; return the command's exit code."""
    api, folder = HfApi(library_name="hf_minitron"), args.folder
    retry(lambda: api.create_repo(args.repo, private=True, exist_ok=True), args.repo)
    retry(lambda: snapshot_download(args.repo, local_dir=folder), args.repo)
    shutil.copyfile(args.recipe, folder / "recipe.yaml")  # the same place in every job, so that it is the same run
    command = [*launcher(args.accelerate_config), "run", str(folder / "recipe.yaml"), "--run", str(folder / "run"), *overrides]
    process = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # training saves a checkpoint, which is pushed below
    done, last = finished(folder), time.monotonic()
    while process.poll() is None:
        time.sleep(1)
        now = finished(folder)
        if now != done or time.monotonic() - last > 60 * args.push_minutes:
            try:
                push(api, args.repo, folder)
                done = now
            except (OSError, ValueError) as error:  # files come and go while a stage works
                logger.warning("Not pushed, and tried again later: %s", error)
            last = time.monotonic()
    retry(lambda: push(api, args.repo, folder), args.repo)
    return process.returncode


def launcher(config: Path | None) -> list[str]:
    """Return what starts hf_minitron: on several GPUs `accelerate launch`."""
    gpus = torch.cuda.device_count()
    if gpus < 2:
        return [sys.executable, "-m", "hf_minitron"]
    how = ["--config_file", str(config)] if config else ["--multi_gpu"]
    return [sys.executable, "-m", "accelerate.commands.launch", *how, "--num_processes", str(gpus), "-m", "hf_minitron"]


def finished(folder: Path) -> set[str]:
    """Return the stages that are done."""
    return {mark.parent.name for mark in folder.glob("run/*/done.json") if mark.parent.suffix != ".tmp"}


def push(api: HfApi, repo_id: str, folder: Path) -> None:
    """Make the repository what the folder is, in one commit; what has not changed is not sent again."""
    message = f"Done: {', '.join(sorted(finished(folder))) or 'nothing yet'}"
    kept = {"ignore_patterns": NOT_PUSHED, "delete_patterns": "run/*"}
    api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, **kept)


if __name__ == "__main__":
    sys.exit(main())
