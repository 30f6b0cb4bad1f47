"""synthesize: what is generated, what of it is kept, and that neither kills nor the number of processes change it."""

import json

import pytest
import tiny
import torch
import yaml
from test_chat import ALTERNATES, MARKED, PLAIN, TWO, chat
from test_chat import tokenizer as chat_tokenizer
from transformers import AutoTokenizer

from hf_minitron.__main__ import main
from hf_minitron.checkpoint.checkpoint import best_device, best_dtype, load_model
from hf_minitron.data.encoding import Encoder
from hf_minitron.data.packing import check_first_block
from hf_minitron.data.texts import load_text
from hf_minitron.distillation.prompts import start_ids
from hf_minitron.distillation.synthesis import Sieve, generate_batch, repeated_share, sampling
from hf_minitron.stages import synthesize

STARTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


def generated(settings, seed=0, model=None, starts=STARTS, max_new_tokens=7):
    model = model or tiny.model()
    return generate_batch(model, starts, sampling(model, tiny.tokenizer(), max_new_tokens, **settings), seed)


def by_hand(start, steps, end=2):
    """The most probable next token, one at a time, all logits from the start each time."""
    model, ids = tiny.model(), list(start)
    while len(ids) < len(start) + steps:
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    new = ids[len(start) :]
    return new[: new.index(end)] if end in new else new


def test_a_batch_of_any_lengths_continues_each_as_it_would_alone():
    assert generated({"temperature": 0}) == [by_hand(start, 7) for start in STARTS]
    assert generated({"temperature": 0.7, "top_k": 1}) == [by_hand(start, 7) for start in STARTS]


def test_a_text_ends_at_any_end_token_of_the_model():
    model, (first, *_) = tiny.model(), by_hand(STARTS[0], 7)
    model.generation_config.eos_token_id = [first, 98]
    assert generated({"temperature": 0}, model=model)[0] == []


def test_settings_of_the_checkpoint_do_not_leak_in():
    expected, model = generated({"temperature": 0.9}), tiny.model()
    model.generation_config.update(repetition_penalty=5.0, top_k=1, typical_p=0.1, min_new_tokens=7)
    assert generated({"temperature": 0.9}, model=model) == expected != generated({"temperature": 0.9}, seed=1)
    assert any(model.generate(torch.tensor([STARTS[0]]), max_new_tokens=7)[0, 3:].tolist() != row for row in expected)


def test_sampling_follows_the_model_s_probabilities():
    model, start, draws = tiny.model(), [5, 6, 7], 3000
    logits = model(torch.tensor([start])).logits[0, -1]
    for temperature, top_k in ((1.0, 0), (2.0, 0), (1.0, 3)):
        wanted = (logits / temperature).softmax(-1)
        if top_k:
            wanted = torch.where(wanted >= wanted.topk(top_k).values[-1], wanted, 0)
            wanted = wanted / wanted.sum()
        rows = generated(
            {"temperature": temperature, "top_k": top_k}, starts=[start] * draws, model=tiny.model(), max_new_tokens=1
        )
        found = torch.bincount(torch.tensor([row[0] if row else 2 for row in rows]), minlength=99) / draws
        assert (found - wanted).abs().max() < 4 * (wanted.max() / draws) ** 0.5


def test_starts():
    tokenizer = tiny.tokenizer()
    assert start_ids(tokenizer, None, 5) == [[1]]
    assert start_ids(tokenizer, ["w0 w1 w2", "w4"], 2) == [[3, 4], [7]]
    tokenizer.bos_token = None
    assert start_ids(tokenizer, None, 5) == [[2]]


def test_repeated_share_counts_each_token_once():
    assert repeated_share(list(range(50))) == 0
    assert repeated_share([1] * 50) == 49 / 50  # all but the first token of a loop
    assert repeated_share([*range(20), *range(20)]) == 0.5
    assert repeated_share([*range(9), 50, *range(9)]) == 0  # no 10-gram comes twice
    assert repeated_share([*range(10), 50, *range(10)]) == 10 / 21
    assert repeated_share([]) == 0


