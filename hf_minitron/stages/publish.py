"""publish: gather the distilled model, its card, report, plan and recipe in one folder ready to push."""

import dataclasses
import json
import shutil
import webbrowser
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from hf_minitron.checkpoint.checkpoint import resolve
from hf_minitron.checkpoint.side_files import side_files
from hf_minitron.data.mixture import least_blocks, read_sources
from hf_minitron.evaluation.report import Report
from hf_minitron.export.export import check_export, export_model, file_name
from hf_minitron.export.layouts import FORMATS, GGUF_TYPES
from hf_minitron.export.texts import Texts, read_blocks
from hf_minitron.hub import facts, plots, publish
from hf_minitron.hub.card import benchmark_files, forest, scatter, write_card
from hf_minitron.hub.page import write_page
from hf_minitron.hub.publish import Target, check_no_token
from hf_minitron.json_files import read_json
from hf_minitron.recipe import bind
from hf_minitron.run import Run, done_digest
from hf_minitron.shape import Shape
from hf_minitron.stage import Stage
from hf_minitron.stages import evaluate, score, target
from hf_minitron.yaml_text import dump_yaml, load_yaml

PAGE = "report.html"
CANDIDATES = "candidates.png"  # of select
EXPORT_TOKENS = 4096  # on which exports are calibrated, and as many on which they are measured


@dataclass(frozen=True)
class Args:
    """The `publish:` section."""

    repo_id: str | None = field(default=None, metadata={"help": "Where --push uploads to: owner/name."})
    private: bool = field(default=True, metadata={"bits": False, "help": "Whether a repository made by --push is private."})
    revision: str | None = field(
        default=None, metadata={"bits": False, "help": "Branch to push to, made when missing; main when left out."}
    )
    create_pr: bool = field(default=False, metadata={"bits": False, "help": "Whether --push opens a pull request."})
    collection: str | None = field(
        default=None, metadata={"bits": False, "help": "Collection to add the model to: its slug, or a title."}
    )
    overwrite: bool = field(
        default=False, metadata={"bits": False, "help": "Whether --push may replace a model of other provenance."}
    )
    base_model: str | None = field(default=None, metadata={"help": "Hub id of `model`, or of what that was made from."})
    license: str | None = field(
        default=None, metadata={"help": "Licence of the teacher, where its folder has no card that says so."}
    )
    language: str | list | None = field(default=None, metadata={"help": "Language codes."})
    datasets: list | None = field(default=None, metadata={"help": "Hub ids of the training data."})
    export: list = field(
        default_factory=list,
        metadata={"help": "Formats for other runtimes to write beside the model: gguf (llama.cpp), mlx.", "choices": FORMATS},
    )
    gguf_types: list = field(
        default_factory=lambda: list(GGUF_TYPES), metadata={"help": "Types of the GGUF files.", "choices": GGUF_TYPES}
    )
    notes: str | None = field(default=None, metadata={"help": "What a user should know: the card's section on limits."})


def check(args: Args, run: Run) -> None:
    """Refuse another licence than the base's, an access token in what would be published, and options that clash."""
    facts.license_of(run)
    check_no_token({f"{path.name} of {run.model}": path for path in side_files(resolve(run.model, weights=False))})
    for code in [args.language] if isinstance(args.language, str) else args.language or []:
        if not isinstance(code, str):
            raise ValueError(f"language: {code!r} is not a language code, such as en; put it in quotes")
    if args.repo_id is not None:
        _target(args)
    if args.export:
        pruning = bind(run, "prune", target.Args)
        try:
            check_export(target.student(pruning, run.model).config, args.export, args.gguf_types)
        except ValueError as error:
            raise ValueError(f"export: {error}") from error


def work(args: Args, run: Run) -> dict[str, float]:
    """Return the units of work, see `hf_minitron.planning.estimate`: what every export reads, and the student with it."""
    files = len(args.gguf_types) * ("gguf" in args.export) + ("mlx" in args.export)
    return {"compare": EXPORT_TOKENS * (files + 2)} if files else {}


