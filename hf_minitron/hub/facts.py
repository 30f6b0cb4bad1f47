"""What the card says beside the report, the recipe and the training log: gathered from a run's folder, finished or not.

Paths of this machine are shortened, and access tokens taken out.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import hf_hub_download, metadata_load
from transformers import AutoConfig, PreTrainedConfig

import hf_minitron
from hf_minitron.architecture.config import pipeline_tag
from hf_minitron.checkpoint.model_files import is_hub_id, pinned
from hf_minitron.checkpoint.saving import minimum_transformers
from hf_minitron.data.formats import hub_name, text_files
from hf_minitron.hub.card import loss_parts
from hf_minitron.hub.command import command
from hf_minitron.hub.public import public, shorten
from hf_minitron.modeling.configuration_pruned import PrunedConfig
from hf_minitron.plan import Plan
from hf_minitron.pruning.compensate import DEFAULT_CORRECTIONS
from hf_minitron.run import Run, done_digest, made_by

STAGES = ("correct", "synthesize", "tokenize", "score", "prune", "cache", "distill", "evaluate")
WROTE = {"synthesize": ("documents", "tokens", "rejected"), "cache": ("method", "bytes_per_token")}  # of `<stage>.json`
LICENSE_KEYS = ("license", "license_name", "license_link")


def gather(run: Run) -> dict[str, Any]:
    """Return what a card needs to know of a run, beside its report, recipe and log; JSON can hold it.

    Args:
        run (`Run`): The run; of stages that are not done it says so in `missing`.

    Returns:
        `dict`: `name`, and what `from_pretrained` takes to `load` it; of a nonuniform one, whether all layers have the
            `same_attention`; `base_model`, the student of it that was pruned in its
        place (`between`) and another `teacher`; the base's commit, `base_revision`; the oldest `transformers` that loads the
        student; the licence and `license_source`, where that stands; the `commits` at which datasets of the Hub were read;
        `cut`, see `cut_of`, and the `corrections` made; `seconds` of every stage; what `correct`, `synthesize` and `cache` did;
        `command`, whether the recipe is `changed` from its file, `version` and the sections' own words.
    """
    section, plan = run.section("publish"), _plan(run)
    logs = {stage: _log(run, stage) for stage in ("correct", "distill")}
    processes = ((logs["distill"] or {}).get("machine") or {}).get("processes", 1)
    optional = {stage: _done_json(run, stage, f"{stage}.json") for stage in WROTE if stage in run.recipe}
    return {
        "name": section.get("repo_id") or run.folder.name,
        "load": section.get("repo_id") or ".",
        **lineage(run),
        **_licence(run),
        "language": section.get("language"),
        "datasets": section.get("datasets") or _datasets(run),
        "commits": _commits(run),
        "notes": public(section.get("notes")),
        "cut": plan and cut_of(plan),
        "corrections": _corrections(run.section("prune")),
        "remote_code": bool(plan) and "auto_map" in _done_json(run, "prune", "student/config.json"),
        **(_of_config(AutoConfig.from_pretrained(run.path("prune") / "student")) if plan else {}),
        "correction": logs["correct"] and {"tokens": logs["correct"]["tokens"], "lora": run.section("correct").get("lora")},
        **{stage: {key: found[key] for key in WROTE[stage]} for stage, found in optional.items() if found},
        "chat": bool(plan) and any((run.path("prune") / "student").glob("chat_template*")),
        "hashes": _hashes(run),
        "command": command(run, processes),
        "seconds": {stage: _done_json(run, stage, "done.json").get("seconds") for stage in STAGES if _is_done(run, stage)},
        "missing": [stage for stage in ("score", "prune", "distill", "evaluate") if not _is_done(run, stage)],
        "version": hf_minitron.__version__,
    }


def cut_of(plan: Plan) -> dict[str, Any]:
    """Return a plan without its indices: sizes `before` and `after`, the layers `dropped`, and `by_layer` what each of the
    teacher's layers keeps (0 where it is gone), where not all keep the same; whether hidden was cut `rotated`."""
    by_layer, kept = plan.sizes_by_layer, set(plan.kept_layers)
    dropped = [layer for layer in range(plan.before["layers"]) if layer not in kept]
    if dropped and not by_layer:
        kinds = plan.before.sizes.keys() & {"attention_layers", "dense_layers"}  # not all layers have heads, or alike MLPs
        mlp = ("ffn", "experts") if not kinds else ()
        attention = ("heads", "kv_heads") if "attention_layers" not in kinds else ()
        axes = [axis for axis in (*attention, *mlp) if axis in plan.after.axes]
        layers = range(plan.before["layers"])
        by_layer = {axis: [plan.after[axis] if layer in kept else 0 for layer in layers] for axis in axes}
    sizes = {"before": dict(plan.before.sizes), "after": dict(plan.after.sizes)}
    sizes["windows"] = {"before": list(plan.before.windows), "after": list(plan.after.windows)}
    sizes["layer_sizes"] = {side: dict(shape.by_layer) for side, shape in (("before", plan.before), ("after", plan.after))}
    return sizes | {"dropped": dropped, "by_layer": by_layer, "rotated": plan.rotated}


