"""synthesize: what is generated, what of it is kept, and that neither kills nor the number of processes change it."""

import json

import pytest
import tiny
import torch
import yaml

from hf_minitron.__main__ import main
from hf_minitron.distillation.synthesis import Sieve, generate_batch, repeated_share, sampling, start_ids
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
    tokenizer.chat_template = "w9 {{ messages[0].content }}{% if add_generation_prompt %} w8{% endif %}"
    assert start_ids(tokenizer, ["w0 w1 w2", "w4"], 2, chat=True) == [[12, 3, 4, 11], [12, 7, 11]]
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
             ("la la", [3] * 30), ("four five six", [1, 2, 3])]  # fmt: skip
    assert [sieve.keeps(text, new, 5) for text, new in texts] == [True, False, False, False, False, False, True]
    assert sieve.rejected == {"duplicate": 1, "short": 1, "empty": 2, "repetitive": 1}
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
