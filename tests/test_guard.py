"""What guards a run: files that count, inputs looked at before any slow step, faults that are told in one line."""

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
import yaml
from huggingface_hub import HfApi, ModelCard

from hf_minitron.__main__ import main
from hf_minitron.architecture.architecture import Architecture
from hf_minitron.checkpoint.checkpoint import resolve
from hf_minitron.checkpoint.side_files import side_files
from hf_minitron.data.packing import check_first_block
from hf_minitron.evaluation.task_files import check_folder, task_files
from hf_minitron.evaluation.tasks import Tasks
from hf_minitron.hub.facts import shorten
from hf_minitron.hub.page import write_page
from hf_minitron.hub.retry import retry
from hf_minitron.recipe_file import read_yaml
from hf_minitron.run import RecipeError, Run
from hf_minitron.stages import distill, training
from hf_minitron.stages.resuming import checkpoints_at_once, last_checkpoint

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
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


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
    assert error.count("\n") == 1, error
    assert error.startswith("error: "), error
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
        patch.setattr("hf_minitron.stages.trained.save_trained", lambda *args: 1 / 0)
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
    assert last_checkpoint(folder) == str(folder / "checkpoint-6")
    assert not caplog.text
    damage(folder / "checkpoint-6" / name, how)
    assert last_checkpoint(folder) == str(folder / "checkpoint-4")
    assert "Not whole: checkpoint-6 (" in caplog.text
    assert "goes on from checkpoint-4" in caplog.text
    for step in (2, 4):
        damage(folder / f"checkpoint-{step}" / name, how)
    assert last_checkpoint(folder) is None
    assert "goes on from its beginning" in caplog.text


def test_what_an_interrupted_attempt_has_left_is_no_missing_space(project, checkpoints, tmp_path, monkeypatch):
    left = sum(path.stat().st_size for path in (checkpoints / "distill.tmp").rglob("*") if path.is_file())
    needed = []
    monkeypatch.setattr("hf_minitron.stages.training.require_space", lambda path, number, what: needed.append(number))
    monkeypatch.setattr("hf_minitron.command.execute", lambda *args: None)
    for folder in (checkpoints, tmp_path / "fresh"):
        assert main(["distill", str(project["path"]), "--run", str(folder)]) == 0
    assert left > 100_000
    assert needed[1] - needed[0] == left


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("cross_documents", [False, True])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_space_for_text_is_what_will_be_written(project, tmp_path, monkeypatch, adds_bos, cross_documents, streaming):
    needed, tokenizer = [], tiny.tokenizer(adds_bos=adds_bos)
    monkeypatch.setattr(training, "require_space", lambda path, number, what: needed.append(number))
    run = Run(tmp_path / "run", str(project["folder"] / "teacher"), 0, {}, tmp_path / "recipe.yaml")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in tiny.text(500, 1)))
    section = {**project["recipe"]["distill"], "text": str(text), "max_steps": 500, "cross_documents": cross_documents,
               "streaming": streaming, "eval_strategy": "steps", "eval_text": str(text), "eval_tokens": 800}  # fmt: skip
    args = distill.Args(**section, lora={})
    student = Architecture.of(tiny.model().config)
    training.check_space(run, args, "distill", tokenizer, student)
    made = [training.make_eval_blocks(args, tokenizer, tmp_path / "eval")]
    made += [training.make_blocks(args, tokenizer, tmp_path / "blocks", 0, 16_000)]
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.arrow"))
    assert [len(made[0]), *map(len, made[1:])] == [50, 1000]
    assert 0 <= written - needed[0] < 5000, "but for the files' own headers"
    training.check_space(run, distill.Args(**section), "distill", tokenizer, student)
    parameters = sum(parameter.numel() for parameter in tiny.model().parameters())
    assert needed[1] - needed[0] == 3 * 4 * parameters * 3, "two checkpoints kept and one being written"


@pytest.mark.parametrize("strategy, interval, limit, steps, most", [
    ("steps", 0.34, 1, 90, 2), ("steps", 0.34, 5, 90, 3), ("steps", 90, 1, 90, 1), ("steps", 500, 1, 90, 1),
    ("steps", 500, None, 9_000, 2), ("steps", 500, 2, -1, 3), ("epoch", 500, 1, -1, 2), ("no", 500, 1, 90, 0),
])  # fmt: skip
def test_the_space_for_checkpoints_is_that_of_those_which_a_training_writes(strategy, interval, limit, steps, most):
    assert checkpoints_at_once(strategy, interval, limit, steps) == most


def test_the_space_is_that_of_the_student(project, tmp_path, monkeypatch):
    needed = []
    monkeypatch.setattr("hf_minitron.stages.training.require_space", lambda path, number, what: needed.append(number))
    recipe, args = project["recipe"], distill.Args(**project["recipe"]["distill"])
    for target in (recipe["prune"]["target"], {"layers": 1}):
        run = Run(tmp_path / "run", str(project["folder"] / "teacher"), 0,
                  {**recipe, "prune": {**recipe["prune"], "target": target}}, tmp_path / "recipe.yaml")  # fmt: skip
        distill.check(args, run)
    assert needed[0] != needed[1]


def test_tasks_are_not_looked_for_on_the_whole_disk(tmp_path, monkeypatch):
    write_task(tmp_path / "tasks")
    check_folder(str(tmp_path / "tasks"))
    monkeypatch.setattr("hf_minitron.evaluation.task_files.MOST_FILES", 3)
    with pytest.raises(ValueError, match="tasks holds more than 3 files; name the folder of the tasks"):
        check_folder(str(tmp_path / "tasks"))


