"""A model is pinned to a revision wherever it is named, and what was loaded is written down."""

import json

import pytest
import tiny
import torch
import yaml
from hub_server import OTHER_TOKEN, TOKEN
from transformers import AutoModelForCausalLM

from hf_minitron.__main__ import main
from hf_minitron.checkpoint.checkpoint import load_model
from hf_minitron.checkpoint.model_files import is_hub_id, pinned, resolve, revision_of
from hf_minitron.distillation.config import DistillationArguments
from hf_minitron.distillation.trainer import DistillationTrainer

REPO = "me/tiny"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models of one shape and different weights."""
    made = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    for seed, folder in enumerate(made):
        tiny.model(dtype=torch.float32, seed=seed).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
    return made


@pytest.fixture
def pins(hub, folders, tmp_path, monkeypatch):
    """The Hub with both, one commit after the other, the second with what nobody loads beside; and an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    contents[1] |= dict.fromkeys(["original/model.safetensors", "consolidated.safetensors", "model.fp16.safetensors"], b"x")
    first = hub.add_repo(REPO, private=False, **contents[0])
    second = hub.commit(REPO, "main", contents[1])
    hub.repos[REPO]["refs"]["v1"] = first
    return hub, first, second


def first_weight(model):
    return model.get_input_embeddings().weight[0].detach()


def weights(folders):
    return [first_weight(AutoModelForCausalLM.from_pretrained(folder)) for folder in folders]


def test_a_revision_beside_the_name_and_as_an_argument(pins, folders):
    hub, first, second = pins
    old, new = weights(folders)
    named = {f"{REPO}@v1": {}, f"{REPO}@{first}": {}, REPO: {"revision": "v1"}}
    for model, kwargs in named.items():
        assert torch.equal(first_weight(load_model(model, torch.float32, **kwargs)), old), model
        assert revision_of(resolve(model, **kwargs)) == first
    assert torch.equal(first_weight(load_model(REPO, torch.float32)), new)
    assert revision_of(resolve(REPO)) == second
    assert revision_of(folders[0]) is None


def test_only_what_is_loaded_is_fetched(pins):
    hub, _, _ = pins
    resolve(REPO, weights=False)
    assert not hub.asked("safetensors")
    resolve(REPO)
    assert hub.asked(r"GET .*/model\.safetensors$") == 1
    assert not hub.asked("original|consolidated|fp16")


def test_shards_are_fetched_by_their_index(pins, tmp_path):
    hub, _, _ = pins
    tiny.model(dtype=torch.float32).save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    files = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    hub.add_repo("me/shards", False, **{f"sub/{name}": content for name, content in files.items()}, **files)
    folder = resolve("me/shards")
    assert {path.name for path in folder.glob("*.safetensors")} == {name for name in files if name.endswith(".safetensors")}
    assert not hub.asked("/sub/")
    assert load_model("me/shards", torch.float32, subfolder="sub").config.num_hidden_layers == tiny.SIZES["layers"]


@pytest.mark.parametrize(
    ("model", "kwargs", "message"),
    [
        (f"{REPO}@v2", {}, "has no revision 'v2'"),
        (f"{REPO}@v1", {"revision": "main"}, "name one of the two"),
        (f"{REPO}@", {}, "names no revision"),
        ("me/none", {}, "No model at 'me/none'"),
    ],
)
def test_a_wrong_pin_is_refused_in_one_line(pins, model, kwargs, message):
    with pytest.raises(ValueError, match=message) as caught:
        resolve(model, **kwargs)
    assert "\n" not in str(caught.value)


def test_a_folder_with_an_at_in_its_name_is_a_folder(tmp_path, monkeypatch, folders):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / "tiny@v1").symlink_to(folders[0])
    assert pinned("me/tiny@v1") == ("me/tiny@v1", None)
    assert not is_hub_id("me/tiny@v1")
    assert resolve("me/tiny@v1").samefile(folders[0])
    with pytest.raises(ValueError, match="revision: 'v1', but me/tiny@v1 is a folder"):
        resolve("me/tiny@v1", revision="v1")


@pytest.mark.parametrize(
    "kwargs", [{"revision": "v1"}, {"revision": "v1", "torch_dtype": "float64", "attn_implementation": "eager"}]
)
def test_a_teachers_arguments_take_effect(pins, folders, tmp_path, kwargs):
    args = DistillationArguments(tmp_path / "out", report_to="none", teacher_model_init_kwargs=kwargs)
    teacher = DistillationTrainer(tiny.model(dtype=torch.float32), REPO, args, train_dataset=tiny.blocks()).teacher.model
    assert torch.equal(first_weight(teacher).float(), weights(folders)[0].to(teacher.dtype).float())
    assert teacher.config.name_or_path == REPO
    if "torch_dtype" in kwargs:
        assert (teacher.dtype, teacher.config._attn_implementation) == (torch.float64, "eager")


def test_a_teachers_token_takes_effect_and_is_shown_nowhere(pins, tmp_path, monkeypatch, capsys):
    hub, _, _ = pins
    hub.repos[REPO]["private"] = True
    monkeypatch.setenv("HF_TOKEN", OTHER_TOKEN)  # may not see it
    with pytest.raises(ValueError, match="No model at 'me/tiny'"):
        resolve(REPO)
    args = DistillationArguments(tmp_path / "out", report_to="none", max_steps=1, save_steps=1, bf16=False,
                                 teacher_model_init_kwargs={"token": TOKEN})  # fmt: skip
    trainer = DistillationTrainer(tiny.model(dtype=torch.float32), REPO, args, train_dataset=tiny.blocks())
    trainer.train()
    said = f"{args} {args!r} {args.to_json_string()} {args.to_sanitized_dict()} {capsys.readouterr()}"
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert TOKEN not in said
    assert TOKEN.encode() not in written


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"revison": "v1"}, "'revison' is not taken; did you mean 'revision'"),
        ({"trust_remote_code": True}, "'trust_remote_code' is not taken"),
        ({"revision": 100000.0}, "revision is 100000.0, not text; put it in quotes"),
        ({"dtype": "int8"}, "dtype is 'int8', not auto"),
    ],
)
def test_wrong_arguments_of_a_teacher_are_refused_at_once(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        DistillationArguments(tmp_path, teacher_model_init_kwargs=kwargs)


def test_arguments_for_a_loaded_teacher_are_refused(tmp_path):
    args = DistillationArguments(tmp_path, report_to="none", teacher_model_init_kwargs={"revision": "v1"})
    with pytest.raises(ValueError, match="teacher_model_init_kwargs: .*loaded already"):
        DistillationTrainer(tiny.model(), tiny.model(), args, train_dataset=tiny.blocks())


def test_a_run_of_a_pinned_model_says_so(pins, project, tmp_path):
    hub, first, second = pins
    recipe = {**project["recipe"], "model": f"{REPO}@v1", "run": str(tmp_path / "run"), "publish": {"license": "mit"}}
    recipe["distill"] = {**recipe["distill"], "max_steps": 1}
    recipe["evaluate"] = {**recipe["evaluate"], "models": {"newest": REPO}, "tasks": [], "speed": False}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", str(tmp_path / "recipe.yaml")]) == 0
    published = tmp_path / "run" / "publish" / "model"
    models = json.loads((published / "report.json").read_text())["models"]
    assert (models["teacher"]["revision"], models["newest"]["revision"]) == (first, second)
    card = (published / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == REPO
    assert f"[{REPO}](https://huggingface.co/{REPO}/tree/{first})" in card
    assert f"{REPO} at revision `{first}`" in card
