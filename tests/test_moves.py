"""What moves on the Hub, a dataset, a model or the data of a task, makes a stage run again; no Hub is no reason to fail."""

import json

import pytest
import tiny
import torch
import yaml
from datasets import config
from huggingface_hub import constants, hf_api

from hf_minitron.__main__ import main
from hf_minitron.data.packing import check_first_block
from hf_minitron.data.texts import COMMITS, hub_commit, load_text
from hf_minitron.evaluation.task_files import task_files
from hf_minitron.inputs import model_files, teacher_files, text_files
from hf_minitron.run import Run
from hf_minitron.stages import distill, evaluate, score

DATA = "datasets/me/data"
CARD = {"configs": [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("plain", "other")]}


def lines(documents):
    return "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()


@pytest.fixture
def moving(hub):
    """A Hub with a dataset of two configurations, at a commit with the tag v1, and a model beside it."""
    COMMITS.clear()
    files = {"README.md": f"---\n{yaml.safe_dump(CARD)}---\n".encode(), "plain.jsonl": lines(tiny.text(30, 1)),
             "other.jsonl": lines(tiny.text(30, 2))}  # fmt: skip
    hub.first = hub.add_repo(DATA, private=False, **files)
    hub.repos[DATA]["refs"]["v1"] = hub.first
    hub.files_of_data = files
    yield hub
    COMMITS.clear()


def move(hub):
    return hub.commit(DATA, "main", hub.files_of_data | {"plain.jsonl": lines(tiny.text(30, 5))})


