"""A chain of two rounds on a tiny model: checked ahead, resumable, each round with a truthful card."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import tiny
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_minitron import command
from hf_minitron.__main__ import main
from hf_minitron.chain import placeholder_models
from hf_minitron.checkpoint.checkpoint import Checkpoint
from hf_minitron.recipe import load_recipe
from hf_minitron.stages.every import STAGES

NONUNIFORM = {"score": {"sublayers": True}, "prune": {"target": {}, "nonuniform": 0.5}}


@pytest.fixture
def chain(project, tmp_path):
    """Writes two recipes, the second of the first's student, and returns their paths as the command takes them."""

    def write(first=(), second=()):
        run, paths = tmp_path / "first", []
        rounds = {"first": {}, "second": {"model": str(run / "publish/model"), "publish": {}}}
        rounds["second"]["prune"] = {"target": {"hidden": 16, "ffn": 32}}
        rounds["second"]["distill"] = {**project["recipe"]["distill"], "teacher": project["recipe"]["model"]}
        for (name, changes), more in zip(rounds.items(), (first, second), strict=True):
            recipe = {**project["recipe"], "run": str(tmp_path / name), **changes}
            recipe["evaluate"] = {**recipe["evaluate"], "tasks": [], "speed": False}
            for key, value in dict(more).items():
                recipe[key] = {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
            paths.append(tmp_path / f"{name}.yaml")
            paths[-1].write_text(yaml.safe_dump(recipe))
        return [str(path) for path in paths]

    return write


def parameters(folder):
    return sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())


@pytest.mark.slow
def test_killed_between_rounds_it_goes_on_and_each_round_has_its_card(chain, tmp_path, capsys, monkeypatch):
    paths, real = chain(), STAGES["score"].run

    def killed(args, run, out):
        return real(args, run, out) if run.folder.name == "first" else 1 / 0

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setitem(STAGES, "score", dataclasses.replace(STAGES["score"], run=killed))
        main(["run", *paths])
    first, second = (tmp_path / name / "publish/model" for name in ("first", "second"))
    assert (first / "README.md").is_file()
    assert not (tmp_path / "second/score").exists()
    capsys.readouterr()
    assert main(["run", *paths]) == 0
    assert capsys.readouterr().out.count("done before, skipped") == 5
    assert parameters(second) < parameters(first)
    assert json.loads((second / "config.json").read_text())["hidden_size"] == 16
    cards = [ModelCard.load(folder / "README.md") for folder in (first, second)]
    assert [card.data.base_model for card in cards] == ["owner/teacher", "owner/teacher"]
    texts = [" ".join(card.text.split()) for card in cards]
    assert "pruned from [owner/teacher](https://huggingface.co/owner/teacher) (42,760) and taught by it with" in texts[0]
    assert "pruned from first (20,472), a student of [owner/teacher]" in texts[1]
    assert "and taught by owner/teacher with" in texts[1]
    assert f"hf-minitron run {paths[0]} {paths[1]}".split("/")[-1] in texts[1]
    # a card written anew is no reason to prune its model again
    assert main(["run", *paths, "--publish.notes", "careful"]) == 0
    out = capsys.readouterr().out
    assert out.count("done before, skipped") == 8
    assert out.count("publish: done") == 2


@pytest.mark.slow
def test_a_published_first_round_is_the_base_model_of_the_second(chain, tmp_path):
    paths = chain(first={"publish": {"repo_id": "me/first"}}, second={"distill": {"teacher": None}})
    assert main(["run", *paths]) == 0
    card = ModelCard.load(tmp_path / "second/publish/model/README.md")
    assert card.data.base_model == "me/first"
    text = " ".join(card.text.split())
    assert "pruned from [me/first](https://huggingface.co/me/first) (20,472) and taught by it with" in text


def test_a_nonuniform_student_is_pruned_and_taught_again(chain, tmp_path):
    assert main(["run", *chain(first=NONUNIFORM)]) == 0
    first, second = (json.loads((tmp_path / name / "publish/model/config.json").read_text()) for name in ("first", "second"))
    assert {first["model_type"], second["model_type"]} == {"minitron_pruned"}
    assert second["layer_intermediate_size"] == [min(size, 32) for size in first["layer_intermediate_size"]]
    assert second["hidden_size"] == 16
    report = json.loads((tmp_path / "second/evaluate/report.json").read_text())
    assert report["models"]["distilled"]["parameters"] == parameters(tmp_path / "second/publish/model")
    text = " ".join(ModelCard.load(tmp_path / "second/publish/model/README.md").text.split())
    assert "pruned from first (" in text
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "second/publish/model")
    cache = tiny.cached_numbers(model, 5) * 2 // 5
    assert f"{cache / 1e3:,.1f} kB" in text, "the KV cache is that of its layers"


