"""The product on real input: data sets and models as they lie on the Hub, and every recipe from its first stage to its last."""

import json
import shutil
import sys
from pathlib import Path
from unittest.mock import MagicMock

import datasets
import huggingface_hub
import lm_eval
import pytest
import real_repos
import tiny
import torch
import yaml
from hub_server import hub_server, use
from test_export import with_chat
from tiny_tokenizers import ALL
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_minitron.__main__ import main
from hf_minitron.data.packing import check_first_block
from hf_minitron.data.texts import load_text
from hf_minitron.evaluation import task_data, tasks
from hf_minitron.evaluation.report import Report
from hf_minitron.hub import card

FOLDER = Path(__file__).resolve().parent.parent / "recipes"
TARGETS = ("hidden", "ffn", "layers", "heads", "experts")


@pytest.fixture(scope="module")
def real_hub(tmp_path_factory):
    """A Hub with the data sets of all recipes and tasks, which every library of this process takes for the real one."""
    repos = tmp_path_factory.mktemp("repos")
    with hub_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, write in real_repos.DATASETS.items():
            (repos / name).mkdir(parents=True)
            write(repos / name)
            server.add_folder(f"datasets/{name}", repos / name)
        use(server, patch, tmp_path_factory.mktemp("cache"))
        known = ("winogrande", "gsm8k", "arc", "piqa", "ifeval")
        folders = tuple(str(Path(lm_eval.__file__).parent / "tasks" / name) for name in known)
        real = tasks._task_manager  # lm-eval's own files, but not all 14,000 of them
        patch.setattr(tasks, "_task_manager", lambda own, include_defaults: real(folders + own, include_defaults=False))
        server.folder = repos
        yield server


# Data sets

TEXTS = {
    "HuggingFaceFW/fineweb-edu": ("train", 80),
    "HuggingFaceFW/fineweb-edu:sample-10BT": ("train", 80),
    "HuggingFaceFW/fineweb-edu:sample-100BT": ("train", 40),
    "HuggingFaceFW/fineweb-edu:CC-MAIN-2024-10": ("train", 40),
    "allenai/c4:en": ("validation", 30),
    "NeelNanda/c4-10k": ("train", 80),
    "Salesforce/wikitext:wikitext-2-raw-v1": ("test", 80),
    "OptimalScale/ClimbMix": ("train", 90),
}


@pytest.mark.parametrize("source", TEXTS)
def test_a_data_set_of_the_hub_loads_and_streams(real_hub, source):
    split, count = TEXTS[source]
    check_first_block(source, tiny.tokenizer(), 8, split=split)
    loaded, streamed = (list(load_text(source, split, streaming=streaming)) for streaming in (False, True))
    assert len(loaded) == count
    assert loaded == streamed
    assert {tuple(row) for row in loaded} == {("text",)}


def test_what_a_data_set_lacks_is_refused_before_anything_is_read(real_hub):
    for source, split, message in (
        ("HuggingFaceFW/fineweb-edu:sample-1BT", "train", "BuilderConfig 'sample-1BT' not found. Available: .*'sample-10BT'"),
        ("HuggingFaceFW/fineweb-edu", "test", r"Bad split: test. Available splits: \['train'\]"),
        ("HuggingFaceFW/fineweb-edo", "train", "Dataset 'HuggingFaceFW/fineweb-edo' doesn't exist on the Hub"),
        ("Salesforce/wikitext", "test", "Config name is missing. Please pick one among the available configs"),
    ):
        with pytest.raises(ValueError, match=f"{source} cannot be read: {message}") as raised:
            check_first_block(source, tiny.tokenizer(), 8, split=split)
        assert "\n" not in str(raised.value), "one line"


def test_a_chat_set_is_read_by_its_messages(real_hub):
    source, split = "HuggingFaceH4/ultrachat_200k", "train_sft"
    for streaming in (False, True):
        chats = list(load_text(source, split, streaming=streaming))
        assert {tuple(row) for row in chats} == {("messages",)}
        assert {turn["role"] for row in chats for turn in row["messages"]} == {"user", "assistant"}
        assert list(load_text(source, split, "messages", streaming=streaming)) == chats
        with pytest.raises(ValueError, match="it has prompt, prompt_id, messages. Columns with text: prompt, prompt_id; set"):
            load_text(source, split, "body", streaming=streaming)
        assert len(list(load_text(source, split, "prompt", streaming=streaming))) == 10


# Tasks

QUESTION = {
    "output_type": "loglikelihood", "dataset_path": "openai/gsm8k", "dataset_name": "main", "test_split": "test",
    "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
}  # fmt: skip
WANTING = {
    "gone": ({"dataset_path": "openai/gsm9k"}, r"openai/gsm9k \(main\): Dataset 'openai/gsm9k' doesn't exist on .*log in with"),
    "config": ({"dataset_name": "maths"}, r"openai/gsm8k \(maths\): BuilderConfig 'maths' not found. Available: \['main'\]"),
    "split": ({"test_split": "exam"}, "it has no split 'exam'; it has train, test"),
    "shots": ({"fewshot_split": "dev", "num_fewshot": 2}, "it has no split 'dev'; it has train, test"),
    "column": ({"doc_to_text": "{{query}}"}, "'query' is undefined"),
}