def small_log(log: Mapping[str, Any]) -> dict[str, Any]:
    """Return a training log without what neither card nor picture shows."""
    shown = {"step", "loss", "eval_loss", "train_runtime", *loss_parts(log)}
    return {**log, "history": [{k: v for k, v in entry.items() if k in shown} for entry in log["history"]]}


def license_of(run: Run) -> dict[str, str | None]:
    """Return `license`, `license_name` and `license_link` as the base's card has them, else the recipe's word; and
    `license_source`, which of the two (`card`, `recipe`), or nothing: it is never guessed.

    Raises:
        ValueError: when the recipe says otherwise than the card.
    """
    card = dict.fromkeys(LICENSE_KEYS) | _base_card(run)
    said = run.section("publish").get("license")
    if not card.get("license"):
        return dict.fromkeys(LICENSE_KEYS) | {"license": said, "license_source": "recipe" if said else None}
    if said not in (None, card["license"]):
        raise ValueError(f"license: {said!r}, but the card of {shorten(run.model)} says {card['license']!r}; leave it out")
    return {key: card[key] and " ".join(str(card[key]).split()) for key in LICENSE_KEYS} | {"license_source": "card"}


def _licence(run: Run) -> dict[str, Any]:
    """Return the licence, the names of its files that came along with the student, and a link to its text that works there."""
    licence, student, base = license_of(run), run.path("distill") / "student", lineage(run)["base_model"]
    files = sorted(path.name for pattern in ("LICENSE*", "NOTICE*") for path in student.glob(pattern))
    link = licence["license_link"]
    if link and not re.match("https?://", link) and link not in files:  # a file of the base model's that did not come along
        licence["license_link"] = (
            f"https://huggingface.co/{base}/blob/main/{quote(link)}" if base and "://" not in link else None
        )
    return licence | {"license_files": files}


def _base_card(run: Run) -> dict[str, Any]:
    """Return the metadata of the card of a run's model, or of what it was made from; nothing where there is none."""
    folder = Path(run.model).expanduser()
    try:
        name, revision = pinned(run.model)
        path = folder / "README.md" if folder.is_dir() else Path(hf_hub_download(name, "README.md", revision=revision))
        if path.is_file():
            return metadata_load(path) or {}
    except (OSError, ValueError, yaml.YAMLError):  # no network, no card, or one that is none
        pass
    parent = made_by(run.model)
    return _base_card(parent) if parent else {}