def test_the_outline_is_what_pruning_makes(chain, project, tmp_path):
    tied = tmp_path / "tied"  # a rotation unties it
    shutil.copytree(project["folder"] / "teacher", tied, ignore=shutil.ignore_patterns("*.safetensors*"))
    tiny.model(dtype=tiny.torch.float32, tie_word_embeddings=True).save_pretrained(tied)
    for target in ({"hidden": 24, "ffn": 48}, {"hidden": 24, "heads": 2, "kv_heads": 1, "layers": 2}):
        for corrections in (["least_squares"], ["rotation"]):
            more = {"model": str(tied), "run": str(tmp_path / f"first-{corrections[0]}-{len(target)}")}
            path, _ = chain(first={"prune": {"target": target, "corrections": corrections}, **more})
            run = load_recipe(Path(path), {}, {name: stage.args for name, stage in command.STAGES.items()})
            made = placeholder_models(run, run, run.folder.with_suffix(".outline"))
            for stage in ("score", "prune"):
                assert main([stage, path]) == 0
            real, outline = run.path("prune") / "student", made[(run.path("publish") / "model").resolve()]
            assert Checkpoint(outline).specs == Checkpoint(real).specs
            assert (outline / "config.json").read_text() == (real / "config.json").read_text()
            assert {p.name for p in real.iterdir()} - {p.name for p in outline.iterdir()} <= {"plan.json", "plan"}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {"prune": {"target": {"hidden": 32}}}, "second.yaml: prune: hidden: 32 is larger"),
        ({}, {"prune": {"target": {"ffn": 20}}}, "second.yaml: prune: ffn: 20 is not a multiple of 8"),
        ({"prune": {"target": {"hidden": 20}}}, {}, "first.yaml: prune: hidden: 20 is not a multiple of 8"),
        ({}, {"evaluate": {"text": "./nowhere.txt"}}, "second.yaml: evaluate: No text at './nowhere.txt'"),
        ({}, {"score": {"tokens": "many"}}, "second.yaml: score.tokens: 'many' is not a whole number"),
        ({}, {"distill": {"teacher": "./nowhere"}}, "second.yaml: distill: No model at './nowhere'"),
        (NONUNIFORM, {"prune": {"target": {"ffn": 80}}}, "second.yaml: prune: ffn: 80 is larger than the model's 72"),
    ],
)
def test_what_is_wrong_with_either_recipe_is_told_before_the_first_is_begun(chain, tmp_path, capsys, first, second, message):
    assert main(["run", *chain(first, second)]) == 1
    assert message in capsys.readouterr().err.replace(str(tmp_path) + "/", "")
    assert not (tmp_path / "first").exists()
    assert not (tmp_path / "second").exists()


def test_folders_and_overrides_that_clash_are_told(chain, tmp_path, capsys):
    paths = chain(second={"run": str(tmp_path / "first")})
    assert main(["run", *paths]) == 1
    assert "another recipe of the chain has the folder" in capsys.readouterr().err
    for key in ("run", "model"):
        assert main(["run", *chain(), f"--{key}", "elsewhere"]) == 1
        assert f"--{key} is for one recipe" in capsys.readouterr().err


def test_the_corrected_teacher_of_the_first_round_may_teach_the_second(chain, project, tmp_path, capsys, monkeypatch):
    correct = {"text": str(project["folder"] / "train.jsonl"), "block_size": 16, "max_steps": 2, "warmup_steps": 1}
    paths = chain(first={"correct": correct}, second={"distill": {"teacher": str(tmp_path / "first/correct/teacher")}})
    monkeypatch.setattr(command, "run_all", lambda *args: None)
    assert main(["run", *paths]) == 0
    assert capsys.readouterr().out.count("About ") == 2
    assert main(["run", *paths[::-1]]) == 1  # the wrong way round
    assert "No model at" in capsys.readouterr().err