def write_question(folder, name, **changes):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **QUESTION, **changes}))


def test_data_of_tasks_is_looked_for_before_anything_slow(real_hub, tmp_path):
    for name, (changes, _) in WANTING.items():
        write_question(tmp_path / "tasks", name, **changes)
    group = {"group": "mixed", "task": ["gone", {"task": "inline", **QUESTION}]}
    (tmp_path / "tasks/mixed.yaml").write_text(yaml.safe_dump(group))
    for name, (_, message) in (*WANTING.items(), ("mixed", WANTING["gone"])):
        with pytest.raises(ValueError, match=f"^tasks: {name} cannot be run: data set .*{message}") as raised:
            tasks.Tasks.find([name], tmp_path / "tasks").check()
        assert "\n" not in str(raised.value), "one line"


def test_data_of_tasks_is_not_downloaded_to_look_at_it(real_hub, tmp_path):
    def cached():
        return {path.name for path in Path(datasets.config.HF_DATASETS_CACHE).glob("openai___gsm8k/**/*.arrow")}

    write_question(tmp_path / "tasks", "whole")
    before = cached()
    for name in ("whole", "gsm8k", "arc_easy", "piqa", "winogrande"):
        tasks.Tasks.find([name], tmp_path / "tasks").check()
    assert cached() == before, "only first rows"


