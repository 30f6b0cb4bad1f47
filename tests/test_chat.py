"""Chats: which tokens are learnt, by every template; in distillation, correction, scoring, caches and perplexity."""

import json
import re
from itertools import pairwise

import pytest
import tiny
import torch
import yaml
from datasets import Dataset
from test_distillation import arguments
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from hf_minitron import DistillationTrainer, calibrate, token_blocks
from hf_minitron.__main__ import main
from hf_minitron.data.encoding import Encoder
from hf_minitron.data.mixture import mixed_blocks, read_sources
from hf_minitron.data.packing import check_first_block
from hf_minitron.data.texts import load_text
from hf_minitron.distillation.batch import supervised
from hf_minitron.distillation.cache import write_cache
from hf_minitron.distillation.cached import CachedTeacher
from hf_minitron.evaluation.answers import Prompts, answers
from hf_minitron.evaluation.compare import open_model
from hf_minitron.evaluation.report import load_samples
from hf_minitron.evaluation.scored import plain_blocks
from hf_minitron.evaluation.text import in_tokens_of, perplexity, read_text, text_bytes
from hf_minitron.importance.removal import removal_costs
from hf_minitron.run import made_by
from hf_minitron.stages import evaluate, publish

ROLES = ["<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]
PLAIN = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)
MARKED = PLAIN.replace(
    "{{ '<|' + message['role'] + '|> ' + message['content'] + ' </s> ' }}",
    "{{ '<|' + message['role'] + '|> ' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + ' </s> ' }}{% endgeneration %}{% else %}{{ message['content'] + ' </s> ' }}{% endif %}",
)
# As Qwen3's: what a turn thought is left out once the user has written again.
THINKS = (
    "{% set seen = namespace(last=0) %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set seen.last = loop.index0 %}{% endif %}{% endfor %}"
) + PLAIN.replace(
    "+ message['content'] +",
    "+ ('w80 ' if message['role'] == 'assistant' and loop.index0 > seen.last else '') + message['content'] +",
)
# Of every turn but the last one word is left, of the user's too.
FORGETS = PLAIN.replace("message['content']", "(message['content'] if loop.last else message['content'].split()[-1])")
ALTERNATES = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}" + PLAIN


def tokenizer(template=PLAIN, **changes):
    made = tiny.tokenizer([*tiny.WORDS, *ROLES], **changes)
    made.add_special_tokens({"additional_special_tokens": ROLES})
    made.chat_template = template
    return made


def chat(*turns):
    """Turns of user and assistant, by turns."""
    return [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]


def encoded(row, template=PLAIN, **changes):
    """The tokens of a row, and those of them that are learnt, as text."""
    made = tokenizer(template, **changes)
    tokens = Encoder(made, [made.bos_token_id] if changes else [])([row])
    assert tokens.starts.tolist() == [True] + [False] * (len(tokens.ids) - 1)
    return made.decode(tokens.ids), made.decode(tokens.ids[tokens.learnt])


TWO = chat("w1 w2", "w3 w4", "w5", "w6 w7 w8")


@pytest.mark.parametrize("template", [PLAIN, MARKED, ALTERNATES])
def test_answers_are_learnt_and_nothing_else(template):
    text, learnt = encoded({"messages": TWO}, template)
    assert text == "<|user|> w1 w2 </s> <|assistant|> w3 w4 </s> <|user|> w5 </s> <|assistant|> w6 w7 w8 </s>"
    assert learnt == "w3 w4 </s> w6 w7 w8 </s>"