def test_the_sieve_says_why():
    sieve = Sieve(min_tokens=3, max_repeated=0.1)
    texts = [("One two  three", [4, 5, 6]), ("one TWO\nthree", [7, 8, 9]), ("one", [4]), (" ", [4, 5, 6]), ("x", []),
             ("la la", [3] * 30), ("a whole book", None), ("four five six", [1, 2, 3])]  # fmt: skip
    assert [sieve.keeps(text, new, 5) for text, new in texts] == [True, *[False] * 6, True]
    assert sieve.rejected == {"duplicate": 1, "short": 1, "empty": 2, "repetitive": 1, "long": 1}
    assert (sieve.documents, sieve.tokens) == (2, 10)


@pytest.fixture
def recipe(project, tmp_path):
    """Writes a recipe with a `synthesize:` section, and returns its path."""

    def write(name="recipe", drop=(), correct=None, text="synthesized", **section):
        known = {"documents": 20, "batch_size": 4, "max_new_tokens": 24, "min_tokens": 8, **section}
        content = {**project["recipe"], "run": str(tmp_path / name), "synthesize": known}
        content["distill"] = {**content["distill"], "text": text}
        content["evaluate"] = {**content["evaluate"], "tasks": [], "speed": False}
        if correct:
            content["correct"] = correct
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in content.items() if key not in drop}))
        return path

    return write


def written(path):
    """The texts and the facts of a recipe's stage."""
    folder = path.with_suffix("") / "synthesize"
    rows = [json.loads(line) for line in (folder / "text.jsonl").read_text().splitlines()]
    return [row["text"] for row in rows], json.loads((folder / "synthesize.json").read_text())