def lineage(run: Run) -> dict[str, str | None]:
    """Return what the card says of the origin: the nearest ancestor on the Hub or else its folder, the student between, another
    teacher, and whether the teacher was corrected."""
    base, parent, teacher = _base_model(run), _made_student(run), run.section("distill").get("teacher")
    base, revision = pinned(base)
    on_hub = is_hub_id(base)
    between = parent.folder.name if parent and base != parent.section("publish").get("repo_id") else None
    if on_hub and base == pinned(run.model)[0]:
        revision = _measured_revision(run) or revision
    root = run
    while root and teacher not in (None, root.model):
        root = made_by(root.model)
    return {
        "base_model": base if on_hub else None,
        "base_revision": revision if on_hub else None,
        "base_folder": None if on_hub else shorten(base),
        "between": between,
        "teacher": None if teacher in (None, run.model) else shorten(_base_model(root) if root else teacher) + _pin(run),
        "corrected": "correct" in run.recipe and teacher is None,
    }


def _measured_revision(run: Run) -> str | None:
    """Return the commit that evaluation loaded as the teacher."""
    report = _done_json(run, "evaluate", "report.json") or {}
    return report.get("models", {}).get("teacher", {}).get("revision")


def _pin(run: Run) -> str:
    """Return the revision of another teacher, where it stands beside its name."""
    revision = (run.section("distill").get("teacher_model_init_kwargs") or {}).get("revision")
    return f"@{revision}" if revision else ""


def _of_config(config: PreTrainedConfig) -> dict[str, Any]:
    found = {"transformers": minimum_transformers(config), "pipeline_tag": pipeline_tag(config)}
    if isinstance(config, PrunedConfig):
        attention = {*zip(config.layer_num_attention_heads, config.layer_num_key_value_heads, strict=True)}
        found["same_attention"] = len(attention) == 1
    return found


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


def _corrections(pruning: Mapping[str, Any]) -> list[str]:
    return [*pruning.get("corrections", DEFAULT_CORRECTIONS), *(["sequential"] if pruning.get("sequential") else [])]


def _datasets(run: Run) -> list[str] | None:
    """Return the Hub ids among the texts that the run has read, but for those it was measured on."""
    texts = [run.section(stage).get(key) for stage in STAGES[:-1] for key in ("text", "prompts")]
    names = [name for text in texts if text for name in (text if isinstance(text, Mapping) else [text])]
    ids = {hub_name(name)[0]: None for name in map(str, names) if "/" in name and _on_hub(name)}
    return list(ids) or None


def _commits(run: Run) -> dict[str, str]:
    """Return the commits at which the finished stages have read datasets of the Hub."""
    held = {name.partition(": ")[::2]: str(value) for name, value in _inputs(run)}
    return {name: value.removeprefix("commit ") for (key, name), value in held.items()
            if value.startswith("commit ") and not key.startswith(("model", "teacher"))}  # fmt: skip


def _hashes(run: Run) -> dict[str, str]:
    """Return the SHA-256 of the files that the finished stages have read: weights of models, texts and tasks."""
    files = {name: value for name, value in _inputs(run) if re.fullmatch("[0-9a-f]{64}", str(value)) and ": " in name}
    kept = {name: sha for name, sha in files.items() if "model: " not in name or name.endswith(".safetensors")}
    return {public(name): sha for name, sha in kept.items()}


def _inputs(run: Run) -> Iterator[tuple[str, Any]]:
    """Yield what the finished stages depend on: settings, and files with their contents."""
    for stage in STAGES:
        if _is_done(run, stage):
            yield from _done_json(run, stage, "done.json")["inputs"].items()


def _on_hub(name: str) -> bool:
    try:
        return text_files(name) is None
    except ValueError:  # a file that has gone since
        return False


def _plan(run: Run) -> Plan | None:
    path = run.path("prune") / "student" / "plan.json"
    return Plan.load(path) if path.is_file() else None


def _log(run: Run, stage: str) -> dict | None:
    return _done_json(run, stage, "log.json") if stage in run.recipe and _is_done(run, stage) else None


def _is_done(run: Run, stage: str) -> bool:
    return done_digest(run.path(stage)) is not None


def _done_json(run: Run, stage: str, name: str) -> dict | None:
    path = run.path(stage) / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