def run(args: Args, run: Run, out: Path) -> None:
    """Write `model/`, ready to push, `card.json`, from which its card can be rendered again, and the run's `report.html`."""
    folder = out / "model"
    shutil.copytree(run.path("distill") / "student", folder, dirs_exist_ok=True)
    report, recipe, log = read(run)
    report.save(folder / "report.json")
    (folder / "recipe.yaml").write_text(dump_yaml(recipe), encoding="utf-8")
    for name, text in benchmark_files(report, run.section("evaluate")).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    card_facts = facts.gather(run)
    if args.export:
        student, name = run.path("distill") / "student", file_name(card_facts["name"])
        card_facts["export"] = export_model(student, folder, name, _texts(run, student), args.export, args.gguf_types)
    card = write(card_facts, report, recipe, log, folder)
    (out / "card.json").write_text(_json(card_facts), encoding="utf-8")
    page(run, card, folder)


def page(run: Run, card: ModelCard, folder: Path) -> None:
    """Write `report.html`: a card with its pictures, which lie in a folder, and the candidates of a search that was ranked."""
    with TemporaryDirectory() as scratch:
        for picture in folder.glob("*.png"):
            shutil.copyfile(picture, Path(scratch) / picture.name)
        card.text += candidates(run, Path(scratch))
        write_page(card, Path(scratch), run.folder / PAGE)


def candidates(run: Run, folder: Path) -> str:
    """Copy the picture of ranked candidates to a folder; return the section about them, and nothing where there are none.

    They are those of the run's search, or of the search whose best candidate it is.
    """
    of = run.folder.parent.parent if run.folder.parent.name == "best" else run.folder
    if done_digest(of / "select") is None:
        return ""
    shutil.copyfile(of / "select" / CANDIDATES, folder / CANDIDATES)
    table = facts.public((of / "select/ranking.md").read_text(encoding="utf-8"))
    return f"\n\n## Candidates of the search\n\n![Quality against size of the candidates]({CANDIDATES})\n\n{table}"