def test_the_student_learns_from_what_the_teacher_wrote(recipe, capsys):
    path = recipe()
    assert main(["run", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.index("synthesize: done") < out.index("score: done")
    texts, facts = written(path)
    assert len(texts) == len(set(texts)) == facts["documents"] == 20
    assert all(len(text.split()) >= 8 for text in texts)
    assert facts["tokens"] >= sum(len(text.split()) + 1 for text in texts)
    assert set(facts["rejected"]) >= {"short", "duplicate"}
    left = sorted(p.name for p in (path.with_suffix("") / "synthesize").iterdir())
    assert left == ["done.json", "synthesize.json", "text.jsonl"]
    assert (path.with_suffix("") / "publish/model/README.md").is_file()
    # the same distillation, told the file
    named = recipe("named", drop=["synthesize"], text=str(path.with_suffix("") / "synthesize/text.jsonl"))
    for stage in ("score", "prune", "distill"):
        assert main([stage, str(named)]) == 0
    files = [p.with_suffix("") / "distill/student/model.safetensors" for p in (path, named)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_prompts_are_the_beginnings_of_documents(project, recipe):
    path = recipe(prompts=str(project["folder"] / "train.jsonl"), prompt_tokens=5, tokens=400, documents=None)
    assert main(["synthesize", str(path)]) == 0
    texts, facts = written(path)
    documents = [json.loads(line)["text"] for line in (project["folder"] / "train.jsonl").read_text().splitlines()]
    begun = [text for text in texts if any(d.split()[:5] == text.split()[:5] for d in documents)]
    assert begun == texts
    assert len({tuple(text.split()[:5]) for text in texts}) > 8
    assert 400 <= facts["tokens"] < 400 + 30


@pytest.mark.parametrize("left", ["", '[{"text": "w1 w', "[]"])
def test_killed_it_goes_on_and_ends_the_same(recipe, monkeypatch, left):
    whole, killed = recipe("whole"), recipe("killed")
    assert main(["synthesize", str(whole)]) == 0
    calls = []
    real = synthesize.generate_batch

    def third_kills(*args):
        calls.append(args)
        return real(*args) if len(calls) < 3 else 1 / 0

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(synthesize, "generate_batch", third_kills)
        main(["synthesize", str(killed)])
    journal = killed.with_suffix("") / "synthesize.tmp/checkpoints/batches.jsonl"
    assert len(journal.read_text().splitlines()) == 2
    with journal.open("a") as file:
        file.write(left if left != "[]" else "")
    monkeypatch.setattr(synthesize, "generate_batch", lambda *args: calls.append(args) or real(*args))
    assert main(["synthesize", str(killed)]) == 0
    assert written(killed) == written(whole)
    assert len({call[3] for call in calls}) == len(calls) - 1  # only the killed batch was made again


def test_the_corrected_teacher_writes(project, recipe):
    section = {"text": str(project["folder"] / "train.jsonl"), "block_size": 16, "max_steps": 4, "learning_rate": 0.01,
               "warmup_steps": 1, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}  # fmt: skip
    original, corrected = recipe("original"), recipe("corrected", correct=section)
    assert main(["synthesize", str(original)]) == 0
    assert main(["synthesize", str(corrected)]) == 1  # not corrected yet
    assert main(["correct", str(corrected)]) == main(["synthesize", str(corrected)]) == 0
    assert written(original) != written(corrected)


def test_what_never_succeeds_ends(project, recipe, capsys, monkeypatch):
    monkeypatch.setattr(synthesize, "HOPELESS", 3)
    path = recipe(max_repeated=0.0, temperature=0.001, max_new_tokens=90, prompts=str(project["folder"] / "train.jsonl"))
    assert main(["synthesize", str(path)]) == 1
    assert "Nothing of the last 12 texts could be kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents": None}, "Set one of documents and tokens"),
        ({"tokens": 5}, "Set one of documents and tokens"),
        ({"top_p": 0}, "top_p: 0.0 is not above 0"),
        ({"min_tokens": 25}, "min_tokens: 25 is more than max_new_tokens: 24"),
        ({"prompts": "./nowhere.txt"}, "No text at './nowhere.txt'"),
        ({"temperature": 0}, "writes one and the same text"),
        ({"chat_template": True}, "chat_template needs prompts"),
        ({"max_new_tokens": 128}, "more than the 128 positions"),
        ({"temperature": -1}, "synthesize.temperature: -1.0 must be at least 0"),
        ({"drop": ["synthesize"]}, "add a `synthesize:` section"),
    ],
)
def test_what_cannot_work_is_told_before_slow_work(recipe, capsys, changes, message):
    path = recipe(**changes)
    assert main(["run", str(path)]) == 1
    assert message in capsys.readouterr().err
    assert not path.with_suffix("").exists()


def test_a_tokenizer_without_a_chat_template_is_told(project, recipe, capsys):
    path = recipe(prompts=str(project["folder"] / "train.jsonl"), chat_template=True)
    assert main(["synthesize", str(path)]) == 1
    assert "chat_template: the tokenizer in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "steps"),
    [
        ({"documents": 64, "batch_size": 16, "max_new_tokens": 112}, 4 * 112),
        ({"documents": 65, "batch_size": 16, "max_new_tokens": 112}, 5 * 112),
        ({"tokens": 64 * 144, "batch_size": 16, "max_new_tokens": 112, "prompts": "a.jsonl", "prompt_tokens": 32}, 4 * 112),
        ({"tokens": 64 * 113, "batch_size": 16, "max_new_tokens": 112}, 4 * 112),
    ],
)
def test_a_batch_takes_as_many_steps_as_its_longest_text(section, steps):
    """Of 64 answers the shortest that is kept has 16 tokens: a seventh of the time that the run took."""
    assert synthesize.work(synthesize.Args(**section), None) == {"decode": steps}


# Chats


