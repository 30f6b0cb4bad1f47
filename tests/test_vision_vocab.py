"""Fewer tokens in vision-language models: the ids of images in config, tokenizer and processor are the new ones."""

import json

import pytest
import tiny
import tiny_tokenizers
import tiny_vision
import torch
import yaml
from PIL import Image
from test_vision import TYPES, answer, marked, relative
from test_vocab_run import TEXT
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Gemma3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from hf_minitron.__main__ import main
from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.config import named_ids
from hf_minitron.distillation.teacher import keep_tokens
from hf_minitron.evaluation.report import Report
from hf_minitron.plan import make_plan
from hf_minitron.pruning.prune import prune_model

VOCAB = 480
MARKS = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
SIZE = {"height": 8, "width": 8}


@pytest.mark.parametrize("model_type", marked(TYPES))
def test_a_student_of_some_tokens_says_of_an_image_what_its_teacher_does(model_type):
    teacher = tiny_vision.model(model_type, tie_word_embeddings=model_type in ("gemma3", "llava"))
    inputs = tiny_vision.images(model_type)
    ids = inputs["input_ids"][0].tolist()
    some = torch.randperm(90, generator=torch.Generator().manual_seed(4))[:40].tolist()
    named = {index for index in named_ids(teacher.config.to_dict()) if index < 99}
    kept = sorted({*ids, *named, *some})
    shape, scores = Architecture.of(teacher.config).shape, torch.zeros(99)
    scores[kept] = 1
    student = prune_model(teacher, make_plan({"vocab": scores}, shape, shape.cut_to({"vocab": len(kept)})))
    assert type(student) is type(teacher)
    assert student.config.image_token_id == kept.index(tiny_vision.IMAGE)
    assert student.config.text_config.vocab_size == len(kept)
    whole, new = answer(teacher, model_type)[..., kept], torch.tensor([[kept.index(index) for index in ids]])
    found = answer(student, model_type, input_ids=new)
    assert relative(found, whole) < 1e-6
    keep_tokens(teacher, kept)
    assert relative(answer(teacher, model_type, input_ids=new), whole) < 1e-6


def test_a_teacher_loses_the_rows_of_other_tokens_in_every_table():
    """Gemma 4 has an embedding for every layer beside the first one."""
    made, kept, ids = tiny.model("gemma4_text"), [3, 1, 98, 40, 7], torch.tensor([[0, 2, 4, 1]])
    with torch.no_grad():
        expected = made(torch.tensor(kept)[ids]).logits[..., kept]
        keep_tokens(made, kept)
        torch.testing.assert_close(made(ids).logits, expected)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A Gemma 3 with a processor of its own, whose tokenizer has three signs for images beside the text's tokens."""
    names = {name: getattr(tiny_tokenizers.ALL["byte_level"], name) for name in ("bos_token", "eos_token", "pad_token")}
    backend = tiny_tokenizers.ALL["byte_level"].backend_tokenizer
    made = PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=MARKS, **names)
    ids = {f"{name}_id": getattr(made, f"{name}_id") for name in names}
    images = {"image_token_index": made.image_token_id, "boi_token_index": made.boi_token_id,
              "eoi_token_index": made.eoi_token_id}  # fmt: skip
    config = tiny_vision.config("gemma3", vocab_size=len(made) + 12, tie_word_embeddings=True, **ids)
    for name, index in images.items():
        setattr(config, name, index)
    torch.manual_seed(0)
    teacher = AutoModelForImageTextToText.from_config(config)
    torch.nn.init.normal_(teacher.model.multi_modal_projector.mm_input_projection_weight)
    tiny.shake(teacher)
    found = tiny.make_project(tmp_path_factory.mktemp("vision"), teacher)
    processor = Gemma3Processor(Gemma3ImageProcessorPil(size=SIZE), made, image_seq_length=4, chat_template="{{ messages }}")
    processor.save_pretrained(found["folder"] / "teacher")
    path = found["folder"] / "teacher" / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_token_id": made.image_token_id}))
    for number, name in enumerate(("train", "calibration", "held_out")):
        rows = [json.dumps({"text": text[:2000]}) for text in TEXT[number::9]]
        (found["folder"] / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return found


def recipe(project, folder, **prune):
    base = project["recipe"]
    sections = {
        "prune": prune,
        "distill": {**base["distill"], "max_steps": 1},
        "evaluate": {**base["evaluate"], "speed": False},
    }
    sections["evaluate"]["tasks"] = []
    content = {**base, "run": str(folder / "run"), **sections}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "recipe.yaml")


