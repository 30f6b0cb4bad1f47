"""run: recipes, arguments, the run's folder and the done marks, on made-up stages."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace

import pytest
import yaml

from hf_minitron import inputs
from hf_minitron.inputs import text_files
from hf_minitron.recipe import bind, load_recipe
from hf_minitron.recipe_file import KEYS, read_recipe, read_yaml
from hf_minitron.run import RecipeError, again, begin, done_digest, finish


@dataclass(frozen=True)
class Bake:
    flour: str = field(metadata={"help": "What it is made of.", "reads": text_files})
    heat: float = 200.0
    loaves: int = 1

    def __post_init__(self):
        if self.loaves < 1:
            raise ValueError(f"loaves: {self.loaves} must be at least 1")


@dataclass(frozen=True)
class Slice:
    width: int = 8


STAGES = {"bake": Bake, "slice": Slice}


@pytest.fixture
def load(tmp_path):
    """Writes a recipe around a model folder and a text, and loads it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "rye.txt").write_text("rye")

    def load(overrides=None, drop=(), **changes):
        recipe = {"model": str(tmp_path / "model"), "run": str(tmp_path / "run"), "bake": {"flour": str(tmp_path / "rye.txt")}}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: v for key, v in (recipe | changes).items() if key not in drop}))
        return load_recipe(path, overrides or {}, STAGES)

    return load


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def do(run, stage, needs=()):
    """Do a stage and return its digest."""
    (begin(run, stage, needs) / "out.txt").write_text(stage)
    finish(run, stage)
    return done_digest(run.path(stage))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bak": {}}, r"Unknown key 'bak' in recipe; did you mean 'bake'\?"),
        ({"xyz": {}}, "Unknown key 'xyz' in recipe; known: bake, minutes, model, run, seed, slice"),
        ({"slice": {"widht": 3}}, r"Unknown key 'widht' in slice; did you mean 'width'\?"),
        ({"slice": [3]}, r"slice: \[3\] is not a section"),
        ({"drop": ["model"]}, "names no model: add `model:`"),
        ({"seed": "lucky"}, "seed: 'lucky' is not a whole number"),
        ({"overrides": {"model.size": 3}}, "--model.size: model holds .* not a section"),
    ],
)
def test_a_recipe_that_no_stage_knows_is_refused(load, changes, message):
    with pytest.raises(RecipeError, match=message):
        load(**changes)


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), ("- a", "holds a list"), (None, "No recipe at")])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    if text:
        path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path, {}, STAGES)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"bake": {}}, "bake.flour is missing: What it is made of"),
        ({"bake.flour": 7}, "bake.flour: 7 is not text"),
        ({"bake.heat": "hot"}, "bake.heat: 'hot' is not a number"),
        ({"bake.heat": True}, "bake.heat: true is not a number"),
        ({"bake.loaves": 1.5}, "bake.loaves: 1.5 is not a whole number"),
        ({"bake.loaves": 0}, "bake: loaves: 0 must be at least 1"),
    ],
)
def test_missing_and_ill_typed_values_are_refused(load, overrides, message):
    with pytest.raises(RecipeError, match=message):
        bind(load(overrides), "bake", Bake)


def test_overrides_reach_sections_and_numbers_are_read_as_numbers(load):
    assert isinstance(yaml.safe_load("1e-4"), str)  # why it needs care
    assert read_yaml("{a: [1e-4, -2E+3, 1e1], b: 1e, c: e5}", "here") == {"a": [1e-4, -2000, 10], "b": "1e", "c": "e5"}
    heat, loaves = read_yaml("1e-4", "--bake.heat"), read_yaml("2e1", "--bake.loaves")
    args = bind(load({"bake.heat": heat, "bake.loaves": loaves, "slice.width": 3}), "bake", Bake)
    assert (args.heat, args.loaves) == (1e-4, 20)
    assert isinstance(args.loaves, int)
    assert bind(load({"slice.width": 3}), "slice", Slice) == Slice(3)  # the recipe had no such section
    assert load(drop=["run"]).folder.parent.name == "runs"


def test_claim_takes_an_empty_folder_and_its_own_again(load, tmp_path):
    run = load()
    run.folder.mkdir()
    run.claim()
    load({"slice.width": 3}).claim()  # other values, same run
    assert yaml.safe_load((run.folder / "recipe.yaml").read_text())["slice"] == {"width": 3}
    (tmp_path / "other").mkdir()
    for other in (load({"model": str(tmp_path / "other")}), replace(run, recipe_path=tmp_path / "other.yaml")):
        with pytest.raises(RecipeError, match="belongs to another run"):
            other.claim()


def test_claim_refuses_foreign_files_and_leaves_them(load):
    run = load()
    run.folder.mkdir()
    (run.folder / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="not a run's folder"):
        run.claim()
    assert names(run.folder) == ["thesis.txt"]