@pytest.mark.parametrize("template", [PLAIN, MARKED, ALTERNATES])
@pytest.mark.parametrize(
    ("turns", "asked"),
    [
        (TWO, "<|user|> w1 w2 </s> <|assistant|> w3 w4 </s> <|user|> w5 </s> <|assistant|>"),
        (TWO[:3], "<|user|> w1 w2 </s> <|assistant|> w3 w4 </s> <|user|> w5 </s> <|assistant|>"),
        (TWO[:1], "<|user|> w1 w2 </s> <|assistant|>"),
        ([TWO[0], TWO[1], TWO[1]], "<|user|> w1 w2 </s> <|assistant|>"),
        ([{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}], "<|user|> w1 </s> <|assistant|>"),
        ([TWO[0], TWO[1], {"role": "tool", "content": "w7"}, TWO[1]],
         "<|user|> w1 w2 </s> <|assistant|> w3 w4 </s> <|tool|> w7 </s> <|assistant|>"),
    ],
)  # fmt: skip
def test_what_a_chat_asks_is_all_before_its_last_answer(template, turns, asked):
    made = chat_tokenizer(template)
    row, ids = Encoder(made, []).prompt({"messages": turns})
    assert made.decode(ids) == asked
    assert row["messages"][-1]["role"] in ("user", "tool")


def chats_to_answer(tmp_path, rows, template=PLAIN, **section):
    """A recipe whose teacher knows a chat template, and prompts of some rows; its path, and the teacher."""
    project = tiny.make_project(tmp_path, tiny.model(dtype=torch.float32, vocab_size=103))
    chat_tokenizer(template).save_pretrained(tmp_path / "teacher")
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = {"documents": 6, "batch_size": 4, "max_new_tokens": 8, "min_tokens": 2, "prompts": str(path)} | section
    recipe = project["recipe"] | {"synthesize": known}
    recipe["distill"] = recipe["distill"] | {"text": "synthesized"}
    recipe["evaluate"] = recipe["evaluate"] | {"tasks": [], "speed": False, "include_path": None}
    project["path"].write_text(yaml.safe_dump(recipe))
    return project["path"], tmp_path / "teacher"


def answered(path):
    """The chats that a recipe's stage has written, and its facts."""
    folder = path.parent / "run/synthesize"
    rows = [json.loads(line) for line in (folder / "text.jsonl").read_text().splitlines()]
    return rows, json.loads((folder / "synthesize.json").read_text())


ASKED = [f"w{number} w{number + 1}" for number in range(9)]