def test_answers_that_are_written_without_their_thoughts_later_are_found():
    tools = [*chat("w1", "w2"), *({"role": "tool", "content": content} for content in ("w3", "w4")), *chat("w5", "w6")[1:]]
    assert encoded({"messages": tools}, THINKS)[1] == "w80 w2 </s> w80 w6 </s>"
    assert encoded({"messages": tools}, THINKS.replace("loop.index0 > seen.last", "loop.last"))[1] == "w2 </s> w80 w6 </s>"
    for repeated in (TWO, chat("w1", "w1", "w1", "w1"), chat("w1 w2", "a", "w3", "b")):
        answers = [turn["content"] for turn in repeated[1::2]]
        text, learnt = encoded({"messages": repeated}, THINKS)
        assert text.count("w80") == 1, "of the last one"
        expected = f"{answers[0]} </s> w80 {answers[1]} </s>"
        assert learnt == expected.replace("a ", "<pad> ").replace("b ", "<pad> "), repeated


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_turns_of_the_system_and_of_tools_are_not_learnt(template):
    turns = [("system", "w9"), ("user", "w1"), ("assistant", "w3"), ("tool", "w4"), ("assistant", "w6")]
    text, learnt = encoded({"messages": [{"role": role, "content": content} for role, content in turns]}, template)
    assert text == "<|system|> w9 </s> <|user|> w1 </s> <|assistant|> w3 </s> <|tool|> w4 </s> <|assistant|> w6 </s>"
    assert learnt == "w3 </s> w6 </s>"


def test_columns_of_other_names_and_nulls_are_read(tmp_path):
    """`conversations` of `from` and `value`, as many datasets have them; what Arrow fills up is no key of a message."""
    rows = [{"conversations": [{"from": turn["role"], "value": turn["content"]} for turn in TWO]}] * 3
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (row, *_) = load_text(str(path))
    assert encoded(row) == encoded({"messages": TWO})
    strict = PLAIN.replace("{% for", "{% if messages[0].name is defined %}{{ raise_exception('a name') }}{% endif %}{% for", 1)
    assert encoded({"messages": [turn | {"name": None} for turn in TWO]}, strict) == encoded({"messages": TWO})


CALLS = PLAIN.replace(
    "message['content'] +",
    "(message.content or '') + (message.tool_calls[0].function.name if message.tool_calls else '') +",
)
CALL = [{"type": "function", "function": {"name": "w9", "arguments": {"w5": 1}}}]


@pytest.mark.parametrize(
    ("human", "gpt"), [("human", "gpt"), ("human", "chatgpt"), ("human", "bing"), ("Human", "model"), ("user", "assistant")]
)
@pytest.mark.parametrize("template", [PLAIN, MARKED, ALTERNATES])
def test_the_roles_of_sharegpt_are_those_of_templates(tmp_path, human, gpt, template):
    names = {"user": human, "assistant": gpt}
    rows = [{"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in TWO], "id": "a"}] * 3
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    check_first_block(str(path), tokenizer(template), 8)
    (row, *_) = load_text(str(path))
    assert encoded(row, template) == encoded({"messages": TWO}, template)


@pytest.mark.parametrize("tool", ["tool", "function", "observation"])
def test_what_a_tool_says_has_one_role(tool):
    turns = [("system", "w9"), ("human", "w1"), ("gpt", "w3"), (tool, "w4"), ("gpt", "w6")]
    text, learnt = encoded({"messages": [{"from": role, "value": content} for role, content in turns]})
    assert text == "<|system|> w9 </s> <|user|> w1 </s> <|assistant|> w3 </s> <|tool|> w4 </s> <|assistant|> w6 </s>"
    assert learnt == "w3 </s> w6 </s>"


def test_a_role_that_the_template_names_is_written():
    named = "{% set also = 'w80' %}" + PLAIN
    turns = [{"role": "w80", "content": "w9"}, *TWO]
    assert encoded({"messages": turns}, named)[1] == "w3 w4 </s> w6 w7 w8 </s>"
    with pytest.raises(ValueError, match="document 0 .* a message of 'w80', a role that the chat template of .* does not name"):
        token_blocks(Dataset.from_list([{"messages": turns}]), tokenizer(), 4)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_a_content_of_parts_is_their_text(tmp_path, template):
    """Also where some rows have texts, and where Arrow has filled up what only a part of an image has."""
    parts = [
        turn | {"content": [{"type": "text", "text": text, "image_url": None} for text in turn["content"].partition(" ")]}
        for turn in TWO
    ]
    expected = encoded({"messages": TWO}, template)
    assert encoded({"messages": parts}, template) == expected
    assert encoded({"prompt": parts[:3], "completion": parts[3:]}, template)[1] == "w6 w7 w8 </s>"
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in (parts, TWO, [*parts[:2], *TWO[2:]])))
    assert [encoded(row, template) for row in load_text(str(path))] == [expected] * 3


