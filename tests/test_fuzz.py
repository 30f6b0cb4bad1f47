"""Mutated recipes, texts and model folders, from a seed: refused in one line, or accepted; never a traceback, never a hang."""

import json
import random
import re
import shutil
import signal
from contextlib import contextmanager
from dataclasses import MISSING, fields

import pytest
import tiny
import yaml

from hf_minitron.command import check_stages, own_stages, plan_text, told
from hf_minitron.data.packing import check_first_block
from hf_minitron.evaluation import tasks
from hf_minitron.recipe import bind, load_recipe
from hf_minitron.recipe_file import YES_NO
from hf_minitron.run import RecipeError
from hf_minitron.stages.every import STAGES

SECTIONS = {name: stage.args for name, stage in STAGES.items()}
JUNK = [
    None, -1, 0, 1, 10**12, 2**70, 1.5, -0.0, float("nan"), float("inf"), True, "", "x", "~nobody/x", "a\0b", "../..", "/",
    "owner/name@", "[", "é" * 300, [], {}, [None], {"a": {"b": [1]}}, [[1]], {"": 1}, {1: 2}, "-1", "1e-4", "no", "auto",
]  # fmt: skip
# A type's name in place of a sentence: nobody has thought of that mistake.
BARE = re.compile(r"^(?:\w+: )?(?:Type|Key|Attribute|Index|Assertion|ZeroDivision|Runtime|Unbound|Overflow)\w*Error: ")


class Late(BaseException):
    """Something takes too long; no handler of errors may catch it."""


