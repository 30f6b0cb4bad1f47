"""The `hf-minitron` command: one verb per stage, `run` for all of them, `plan` to look before you leap.

It imports what its verb needs once it is known, and for its help nothing: `keys.json` lists what sections hold.
"""

import argparse
import difflib
import importlib
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from hf_minitron.errors import TOKEN, RecipeError
from hf_minitron.export.layouts import FORMATS, GGUF_TYPES
from hf_minitron.known_names import OPTIONS as ELSEWHERE
from hf_minitron.known_names import VERBS
from hf_minitron.recipe_file import KEYS, TOP_LEVEL, check_no_token, read_overrides, read_recipe

INTRO = """\
Make a large language model small the Minitron way: score what matters in it, prune the rest, distill the big one into the
small one, evaluate both, publish the result. A recipe (a YAML file with one section per stage) says how.

  hf-minitron init owner/model --keep 50%      write a short recipe for a base or instruct model, without its weights
  hf-minitron plan recipe.yaml      what it costs: sizes, memory of every stage, tokens, hours (no weights read)
  hf-minitron plan recipe.yaml --gpus 8 --gpu-memory 80GB      and whether it fits, and what to change
  hf-minitron run recipe.yaml       all stages; finished ones are skipped, an interrupted one goes on
  hf-minitron run a.yaml b.yaml     one after another: b may prune what a makes (model: <run of a>/publish/model)
  hf-minitron prune recipe.yaml     one stage
  hf-minitron export FOLDER --to gguf mlx      a model for llama.cpp and MLX, loaded there and compared
  hf-minitron report recipe.yaml    what is known of a run, finished or not, as a page: report.html
  hf-minitron run recipe.yaml --prune.target.ffn 1024 --distill.learning_rate 3e-4     other values than the recipe's

Which target? `search` (after `score`) turns a budget into a handful of shapes, each a recipe for a short run; when these have
run, `select` ranks them and writes the recipe of the best:

  hf-minitron search recipe.yaml --search.budget.parameters 50%
  hf-minitron select recipe.yaml
"""
RUNS = {
    "init": "write a short commented recipe for a model, without its weights, and say what it takes.",
    "run": "all stages in order; finished ones are skipped, an interrupted one goes on.",
    "plan": "sizes before and after, memory, disk and hours of every stage, of a recipe or a model's half, from config.json.",
    "export": "write a model folder for llama.cpp (gguf), MLX (mlx) or stock classes (stock), and compare it with the model.",
    "report": "write report.html, the run's facts as one page, finished or not, and say where it is.",
}
# Verbs that need less than all stages, and the modules that do them.
MODULES = {"plan": "planning.plan_text", "init": "planning.drafting", "export": "export.command"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    argv = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        check_no_token("\n".join(argv), "the command line")
        check_verb(argv)
        args, rest = parser().parse_known_args(argv)
        args.is_model = args.verb == "plan" and is_model(args.recipe)
        check_options(args, rest)
        overrides = read_overrides(rest)
        if hasattr(args, "gpu_memory"):
            args.memory = memory_size(args.gpu_memory)
        for path in recipes_of(args):
            read_recipe(path, overrides, known_keys())  # a mistyped key is told before anything is imported
        return importlib.import_module(f"hf_minitron.{MODULES.get(args.verb, 'command')}").main(args, overrides)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("\nStopped by Ctrl-C. Start the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of `| head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {TOKEN.sub('<token>', str(error))}", file=sys.stderr)
        return 1


def recipes_of(args: argparse.Namespace) -> list[Path]:
    """Return the recipes that a verb reads: none where a model is named in place of one."""
    if args.verb in ("init", "export"):
        return []
    if args.is_model:
        return []
    return args.recipe if isinstance(args.recipe, list) else [args.recipe]


def is_model(path: Path) -> bool:
    """Return whether what `plan` is asked about is a model, not a recipe."""
    return path.suffix not in (".yaml", ".yml") and (path.suffix == ".json" or not path.is_file())


def memory_size(text: str | None) -> float | None:
    """Read a size such as `80GB`, `24` or `23.5GiB`; in GB without a unit.

    Raises:
        RecipeError: for what is no size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(g|gb|gib)?", text.strip().lower())
    if match is None or float(match[1]) == 0:
        raise RecipeError(f"--gpu-memory: {text!r} is not a size such as 80GB or 24GiB")
    return float(match[1]) * (2**30 if match[2] == "gib" else 1e9)


def stages() -> dict[str, dict]:
    """Return what is known of the stages, of one's own too where these were added to the table of stages."""
    table = getattr(sys.modules.get("hf_minitron.stages.every"), "STAGES", {})
    own = {name: stage for name, stage in table.items() if name not in KEYS["stages"]}
    return KEYS["stages"] | {name: {"summary": stage.summary, "keys": {}, "training": False} for name, stage in own.items()}


def known_keys() -> dict[str, list[str] | None]:
    """Return the keys of every section; `None` where the installed libraries may know others than `keys.json`."""
    same = version("transformers") == KEYS["transformers"]
    listed = {n: [*s["keys"], *s["more"]] if same or not s["training"] else None for n, s in KEYS["stages"].items()}
    return dict.fromkeys(stages()) | listed


def check_verb(argv: Sequence[str]) -> None:
    """Refuse a first word that is no verb, naming the nearest.

    Raises:
        RecipeError: with all verbs.
    """
    word = argv[0] if argv else "--help"
    verbs = [*stages(), *RUNS]
    if word in verbs or word.startswith("-"):
        return
    named = f"--{word}" if word in ("help", "version") else VERBS.get(word.lower())
    near = [named] if named else difflib.get_close_matches(word, verbs, n=1, cutoff=0.7)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise RecipeError(f"{word!r} is not a verb; {hint}Verbs: {', '.join(verbs)}; hf-minitron --help says what they do")


def check_options(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Refuse a mistyped option of a verb, which would be read as a key of the recipe.

    Raises:
        RecipeError: with the nearest option.
    """
    options = {name.replace("_", "-") for name in vars(args).keys() - {"verb", "recipe", "model", "is_model"}}
    options -= set() if args.is_model or args.verb == "init" else {"keep"}
    for word in (item.partition("=")[0] for item in rest if item.startswith("--") and "." not in item):
        name = word[2:].replace("_", "-")
        near = {ELSEWHERE.get(name)} & options or difflib.get_close_matches(name, options, n=1, cutoff=0.75)
        if near and word[2:] not in {*TOP_LEVEL, *stages()}:
            raise RecipeError(f"{word} is not an option of {args.verb}; did you mean --{next(iter(near))}?")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are those of the command: one line."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            RecipeError: with what says more.
        """
        raise RecipeError(f"{message.removeprefix('argument ')}; {self.prog} --help says more")


def parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    made = Parser("hf-minitron", description=INTRO, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--version", action="version", version=f"hf_minitron {version('hf_minitron')}")
    verbs = made.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, text in {**{name: stage["summary"] for name, stage in stages().items()}, **RUNS}.items():
        verb = verbs.add_parser(
            name, help=text, description=text, epilog=_keys(name), formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name in ("plan", "init"):
            _add_machine(verb)
        if name in OPTIONS:
            OPTIONS[name](verb)
            continue
        several = {"nargs": "+", "help": "recipes, YAML files; a later one may build on what an earlier one makes"}
        one = {"help": "the recipe, a YAML file" + (", or a model" if name == "plan" else "")}
        verb.add_argument("recipe", type=Path, **(several if name == "run" else one))
        if name == "plan":
            verb.add_argument("--context", type=int, metavar="TOKENS", help="also count cache and FLOPs at so many tokens")
            verb.add_argument("--keep", metavar="SHARE", help="of a model's parameters, without a recipe (default 50%%)")
        if name == "report":
            verb.add_argument("--open", action="store_true", help="open it in a browser")
        if name in ("run", "publish"):
            verb.add_argument("--push", action="store_true", help="upload to publish.repo_id (private unless told)")
            verb.add_argument("--dry-run", action="store_true", help="with --push: list what it would upload, send nothing")
    return made


def _add_machine(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--gpus", type=int, default=1, help="how many GPUs it shall run on (default 1)")
    verb.add_argument(
        "--gpu-memory", metavar="SIZE", help="memory of each, such as 80GB: says whether stages fit (init: 80GB when left out)"
    )
    verb.add_argument("--gpu-tflops", type=float, default=989, help="bfloat16 peak of each (default 989, an H100)")
    verb.add_argument("--utilization", type=float, default=0.26, help="share of the peak that is used (default 0.26)")


def _add_draft(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", help="a folder or a Hub id")
    verb.add_argument("--keep", default="50%", metavar="SHARE", help="of the parameters (default 50%%)")
    verb.add_argument("--text", metavar="DATASET", help="training text or chats: files, or a dataset's Hub id")
    verb.add_argument("--output", type=Path, default=Path("recipe.yaml"), help="where to write it (default recipe.yaml)")


def _add_export(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", help="a folder or a Hub id")
    verb.add_argument("--to", nargs="+", required=True, choices=(*FORMATS, "stock"), help="for llama.cpp, MLX, stock classes")
    verb.add_argument("--types", nargs="+", default=list(GGUF_TYPES), choices=GGUF_TYPES, help="of GGUF files (default all)")
    verb.add_argument("--output", type=Path, default=Path("export"), help="the folder to write to (default export)")
    verb.add_argument("--text", metavar="DATASET", help="to calibrate and measure on (default Python's documentation)")
    verb.add_argument(
        "--tokens", type=int, default=4096, help="of that text, to calibrate and to measure on (default 4096 each)"
    )


# Verbs that read no recipe, and what adds their options.
OPTIONS = {"init": _add_draft, "export": _add_export}


def _keys(name: str) -> str:
    """List what a stage's section knows, for its help: type, default, allowed values."""
    if name in OPTIONS:
        return ""
    lines = ["Keys of the recipe; change one with --key value:"]
    lines += [f"  {key:24} {text}" for key, text in KEYS["top"].items()]
    shown = {n: stage for n, stage in stages().items() if n == name or name == "run"}
    for stage, known in shown.items():
        for key, entry in known["keys"].items():
            lines.append(f"  {f'{stage}.{key}':24} {entry['help']} ({_values(entry)})")
        if known["training"]:
            lines.append(f"  {stage + '.*':24} and every field of transformers.TrainingArguments")
    return "\n".join(lines)


def _values(entry: dict) -> str:
    """Say what a key may be, and what it is when it is left out."""
    allowed = f": {', '.join(map(str, entry['choices']))}" if "choices" in entry else ""
    default = "required" if "required" in entry else f"default {json.dumps(entry['default'])}" if "default" in entry else ""
    return "; ".join(filter(None, (f"{entry['type']}{allowed}", default)))


if __name__ == "__main__":
    sys.exit(main())