def test_calls_of_tools_without_a_content_are_written_by_the_template(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": CALL}
    turns = [TWO[0], call, {"role": "tool", "content": "w4"}, {"role": "assistant", "content": "w6"}]
    text, learnt = encoded({"messages": turns}, CALLS)
    assert text == "<|user|> w1 w2 </s> <|assistant|> w9 </s> <|tool|> w4 </s> <|assistant|> w6 </s>"
    assert learnt == "w9 </s> w6 </s>"
    path = tmp_path / "a.parquet"
    Dataset.from_list([{"messages": turns}, {"messages": TWO}]).to_parquet(path)
    assert [encoded(row, CALLS) for row in load_text(str(path))] == [(text, learnt), encoded({"messages": TWO})]


def test_arguments_of_calls_that_are_json_are_written_as_tables():
    """As vLLM reads them, and as Transformers' templates want them; else `tojson` would write a text in quotes."""
    template = CALLS.replace("message.tool_calls[0].function.name", "(message.tool_calls[0].function.arguments.w5)")
    texts = []
    for given in ({"w5": "w1"}, '{"w5": "w1"}'):
        call = [{"type": "function", "function": {"name": "w9", "arguments": given}}]
        texts.append(encoded({"messages": [TWO[0], {"role": "assistant", "content": None, "tool_calls": call}]}, template))
    assert texts[0] == texts[1]
    assert texts[0][1] == "w1 </s>"


def test_messages_that_are_json_are_no_plain_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps({"messages": json.dumps(TWO), "chat": TWO}) + "\n") * 9)
    with pytest.raises(
        ValueError, match="row 1: column 'messages' holds '.*, not messages. .*; with messages: chat; set text_"
    ):
        check_first_block(str(path), tokenizer(), 8)


def test_what_arrow_adds_to_tools_and_their_calls_is_no_part_of_them(tmp_path):
    """Tables of one column have the keys of all of its rows."""
    template = CALLS.replace("tool_calls[0].function.name", "tool_calls[0].function.arguments.keys() | join(' ')")
    template = template.replace("{% for", "{% if tools %}{{ tools[0].keys() | join(' ') + ' ' }}{% endif %}{% for", 1)
    rows = []
    for key in ("w5", "w6"):
        calls = [{"type": "function", "function": {"name": "w9", "arguments": {key: 1}}}]
        turn = {"role": "assistant", "content": None, "tool_calls": calls}
        rows.append({"messages": [TWO[0], turn], "tools": [{"name": "w9", key: "w8"}]})
    names = [encoded(row, template) for row in rows]
    assert "w5 </s>" in names[0][1]
    path = tmp_path / "a.parquet"
    Dataset.from_list(rows).to_parquet(path)
    assert [encoded(row, template) for row in load_text(str(path))] == names


def test_completions_are_learnt_with_an_end_token():
    assert encoded({"prompt": "w1 w2 ", "completion": "w3 w4"}) == ("w1 w2 w3 w4 </s>", "w3 w4 </s>")
    assert encoded({"prompt": "w1", "completion": " w3 </s>"}) == ("w1 w3 </s>", "w3 </s>"), "its own end token"
    assert encoded({"prompt": "w1 ", "completion": "w3"}, adds_bos=True) == ("<s> w1 w3 </s>", "w3 </s>")