@contextmanager
def within(seconds):
    """End what takes more CPU time, or six times as long by the clock, so that a hang is a failure, and a busy machine none."""

    def late(*args):
        raise Late(f"it takes longer than {seconds} seconds")

    before = signal.signal(signal.SIGPROF, late), signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(6 * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        signal.signal(signal.SIGPROF, before[0])
        signal.signal(signal.SIGALRM, before[1])


@pytest.fixture(autouse=True)
def own_tasks(monkeypatch):
    """Tasks are looked for among one's own: reading lm-eval's 14,000 files takes as long as a hang, and is not one."""
    real = tasks._task_manager
    monkeypatch.setattr(tasks, "_task_manager", lambda folders, include_defaults: real(folders, include_defaults=False))


def places(value, path=()):
    """Yield the path of every value in a tree."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def mutated(tree, rng):
    """Return a copy of a tree with one to three values replaced, removed, wrapped or added."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.randint(1, 3)):
        path = rng.choice(list(places(tree)))
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        how = rng.choice(["replace", "replace", "remove", "wrap", "add"])
        if how == "replace":
            parent[path[-1]] = rng.choice(JUNK)
        elif how == "wrap":
            parent[path[-1]] = rng.choice([lambda v: [v], lambda v: {"a": v}, str])(parent[path[-1]])
        elif how == "add" and isinstance(parent, dict):
            parent[rng.choice(["extra", 7, "", "tokens ", "Model"])] = rng.choice(JUNK)
        else:
            del parent[path[-1]]
    return tree


def refusal(work):
    """Return the line in which something is refused, or `None`."""
    try:
        with within(10), told():
            work()
    except RecipeError as error:
        line = str(error)
        assert line.strip(), line
        assert "\n" not in line, line
        assert not BARE.search(line), line
        return line
    return None


def check(path):
    run = load_recipe(path, {}, SECTIONS)
    plan_text(run.recipe)
    check_stages(run, list(own_stages(run)), None)


def counts(few, many):
    return [pytest.param(few, id="sample"), pytest.param(many, id="all", marks=pytest.mark.slow)]


@pytest.fixture
def quick(monkeypatch):
    """Texts and tasks are left alone: they have mutations of their own, and tests."""
    for stage in ("score", "evaluate", "training"):
        monkeypatch.setattr(f"hf_minitron.stages.{stage}.check_first_block", lambda *args, **kwargs: None)
    monkeypatch.setattr("hf_minitron.evaluation.tasks.Tasks.check", lambda *args: None)


def same(first, second):
    """Whether two values of a recipe mean the same: nothing, a number, a truth value, a choice by its name."""
    first, second = (YES_NO.get(value, value) if isinstance(value, str) else value for value in (first, second))
    first, second = (value[0] if isinstance(value, list) and len(value) == 1 else value for value in (first, second))
    first, second = (getattr(value, "value", value) for value in (first, second))
    return first == second or (first in EMPTY and second in EMPTY)


def given(section, setting):
    default = setting.default if setting.default_factory is MISSING else setting.default_factory()
    return section.get(setting.name, default)


def without_effect(sections, args):
    """Yield the settings that a section changes to another value, with none of it in the stage's arguments."""
    for setting in fields(type(args[0])):
        (first, second), (old, new) = (
            [given(section, setting) for section in sections],
            [getattr(a, setting.name) for a in args],
        )
        idle = old == new and not same(new, second)  # an older name of another setting becomes what that is
        if idle and setting.name not in OF_THE_MACHINE and not same(first, second) and second not in EMPTY:
            yield f"{setting.name}: {first!r} -> {second!r}"


def arguments(path):
    """Return a recipe's run, and the arguments and digest of every stage."""
    run = load_recipe(path, {}, SECTIONS)
    return run, {
        name: (bind(run, name, stage.args), run.digest(name, stage.needs_in(run))) for name, stage in own_stages(run).items()
    }


EMPTY = (None, "", {}, [])  # what a key without a value is read as
OF_THE_MACHINE = ("use_cpu", "dataloader_pin_memory")  # without an accelerator there is no choice


@pytest.mark.parametrize("count", counts(20, 500))
def test_mutated_recipes(project, tmp_path, quick, count):
    rng, refused, path = random.Random(13), 0, tmp_path / "recipe.yaml"
    recipe = project["recipe"] | {"run": str(tmp_path / "run")}
    path.write_text(yaml.safe_dump(recipe))
    first, before = arguments(path)
    for _ in range(count):
        tree = mutated(recipe, rng)
        path.write_text(yaml.safe_dump(tree, allow_unicode=True))
        if refusal(lambda: check(path)) is not None:
            refused += 1
            continue
        run, after = arguments(path)
        for name in before:
            assert not list(without_effect([first.section(name), run.section(name)], [before[name][0], after[name][0]])), (
                name,
                tree,
            )
        for key, name in {"run": "folder", "model": "model", "seed": "seed"}.items():
            unlike = not same(run.recipe.get(key), recipe.get(key)) and run.recipe.get(key) not in EMPTY
            assert not unlike or getattr(run, name) != getattr(first, name), (key, tree)
    assert 0.4 < refused / count, "most mutations are mistakes"
    assert not (tmp_path / "run").exists()


# Every setting of every stage; what a section needs beside it.
SETTINGS = [(name, setting) for name, stage in STAGES.items() for setting in fields(stage.args) if setting.init]
NEEDED = {
    "synthesize": {"documents": 6, "max_new_tokens": 24, "min_tokens": 2},
    "tokenize": {},
    "cache": {"method": "top_k"},
    "search": {"budget": {"parameters": "80%"}},
    "select": {},
}


@pytest.mark.parametrize("count", counts(150, 3000))
def test_an_accepted_value_changes_arguments_and_digest(project, tmp_path, quick, count):
    rng, path, accepted, idle = random.Random(13), tmp_path / "recipe.yaml", 0, []
    recipe = project["recipe"] | {"run": str(tmp_path / "run")}
    sections = (
        {"correct": recipe["distill"] | {"warmup_steps": 0}}
        | NEEDED
        | {name: recipe[name] for name in recipe if name in STAGES}
    )

    def look(name, section):
        path.write_text(yaml.safe_dump(recipe | {name: section}, allow_unicode=True))
        run, stage = load_recipe(path, {}, SECTIONS), STAGES[name]
        args = bind(run, name, stage.args)
        if name not in ("search", "select"):  # which look at what a run has made
            stage.check(args, run)
        found[:] = [args, run.digest(name, stage.needs_in(run))]

    found, before = [], {}
    for name, section in sections.items():
        look(name, section)
        before[name] = list(found)
    for _ in range(count):
        (name, setting), value = rng.choice(SETTINGS), rng.choice(JUNK)
        section = sections[name] | {setting.name: value}
        if refusal(lambda name=name, section=section: look(name, section)) is not None:
            continue
        accepted += 1
        both = [before[name][0], found[0]]
        idle += [f"{name}: {what}" for what in without_effect([sections[name], section], both)]
        quiet = not setting.metadata.get("bits", True) or setting.name in getattr(STAGES[name].args, "NO_BITS", ())
        old, new = (getattr(args, setting.name) for args in both)
        if old != new and not quiet and before[name][1] == found[1]:
            idle.append(f"{name}: {setting.name}: {value!r} is not in the digest")
    assert not idle
    assert accepted > count / 20


@pytest.mark.parametrize("count", counts(10, 100))
def test_mutated_texts(tmp_path, count):
    rng, tokenizer = random.Random(13), tiny.tokenizer()
    whole = "\n".join(json.dumps({"text": text}) for text in tiny.text(30, 0)).encode()
    for number in range(count):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(content))
            content[at : at + rng.choice([0, 1, 40])] = rng.choice(
                [b"\xff", b"\0", b"{", b"\n", b"null", b"", b'"', b"[" * 3000]
            )
        path = tmp_path / f"{number}{rng.choice(['.jsonl', '.json', '.csv', '.txt', '.parquet'])}"
        path.write_bytes(bytes(content[: rng.choice([None, None, 30, 0])]))
        line = refusal(lambda path=path: check_first_block(str(path), tokenizer, 16))
        assert line is None or path.name in line, line


@pytest.mark.parametrize("count", counts(8, 100))
def test_mutated_model_folders(project, tmp_path, quick, count):
    rng, model = random.Random(13), tmp_path / "model"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(project["recipe"] | {"run": str(tmp_path / "run"), "model": str(model)}))
    for _ in range(count):
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(project["folder"] / "teacher", model)
        file = rng.choice(sorted(model.iterdir()))
        how = rng.choice(["tree", "tree", "cut", "gone", "bytes", "folder", "link"])
        if how == "tree" and file.suffix == ".json":
            file.write_text(json.dumps(mutated(json.loads(file.read_text()), rng)))
        elif how == "bytes":
            content = bytearray(file.read_bytes())
            content[rng.randrange(min(len(content), 300))] = rng.randrange(256)
            file.write_bytes(content)
        elif how == "cut":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        else:
            file.unlink()
            if how == "folder":
                file.mkdir()
            elif how == "link":
                file.symlink_to("/etc/passwd" if rng.random() < 0.5 else "nowhere")
        refusal(lambda: check(path))
    assert not (tmp_path / "run").exists()
