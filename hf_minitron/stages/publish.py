"""publish: gather the distilled model, its card, report, plan and recipe in one folder ready to push."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from hf_minitron.evaluation.report import Report
from hf_minitron.hub import plots, publish
from hf_minitron.hub.card import load_log, write_card
from hf_minitron.hub.publish import Target
from hf_minitron.plan import Plan
from hf_minitron.run import Run, made_by

NEEDS = ("distill", "evaluate")


@dataclass(frozen=True)
class Args:
    """The `publish:` section."""

    repo_id: str | None = field(default=None, metadata={"help": "Where --push uploads to: owner/name."})
    private: bool = field(default=True, metadata={"help": "Whether a repository made by --push is private."})
    revision: str | None = field(default=None, metadata={"help": "Branch to push to, made when missing; main when left out."})
    create_pr: bool = field(default=False, metadata={"help": "Whether --push opens a pull request."})
    collection: str | None = field(default=None, metadata={"help": "Collection to add the model to: its slug, or a title."})
    overwrite: bool = field(default=False, metadata={"help": "Whether --push may replace a model of other provenance."})
    base_model: str | None = field(default=None, metadata={"help": "Hub id of `model`, or of what that was made from."})
    license: str | None = field(default=None, metadata={"help": "Licence of the teacher, as its own card says."})
    language: str | list | None = field(default=None, metadata={"help": "Language codes."})
    datasets: list | None = field(default=None, metadata={"help": "Hub ids of the training data."})
    notes: str | None = field(default=None, metadata={"help": "What a user should know: the card's section on limits."})


def check(args: Args, run: Run) -> None:
    """Refuse a repository name without an owner, and options of a push that do not go together."""
    if args.repo_id is not None:
        _target(args)


def tokens(args: Args) -> dict[str, int]:
    """Publishing runs no model."""
    return {}


def run(args: Args, run: Run, out: Path) -> None:
    """Write `model/`, ready to push."""
    folder = out / "model"
    shutil.copytree(run.path("distill") / "student", folder, dirs_exist_ok=True)
    shutil.copyfile(run.path("evaluate") / "report.json", folder / "report.json")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(dict(run.recipe), sort_keys=False), encoding="utf-8")
    plan, log = Plan.load(folder / "plan.json"), load_log(run.path("distill") / "log.json")
    if plan.by_layer:
        plots.plot_kept(plan.before, plan.sizes_by_layer, folder / "shapes.png")
    else:
        plots.plot_shapes(plan.before, plan.after, folder / "shapes.png")
    plots.plot_loss(log, folder / "loss.png")
    facts = {
        "name": args.repo_id or run.folder.name,
        **lineage(run),
        "license": args.license,
        "language": args.language,
        "datasets": args.datasets,
        "notes": args.notes,
        "remote_code": bool(plan.by_layer),
        "pictures": {"shapes": "shapes.png", "loss": "loss.png"},
    }
    report, command = Report.load(folder / "report.json"), "hf-minitron run " + " ".join(recipes(run))
    write_card(report, plan.before, plan.after, run.recipe, command, log, facts).save(folder / "README.md")


def recipes(run: Run) -> list[str]:
    """Return the recipes that make a run's student, in order: those that made its `model` come first."""
    parent = made_by(run.model)
    return [*(recipes(parent) if parent else ()), str(run.recipe_path)]


def lineage(run: Run) -> dict[str, str | None]:
    """Return what the card says of the origin: the nearest ancestor on the Hub, the student between, another teacher."""
    base, parent, teacher = _base_model(run), _made_student(run), run.section("distill").get("teacher")
    between = parent.folder.name if parent and base != parent.section("publish").get("repo_id") else None
    root = run
    while root and teacher not in (None, root.model):
        root = made_by(root.model)
    return {
        "base_model": base,
        "between": between,
        "teacher": None if teacher == run.model else _base_model(root) if root and teacher else teacher,
        "corrected": "correct" in run.recipe and teacher is None,
    }


def _base_model(run: Run) -> str:
    """Return the Hub id of a run's `model`, or of what it was made from: its own word, else that of the run that made it."""
    if named := run.section("publish").get("base_model"):
        return named
    student, parent = _made_student(run), made_by(run.model)
    if student and student.section("publish").get("repo_id"):
        return student.section("publish")["repo_id"]
    return _base_model(parent) if parent else run.model


def _made_student(run: Run) -> Run | None:
    """Return the run whose student is a run's `model`, if any; a corrected teacher is none."""
    return made_by(run.model) if Path(run.model).parent.name in ("publish", "distill") else None


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