def seen(folder):
    """A model, its tokenizer, and what its own processor makes of a picture between words."""
    processor = AutoProcessor.from_pretrained(folder)
    picture = Image.fromarray(torch.randint(0, 255, (8, 8, 3), generator=torch.Generator().manual_seed(2)).byte().numpy())
    inputs = processor(text="assert <start_of_image> statements", images=[picture], return_tensors="pt")
    model = tiny.load_complete(folder, AutoModelForImageTextToText).float()
    return model, processor.tokenizer, inputs


@pytest.mark.slow
def test_a_whole_run_gives_a_student_with_its_own_processor(project, tmp_path, capsys):
    assert main(["run", recipe(project, tmp_path, target={"vocab": VOCAB})]) == 0, capsys.readouterr().err
    teacher, whole, _ = seen(project["folder"] / "teacher")
    student, small, inputs = seen(tmp_path / "run" / "prune" / "student")
    assert type(student) is type(teacher)
    assert len(small) == student.config.text_config.vocab_size == VOCAB
    assert (small.image_token, small.boi_token, small.eoi_token) == tuple(MARKS.values())
    named = [student.config.image_token_id, student.config.boi_token_index, student.config.eoi_token_index]
    assert named == [small.image_token_id, small.boi_token_id, small.eoi_token_id]
    kept = json.loads((tmp_path / "run" / "prune" / "student" / "plan.json").read_text())["keep"]["vocab"]
    with torch.no_grad():
        ours = student(**inputs).logits
        theirs = teacher(**inputs | {"input_ids": torch.tensor(kept)[inputs["input_ids"]]}).logits[..., kept]
        other = student(**inputs | {"pixel_values": inputs["pixel_values"].flip(-1)}).logits
    assert relative(ours, theirs) < 1e-5
    assert relative(other, ours) > 1e-3, "the picture says nothing"
    folder = tmp_path / "run" / "publish" / "model"
    published, tokenizer, again = seen(folder)
    assert torch.equal(again["input_ids"], inputs["input_ids"])
    assert published(**again).logits.isfinite().all()
    assert tokenizer.chat_template == whole.chat_template
    assert json.loads((folder / "processor_config.json").read_text())["image_token_id"] == small.image_token_id
    report = Report.load(tmp_path / "run" / "evaluate" / "report.json")
    assert report.value("distilled", "bits_per_byte") > 0


def test_the_text_model_alone_may_have_fewer_tokens(project, tmp_path, capsys):
    path = recipe(project, tmp_path, target={"vocab": VOCAB, "ffn": 48}, text_only=True)
    for stage in ("score", "prune"):
        assert main([stage, path]) == 0, capsys.readouterr().err
    folder = tmp_path / "run" / "prune" / "student"
    student, small = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert student.config.model_type == "gemma3_text"
    assert student.config.vocab_size == len(small) == VOCAB
    assert student.config.eos_token_id == small.eos_token_id


def test_plan_refuses_fewer_tokens_than_the_config_names(project, tmp_path, capsys):
    assert main(["plan", recipe(project, tmp_path, target={"vocab": 3})]) == 1
    error = capsys.readouterr().err.strip()
    assert "vocab: 3 is fewer than the 6 tokens that the config names, which stay; use more" in error
    assert "\n" not in error


def test_plan_takes_a_cut_below_the_ids_of_images(project, tmp_path, capsys):
    assert main(["plan", recipe(project, tmp_path, target={"vocab": VOCAB})]) == 0, capsys.readouterr().err
    (vocab,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| vocab")]
    assert vocab.split("|")[3].strip() == str(VOCAB)