def test_completions_of_messages_are_learnt_as_the_template_ends_them():
    row = {"prompt": TWO[:3], "completion": TWO[3:]}
    for template in (PLAIN, MARKED, FORGETS):
        text, learnt = encoded(row, template)
        assert text.endswith("<|user|> w5 </s> <|assistant|> w6 w7 w8 </s>")
        assert learnt == "w6 w7 w8 </s>"


def test_tools_are_written_by_the_template():
    template = "{% if tools %}{{ '<|system|> ' + tools[0]['name'] + ' </s> ' }}{% endif %}" + PLAIN
    for tools in ([{"name": "w9"}], json.dumps([{"name": "w9"}])):
        text, learnt = encoded({"messages": TWO, "tools": tools}, template)
        assert text.startswith("<|system|> w9 </s> <|user|> w1")
        assert learnt == "w3 w4 </s> w6 w7 w8 </s>"
    for none in (None, "", " ", "[]", "null", []):
        assert encoded({"messages": TWO, "tools": none}, template) == encoded({"messages": TWO}), none


def test_tools_that_are_json_are_read_once(monkeypatch):
    read, real = [], json.loads
    monkeypatch.setattr("json.loads", lambda text: read.append(text) or real(text))
    rows = [{"messages": TWO, "tools": json.dumps([{"name": f"w{number}"}])} for number in range(3)]
    for template in (PLAIN, MARKED):
        Encoder(tokenizer(template), [])(rows)
        assert read == [row["tools"] for row in rows]
        read.clear()


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize(
    ("tools", "message"),
    [
        (
            '[{"name": w9}]',
            r"document 1 \(from 0\) has tools that are not JSON: Expecting value.*: '\[{\"name\": w9}\]'. Leave it out",
        ),
        ("search", "has tools that are not JSON: Expecting value.*: 'search'"),
        ('{"name": "w9"}', "has tools that are no list of tables: .*w9.*. Leave it out"),
        ('["w9"]', "has tools that are no list of tables: .*w9.*. Leave it out"),
        (3, "has tools that are no list of tables: '3'"),
    ],
)
def test_tools_that_are_none_are_refused(tools, message, template):
    rows = [{"messages": TWO, "tools": None}, {"messages": TWO, "tools": tools}]
    for kind in (rows, [{"prompt": TWO[:1], "completion": TWO[1:2], "tools": row["tools"]} for row in rows]):
        refused = Encoder(tokenizer(template), [])(kind)
        assert re.search(message, f"document {refused.number} (from 0) {refused.reason}")


def test_a_token_with_a_sign_of_an_answer_is_learnt():
    """Where a tokenizer joins the end of a prompt with the beginning of an answer."""
    made = tokenizer()
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("|", "removed")
    made.add_tokens(["w1 w3"])
    tokens = Encoder(made, [])([{"prompt": "w1 ", "completion": "w3"}])
    assert made.convert_ids_to_tokens(tokens.ids.tolist()) == ["w1 w3", "</s>"]
    assert tokens.learnt.tolist() == [True, True]


