"""What guards a run: files that count, inputs looked at before any slow step, faults that are told in one line."""

import json
import re
import shutil

import pytest
import tiny
import yaml

from hf_minitron.__main__ import main
from hf_minitron.data import check_first_block
from hf_minitron.evaluation.task_files import task_files
from hf_minitron.evaluation.tasks import Tasks
from hf_minitron.stages.resuming import last_checkpoint

TASK = {
    "dataset_path": "json",
    "doc_to_text": "{{context}}",
    "output_type": "loglikelihood",
    "test_split": "test",
}


def write_task(folder, name="own", **changes):
    """Write a task of one's own, with everything that a task can be made of."""
    folder.mkdir(exist_ok=True)
    (folder / "data.jsonl").write_text('{"context": "w1", "word": "w2"}\n')
    (folder / "base.yaml").write_text(
        yaml.safe_dump(TASK | {"dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}}})
    )
    (folder / "words.py").write_text("def process(docs):\n    return docs\n")
    text = yaml.safe_dump({"include": "base.yaml", "task": name, "doc_to_target": " {{word}}", **changes})
    (folder / f"{name}.yaml").write_text(text + "process_docs: !function words.process\n")
    return folder / f"{name}.yaml"


def test_a_task_is_its_files_and_nothing_that_lies_beside_them(tmp_path):
    path = write_task(tmp_path / "tasks")
    (tmp_path / "tasks/group.yaml").write_text(yaml.safe_dump({"group": "every", "task": ["own"]}))
    (tmp_path / "tasks/other.txt").write_text("not the task's")
    names = {"own.yaml", "base.yaml", "words.py", "data.jsonl"}
    section = {"include_path": str(tmp_path / "tasks")}
    assert set(task_files(["own"], section)) == names
    assert set(task_files([str(path)], {})) == names
    assert set(task_files(["every"], section)) == names | {"group.yaml"}
    assert task_files(["piqa", "none", 7], section) == task_files("own", section) == task_files(["own"], {}) == {}


ROWS = [json.dumps({"text": text, "number": 1}) for text in tiny.text(80, 0)]
BAD_TEXTS = {
    "json": (".jsonl", "\n".join([*ROWS[:70], '{"text": "w1', *ROWS[70:]]), "line 71 is not JSON"),
    "list": (".jsonl", "\n".join([*ROWS[:70], "", "[1]"]), r"line 72 holds \[1\], not an object"),
    "bytes": (".jsonl", b'{"text": "w1 \xff"}\n' + "\n".join(ROWS).encode(), "line 1 is not UTF-8: byte 0xff"),
    "text bytes": (".txt", b"w1 w2\n\xe4\n" * 90, "line 2 is not UTF-8: byte 0xe4"),
    "column": (".jsonl", '{"body": "w1 w2 w3"}\n' * 90, "no column 'text'; it has body"),
    "empty": (".jsonl", '{"text": ""}\n{"text": "  "}\n' * 900, "holds only empty documents"),
    "short": (".jsonl", "\n".join(ROWS[:1]), "too short for one block"),
    "no json": (".json", "[{" * 90, "cannot be read"),
    "no parquet": (".parquet", "PAR1" * 90, "cannot be read"),
    "numbers": (".jsonl", '{"text": 7}\n' * 900, "holds no text|not text"),
    "null": (".jsonl", "\n".join([*ROWS[:3], '{"text": null}', *ROWS[3:]]), "holds no text|not text"),
}


def test_a_text_that_breaks_at_its_end_is_told_unless_it_is_streamed(tmp_path):
    (tmp_path / "text.jsonl").write_bytes("\n".join(ROWS).encode() + b'\n{"text": "\xff"}\n')
    check_first_block(str(tmp_path / "text.jsonl"), tiny.tokenizer(), 64, streaming=True)
    with pytest.raises(ValueError, match="text.jsonl, line 81 is not UTF-8: byte 0xff"):
        check_first_block(str(tmp_path / "text.jsonl"), tiny.tokenizer(), 64)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("suffix", "content", "message"), BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_a_text_that_breaks_is_told_with_its_line(tmp_path, suffix, content, message, streaming):
    path = tmp_path / f"text{suffix}"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=message) as caught:
        check_first_block(str(path), tiny.tokenizer(), 64, streaming=streaming)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        ("score", {"text_column": "body"}, "score: .*calibration.jsonl has no column 'body'; it has text"),
        ("score", {"tokens": 8}, "score: .* 8 tokens are not one block of 16"),
        ("distill", {"text_column": "body"}, "distill: .*train.jsonl has no column 'body'"),
        ("distill", {"block_size": 200}, "distill: block_size: 200 is more than the 128 positions"),
        ("distill", {"text": "{broken}"}, "distill: .*broken.jsonl, line 3 is not JSON"),
        ("distill", {"text": "{broken}", "streaming": True}, "distill: .*broken.jsonl, line 3 is not JSON"),
        ("correct", {"text": "{broken}", "block_size": 16, "warmup_steps": 0}, "correct: .*broken.jsonl, line 3 is not JSON"),
        ("correct", {"text": "{train}", "block_size": 200, "warmup_steps": 0}, "correct: block_size: 200 is more than the 128"),
        ("evaluate", {"tokens": 8}, "evaluate: .* 8 tokens are not one block of 16"),
        ("evaluate", {"text": "{broken}"}, "evaluate: .*broken.jsonl, line 3 is not JSON"),
        ("evaluate", {"tasks": [], "few_shot": 2}, "evaluate: few_shot: 2 is of tasks, and there are none"),
        ("evaluate", {"tasks": [], "limit": 2}, "evaluate: limit: 2 is of tasks, and there are none"),
        ("evaluate", {"tasks": [], "chat_template": True}, "evaluate: chat_template: True is of tasks"),
        ("synthesize", {"documents": 2, "prompts": "{broken}", "max_new_tokens": 20}, "synthesize: .*broken.jsonl, line 3"),
    ],
)
@pytest.mark.parametrize("verb", ["run", "stage"])
def test_every_stage_reads_its_text_before_the_first_slow_step(project, tmp_path, capsys, stage, overrides, message, verb):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join([*ROWS[:2], "{", *ROWS[2:]]))
    names = {"{broken}": str(broken), "{train}": str(project["folder"] / "train.jsonl")}
    recipe = {**project["recipe"], "run": str(tmp_path / "run")}
    section = {key: names.get(value, value) if isinstance(value, str) else value for key, value in overrides.items()}
    recipe[stage] = {**recipe.get(stage, {}), **section}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main([stage if verb == "stage" else verb, str(tmp_path / "recipe.yaml")]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1 and error.startswith("error: "), error
    assert not (tmp_path / "run").exists()


BAD_TASKS = {
    "unsafe": ({"unsafe_code": True}, {}, "tasks: unsafe runs code that the model writes"),
    "shots": ({"num_fewshot": 0}, {"few_shot": 3}, "few_shot: 3, but the task shots fixes its worked examples at 0"),
    "template": ({"doc_to_text": "{{ context | none }}"}, {}, "tasks: template cannot be run: .*none"),
    "data": ({"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}, {}, "tasks: data cannot be run: .*nowhere"),
    "split": ({"test_split": "exam"}, {}, "tasks: split cannot be run: .*exam"),
}


def test_a_task_that_cannot_be_run_is_told_before(tmp_path):
    for name, (changes, _, _) in BAD_TASKS.items():
        write_task(tmp_path / "tasks", name, **changes)  # in one folder: lm-eval takes seconds to look into another
    write_task(tmp_path / "tasks")
    for name, (_, settings, message) in BAD_TASKS.items():
        with pytest.raises(ValueError, match=message):
            Tasks.find([name], tmp_path / "tasks", **settings).check()
    Tasks.find(["own"], tmp_path / "tasks", limit=2, few_shot=0).check()


@pytest.fixture(scope="module")
def checkpoints(project, tmp_path_factory):
    """An interrupted distillation's folder with checkpoints 2, 4 and 6."""

    folder = tmp_path_factory.mktemp("kill") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_minitron.stages.distill.save_trained", lambda *args: 1 / 0)
        for stage in ("score", "prune"):
            assert main([stage, str(project["path"]), "--run", str(folder)]) == 0
        with pytest.raises(ZeroDivisionError):
            main(["distill", str(project["path"]), "--run", str(folder), "--distill.save_total_limit", "5"])
    return folder


def damage(path, how):
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "trainer_state.json"])
@pytest.mark.parametrize("how", ["gone", "cut off"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_by_name(checkpoints, tmp_path, caplog, name, how):
    folder = tmp_path / "checkpoints"
    shutil.copytree(checkpoints / "distill.tmp/checkpoints", folder)
    assert last_checkpoint(folder) == str(folder / "checkpoint-6") and not caplog.text
    damage(folder / "checkpoint-6" / name, how)
    assert last_checkpoint(folder) == str(folder / "checkpoint-4")
    assert "Not whole: checkpoint-6 (" in caplog.text and "goes on from checkpoint-4" in caplog.text
    for step in (2, 4):
        damage(folder / f"checkpoint-{step}" / name, how)
    assert last_checkpoint(folder) is None and "goes on from its beginning" in caplog.text


def test_what_an_interrupted_attempt_has_left_is_no_missing_space(project, checkpoints, tmp_path, monkeypatch):
    left = sum(path.stat().st_size for path in (checkpoints / "distill.tmp").rglob("*") if path.is_file())
    needed = []
    monkeypatch.setattr("hf_minitron.stages.training.require_space", lambda path, number, what: needed.append(number))
    monkeypatch.setattr("hf_minitron.__main__.execute", lambda *args: None)
    for folder in (checkpoints, tmp_path / "fresh"):
        assert main(["distill", str(project["path"]), "--run", str(folder)]) == 0
    assert left > 100_000 and needed[1] - needed[0] == left