TOKENS = ["hf_" + "Secret" * 6, "ghp_" + "a1B2" * 9, "sk-proj-" + "a1B2" * 9, "AKIA" + "A1B2" * 4]


@pytest.mark.parametrize("verb", ["plan", "report", "run", "score", "publish"])
@pytest.mark.parametrize("token", TOKENS)
def test_a_token_is_refused_by_every_verb_and_not_shown(project, tmp_path, capsys, verb, token):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(project["recipe"] | {"publish": {"notes": f"made with {token}"}}))
    for command in (
        [verb, str(path)],
        [verb, str(project["path"]), "--publish.notes", token],
        [verb, str(path), f"--{token}=1"],
    ):
        assert main(command) == 1
        out = capsys.readouterr()
        assert "holds an access token" in out.err, command
        assert token not in out.err + out.out, command


BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD_YAML = {
    "bomb": (BOMB, "holds more than 100,000 values"),
    "itself": ("a: &a [*a]", "nested deeper"),
    "deep": ("[" * 5000, "nested deeper|is not YAML"),
    "less deep": ("[" * 80 + "]" * 80, "nested deeper than the 50 levels"),
    "twice": ("model: a/b\nseed: 1\nseed: 2\n", "the key 'seed' stands twice in a section, again in line 3"),
    "twice below": ("model: a/b\nscore: {tokens: 1, tokens: 2}\n", "the key 'tokens' stands twice"),
    "large": ("a" * 1_000_001, "a recipe has at most 1,000,000"),
    "python": ("a: !!python/object/apply:os.system [ls]", "is not YAML"),
}


@pytest.mark.parametrize(("text", "message"), BAD_YAML.values(), ids=BAD_YAML)
def test_yaml_that_would_fill_the_memory_or_say_two_things_is_refused(text, message):
    with pytest.raises(RecipeError, match=message) as caught:
        read_yaml(text, "recipe.yaml")
    assert "\n" not in str(caught.value)


def test_aliases_and_merges_are_read():
    assert read_yaml("a: &a {b: 1}\nc: *a\nd: {<<: *a, b: 2}", "x") == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 2}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"model_type": "llama", "num_hidden_layers": 1000000000}',
            "num_hidden_layers: 1,000,000,000 is more",
        ),
        ('{"model_type": "llama", "rope_scaling": {"n_layer": 20000}}', "n_layer: 20,000 is more"),
        ('{"model_type": "llama", "vocab_size": 1e15}', "vocab_size"),
        ("{", "config.json is not JSON"),
        ("[]", "config.json holds a list"),
    ],
)
def test_a_config_that_no_model_has_is_refused_at_once(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        resolve(tmp_path)


def test_links_out_of_a_models_folder_are_not_followed(tmp_path, caplog):
    model = tmp_path / "models--a--b/snapshots/abc"
    model.mkdir(parents=True)
    (tmp_path / "models--a--b/blobs").mkdir()
    (tmp_path / "models--a--b/blobs/123").write_text("licence")
    (model / "LICENSE").symlink_to("../../blobs/123")
    (model / "tokenizer.json").symlink_to("LICENSE")
    (model / "vocab").mkdir()
    assert [path.name for path in side_files(model)] == ["LICENSE", "tokenizer.json"]
    assert "vocab is a folder, which does not go with" in caplog.text
    (model / "NOTICE").symlink_to("../../blobs/none")
    with pytest.raises(ValueError, match="NOTICE is a link to .*none, which is not there"):
        side_files(model)
    (model / "NOTICE").unlink()
    (model / "NOTICE").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="NOTICE is a link to /etc/passwd, out of the model's folder"):
        side_files(model)


def test_what_a_base_card_says_is_text_in_the_page(tmp_path):
    bad = "<img src=x onerror=alert(1)> [a](javascript:alert(1)) ![b](../secret.txt) <script>x</script>"
    (tmp_path / "secret.txt").write_text("mine")
    (tmp_path / "page").mkdir()
    card = ModelCard(f"---\nmodel_name: a\n---\n# A\n\n{bad}\n\n{bad.replace('<img', '<div><img')}\n\n"
                     "<details><summary>The recipe</summary>\n\nx\n\n</details>\n")  # fmt: skip
    write_page(card, tmp_path / "page", tmp_path / "page.html")
    body = (tmp_path / "page.html").read_text().partition("<main>")[2]
    assert "<script" not in body
    assert "<img src=x" not in body
    assert "<div><img" not in body
    assert 'href="javascript' not in body
    assert "data:" not in body
    assert "<details><summary>The recipe</summary>" in body
    assert "</details>" in body


def test_paths_with_blanks_are_paths(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    for text, short in {
        "/data/my texts/train 1.jsonl": ".../my texts/train 1.jsonl",
        "read /srv/data/x.jsonl twice": "read .../data/x.jsonl twice",
        "file:///home/me/x": "~/x",
        "https://huggingface.co/a/b": "https://huggingface.co/a/b",
        "/no thinking": "/no thinking",
    }.items():
        assert shorten(text) == short


def test_ctrl_c_says_one_line(project, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_minitron.command.run_stages", interrupted)
    assert main(["score", str(project["path"])]) == 130
    assert capsys.readouterr().err == "\nStopped by Ctrl-C. Start the same command again to go on\n"


@pytest.mark.parametrize("status", [402, 413, 507])
def test_what_the_hub_says_is_told(hub, status):
    hub.fail("GET", "/api/models/", status, body='{"error": "Private storage limit reached"}')
    with pytest.raises(ValueError, match=rf"me/small.*\({status}\)(.|\n)*Private storage limit reached"):
        retry(lambda: HfApi().model_info("me/small"), "me/small")