BAD = {
    "forgets": (
        {"messages": TWO},
        FORGETS,
        "cannot be split into turns: the chat template of .* writes a turn in another way once",
    ),
    "raises": ({"messages": TWO[1:]}, ALTERNATES, "is refused by the chat template of .*: begin with the user. Leave it out"),
    "silent": ({"messages": TWO[:1]}, PLAIN, "has no turn of the assistant, so nothing in it is learnt. Leave it out"),
    "silent, marked": ({"messages": TWO[:1]}, MARKED, "has no turn of the assistant, so nothing in it is learnt"),
    "roles": ({"messages": [{"role": "human", "content": "w1"}]}, PLAIN, "has no turn of the assistant"),
    "empty": ({"messages": []}, PLAIN, "holds no messages. Leave it out"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        PLAIN,
        "holds a message with a part of type 'image', and only text is read. Leave it out",
    ),
    "image beside text": (
        {
            "messages": chat(
                [{"type": "text", "text": "w1"}],
                [{"type": "text", "text": "w2"}, {"type": "image_url", "image_url": {"url": "w3"}}],
            )
        },
        PLAIN,
        "holds a message with a part of type 'image_url', and only text is read",
    ),
    "table": (
        {"messages": [{"role": "user", "content": {"w1": "w2"}}]},
        PLAIN,
        "holds a message whose content is no text: {'w1': 'w2'}. Leave it out",
    ),
    "moderator": (
        {"messages": [*TWO, {"from": "moderator", "value": "w1"}]},
        PLAIN,
        "holds a message of 'moderator', a role that the chat template of the tokenizer does not name. Call it system, ",
    ),
    "calls": (
        {"messages": [TWO[0], {"role": "assistant", "content": None, "tool_calls": [{"w1": "w2"}]}]},
        PLAIN,
        "has tool_calls, which the chat template of the tokenizer does not write. Give it a template that",
    ),
    "calls without content": (
        {"messages": [TWO[0], {"role": "assistant", "content": None, "tool_calls": [{"w1": "w2"}]}]},
        PLAIN + "{% if messages[0].tool_calls %}{% endif %}",
        'is refused by the chat template of the tokenizer: .* no attribute .content.. Give calls of tools the content "", or',
    ),
    "nothing": ({"messages": [TWO[0], {"role": "assistant", "content": None}]}, PLAIN, "holds a message without content: "),
    "no role": ({"messages": [{"content": "w1"}]}, PLAIN, "holds a message without a role"),
    "mixed": ({"prompt": "w1", "completion": TWO[1:2]}, PLAIN, "has a prompt and a completion that are not both texts"),
    "mixed the other way": (
        {"prompt": TWO[:1], "completion": "w1"},
        PLAIN,
        "has a prompt and a completion that are not both m",
    ),
    "begins with an answer": ({"messages": TWO[1:]}, PLAIN, "begins with a turn of the assistant, before which nothing is"),
    "no answer": (
        {"prompt": TWO[:1], "completion": TWO[:1]},
        PLAIN,
        "has a completion that does not begin with a turn of the a",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_chat_that_is_none_is_refused_by_its_number(kind):
    row, template, message = BAD[kind]
    with pytest.raises(ValueError, match=rf"^The text: document 0 \(from 0\) {message}") as raised:
        token_blocks(Dataset.from_list([row]), tokenizer(template), 4)
    assert "\n" not in str(raised.value)


def test_without_a_template_or_offsets_chats_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": TWO}) + "\n")
    with pytest.raises(ValueError, match="a.jsonl holds chats, and the tokenizer has no chat template: give it one"):
        check_first_block(str(path), tokenizer(None), 8)
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.is_fast", False)
    with pytest.raises(ValueError, match="a.jsonl holds chats or completions, whose tokens only a fast tokenizer places"):
        check_first_block(str(path), tokenizer(), 8)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_chats_are_packed_with_the_answers_as_labels(tmp_path, streaming, template, adds_bos):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": chat(f"w{i}", f"w{i + 1} w{i + 2}")}) + "\n" for i in range(40)))
    made = tokenizer(template, adds_bos=adds_bos)
    blocks = token_blocks(load_text(str(path), streaming=streaming), made, 10, cross_documents=False)
    ids, labels, positions = (blocks[name][:] for name in ("input_ids", "labels", "position_ids"))
    learnt = [[made.convert_ids_to_tokens(int(i)) for i in row[row != -100]] for row in labels]
    flat = [token for row in learnt for token in row]
    assert flat[:6] == ["w1", "w2", "</s>", "w2", "w3", "</s>"]
    assert (ids == labels)[labels != -100].all()
    assert ((ids == 1) <= (labels == -100)).all(), "no BOS token is learnt"
    assert (positions[ids == made.convert_tokens_to_ids("<|user|>")] == 0).all(), "a chat begins with the user"


def test_a_mixture_of_chats_and_text_learns_all_of_the_text(tmp_path):
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": TWO}) + "\n" for _ in range(20)))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"w{i} w{i + 1}"}) + "\n" for i in range(80)))
    text = {str(tmp_path / f"{name}.jsonl"): 1 for name in ("chats", "texts")}
    blocks = mixed_blocks(read_sources(text), tokenizer(), 12, max_tokens=120)
    whole = (blocks["labels"][:] == blocks["input_ids"][:]).all(1)
    assert whole.tolist() == [False, True] * 5


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A project whose texts are chats, and their model."""
    folder = tmp_path_factory.mktemp("chats")
    project = tiny.make_project(folder, tiny.model(dtype=torch.float32, vocab_size=103))
    tokenizer().save_pretrained(folder / "teacher")
    for name in ("train", "calibration", "held_out"):
        rows = [text.split() for text in tiny.text(30, 5)]
        turns = [chat(" ".join(row[:15]), " ".join(row[15:20]), row[20], " ".join(row[21:])) for row in rows]
        kinds = [{"messages": turn} for turn in turns]
        if name == "held_out":
            kinds = [{"prompt": turn[:3], "completion": turn[3:]} for turn in turns]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kinds))
    return project


def test_a_run_learns_from_chats(chats, capsys):
    recipe = chats["recipe"]
    train = {
        "text": recipe["distill"]["text"],
        "eval_text": recipe["evaluate"]["text"],
        "eval_strategy": "steps",
        "eval_tokens": 160,
    }
    recipe["correct"] = {**recipe["distill"], **train, "warmup_steps": 0}
    recipe["distill"] = {**recipe["distill"], **train, "cross_documents": False}
    recipe["score"] |= {"layers": "loss", "sublayers": True}
    recipe["evaluate"] |= {"tasks": [], "speed": False, "include_path": None, "generate": ["w5 w6"], "max_new_tokens": 6}
    recipe["tokenize"], recipe["cache"] = {}, {"method": "top_k", "k": 103, "dtype": "float32"}
    chats["path"].write_text(yaml.safe_dump(recipe))
    assert main(["run", str(chats["path"])]) == 0, capsys.readouterr().err
    log = json.loads((chats["folder"] / "run/distill/log.json").read_text())
    cached = [entry["loss"] for entry in log["history"] if "loss" in entry]
    assert len(cached) == 6
    del recipe["cache"]
    chats["path"].write_text(yaml.safe_dump(recipe))
    assert main(["distill", str(chats["path"])]) == 0, capsys.readouterr().err
    log = json.loads((chats["folder"] / "run/distill/log.json").read_text())
    assert [entry["loss"] for entry in log["history"] if "loss" in entry] == pytest.approx(cached, rel=1e-4)
    report = json.loads((chats["folder"] / "run/evaluate/report.json").read_text())
    assert report["text"]["add_bos_token"] is False
    teacher = chats["folder"] / "teacher"
    model, made = open_model(teacher), AutoTokenizer.from_pretrained(teacher)
    (plain,), (said,) = (answers(model, made, Prompts(["w5 w6"], 6, chat)) for chat in (False, True))
    assert plain != said == (report["answers"][0]["prompt"], report["answers"][0]["teacher"])
    assert report["settings"]["chat_template"] is True
    card = (chats["folder"] / "run/publish/model/README.md").read_text()
    assert "Always the most probable token, in the chat template; not selected." in card
    text = " ".join(card.split())
    samples = load_samples(chats["folder"] / "run/evaluate/samples/distilled.parquet")
    scored = int(sum(row["weight"] for row in samples if row["metric"] == "perplexity"))
    assert 0 < scored < report["text"]["tokens"] / 2
    assert f"Perplexity is per token on {scored} tokens (the answers alone) of held-out text" in text
    texts = publish._texts(made_by(str(chats["folder"] / "run/publish/model")), chats["folder"] / "run/distill/student")
    assert sum(label != -100 for row in texts.labels for label in row[1:]) == scored, "exports are measured on the same"


@pytest.mark.parametrize(
    ("row", "settings", "expected"),
    [
        ({"messages": TWO}, {}, True),
        ({"conversations": TWO}, {"tasks": ["arc_easy"], "generate": []}, True),
        ({"prompt": TWO[:3], "completion": TWO[3:]}, {}, True),
        ({"prompt": "w1", "completion": "w2"}, {}, False),
        ({"text": "w1"}, {}, False),
        ({"input_ids": [5, 6]}, {}, False),
        ({"messages": TWO}, {"chat_template": False}, False),
        ({"text": "w1"}, {"chat_template": True}, True),
        ({"messages": TWO}, {"generate": []}, False),
    ],
)
def test_prompts_are_asked_as_the_held_out_text_is_written(tmp_path, row, settings, expected):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    args = evaluate.Args(str(tmp_path / "a.jsonl"), **{"generate": ["w5"], **settings})
    assert evaluate.asks_in_chats(args) is expected


def test_held_out_chats_without_an_answer_are_refused():
    ids = [[5, 6, 7, 8]] * 2
    with pytest.raises(ValueError, match="none of the 8 tokens of the held-out text is predicted: no answer"):
        read_text(tiny.model(), ids, labels=[[9, -100, -100, -100]] * 2)
    sums, _ = read_text(tiny.model(), ids, labels=[[-100] * 4, [-100, -100, 7, 8]])
    assert (sums["perplexity"] != 0).tolist() == [False, True]


def test_stages_refuse_chats_where_text_is_meant(chats, tmp_path, capsys):
    other = tiny.tokenizer()
    other.chat_template = PLAIN
    for name, made in {"other": other, "bare": tokenizer(None)}.items():
        made.save_pretrained(tmp_path / name)
        tiny.model(dtype=torch.float32, vocab_size=103).save_pretrained(tmp_path / name)
    for command, message in {
        (
            "evaluate",
            "--evaluate.models",
            json.dumps({"other": str(tmp_path / "other")}),
        ): "holds chats, which other would read",
        ("evaluate", "--evaluate.generate", "w5", "--evaluate.models", json.dumps({"bare": str(tmp_path / "bare")})): (
            f"chat_template: the tokenizer of {tmp_path / 'bare'} has none; set it to false, or save one with it"
        ),
    }.items():
        assert main([command[0], str(chats["path"]), *command[1:]]) == 1
        assert message in capsys.readouterr().err


def test_perplexity_costs_and_losses_are_of_answers(tmp_path):
    rows = [{"messages": chat(*(" ".join(tiny.WORDS[i + j : i + j + 4]) for j in range(0, 40, 10)))} for i in range(12)]
    model, made = tiny.model(vocab_size=103), tokenizer()
    blocks = token_blocks(Dataset.from_list(rows), made, 16)
    assert (blocks["labels"][:] == -100).any()
    ids, labels = blocks["input_ids"][:], blocks["labels"][:]
    logits = model(input_ids=ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).detach()
    assert perplexity(model, blocks).value == pytest.approx(float(expected.exp()), rel=1e-5)
    assert calibrate(model, blocks).scores["ffn"].isfinite().all()
    assert removal_costs(model, blocks, "loss").isfinite().all()
    args = arguments(tmp_path, losses={"cross_entropy": 1.0})
    trainer = DistillationTrainer(model, None, args, train_dataset=blocks)
    batch = trainer.data_collator([blocks[i] for i in range(len(blocks))])
    assert float(trainer.compute_loss(model, batch).detach()) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("loss", ["forward_kl", "cross_entropy", "block"])
def test_a_batch_without_an_answer_changes_nothing(tmp_path, loss):
    rows = Dataset.from_dict({"input_ids": [[3, 4, 5, 6]] * 4, "labels": [[-100] * 4] * 4}).with_format("torch")
    student = tiny.model(seed=1)
    before = [weight.clone() for weight in student.parameters()]
    args = arguments(tmp_path, losses={loss: 1.0}, max_steps=2, weight_decay=0.0, balance="static")
    result = DistillationTrainer(student, tiny.model(), args, train_dataset=rows).train()
    assert result.training_loss == 0
    assert all(torch.equal(weight, old) for weight, old in zip(student.parameters(), before, strict=True))


def test_only_bytes_of_answers_count_and_another_tokenizer_is_refused(tmp_path):
    rows, made = [{"messages": chat("w1 w2", "w3 w44", "w5", "w61 w7 w8")}] * 12, tokenizer()
    blocks = token_blocks(Dataset.from_list(rows), made, 12)
    ids, labels = plain_blocks(blocks)
    texts = [made.decode([t for t in row[1:] if t != -100], skip_special_tokens=True) for row in labels]
    assert text_bytes(ids, made, labels) == [len(text) for text in texts]
    assert sum(map(len, texts)) > 0
    with pytest.raises(
        ValueError, match="the text is of chats, whose answers are not found in the tokens of another tokenizer"
    ):
        in_tokens_of(tiny.tokenizer(), blocks, made)


@pytest.mark.parametrize("method", [{"top_k": 103}, {"top_k": 7}, {"random": 9}])
@pytest.mark.parametrize("cross_documents", [True, False])
def test_a_cache_holds_what_the_teacher_says_of_answers_alone(tmp_path, method, cross_documents):
    """One block has none of them."""
    turns = [[" ".join(tiny.WORDS[i + j : i + j + 3 + 20 * (j == 20)]) for j in range(0, 40, 10)] for i in range(12)]
    rows = [{"messages": chat(*turn)} for turn in turns]
    teacher, made = tiny.model(vocab_size=103, dtype=torch.float32), tokenizer()
    blocks = token_blocks(Dataset.from_list(rows), made, 12, cross_documents=cross_documents)
    learnt = (supervised(blocks[:])[:, 1:] != -100).sum(1).tolist()
    assert 0 in learnt
    facts = write_cache(teacher, blocks, tmp_path / "answers", method, "float32")
    whole = write_cache(teacher, blocks.remove_columns("labels"), tmp_path / "whole", method, "float32")
    assert facts["tokens"] == sum(max(number, 1) for number in learnt)
    assert facts["bytes"] < whole["bytes"]
    losses = {}
    for name in ("answers", "whole"):
        args = arguments(tmp_path / "out", losses={"forward_kl": 1.0}, bf16=False, max_steps=4)
        student = tiny.model(seed=1, vocab_size=103, dtype=torch.float32)
        trainer = DistillationTrainer(student, CachedTeacher(tmp_path / name), args, train_dataset=blocks)
        batch = trainer.data_collator([blocks[i] for i in range(len(blocks))])
        losses[name] = float(trainer.compute_loss(student, batch).detach())
        trainer.train()
    if "top_k" in method:
        assert losses["answers"] == pytest.approx(losses["whole"], rel=1e-5)
    other = blocks.remove_columns("labels")
    with pytest.raises(ValueError, match="sequences, the first of 12 tokens, are not in the cache .*packed in another way"):
        DistillationTrainer(student, CachedTeacher(tmp_path / "answers"), args, train_dataset=other)


def test_every_answer_is_learnt_once_whatever_the_size_of_blocks():
    rows, made = [{"messages": chat(*(f"w{i + j} w{i}" for j in range(6)))} for i in range(30)], tokenizer()
    counts = set()
    for size in (5, 9, 40):
        blocks = token_blocks(Dataset.from_list(rows), made, size)
        flat = blocks["labels"][:].flatten()
        counts.add(tuple(flat[flat != -100][:200].tolist()))
    assert len(counts) == 1
    assert all(first != second or first != 2 for first, second in pairwise(counts.pop())), "an end token follows an answer"