def test_the_digest_follows_all_that_a_stage_reads_and_nothing_else(load, tmp_path):
    same = load().digest("bake", ())
    assert load({"slice.width": 3}).digest("bake", ()) == load().digest("bake", ()) == same
    changed = [load({"bake.heat": 90}), load({"seed": 1}), load({"model": "owner/name"})]
    digests = {same, *(run.digest("bake", ()) for run in changed)}
    for file in ("rye.txt", "model/config.json"):
        (tmp_path / file).write_text("longer than it was")
        digests.add(load().digest("bake", ()))
    assert len(digests) == 6
    alone = load().digest("slice", ["bake"])
    do(load(), "bake")
    after_bake = load().digest("slice", ["bake"])
    do(load({"bake.heat": 90}), "bake")
    assert len({alone, after_bake, load().digest("slice", ["bake"])}) == 3


def test_a_done_stage_is_skipped_and_a_changed_one_starts_empty(load):
    run = load()
    do(run, "bake")
    assert begin(run, "bake", ()) is None
    assert names(run.folder) == ["bake"]
    mark = json.loads((run.path("bake") / "done.json").read_text())
    assert mark["digest"] == run.digest("bake", ())
    assert mark["seconds"] >= 0
    hotter = load({"bake.heat": 250})
    assert names(begin(hotter, "bake", ())) == ["started.json"]
    assert (run.path("bake") / "out.txt").is_file()  # the old result stays until the new one is there
    finish(hotter, "bake")
    assert names(run.path("bake")) == ["done.json"]
    assert begin(hotter, "bake", ()) is None


def test_an_interrupted_stage_keeps_its_work_only_for_the_very_same_work(load):
    folder = begin(load(), "bake", ())
    (folder / "checkpoint").write_text("half")
    assert done_digest(load().path("bake")) is None
    assert not load().path("bake").exists()
    assert begin(load(), "bake", ()) == folder
    assert (folder / "checkpoint").is_file()
    assert begin(load({"bake.heat": 90}), "bake", ()) == folder
    assert names(folder) == ["started.json"]


@pytest.mark.parametrize("left", ["", '{"dig', "{}"])
def test_a_half_written_mark_is_not_done(load, left):
    run = load()
    do(run, "bake")
    (run.path("bake") / "done.json").write_text(left)
    assert done_digest(run.path("bake")) is None
    assert begin(run, "bake", ()) is not None


def test_finished_work_survives_a_kill_before_it_gets_its_name(load, monkeypatch):
    run = load()
    folder = begin(run, "bake", ())
    (folder / "out.txt").write_text("bread")
    (folder / "checkpoints").mkdir()
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("hf_minitron.run._settle", lambda *args: 1 / 0)
        finish(run, "bake")
    assert (folder / "checkpoints").is_dir()
    assert begin(run, "bake", ()) is None
    assert names(run.path("bake")) == ["done.json", "out.txt"]
    assert not folder.exists()


@pytest.mark.parametrize("left", ["", '{"dig'])
def test_a_half_written_start_mark_starts_afresh(load, left):
    folder = begin(load(), "bake", ())
    (folder / "checkpoint").write_text("half")
    (folder / "started.json").write_text(left)  # as kill -9 may leave it
    assert names(begin(load(), "bake", ())) == ["started.json"]


def test_a_stage_before_its_needs_is_told_the_command(load):
    run = load()
    with pytest.raises(RecipeError, match=f"slice needs bake first: hf-minitron bake {run.recipe_path}"):
        begin(run, "slice", ["bake"])
    begin(run, "bake", ())  # begun is not done
    with pytest.raises(RecipeError, match="slice needs bake first"):
        begin(run, "slice", ["bake"])


@dataclass(frozen=True)
class Knead:
    speed: int = 1
    logging_steps: int = 10
    report_to: str = "none"
    load_best_model_at_end: bool = False
    radio: bool = field(default=False, metadata={"bits": False})

    NO_BITS = ("logging_steps", "report_to")


def test_a_digest_does_not_follow_what_lies_about_nor_what_changes_no_bits(load, tmp_path, monkeypatch):
    monkeypatch.setattr("test_run.STAGES", STAGES | {"knead": Knead})
    monkeypatch.chdir(tmp_path)
    same = load({"knead.speed": 2, "bake.heat": 90}).digest("bake", ())
    for name in ("random", "bake", "90", "flour"):  # any word of a recipe
        (tmp_path / name).write_text("a file that happens to lie there")
    assert load({"knead.speed": 2, "bake.heat": 90}).digest("bake", ()) == same
    kneaded = load({"knead.speed": 2}).digest("knead", ())
    assert (
        load({"knead.speed": 2, "knead.logging_steps": 1, "knead.report_to": "all", "knead.radio": True}).digest("knead", ())
        == kneaded
    )
    assert load({"knead.speed": 3}).digest("knead", ()) != kneaded
    best = {"knead.speed": 2, "knead.load_best_model_at_end": True}  # of the checkpoints there are
    assert load(best).digest("knead", ()) != load(best | {"knead.logging_steps": 1}).digest("knead", ())