def _texts(run: Run, student: Path) -> Texts:
    """Return the texts that exports are measured on and calibrated on: the recipe's held-out and calibration text."""
    tokenizer = AutoTokenizer.from_pretrained(student)

    def blocks(args: evaluate.Args | score.Args) -> list[list[list[int]]]:
        sources = read_sources(args.text, args.split, args.text_column)
        least = least_blocks(sources) * args.block_size  # of fewer, a source of several would give none
        tokens = min(args.tokens, max(EXPORT_TOKENS, least))
        found = read_blocks(sources, tokenizer, args.block_size, tokens, run.seed, args.add_bos_token)
        return [rows[: EXPORT_TOKENS // len(rows[0])] for rows in found]

    measured = bind(run, "evaluate", evaluate.Args)
    (held_out, labels), (calibration, _) = blocks(measured), blocks(bind(run, "score", score.Args))
    return Texts(facts.public(measured.text), held_out, calibration, labels)


def read(run: Run) -> tuple[Report | None, dict, dict | None]:
    """Return a run's report, recipe and training log as everybody may see them; `None` for what is not there yet."""
    report, log = (run.path(stage) / name for stage, name in (("evaluate", "report.json"), ("distill", "log.json")))
    measured = Report.load(report) if report.is_file() else None
    shown = measured and dataclasses.replace(measured, models=facts.public(measured.models))
    return shown, facts.public(run.recipe), read_json(log) or None


def write(card_facts: dict, report: Report | None, recipe: dict, log: dict | None, folder: Path) -> ModelCard:
    """Write the card and its pictures into a folder; the names of the pictures go into the facts.

    Args:
        card_facts (`dict`): What `facts.gather` returns; it gets `pictures`.
        report (`Report`, *optional*): What was measured.
        recipe (`dict`): The recipe.
        log (`dict`, *optional*): The training log.
        folder (`Path`): Where to write.

    Returns:
        `ModelCard`: The card.
    """
    card_facts["pictures"] = {}
    if cut := card_facts["cut"]:
        before, sizes = Shape(cut["before"]), cut["by_layer"]
        stay = [layer for layer in range(before["layers"]) if layer not in cut["dropped"]]
        means = {axis: [row[layer] for layer in stay] for axis, row in sizes.items()}
        plots.plot_shapes(before, Shape(cut["after"]), folder / "shapes.png", means)
        card_facts["pictures"]["shapes"] = "shapes.png"
        if sizes:
            plots.plot_kept(before, sizes, folder / "kept.png")
            card_facts["pictures"]["kept"] = "kept.png"
    if log and any("loss" in entry for entry in log["history"]):
        plots.plot_loss(log, folder / "loss.png")
        card_facts["pictures"]["loss"] = "loss.png"
    if found := forest(report) if report else ():
        plots.plot_differences(found, folder / "differences.png")
        card_facts["pictures"]["differences"] = "differences.png"
    if points := scatter(report) if report else ():
        plots.plot_sizes(points, folder / "models.png", "bits per byte", marked="distilled")
        card_facts["pictures"]["models"] = "models.png"
    card = write_card(report, recipe, log, card_facts)
    card.save(folder / "README.md")
    return card


def report(run: Run, show: bool = False) -> str:
    """Write `report.html` for a run, finished or not, and return where it is.

    Args:
        run (`Run`): The run.
        show (`bool`, *optional*, defaults to `False`): Whether to open it in a browser.

    Raises:
        ValueError: when the run has not begun, or the folder is another run's.
    """
    if not (run.folder / "run.json").is_file():
        raise ValueError(f"No run in {run.folder}, so there is nothing to report: hf-minitron run {run.recipe_path}")
    run.check_owner()
    card_facts, path = facts.gather(run), run.folder / PAGE
    if done_digest(run.path("publish")) is None:
        card_facts["missing"].append("publish")
    with TemporaryDirectory() as folder:
        page(run, write(card_facts, *read(run), Path(folder)), Path(folder))
    if show:
        webbrowser.open(path.resolve().as_uri())
    return str(path)


def keep(run: Run, folder: Path) -> None:
    """Copy a finished run's card to a folder, with all that it is rendered from.

    Args:
        run (`Run`): The run.
        folder (`Path`): The folder, such as `model_cards/<name>`: gets README.md, its pictures, report.json, recipe.yaml,
            log.json and card.json.

    Raises:
        ValueError: when the run is not published.
    """
    if done_digest(run.path("publish")) is None:
        raise ValueError(f"{run.folder} is not published: hf-minitron publish {run.recipe_path}")
    card_facts = read_json(run.path("publish") / "card.json")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("README.md", "report.json", "recipe.yaml", *card_facts["pictures"].values()):
        shutil.copyfile(run.path("publish") / "model" / name, folder / name)
    shutil.copyfile(run.path("publish") / "card.json", folder / "card.json")
    log = facts.small_log(read_json(run.path("distill") / "log.json"))
    (folder / "log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


def render(folder: Path) -> ModelCard:
    """Render the card of a folder that `keep` has written, from the facts in it."""
    card_facts, *known = _kept(folder)
    return write_card(*known, card_facts)


def draw(folder: Path) -> None:
    """Write the card of a folder that `keep` has written again, and its pictures, from the facts in it."""
    card_facts, *known = _kept(folder)
    write(card_facts, *known, folder)
    (folder / "card.json").write_text(_json(card_facts), encoding="utf-8")


def _kept(folder: Path) -> tuple[dict, Report, dict, dict | None]:
    recipe = load_yaml((folder / "recipe.yaml").read_text(encoding="utf-8"))
    log = read_json(folder / "log.json") or None
    return read_json(folder / "card.json"), Report.load(folder / "report.json"), recipe, log


def _json(card_facts: dict) -> str:
    return json.dumps(card_facts, indent=1, ensure_ascii=False) + "\n"


def push(args: Args, run: Run) -> str:
    """Upload `model/` and say where it is.

    Raises:
        ValueError: when no `repo_id` is set, and as `hub.publish.push`.
    """
    return f"Pushed to {publish.push(run.path('publish') / 'model', _target(args))}"


def preview(args: Args, run: Run) -> str:
    """Say what `push` would upload; nothing is sent."""
    return publish.preview(run.path("publish") / "model", _target(args))


def _target(args: Args) -> Target:
    if args.repo_id is None:
        raise ValueError("--push needs a repository: set publish.repo_id, or --publish.repo_id owner/name")
    return Target(args.repo_id, args.private, args.revision, args.create_pr, args.collection, args.overwrite)


STAGE = Stage("publish", __doc__, Args, check, run, work, needs=("distill", "evaluate"))