def no_hub(how, monkeypatch):
    """Let nobody reach the Hub: it is switched off, or it does not answer."""
    COMMITS.clear()
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    else:
        for place in (constants, config):
            monkeypatch.setattr(place, "ENDPOINT" if place is constants else "HF_ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(hf_api.api, "endpoint", "http://127.0.0.1:9")


NO_HUB = ("offline", "unreachable")


def scores(project, tmp_path, text, *more):
    recipe = {**project["recipe"], "run": str(tmp_path / "run")}
    recipe["score"] = {**recipe["score"], "text": text}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return main(["score", str(tmp_path / "recipe.yaml"), *more])


def both_commits_cached(moving):
    """Read a dataset before and after it has moved, as two commands do; return the second commit."""
    load_text("me/data@v1:plain")
    second = move(moving)
    COMMITS.clear()
    load_text("me/data:plain")
    return second


@pytest.mark.parametrize("how", NO_HUB)
def test_a_dataset_that_moves_makes_its_stage_run_again(moving, project, tmp_path, capsys, monkeypatch, how):
    assert scores(project, tmp_path, "me/data:plain") == 0, capsys.readouterr().err
    first = json.loads((tmp_path / "run/score/done.json").read_text())
    assert first["inputs"]["text: me/data:plain"] == f"commit {moving.first}", "the commit is written down"
    capsys.readouterr()
    assert scores(project, tmp_path, "me/data:plain") == 0
    assert "score: done before, skipped" in capsys.readouterr().out
    second = move(moving)
    assert scores(project, tmp_path, "me/data:plain") == 0
    said = f"score runs again: text: me/data:plain has moved from commit {moving.first} to commit {second}\n"
    assert said in capsys.readouterr().out
    no_hub(how, monkeypatch)
    assert scores(project, tmp_path, "me/data:plain") == 0, capsys.readouterr().err
    assert "score: done before, skipped" in capsys.readouterr().out
    assert scores(project, tmp_path, "me/data:plain", "--score.tokens", "128") == 0, capsys.readouterr().err
    assert "score runs again: tokens 256 -> 128\n" in capsys.readouterr().out


def test_a_pinned_dataset_stays_where_it_is(moving, tmp_path):
    old, second = list(load_text("me/data:plain")), move(moving)
    COMMITS.clear()
    new = list(load_text("me/data:plain"))
    assert new != old
    for source in ("me/data@v1:plain", f"me/data@{moving.first}:plain"):
        for streaming in (False, True):
            assert list(load_text(source, streaming=streaming)) == old, source
        assert text_files(source, {}) == {source: moving.first}
    assert text_files({"me/data:plain": 1, "me/data:other": 1}, {}) == {"me/data:plain": second, "me/data:other": second}
    with pytest.raises(ValueError, match="me/data@v2:plain cannot be read: Revision 'v2' doesn't exist for dataset 'me/data'"):
        check_first_block("me/data@v2:plain", tiny.tokenizer(), 8)
    with pytest.raises(ValueError, match="'me/data@:plain' names no revision: write me/data@ with a branch, a tag or a commit"):
        check_first_block("me/data@:plain", tiny.tokenizer(), 8)


@pytest.mark.parametrize("how", NO_HUB)
def test_another_commit_of_the_cache_does_not_take_a_pins_place(moving, monkeypatch, how):
    second = both_commits_cached(moving)
    no_hub(how, monkeypatch)
    for pin in ("v1", moving.first):
        message = f"me/data@{pin}:plain cannot be read: .* the cache holds commit {second}, not {moving.first}"
        with pytest.raises(ValueError, match=message) as raised:
            load_text(f"me/data@{pin}:plain")
        assert "\n" not in str(raised.value)
    assert len(load_text(f"me/data@{second}:plain")) == 30
    assert len(load_text("me/data:plain")) == 30


def test_a_process_reads_one_commit_of_a_dataset(moving):
    old = list(load_text("me/data:plain"))
    move(moving)
    assert list(load_text("me/data:plain")) == old
    assert list(load_text("me/data:plain", streaming=True)) == old


@pytest.mark.parametrize(
    ("stage", "section"),
    [
        ("score", {"text": "me/data:plain"}),
        ("distill", {"text": {"me/data:plain": 0.5, "me/data:other": 0.5}}),
        ("distill", {"text": "synthesized", "eval_text": "me/data:plain"}),
        ("evaluate", {"text": "me/data:plain"}),
    ],
)
def test_every_text_of_a_recipe_is_watched(moving, tmp_path, stage, section):
    sections = {"score": score.Args, "distill": distill.Args, "evaluate": evaluate.Args}

    def look():
        COMMITS.clear()
        run = Run(tmp_path, "owner/none", 0, {stage: section}, tmp_path / "recipe.yaml", sections)
        return run.digest(stage, ())

    before = look()
    assert before == look()
    move(moving)
    assert before != look()
    assert not moving.asked("synthesized")


# Models


@pytest.fixture
def models(moving, tmp_path):
    tiny.model(dtype=torch.float32).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    moving.add_folder("me/tiny", tmp_path / "model")
    return moving


def move_model(hub, **files):
    return hub.commit("me/tiny", "main", hub.files("me/tiny") | files)


def test_a_model_that_moves_makes_stages_run_again_unless_only_its_card_does(models, project, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_minitron.command.time_allows", lambda *args: ({}, ""))  # which takes most of the time
    first = models.repos["me/tiny"]["refs"]["main"]
    recipe = {**project["recipe"], "run": str(tmp_path / "run"), "model": "me/tiny", "prune": {"target": {"ffn": 48}}}
    recipe["score"] = {**recipe["score"], "text": "me/data@v1:plain"}
    recipe["distill"] = {**recipe["distill"], "max_steps": 1}
    recipe["evaluate"] = {**recipe["evaluate"], "models": {"other": "me/tiny@main"}, "tasks": [], "speed": False}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    again = lambda: (main(["run", str(tmp_path / "recipe.yaml")]), capsys.readouterr())  # noqa: E731
    assert again()[0] == 0
    for _ in range(2):
        code, said = again()
        assert code == 0, said.err
        for stage in ("score", "prune", "distill", "evaluate"):
            assert f"{stage}: done before, skipped" in said.out, stage
        move_model(models, **{"README.md": b"# A card\n"})
    card = (tmp_path / "run/publish/model/README.md").read_text()
    assert f"read at these commits: \nme/data@v1:plain `{models.first}`." in card
    assert yaml.safe_load(card.split("---")[1])["datasets"] == ["me/data"]
    tokenizer = json.loads(models.files("me/tiny")["tokenizer_config.json"]) | {"model_max_length": 77}
    last = move_model(models, **{"tokenizer_config.json": json.dumps(tokenizer).encode()})
    code, said = again()
    assert code == 0, said.err
    assert f"score runs again: model: me/tiny has moved from commit {first} to commit {last}" in said.out


def test_a_teacher_is_watched_at_its_revision(models, tmp_path):
    from hf_minitron.checkpoint.model_files import resolve

    main_commit = models.repos["me/tiny"]["refs"]["main"]
    models.repos["me/tiny"]["refs"]["dev"] = main_commit
    pin = {"revision": "dev", "cache_dir": str(tmp_path / "own")}
    resolve("me/tiny", **pin)
    section = {"model": "me/tiny", "teacher_model_init_kwargs": pin}
    for teacher in ("me/tiny", None):
        (found,) = teacher_files(teacher, section).values()
        assert (found.name, found.is_relative_to(tmp_path / "own")) == (main_commit, True)
    moved = models.commit("me/tiny", "dev", models.files("me/tiny") | {"merges.txt": b"x"})
    resolve("me/tiny", **pin)
    (found,) = teacher_files(None, section).values()
    assert found.name == moved
    assert teacher_files(None, {"model": "me/tiny"}) == {}, "the run's model is looked at anyway"


def test_the_base_model_of_an_adapter_is_watched(models, tmp_path):
    from hf_minitron.checkpoint.model_files import resolve

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "me/tiny"}))
    resolve("me/tiny")
    assert set(model_files(str(adapter), {})) == {"adapter_config.json", "me/tiny"}


# Tasks


@pytest.mark.parametrize("how", NO_HUB)
def test_the_data_of_a_task_is_watched(moving, project, tmp_path, monkeypatch, how):
    task = yaml.safe_load((project["folder"] / "tasks/tiny.yaml").read_text())
    for name, kwargs in (("moves", {}), ("stays", {"revision": "v1"})):
        content = task | {"task": name, "dataset_path": "me/data", "dataset_name": "plain", "dataset_kwargs": kwargs}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))

    def look():
        COMMITS.clear()
        return [task_files([name], {"include_path": str(tmp_path)})["me/data"] for name in ("moves", "stays")]

    assert look() == [moving.first, moving.first]
    second = move(moving)
    assert look() == [second, moving.first]
    assert task_files([str(tmp_path / "moves.yaml")], {})["me/data"] == second
    no_hub(how, monkeypatch)
    assert look() == [None, None], "nothing of it is in the cache"


@pytest.mark.parametrize("how", NO_HUB)
def test_without_the_hub_the_commits_are_those_of_the_cache(moving, monkeypatch, how):
    second = both_commits_cached(moving)
    no_hub(how, monkeypatch)
    assert [hub_commit("me/data"), hub_commit("me/data", "v1"), hub_commit("me/none")] == [second, moving.first, None]
    assert text_files("me/data:plain", {}) == {"me/data:plain": second}