def test_contents_count_and_times_do_not(load, tmp_path):
    same, rye = load().digest("bake", ()), tmp_path / "rye.txt"
    os.utime(rye, (1, 1))
    assert load().digest("bake", ()) == same, "a touched file"
    stat = rye.stat()
    rye.write_text("oat")  # as long, and as old
    os.utime(rye, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load().digest("bake", ()) != same


def test_hashes_of_large_files_are_kept_and_never_outlive_their_content(load, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "LARGE", 1)
    monkeypatch.setattr(inputs, "SETTLED", -1)
    run, rye = load(), tmp_path / "rye.txt"
    run.claim()
    same = run.digest("bake", ())
    cache = run.folder / inputs.HASHES
    kept = json.loads(cache.read_text())
    cache.write_text(json.dumps({str(rye): [*kept[str(rye)][:-1], "looked up"]}))
    assert load().inputs("bake", ())[f"flour: {rye}"] == "looked up"
    cache.write_text(json.dumps(kept))
    stat = rye.stat()
    rye.write_text("oat")
    os.utime(rye, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load().digest("bake", ()) != same


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bake.heat": 90}, "bake runs again: heat default -> 90"),
        ({"seed": 7}, "bake runs again: seed 0 -> 7"),
        ({}, "bake runs again: flour: {rye} has changed"),
    ],
)
def test_a_stage_that_runs_again_says_why(load, tmp_path, change, words):
    run, rye = load(), tmp_path / "rye.txt"
    assert again(run, "bake", ()) is None
    do(run, "bake")
    assert again(load(), "bake", ()) is None
    if not change:
        rye.write_text("wheat")
    assert again(load(change), "bake", ()) == words.format(rye=rye)
    (begin(load(change), "bake", ()) / "checkpoints").mkdir()
    assert again(load(change), "bake", ()) is None, "it goes on"


def test_dropped_checkpoints_and_what_ran_before_are_named(load):
    do(load(), "bake")
    folder = begin(load({"slice.width": 2}), "slice", ["bake"])
    (folder / "checkpoints").mkdir()
    assert again(load({"slice.width": 3}), "slice", ["bake"]) == "slice runs again: width 2 -> 3; its checkpoints are dropped"
    do(load({"bake.heat": 90}), "bake")
    assert "slice runs again: bake " in again(load({"slice.width": 2}), "slice", ["bake"])


def test_what_is_edited_while_a_run_goes_on_does_not_become_its_provenance(load, tmp_path, caplog):
    run = load()
    same = run.digest("bake", ())
    (tmp_path / "rye.txt").write_text("wheat")
    assert run.digest("bake", ()) == same, "looked at once"
    with pytest.raises(RecipeError, match=r"bake: flour: .*rye.txt has changed since this command began"):
        begin(run, "bake", ())
    begin(load(), "bake", ())
    run = load()
    begin(run, "bake", ())
    (tmp_path / "rye.txt").write_text("oat")
    finish(run, "bake")
    assert "rye.txt has changed while it was running" in caplog.text
    assert "rye.txt has changed" in again(load(), "bake", ())


def test_damaged_files_of_a_done_stage_are_named_with_what_heals_them(load):
    run = load()
    do(run, "bake")
    out = run.path("bake") / "out.txt"
    os.utime(out, (1, 1))
    assert begin(load(), "bake", ()) is None, "a touched file is not damaged"
    out.write_text("bakE")  # as long as before
    with pytest.raises(RecipeError, match=r"slice needs bake, but .*out.txt is damaged. Make it anew: hf-minitron bake "):
        begin(load(), "slice", ["bake"])
    assert again(load(), "bake", ()) == f"bake runs again: {out} is damaged"
    do(load(), "bake")
    assert begin(load(), "slice", ["bake"]) is not None
    out.unlink()
    assert again(load(), "bake", ()) == f"bake runs again: {out} is missing"


HOLD = """
import sys, time
from pathlib import Path
from hf_minitron.run import Run
with Run(Path(sys.argv[1]), "model", 0, {}, Path("recipe.yaml")).locked():
    print("locked", flush=True)
    time.sleep(600)
"""


def test_one_process_works_in_a_folder_and_a_dead_one_blocks_nobody(load):
    run = load()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run.folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    for entered in (run.check_free, run.locked().__enter__):
        with pytest.raises(RecipeError, match=f"{run.folder}: another hf-minitron works in this folder. Wait until it ends"):
            entered()
    run.check_owner()  # looks only
    holder.kill()
    holder.wait()
    run.check_free()
    with run.locked():
        run.claim()


def test_a_section_of_comments_alone_takes_what_the_command_line_sets(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: m\nrun: r\npublish: # all of it is commented out\n")
    recipe = read_recipe(tmp_path / "recipe.yaml", {"publish.repo_id": "me/small"}, dict.fromkeys(KEYS["stages"]))
    assert recipe["publish"] == {"repo_id": "me/small"}
