"""YAML in which language codes, dates and revisions are text, read and written."""

import math

import pytest
import yaml

from hf_minitron.errors import RecipeError
from hf_minitron.hub import facts
from hf_minitron.recipe import bind, load_recipe
from hf_minitron.stages import publish
from hf_minitron.stages.every import STAGES
from hf_minitron.yaml_text import dump_yaml, load_yaml

TEXTS = [
    "no",
    "yes",
    "on",
    "off",
    "Y",
    "n",
    "No",
    "0123",
    "0x1F",
    "0o17",
    "12:30:45",
    "2024-05-01",
    "1.2.3",
    "=",
    "1e",
    "e5",
]
NUMBERS = {
    "1e-4": 1e-4,
    "3": 3,
    "-2": -2,
    "0": 0,
    "1_000": 1000,
    "2.5": 2.5,
    "1E5": 1e5,
    ".5": 0.5,
    "5.": 5.0,
    "-.inf": -math.inf,
}
QUOTED = [
    "no",
    "1e5",
    "1e-4",
    "0123",
    "true",
    "null",
    "~",
    "3",
    "2.5",
    "2024-05-01",
    "12:30",
    "1_000",
    "on",
    ".inf",
    "",
    "=",
    "<<",
]


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_text(text):
    assert load_yaml(f"a: {text}") == {"a": text}


@pytest.mark.parametrize("text", NUMBERS)
def test_what_is_a_number(text):
    found = load_yaml(f"a: {text}")["a"]
    assert (found, type(found)) == (NUMBERS[text], type(NUMBERS[text]))


def test_truth_values_and_nothing():
    assert load_yaml("[true, False, null, ~, ]") == [True, False, None, None]


@pytest.mark.parametrize("text", QUOTED)
def test_text_is_read_back_as_text_by_either_version(text):
    written = dump_yaml({"a": text, "b": [text]})
    for read in (load_yaml, yaml.safe_load):
        assert read(written) == {"a": text, "b": [text]}, (read, written)


def recipe_with(tmp_path, project, section):
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml({key: value for key, value in project["recipe"].items() if key != "publish"}) + section)
    return load_recipe(path, {}, {name: stage.args for name, stage in STAGES.items()})


def test_languages_and_revisions_of_a_recipe_are_text(project, tmp_path):
    run = recipe_with(tmp_path, project, "publish: {language: [en, no, on], revision: 0123}\n")
    args = bind(run, "publish", publish.Args)
    assert (args.language, args.revision) == (["en", "no", "on"], "0123")
    run.claim()
    assert load_yaml((run.folder / "recipe.yaml").read_text()) == run.recipe


def test_norwegian_reaches_the_card(whole, tmp_path):
    recipe = load_yaml((whole / "recipe.yaml").read_text())
    recipe["publish"]["language"] = ["en", "no"]
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
    run = load_recipe(tmp_path / "recipe.yaml", {}, {name: stage.args for name, stage in STAGES.items()})
    publish.write(facts.gather(run), *publish.read(run), tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["language"] == ["en", "no"]
    assert load_yaml(card.split("```yaml\n")[1].split("```")[0])["publish"]["language"] == ["en", "no"]
    assert "It needs transformers >= 5.15." in card


def test_a_language_that_is_no_text_is_refused(project, tmp_path):
    run = recipe_with(tmp_path, project, "publish: {language: [en, false]}\n")
    with pytest.raises(ValueError, match="language: False is not a language code"):
        publish.check(bind(run, "publish", publish.Args), run)


@pytest.mark.parametrize("text", ["yes", "on", "Yes"])
def test_where_only_a_truth_value_is_meant_yes_is_one(project, tmp_path, text):
    run = recipe_with(tmp_path, project, f"publish: {{private: {text}, overwrite: no}}\n")
    args = bind(run, "publish", publish.Args)
    assert (args.private, args.overwrite) == (True, False)


@pytest.mark.parametrize("text", ["1e5", "3", "1.5"])
def test_a_number_for_text_is_refused_with_the_remedy(project, tmp_path, text):
    run = recipe_with(tmp_path, project, f"publish: {{revision: {text}}}\n")
    with pytest.raises(RecipeError, match="publish.revision: .* is not text or null; put it in quotes"):
        bind(run, "publish", publish.Args)
