"""A vision-language model through all stages: the student is one too, its images mean what they meant, and it is published."""

import json

import pytest
import tiny
import tiny_vision
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Gemma3ForCausalLM

from hf_minitron.__main__ import main

PROCESSOR = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 8, "width": 8}}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    made = tiny.make_project(tmp_path_factory.mktemp("vision"), tiny_vision.model("gemma3", torch.float32))
    (made["folder"] / "teacher" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return made


def written(project, path, **sections):
    recipe = project["recipe"] | {key: project["recipe"].get(key, {}) | value for key, value in sections.items()}
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"run": str(path / "run")}))
    return str(path / "recipe.yaml")


@pytest.mark.slow
def test_a_vision_language_model_goes_through_a_whole_run(project, tmp_path, capsys):
    recipe = written(project, tmp_path, prune={"target": {"hidden": 24, "ffn": 48, "layers": 2, "heads": 2}})
    assert main(["run", recipe]) == 0, capsys.readouterr().err
    folder = tmp_path / "run" / "publish" / "model"
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert 'pipeline("image-text-to-text"' in card.content
    assert "transformers >= 4.50" in card.content
    assert json.loads((folder / "preprocessor_config.json").read_text()) == PROCESSOR
    student, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    teacher = AutoModelForImageTextToText.from_pretrained(project["folder"] / "teacher")
    assert type(student) is type(teacher)
    assert student.config.text_config.hidden_size == 24
    assert student.config.text_config.num_hidden_layers == 2
    theirs, ours = dict(teacher.model.vision_tower.named_parameters()), dict(student.model.vision_tower.named_parameters())
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    inputs = tiny_vision.images("gemma3", torch.float32)
    with torch.no_grad():
        seen = student(**inputs).logits
        other = student(**inputs | {"pixel_values": inputs["pixel_values"].flip(-1)}).logits
    assert seen.isfinite().all()
    assert (seen - other).abs().max() > 1e-3
    report = json.loads((tmp_path / "run" / "evaluate" / "report.json").read_text())
    assert {entry["model"] for entry in report["entries"]} == {"teacher", "pruned", "distilled"}


@pytest.mark.slow
def test_a_qwen_3_5_with_images_goes_through_a_whole_run(tmp_path, capsys):
    """As its checkpoints are: a hybrid text model inside of a model that reads images, in bfloat16."""
    teacher = tiny_vision.model("qwen3_5", torch.float32).to(torch.bfloat16)
    teacher.config.dtype = torch.bfloat16
    made = tiny.make_project(tmp_path, teacher)
    target = {"layers": {"linear": 1, "attention": 1}, "hidden": 24, "ffn": 48, "ssm_heads": 4}
    sections = {"prune": {"target": target}, "evaluate": {"tasks": []}}  # its class of tokenizer reads few of these words
    assert main(["run", written(made, tmp_path, **sections)]) == 0, capsys.readouterr().err
    student = tiny.load_complete(tmp_path / "run" / "publish" / "model", AutoModelForImageTextToText)
    assert type(student) is type(teacher)
    assert len(set(student.config.text_config.layer_types)) == student.config.text_config.num_hidden_layers == 2
    with torch.no_grad():
        assert student(**tiny_vision.images("qwen3_5", student.dtype)).logits.isfinite().all()


def test_the_student_may_be_the_text_model_alone(project, tmp_path, capsys):
    recipe = written(project, tmp_path, prune={"target": {"ffn": 48}, "text_only": True}, distill={"max_steps": 1})
    for stage in ("score", "prune", "distill"):
        assert main([stage, recipe]) == 0, capsys.readouterr().err
    folder = tmp_path / "run" / "distill" / "student"
    assert not (folder / "preprocessor_config.json").exists()
    student, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(student) is Gemma3ForCausalLM
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    capsys.readouterr()
    assert main(["plan", recipe]) == 0
    counts = next(line for line in capsys.readouterr().out.splitlines() if "parameters" in line)
    assert f"{student.num_parameters():,}" in counts
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"model": str(folder)}))
    assert main(["plan", recipe]) == 1
    assert "is a language model of text alone already; leave it out" in capsys.readouterr().err
