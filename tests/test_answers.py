"""What models write after the same prompts: greedy, in the card and the page as it is."""

import html
import json
import re

import pytest
import tiny
import torch
import yaml
from markdown_it import MarkdownIt
from test_publish import card, report
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_minitron.__main__ import main
from hf_minitron.evaluation.answers import Prompts, answers, verbatim
from hf_minitron.evaluation.report import Report

TEMPLATE = "{% for m in messages %}{{ 'w3 ' + m['content'] + ' ' }}{% endfor %}{% if add_generation_prompt %}w4{% endif %}"


def greedy(model, ids, count):
    """The most probable next token, one at a time."""
    for _ in range(count):
        ids = [*ids, model(torch.tensor([ids])).logits[0, -1].argmax().item()]
    return ids


@pytest.mark.parametrize("chat", [False, True])
def test_an_answer_is_the_most_probable_one(chat):
    model, tokenizer = tiny.model().train(), tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    model.generation_config.update(do_sample=True, temperature=3.0)
    own, prompts = model.generation_config, ["w9", "w5 w6 w7"]
    found = answers(model, tokenizer, Prompts(prompts, 4, chat))
    assert [prompt for prompt, _ in found] == prompts
    for prompt, text in found:
        start = tokenizer(f"w3 {prompt} w4" if chat else prompt)["input_ids"]
        new = greedy(tiny.model(), start, 4)[len(start) :]
        ends = [*new, tokenizer.eos_token_id].index(tokenizer.eos_token_id)
        assert text == tokenizer.decode(new[:ends], skip_special_tokens=True).strip()
    assert model.generation_config is own
    assert model.training


UGLY = [
    "<b>bold</b> & `code` | a_b_ *c*",
    "</details><script>alert(1)</script>",
    "1. one\n\n2. two\n# head",
    "![x](y.png)",
    "\\ ~ ^",
]


@pytest.mark.parametrize("text", UGLY)
def test_a_text_is_shown_as_it_is(text):
    rendered = MarkdownIt("commonmark", {"html": True}).enable("table").render(f"- *name*: {verbatim(text)}")
    shown = html.unescape(re.fullmatch(r"<ul>\n<li><em>name</em>: (.*)</li>\n</ul>\n", rendered)[1])
    assert shown == " ".join(text.split())
    assert not re.search(r"<(?!/?(ul|li|em)>)", rendered)


def test_signs_that_no_page_shows_are_said_to_be_there():
    assert verbatim("a\x00b\x1b c\u202ed\u2066\x9f") == "a\ufffdb\ufffd c\ufffdd\ufffd\ufffd"
    assert verbatim("Ünï 你好 \U0001f469\u200d\U0001f4bb\t\n x") == "Ünï 你好 \U0001f469\u200d\U0001f4bb x"


def test_the_report_the_card_and_the_page_hold_the_answers(whole):
    folder = whole / "run/publish/model"
    rows = Report.load(folder / "report.json").answers
    assert [row["prompt"] for row in rows] == ["w5 w6 w7", "w8"]
    assert all([*row] == ["prompt", "teacher", "corrected", "pruned", "distilled"] for row in rows)
    model = AutoModelForCausalLM.from_pretrained(whole / "teacher", dtype=torch.bfloat16)
    assert [(row["prompt"], row["teacher"]) for row in rows] == answers(
        model, AutoTokenizer.from_pretrained(whole / "teacher"), Prompts(["w5 w6 w7", "w8"], 5)
    )
    text, page = (folder / "README.md").read_text(), (whole / "run/report.html").read_text()
    assert "<details><summary>What the models write</summary>" in text
    for row in rows:
        assert f"\n**{row['prompt']}**\n\n- *teacher*: {row['teacher'] or '(nothing)'}\n" in text
        assert f"<em>distilled</em>: {html.escape(row['distilled'] or '(nothing)')}</li>" in page


def test_without_prompts_nothing_is_said():
    assert "What the models write" not in str(card())
    assert report().answers == ()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"generate": [""]}, "generate: '' is no prompt"),
        ({"generate": ["w5", 7]}, "generate: 7 is no prompt"),
        ({"max_new_tokens": 5}, "max_new_tokens: 5 has no effect without generate"),
        ({"generate": ["w5"], "chat_template": True, "tasks": [], "limit": None}, "chat_template: the tokenizer of"),
        ({"chat_template": True, "tasks": [], "limit": None}, "chat_template: True is of tasks, and there are none"),
        ({"prompts": ["w5"]}, "did you mean 'generate'?"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused_first(section, message, project, tmp_path, capsys):
    recipe = project["recipe"] | {"run": str(tmp_path / "run")}
    recipe["evaluate"] = recipe["evaluate"] | section
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["run", str(path)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run/score").exists()


def test_answers_survive_the_disk(tmp_path):
    before = Report({"teacher": {}}, answers=[{"prompt": "a", "teacher": "b, c"}])
    before.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["answers"] == [{"prompt": "a", "teacher": "b, c"}]
    assert Report.load(tmp_path / "report.json") == before