@pytest.mark.parametrize(
    ("rows", "section"),
    [
        ([{"messages": chat(text)} for text in ASKED], {}),
        ([{"messages": chat(text, "w90 w91")} for text in ASKED], {}),
        ([{"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "w9"}]} for text in ASKED], {}),
        ([{"prompt": chat(text)} for text in ASKED], {}),
        ([{"prompt": chat(text), "completion": chat("", "w9")[1:]} for text in ASKED], {}),
        ([{"prompt": text} for text in ASKED], {"chat_template": True}),
        ([{"prompt": text, "completion": "w9"} for text in ASKED], {"chat_template": True}),
        ([{"text": text} for text in ASKED], {"chat_template": True}),
        ([{"id": 3, "question": text} for text in ASKED], {"chat_template": True, "text_column": "question"}),
    ],
)
def test_the_teacher_answers_chats_and_the_student_learns_the_answers(tmp_path, capsys, rows, section):
    """The most probable ones, as the model writes them after the chat template with its generation prompt."""
    path, teacher = chats_to_answer(tmp_path, rows, temperature=0, max_repeated=1, **section)
    assert main(["synthesize", str(path)]) == 0, capsys.readouterr().err
    written, facts = answered(path)
    assert facts["documents"] == len(written) == 6
    made = AutoTokenizer.from_pretrained(teacher)
    for row in written:
        asked, answer = row["messages"]
        assert asked["role"] == "user"
        assert asked["content"] in ASKED
        start = made(f"<|user|> {asked['content']} </s> <|assistant|>")["input_ids"]
        model = load_model(teacher, best_dtype(best_device()), best_device())
        (new,) = generate_batch(model, [start], sampling(model, made, 8, temperature=0), 0)
        assert answer == {"role": "assistant", "content": made.decode(new)}
    text = path.parent / "run/synthesize/text.jsonl"
    assert check_first_block(str(text), made, 8) == "messages"
    tokens = Encoder(made, [])(load_text(str(text)).to_list())
    assert made.decode(tokens.ids[tokens.learnt]) == " ".join(f"{row['messages'][1]['content']} </s>" for row in written)


def test_a_chat_s_prompt_without_a_template_is_continued_as_a_text(tmp_path):
    path, _ = chats_to_answer(tmp_path, [{"prompt": text} for text in ASKED])
    assert main(["synthesize", str(path)]) == 0
    assert all(row["text"].startswith(tuple(ASKED)) for row in answered(path)[0])


def test_tools_stay_beside_the_answer(tmp_path):
    template = "{% if tools %}{{ '<|system|> ' + tools[0]['name'] + ' </s> ' }}{% endif %}" + PLAIN
    tools = [[{"name": "w9"}], json.dumps([{"name": "w8", "more": {"w7": 1}}]), None]
    rows = [{"messages": chat(text), "tools": tools[1 if i % 2 else 2]} for i, text in enumerate(ASKED)]
    path, teacher = chats_to_answer(tmp_path, rows, template, max_repeated=1)
    assert main(["synthesize", str(path)]) == 0
    written, _ = answered(path)
    assert {row.get("tools") for row in written} == {tools[1], None}
    text = path.parent / "run/synthesize/text.jsonl"
    assert check_first_block(str(text), AutoTokenizer.from_pretrained(teacher), 8) == "messages"


def test_prompts_without_room_for_an_answer_are_left_out_and_counted(tmp_path):
    """Of 128 positions 8 are an answer's."""
    rows = [{"messages": chat(" ".join(tiny.WORDS[i : i + (4 if i % 2 else 80)] * 2))} for i in range(8)]
    path, _ = chats_to_answer(tmp_path, rows, documents=4, max_repeated=1)
    assert main(["synthesize", str(path)]) == 0
    written, facts = answered(path)
    assert all(len(row["messages"][0]["content"].split()) == 8 for row in written)
    assert facts["rejected"]["long"] > 0


def test_a_whole_run_on_chats_that_the_teacher_answered(tmp_path, capsys):
    path, _ = chats_to_answer(tmp_path, [{"messages": chat(text, "w9")} for text in ASKED], documents=40, max_repeated=1)
    assert main(["run", str(path)]) == 0, capsys.readouterr().err
    assert (path.parent / "run/publish/model/README.md").is_file()


@pytest.mark.parametrize(
    ("row", "section", "message"),
    [
        ({"messages": [{"role": "system", "content": "w1"}]}, {}, "document 0 (from 0) asks nothing: no turn of a user is"),
        ({"messages": chat("", "w1")[1:]}, {}, "document 0 (from 0) asks nothing: no turn of a user is before an answer"),
        ({"messages": [{"role": "user", "content": None}]}, {}, "document 0 (from 0) holds a message without content"),
        ({"messages": []}, {}, "column 'messages' holds '[]', not messages"),
        ({"input_ids": [1, 2]}, {}, "Also read are messages, conversations, prompt"),
        ({"completion": "w1"}, {}, "has no column 'text'; it has completion"),
        ({"text": " "}, {}, "holds no text in 'text'"),
        ({"messages": chat("w1 " * 120)}, {}, "the shortest of 4 prompts and max_new_tokens: 131 together, more than the 128"),
        ({"messages": chat("w1")}, {"add_bos_token": True}, "add_bos_token: a chat template has its own BOS token"),
        ({"messages": chat("w1"), "tools": "{"}, {}, "has tools that are not JSON"),
    ],
)
def test_chats_that_ask_nothing_are_told_before_slow_work(tmp_path, capsys, row, section, message):
    path, _ = chats_to_answer(tmp_path, [row], **section)
    assert main(["run", str(path)]) == 1
    assert message in capsys.readouterr().err
    assert not (path.parent / "run").exists()


def test_chats_for_a_tokenizer_without_a_template_are_told(tmp_path, capsys):
    path, _ = chats_to_answer(tmp_path, [{"messages": TWO}], None)
    assert main(["synthesize", str(path)]) == 1
    assert "holds chats, and " in (error := capsys.readouterr().err)
    assert "has no chat template: give it one, or write the chats as text" in error