def test_a_task_that_wants_none_of_the_first_rows_is_looked_at_whole(real_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(task_data, "FIRST_ROWS", 2)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/pick.py").write_text("def pick(docs):\n    return docs.select([5])\n")
    text = yaml.safe_dump({"task": "picked", **QUESTION})
    (tmp_path / "tasks/picked.yaml").write_text(text + "process_docs: !function pick.pick\n")
    tasks.Tasks.find(["picked"], tmp_path / "tasks").check()


def test_offline_the_data_of_tasks_must_be_in_the_cache(real_hub, tmp_path, monkeypatch):
    write_question(tmp_path / "tasks", "cached", dataset_path="openai/gsm8k")
    write_question(tmp_path / "tasks", "absent", dataset_path="baber/piqa", dataset_name=None)
    datasets.load_dataset("openai/gsm8k", "main")
    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    tasks.Tasks.find(["cached"], tmp_path / "tasks").check()
    with pytest.raises(ValueError, match="absent cannot be run: data set baber/piqa: .*HF_HUB_OFFLINE is set, .* load it once"):
        tasks.Tasks.find(["absent"], tmp_path / "tasks").check()


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has not imported IFEval's code yet, and whose nltk has a folder of its own."""
    for name in [name for name in sys.modules if "ifeval" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    return tmp_path


@pytest.mark.slow
def test_ifeval_in_the_chat_template_is_measured_as_the_data_set_that_it_is(real_hub, fresh):
    for package in ("langdetect", "immutabledict"):
        pytest.importorskip(package, reason='pip install "lm-eval[ifeval]"')
    (fresh / "tokenizers/punkt_tab").mkdir(parents=True)  # no instruction of ours counts sentences
    chosen = tasks.Tasks.find(["ifeval"], chat_template=True)
    chosen.check()
    tokenizer = with_chat(ALL["byte_level"])
    model = tiny.model(dtype=torch.float32, vocab_size=len(tokenizer), max_position_embeddings=1536)
    entries, records = tasks.run_tasks(model, tokenizer, chosen, name="distilled")
    metrics = {entry.metric: entry for entry in entries}
    assert set(metrics) == {f"{of}_level_{how}_acc" for of in ("prompt", "inst") for how in ("strict", "loose")}
    for metric, entry in metrics.items():
        assert entry.dataset == ("google/IFEval", None, "train"), metric
        assert entry.aggregation == "mean", metric
        assert entry.stderr is not None, metric
        assert entry.n == 3, metric
    weights = {row["doc"]: row["weight"] for row in records if row["metric"] == "inst_level_strict_acc"}
    assert weights == {0: 1, 1: 2, 2: 3}, "instructions of a prompt"
    results = card._eval_results(Report({"distilled": {}}, entries))
    assert {(result.dataset_type, result.dataset_split) for result in results} == {("google/IFEval", "train")}
    assert all("stderr" in result.metric_args for result in results)


def test_answers_longer_than_a_models_positions_are_told_before_anything_slow(real_hub):
    chosen = tasks.Tasks.find(["ifeval"])
    with pytest.raises(ValueError, match="ifeval lets models write 1280 tokens, and teacher has 512 positions: leave it"):
        chosen.check_positions("teacher", 512)
    chosen.check_positions("teacher", 2048)
    chosen.check_positions("teacher", None)


def test_a_missing_package_of_a_task_is_told_with_the_command_that_installs_it(real_hub, fresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(ValueError) as raised:
        tasks.Tasks.find(["ifeval"]).check()
    assert str(raised.value) == 'tasks: ifeval needs the package langdetect: pip install "lm-eval[ifeval]"'


def test_what_nltk_cannot_fetch_is_told(real_hub, fresh, monkeypatch):
    for package in ("langdetect", "immutabledict"):
        monkeypatch.setitem(sys.modules, package, MagicMock())
    monkeypatch.setattr("nltk.download", lambda *args, **kwargs: False)
    with pytest.raises(ValueError, match="^tasks: ifeval cannot be run: .*nltk's punkt_tab cannot be fetched: python -m nltk"):
        tasks.Tasks.find(["ifeval"]).check()


# Recipes

SMALL = {
    "score.tokens": 256, "score.block_size": 32, "score.batch_size": 4, "score.layers_limit": 4,
    "distill.block_size": 32, "distill.max_steps": 2, "distill.gradient_accumulation_steps": 2, "distill.logging_steps": 1,
    "distill.per_device_train_batch_size": 2, "distill.warmup_steps": 1, "distill.save_steps": 1, "distill.disable_tqdm": True,
    "evaluate.tokens": 256, "evaluate.block_size": 32, "evaluate.limit": 2,
    "evaluate.speed": {"batch_sizes": [1], "prompt": [4], "new_tokens": 2, "rounds": 1},
}  # fmt: skip
RECIPES = sorted({path.parent for path in FOLDER.glob("*/*.yaml") if path.parent.name != "accelerate"})
CHEAP = ("qwen3-4b-cached",)


def small(paths, folder):
    """Write recipes' copies with targets for the tiny model; return their paths and the model's name."""
    recipes, written = [yaml.safe_load(path.read_text()) for path in paths], []
    name = Path(recipes[0]["model"]).name
    for path, recipe in zip(paths, recipes, strict=True):
        for key in {"target", "multiple_of"} & recipe["prune"].keys():
            recipe["prune"][key] = real_repos.scaled(name, recipe["prune"][key])
        recipe["evaluate"].pop("tensor_parallel", None)  # here is one process
        if "layers_block" in recipe["score"]:
            recipe["score"]["layers_block"] = recipe["prune"]["target"]["layers"]
        written.append(folder / path.parent.name / path.name)
        written[-1].parent.mkdir(exist_ok=True)
        written[-1].write_text(yaml.safe_dump(recipe, sort_keys=False))
    return written, recipes


@pytest.mark.parametrize(
    "recipe",
    [path if path.name in CHEAP else pytest.param(path, marks=pytest.mark.slow) for path in RECIPES],
    ids=lambda p: p.name,
)
def test_a_recipe_runs_from_the_hub_to_a_card(recipe, real_hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(recipe, tmp_path / "recipes" / recipe.name)  # prompts lie beside some
    paths, recipes = small(sorted(recipe.glob("*.yaml")), tmp_path)
    publish_model(real_hub, recipes[0]["model"], tmp_path)
    if "stdlib" in recipes[0]["score"]["text"]:
        prepare_texts(tmp_path / ".cache/hf_minitron/stdlib", monkeypatch)
    overrides = SMALL | {f"correct.{key.partition('.')[2]}": value for key, value in SMALL.items()
                         if key.startswith("distill.") and "correct" in recipes[0]}  # fmt: skip
    overrides = {
        key: value for key, value in overrides.items() if key != "score.layers_limit" or "layers" in recipes[0]["score"]
    }
    if not recipes[0]["evaluate"].get("tasks"):
        del overrides["evaluate.limit"]
    arguments = [item for key, value in overrides.items() for item in (f"--{key}", json.dumps(value))]
    assert main(["run", *map(str, paths), *arguments]) == 0, capsys.readouterr().err
    for made in recipes:
        check_run(Path(made["run"]), made)


def publish_model(server, model, home):
    """Put a recipe's model where the recipe looks for it: on the Hub, or in a folder."""
    name = Path(model).name
    folder = server.folder / "models" / name
    if not folder.exists():
        real_repos.write_model(folder, name)
    if model.count("/") == 1 and not model.startswith("models/"):
        server.add_folder(model, folder)
    else:
        shutil.copytree(folder, home / model.replace("~/", ""))


def prepare_texts(folder, monkeypatch):
    """Write the texts and the task of the demonstration by its own script, of other documents."""
    monkeypatch.syspath_prepend(FOLDER)
    import prepare_offline

    documents = [(f"module{i}", text) for i, text in enumerate(real_repos.passages(60, 7))]
    monkeypatch.setattr(prepare_offline, "documents", lambda: iter(documents))
    prepare_offline.prepare_text(folder)


def check_run(run, recipe):
    """A student that Transformers loads, of the target's sizes, a report of three models and a card."""
    folder = run / "publish/model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for axis, size in recipe["prune"]["target"].items():
        key = "moe_intermediate_size" if axis == "ffn" and hasattr(model.config, "num_experts") else real_repos.SIZES[axis]
        assert getattr(model.config, key) == size, axis
    report = json.loads((run / "evaluate/report.json").read_text())
    assert {"teacher", "pruned", "distilled"} <= set(report["models"]), list(report)
    assert "license: " in (folder / "README.md").read_text()
    assert tokenizer.eos_token_id == model.config.eos_token_id
