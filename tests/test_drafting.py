"""First steps: a recipe for a model, a plan without one, shares as targets, and names that people know from elsewhere."""

import gzip
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import tiny
import yaml
from datasets import Dataset, DatasetDict
from test_chat import tokenizer as chat_tokenizer

from hf_minitron import Architecture
from hf_minitron.__main__ import RUNS, known_keys, main
from hf_minitron.distillation.losses.tokens import CROSS_ENTROPY, TOKEN_LOSSES
from hf_minitron.errors import RecipeError
from hf_minitron.known_names import RENAMED, VERBS
from hf_minitron.planning.costs import CHECKPOINTING, Machine
from hf_minitron.planning.drafting import draft, is_instruct
from hf_minitron.planning.own_text import tokens_of
from hf_minitron.recipe import bind, load_recipe
from hf_minitron.recipe_file import TOP_LEVEL
from hf_minitron.stages.every import STAGES
from hf_minitron.stages.share import share_of, sizes_for, with_sizes
from hf_minitron.stages.target import teacher, unquantizable

CONFIGS = Path(__file__).resolve().parent / "configs"
SECTIONS = {name: stage.args for name, stage in STAGES.items()}


def drafted(tmp_path, model, *options):
    path = tmp_path / "recipe.yaml"
    assert main(["init", str(CONFIGS / model), "--output", str(path), *options]) == 0
    return path, yaml.safe_load(path.read_text())


@pytest.mark.parametrize(
    ("model", "keep"),
    [("Llama-3.1-8B", 0.5), ("Qwen3-4B-Base", 0.6), ("SmolLM2-135M-Instruct", 0.75), ("Ministral-8B-Instruct-2410", 0.6)],
)
def test_init_writes_a_recipe_that_binds_and_plans(tmp_path, capsys, model, keep):
    path, recipe = drafted(tmp_path, model, "--keep", f"{keep:.0%}", "--gpus", "8", "--gpu-memory", "80GB")
    out = capsys.readouterr().out
    assert "Every stage fits into 80 GB." in out
    assert f"Recipe: {path}" in out
    run = load_recipe(path, {}, SECTIONS)
    for name in recipe.keys() & STAGES.keys():
        bind(run, name, SECTIONS[name])
    architecture = teacher(recipe["model"])
    after = architecture.shape.cut_to(recipe["prune"]["target"], recipe["prune"]["multiple_of"])
    share = after.num_parameters(architecture.rows) / architecture.shape.num_parameters(architecture.rows)
    assert share == pytest.approx(keep, abs=0.02)
    assert all(size % 32 == 0 for size in recipe["prune"]["target"].values())
    instruct = "Instruct" in model
    assert recipe["evaluate"]["tasks"] == (["gsm8k", "ifeval"] if instruct else ["arc_easy", "hellaswag", "winogrande"])
    assert recipe["evaluate"].get("chat_template", False) is instruct
    assert bool(recipe["evaluate"].get("generate")) is instruct
    texts = {"HuggingFaceTB/smoltalk:all"} if instruct else {"HuggingFaceFW/fineweb-edu:sample-10BT"}
    assert {recipe["score"]["text"], recipe["distill"]["text"]} == texts
    assert CHECKPOINTING in recipe["distill"], "the name that the installed transformers does not call deprecated"
    assert "2408.11796" in path.read_text()
    assert main(["plan", str(path), "--gpus", "8", "--gpu-memory", "80GB"]) == 0


@pytest.mark.parametrize(
    ("name", "files", "expected"),
    [
        ("Own-1B-Instruct", {}, True),
        ("gemma-3-1b-it", {}, True),
        ("Own-1B", {}, False),
        ("Italy-1B", {}, False),
        ("Own-1B", {"tokenizer_config.json": {"chat_template": "{{ messages }}"}}, True),
        ("Own-1B", {"tokenizer_config.json": {}, "chat_template.jinja": "{{ messages }}"}, True),
        ("Own-1B-Base", {"tokenizer_config.json": {"chat_template": "{{ messages }}"}}, False),
        ("Own-1B-Instruct", {"tokenizer_config.json": {}}, False),
    ],
)
def test_who_answers_in_chats_is_told_by_the_chat_template(tmp_path, name, files, expected):
    """Some base models bring a template, too; without a tokenizer the name tells."""
    for file, content in files.items():
        (tmp_path / file).write_text(json.dumps(content))
    assert is_instruct(name, tmp_path) is expected


def test_a_text_of_ones_own_is_trained_on_by_an_instruct_model(tmp_path):
    path, recipe = drafted(tmp_path, "SmolLM2-135M-Instruct", "--text", "me/corpus")
    assert recipe["distill"]["text"] == recipe["score"]["text"] == "me/corpus"
    assert "a million chats" not in path.read_text()


@pytest.mark.parametrize("megabytes", [0.05, 1, 40])
def test_tokens_batch_and_blocks_follow_a_short_text(tmp_path, megabytes):
    """It is read a few times, in enough steps; nobody means a file of some kilobytes to be read for a day."""
    text = tmp_path / "own.jsonl"
    text.write_text((json.dumps({"text": "words " * 160}) + "\n") * int(megabytes * 1e6 / 972))
    path, recipe = drafted(tmp_path, "SmolLM2-135M-Instruct", "--text", str(text))
    about = text.stat().st_size / 4
    distill = recipe["distill"]
    step = distill["per_device_train_batch_size"] * distill["gradient_accumulation_steps"] * distill["block_size"]
    assert step * distill["max_steps"] == pytest.approx(4 * about, rel=0.1)
    assert distill["max_steps"] >= 150
    assert recipe["score"]["tokens"] <= about
    assert recipe["score"]["tokens"] % recipe["score"]["block_size"] == 0
    assert "passes over about" in path.read_text()


def test_a_text_that_is_not_there_is_told(tmp_path, capsys):
    words = ["--text", str(tmp_path / "none.jsonl"), "--output", str(tmp_path / "recipe.yaml")]
    assert main(["init", str(CONFIGS / "Llama-3.2-1B"), *words]) == 1
    assert "none.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "recipe.yaml").exists()


def test_the_draft_is_near_what_the_paper_did():
    """Llama-3.1-Minitron-4B-Width: hidden 3072, ffn 9216 of 4096 and 14336 (2408.11796, table 3)."""
    sizes = sizes_for(teacher(str(CONFIGS / "Llama-3.1-8B")), 4_512_746_496 / 8_030_261_248)
    assert sizes == {"hidden": 3072, "ffn": 9216}


@pytest.mark.parametrize("model", ["gpt2", "pythia-160m", "opt-125m", "gpt-neo-125m", "stablelm-2-1_6b", "bloom-560m"])
def test_heads_follow_hidden_where_the_class_ties_them(model):
    """As many as there are times their size is the hidden size of these classes, so that neither is cut alone."""
    architecture = teacher(str(CONFIGS / model))
    sizes = sizes_for(architecture, 0.5)
    shape = architecture.shape.cut_to(sizes)
    assert shape["heads"] * shape["head_dim"] == shape["hidden"]
    share = shape.num_parameters(architecture.rows) / architecture.shape.num_parameters(architecture.rows)
    assert share == pytest.approx(0.5, abs=0.03)


def kept(model, sizes):
    architecture = teacher(str(CONFIGS / model))
    shape = architecture.shape
    return shape.cut_to(sizes).num_parameters(architecture.rows) / shape.num_parameters(architecture.rows)


@pytest.mark.parametrize(
    ("model", "share", "axes"),
    [
        ("OLMoE-1B-7B-0924", 0.55, ["experts"]),
        ("OLMoE-1B-7B-0924", 0.4, ["experts", "ffn"]),
        ("Qwen3-30B-A3B-Base", 0.4, ["experts", "ffn"]),
        ("Qwen3-30B-A3B-Base", 0.7, ["experts"]),
        ("Mixtral-8x7B-v0.1", 0.7, ["experts", "ffn"]),
        ("DeepSeek-V2-Lite", 0.6, ["experts"]),
        ("granite-4.0-h-tiny", 0.6, ["experts"]),
    ],
)
def test_a_share_of_a_mixture_cuts_experts(model, share, axes):
    """Half of them at most (2510.13999), then the channels of those that stay; heads, hidden and layers stay."""
    sizes, before = sizes_for(teacher(str(CONFIGS / model)), share), teacher(str(CONFIGS / model)).shape
    assert list(sizes) == axes
    assert sizes["experts"] >= before["experts"] / 2
    assert kept(model, sizes) == pytest.approx(share, abs=0.03)


def test_no_share_cuts_an_axis_to_almost_nothing():
    """Of Qwen2.5-VL-3B 40% were 768 of 11,008 FFN channels, for its class ties heads to hidden."""
    sizes = sizes_for(teacher(str(CONFIGS / "Qwen2.5-VL-3B-Instruct")), 0.4)
    assert sizes == {"hidden": 1024, "heads": 8, "ffn": 5376}
    assert kept("Qwen2.5-VL-3B-Instruct", sizes) == pytest.approx(0.4, abs=0.03)


def test_a_share_that_would_is_refused_with_the_nearest_that_can_be_kept():
    message = "3% of this model's parameters .* at least 25% of hidden and 25% of ffn stay; take 15%, or give sizes"
    with pytest.raises(RecipeError, match=message):
        sizes_for(teacher(str(CONFIGS / "SmolLM2-135M-Instruct")), 0.03)


@pytest.mark.parametrize(
    ("model", "keep", "why"),
    [
        ("Llama-3.1-8B", "50%", "width, as in Llama-3.1-Minitron-4B-Width (2408.11796, table 3); heads and layers stay"),
        ("OLMoE-1B-7B-0924", "40%", "experts, half of them at most, as in REAP (2510.13999); then channels of the rest; hidden "
         "and heads and layers stay"),
        ("Mamba-Codestral-7B-v0.1", "60%", "width, which is ahead of depth after training (2407.14679, table 13); ssm_heads "
         "follow hidden; layers stay"),
        ("gpt2", "60%", "width, as in Llama-3.1-Minitron-4B-Width (2408.11796, table 3); heads follow hidden, as this class "
         "ties them; layers stay"),
    ],
)  # fmt: skip
def test_the_reason_of_a_target_is_true_of_it(model, keep, why):
    text = draft(str(CONFIGS / model), share_of(keep, "--keep"), Machine(8, 80e9))
    assert re.search("  target: # (.*)", text)[1] == why


TITLE = re.compile(r"# (.+) to [\d,]+ parameters, (\d+)% of")


def test_names_are_drafted_as_they_are(tmp_path, monkeypatch):
    """Spaces and signs of YAML in a path, a name that YAML takes for a number, and the folder that one stands in."""
    text = "my #1: chats.jsonl"
    for folder in ("1e5", "a #b: c"):
        shutil.copytree(CONFIGS / "SmolLM2-135M-Instruct", tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    Path(text).write_text(json.dumps({"text": "words " * 2000}) + "\n")
    machine = Machine(1, 80e9)
    for model, name in {"1e5": "1e5", "a #b: c": "a #b: c"}.items():
        drawn = draft(model, 0.75, machine, text, Path("my recipe.yaml"))
        recipe = yaml.safe_load(drawn)
        assert recipe["model"] == model
        assert recipe["score"]["text"] == recipe["distill"]["text"] == text
        assert TITLE.match(drawn)[1] == name
        assert "hf-minitron plan 'my recipe.yaml'" in drawn
    assert isinstance(recipe["run"], str)
    monkeypatch.chdir("1e5")
    drawn = draft(".", 0.75, machine)
    assert TITLE.match(drawn)[1] == "1e5"
    assert yaml.safe_load(drawn)["run"] == "runs/1e5-75"


@pytest.fixture
def chatty(tmp_path):
    """A folder of a model's config and a tokenizer with a chat template, which `init` takes."""
    folder = tmp_path / "Tiny-Instruct"
    tiny.config(vocab_size=103).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


def rows_of(*rows, times=400):
    return "".join(json.dumps(row) + "\n" for row in rows * times)


LONG = " ".join(tiny.WORDS[:40])
TURNS = [{"role": "user", "content": LONG}, {"role": "assistant", "content": LONG}]
UNREADABLE = {
    "no column": (
        "a.csv",
        "id,body\n" + f"1,{LONG}\n" * 99,
        "has no column 'text'; it has id, body. Columns with text: body; set ",
    ),
    "no assistant": (
        "a.jsonl",
        rows_of({"messages": TURNS[:1]}),
        "document 0 (from 0) has no turn of the assistant, so nothing",
    ),
    "no content": ("a.jsonl", rows_of({"messages": [{"role": "user"}]}), "holds a message without content"),
    "an odd role": (
        "a.jsonl",
        rows_of({"messages": [{"role": "boss", "content": "w1"}, *TURNS]}),
        "a message of 'boss', a role",
    ),
    "short": (
        "a.jsonl",
        rows_of({"text": "w1"}, times=3),
        "is too short for one block: 6 tokens in 3 documents, block_size 128",
    ),
    "shorter": ("a.txt", "w1", "is too short for one block"),
    "empty": ("a.jsonl", "", "cannot be read: it is empty"),
    "blank": ("a.jsonl", rows_of({"text": " "}), "holds only empty documents. Name another text"),
    "not JSON": ("a.jsonl", rows_of({"text": LONG}, times=1) + "{text: 1}\n", "a.jsonl, line 2 is not JSON: "),
    "tools": ("a.jsonl", rows_of({"messages": TURNS, "tools": "{"}), "has tools that are not JSON"),
    "a list": ("a.json", json.dumps([1, 2]), "not text. Columns with text: none"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_init_says_at_once_that_a_local_text_cannot_be_read(chatty, tmp_path, capsys, case):
    name, content, message = UNREADABLE[case]
    (tmp_path / name).write_text(content)
    path = tmp_path / "recipe.yaml"
    assert main(["init", str(chatty), "--text", str(tmp_path / name), "--output", str(path)]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {path} is written, but score cannot read its text: ")
    assert message in said.err
    assert said.err.count("\n") == 1
    assert f"Recipe: {path}" in said.out
    assert path.is_file()


@pytest.mark.parametrize("kind", ["messages", "conversations", "pairs", "chats of pairs", "text", "folder", "gz"])
def test_init_takes_every_text_that_the_stages_take(chatty, tmp_path, capsys, kind):
    name, rows = "a.jsonl", {
        "messages": {"messages": TURNS}, "pairs": {"prompt": LONG, "completion": LONG}, "text": {"text": LONG},
        "conversations": {"conversations": [{"from": "human", "value": LONG}, {"from": "gpt", "value": LONG}]},
        "chats of pairs": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    }  # fmt: skip
    content = rows_of(rows.get(kind, rows["messages"]))
    source = tmp_path / name
    source.write_text(content)
    if kind == "gz":
        source = tmp_path / "a.jsonl.gz"
        source.write_bytes(gzip.compress(content.encode()))
    if kind == "folder":
        source = tmp_path / "chats"
        source.mkdir()
        for split in ("train", "validation"):
            (source / f"{split}.jsonl").write_text(content)
    assert main(["init", str(chatty), "--text", str(source), "--output", str(tmp_path / "r.yaml")]) == 0, (
        capsys.readouterr().err
    )


def test_a_broken_file_is_told_in_one_line(chatty, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    command = ["-m", "hf_minitron", "init", chatty, "--text", tmp_path / "a.parquet", "--output", tmp_path / "r.yaml"]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert done.stderr.startswith(f"error: {tmp_path / 'r.yaml'} is written, but score cannot read its text: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("kind", ["file", "folder", "gz", "parquet", "saved", "pattern"])
def test_a_text_of_ones_own_is_counted_whatever_holds_it(tmp_path, kind):
    """Within a half, of Python's documentation; what is held out beside it is not counted, nor is a card."""
    rows = [{"text": text} for text in topics.values()]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    source = tmp_path / {"file": "a.jsonl", "gz": "a.jsonl.gz", "parquet": "a.parquet", "pattern": "*.jsonl"}.get(kind, "texts")
    if kind in ("file", "pattern"):
        (tmp_path / "a.jsonl").write_text(content)
    elif kind == "gz":
        source.write_bytes(gzip.compress(content.encode()))
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(source)
    elif kind == "saved":
        DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:40])}).save_to_disk(source)
    else:
        source.mkdir()
        (source / "train.jsonl").write_text(content)
        (source / "test.jsonl").write_text(content[: len(content) // 5])
        (source / "README.md").write_text("A card. " * 100_000)
    assert tokens_of(str(source)) == pytest.approx(len(content) / 4, rel=0.5)


def test_init_says_that_a_model_without_a_chat_template_reads_no_chats(chatty, tmp_path, capsys):
    chat_tokenizer(None).save_pretrained(chatty)
    (chatty / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "a.jsonl").write_text(rows_of({"messages": TURNS}))
    assert main(["init", str(chatty), "--text", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "r.yaml")]) == 1
    assert "has no chat template: give it one, or write the chats as text" in capsys.readouterr().err


def test_init_checks_the_held_out_split_too(chatty, tmp_path, capsys):
    for split, content in {"train": rows_of({"text": LONG}), "test": rows_of({"text": LONG}, times=2)}.items():
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / f"text/{split}.jsonl").write_text(content)
    assert main(["init", str(chatty), "--text", str(tmp_path / "text"), "--output", str(tmp_path / "r.yaml")]) == 1
    assert "but evaluate cannot read its text: " in capsys.readouterr().err


def test_splits_of_other_names_are_drafted(tmp_path):
    """As of HuggingFaceH4/ultrachat_200k, which has no split train."""
    rows = rows_of({"text": LONG})
    for name in ("train_sft-0.jsonl", "test_gen-0.jsonl", "test_sft-0.jsonl"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / f"data/{name}").write_text(rows)
    text = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    text += "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in ("train_sft", "test_gen", "test_sft"))
    (tmp_path / "README.md").write_text(text + "---\n")
    recipe = yaml.safe_load(draft(str(CONFIGS / "SmolLM2-135M-Instruct"), 0.75, Machine(1, 80e9), str(tmp_path)))
    assert [recipe[stage]["split"] for stage in ("score", "distill", "evaluate")] == ["train_sft", "train_sft", "test_sft"]


def test_what_is_measured_of_a_text_of_ones_own(tmp_path):
    """Its held-out split, where it has one; else a comment says that a part is to be held out. Its language is not known."""
    model, rows = str(CONFIGS / "SmolLM2-135M-Instruct"), json.dumps({"text": "words " * 2000}) + "\n"
    found = {}
    for name, files in {"alone": ["train"], "test": ["train", "test"], "validation": ["train", "validation"]}.items():
        folder = tmp_path / name
        folder.mkdir()
        for split in files:
            (folder / f"{split}.jsonl").write_text(rows)
        found[name] = draft(model, 0.75, Machine(1, 80e9), str(folder))
    evaluate = {name: yaml.safe_load(text)["evaluate"] for name, text in found.items()}
    assert evaluate["test"]["text"] == str(tmp_path / "test")
    assert "split" not in evaluate["test"]
    assert evaluate["validation"]["text"] == str(tmp_path / "validation")
    assert evaluate["validation"]["split"] == "validation"
    assert evaluate["alone"]["text"] == "HuggingFaceTB/smoltalk:all"
    assert "# not your text: hold out a part of that, and name its file here" in found["alone"]
    assert all("language: en\n" not in text for text in found.values())


def test_a_model_in_mxfp4_is_drafted_to_be_dequantized(tmp_path, capsys):
    _, recipe = drafted(tmp_path, "gpt-oss-20b", "--gpus", "8")
    assert recipe["prune"]["dequantize"] is True
    assert "| distill " in capsys.readouterr().out


def test_batch_and_steps_follow_the_machine(tmp_path, capsys):
    (tmp_path / "small").mkdir()
    _, large = drafted(tmp_path, "Llama-3.2-1B", "--gpus", "8")
    _, small = drafted(tmp_path / "small", "Llama-3.2-1B", "--gpu-memory", "24GB", "--text", "me/corpus")
    assert small["distill"][CHECKPOINTING] is True
    assert small["distill"]["text"] == "me/corpus"
    batch = "per_device_train_batch_size"
    assert small["distill"][batch] < large["distill"][batch] or large["distill"][CHECKPOINTING] is False
    assert "Every stage fits into 24 GB." in capsys.readouterr().out


def test_a_slower_gpu_is_drafted_fewer_tokens(tmp_path, capsys):
    (tmp_path / "slow").mkdir()
    tokens = []
    for folder, options in ((tmp_path, ()), (tmp_path / "slow", ("--gpu-tflops", "99", "--utilization", "0.13"))):
        path, recipe = drafted(folder, "Llama-3.2-1B", *options)
        distill = recipe["distill"]
        names = ("max_steps", "block_size", "per_device_train_batch_size", "gradient_accumulation_steps")
        tokens.append(math.prod(distill[name] for name in names))
        assert "about 24 hours on 1 GPU" in path.read_text()
    assert tokens[0] / tokens[1] == pytest.approx(989 / 99 * 2, rel=0.05)
    assert "13% of 99 TFLOP/s" in capsys.readouterr().out


def test_a_draft_fits_its_machine_by_adapters_or_says_that_it_does_not(tmp_path, capsys):
    """No comment claims a memory that does not hold the draft."""
    path, recipe = drafted(tmp_path, "Qwen3-4B-Base", "--gpu-memory", "24GB")
    assert "Every stage fits into 24 GB." in capsys.readouterr().out
    assert recipe["distill"]["base_dtype"] == "bfloat16"
    run = load_recipe(path, {}, SECTIONS)
    assert bind(run, "distill", SECTIONS["distill"]).lora == {"r": 32, "lora_alpha": 64}
    text = path.read_text().replace("  base_dtype: bfloat16", "").replace("  lora: {r: 32, lora_alpha: 64}", "")
    path.write_text(text)
    assert main(["plan", str(path), "--gpu-memory", "24GB"]) == 0
    assert "; or train adapters, distill.lora: {} and distill.base_dtype: bfloat16: " in capsys.readouterr().out
    path.unlink()
    _, recipe = drafted(tmp_path, "Qwen3-4B-Base", "--gpu-memory", "12GB")
    assert "lora" not in recipe["distill"]
    assert "more than 12 GB: plan says what helps" in path.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["init", "{config}", "--keep", "0.5", "--output", "{new}"], "above 0 and at most 100%; did you mean 50%?"),
        (["init", "{config}", "--keep", "62.5", "--output", "{new}"], "above 0 and at most 100%; did you mean 62.5%?"),
        (["init", "{config}", "--keep", "2.5B", "--output", "{new}"], "--keep: '2.5B' is not a share such as 50%"),
        (["init", "{config}", "--keep", "99.9%", "--output", "{new}"], "prune.target: 99.9% of this model's parameters cannot"),
        (
            ["init", "{config}", "--keep", "-5%", "--output", "{new}"],
            "--keep: expected one argument; hf-minitron init --help says",
        ),
        (
            ["init", "{config}", "--gpus", "1.5", "--output", "{new}"],
            "--gpus: invalid int value: '1.5'; hf-minitron init --help",
        ),
        (["init", "{config}", "--output", "."], "--output: . is a folder; name a file, such as recipe.yaml"),
        (["init", "{config}", "--text", " ", "--output", "{new}"], "--text: ' ' names no text; leave it out"),
        (["init", "{config}", "--text", "./nowhere.jsonl", "--output", "{new}"], "No text at './nowhere.jsonl'"),
        (["plan", "{config}/config.json"], "config.json is a file; name the folder of a model, with its config.json"),
        (["init", "{config}", "--keep", "120%", "--output", "{new}"], "--keep: '120%' is not a share such as 50%"),
        (["init", "./nowhere", "--output", "{new}"], "No model at './nowhere'"),
        (["init", "{config}", "--output", "{there}"], "is there already; name another --output, or delete it"),
        (["init", "{config}", "--output", "{new}", "--distill.max_steps", "9"], "--distill.max_steps is a setting of a recipe"),
        (["plan", "{there}", "--keep", "50%"], "--keep: '50%' is for a model"),
        (["plan", "{config}", "--distill.max_steps", "9"], "--distill.max_steps is a setting of a recipe"),
        (["plan", "./nowhere"], "No model at 'nowhere'"),
    ],
)
def test_what_cannot_be_drafted_is_told(tmp_path, project, capsys, words, message):
    places = {"config": CONFIGS / "SmolLM2-135M-Instruct", "new": tmp_path / "new.yaml", "there": project["path"]}
    assert main([word.format(**places) for word in words]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new.yaml").exists()


def test_plan_takes_a_model(capsys):
    assert main(["plan", str(CONFIGS / "SmolLM2-135M-Instruct"), "--keep", "75%", "--gpus", "1"]) == 0
    out = capsys.readouterr().out
    assert "75% of its parameters, as hf-minitron init" in out
    assert "| parameters               | 134,515,008 |" in out
    assert "| distill " in out


# Shares


def test_a_share_of_an_axis_becomes_the_nearest_legal_size():
    recipe = {"model": str(CONFIGS / "Llama-3.1-8B"), "prune": {"target": {"ffn": "61%", "heads": "70%", "layers": 30}}}
    assert with_sizes(recipe)["prune"]["target"] == {"ffn": 8704, "heads": 24, "layers": 30}
    assert recipe["prune"]["target"]["ffn"] == "61%"
    whole = with_sizes(recipe | {"prune": {"target": "60%"}})["prune"]["target"]
    assert set(whole) == {"hidden", "ffn"}
    same = {"model": "nowhere", "prune": {"target": {"ffn": 8}}}
    assert with_sizes(same) is same


@pytest.mark.parametrize("value", ["0%", "101%", "half", 0.5, "-5%"])
def test_what_is_no_share_is_refused(value):
    with pytest.raises(RecipeError, match="is not a share such as 50%"):
        share_of(value, "prune.target")


def test_a_run_with_shares_keeps_sizes_in_its_recipe(project, tmp_path, capsys):
    folder = tmp_path / "run"
    for verb in ("score", "prune"):
        assert main([verb, str(project["path"]), "--run", str(folder), "--prune.target", "{ffn: 50%}"]) == 0
    stored = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert stored["prune"]["target"] == {"ffn": 32}, "of 72, and a multiple of 8"
    assert main(["prune", str(project["path"]), "--run", str(folder), "--prune.target.ffn", "bad%"]) == 1
    assert "prune.target.ffn: 'bad%' is not a share such as 50%" in capsys.readouterr().err


# Names


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--lr", "1"), "did you mean 'distill.learning_rate'?"),
        (("--learning_rate", "1"), "did you mean 'distill.learning_rate'?"),
        (("--distill.lr", "1"), "did you mean 'learning_rate'?"),
        (("--distill.batch_size", "1"), "did you mean 'per_device_train_batch_size'?"),
        (("--distill.batch-size", "1"), "'batch-size' in distill; did you mean 'per_device_train_batch_size'?"),
        (("--evaluate.batch-size", "1"), "did you mean 'batch_size'?"),
        (("--distill.alpha", "0.5"), "did you mean 'losses'?"),
        (("--distill.reverse_kl", "1"), "did you mean 'losses.reverse_kl'?"),
        (("--kd-ratio", "0.5"), "did you mean 'distill.losses'?"),
        (("--intermediate_size", "9"), "did you mean 'prune.target.ffn'?"),
        (("--prune.intermediate_size", "9"), "did you mean 'target.ffn'?"),
        (("--prune.target.intermediate_size", "9"), "did you mean 'ffn'?"),
        (("--prune.target.num_hidden_layers", "9"), "did you mean 'layers'?"),
        (("--score.dataset", "x"), "did you mean 'text'?"),
        (("--distill.max_seq_length", "9"), "did you mean 'block_size'?"),
        (("--evaluate.num_fewshot", "9"), "did you mean 'few_shot'?"),
        (("--distill.bs", "9"), "did you mean 'per_device_train_batch_size'?"),
        (("--score.bs", "9"), "did you mean 'batch_size'?"),
        (("--distill.grad_acc", "9"), "did you mean 'gradient_accumulation_steps'?"),
        (("--distill.cutoff_len", "9"), "did you mean 'block_size'?"),
        (("--distill.max_seq_lenght", "9"), "did you mean 'block_size'?"),
        (("--distill.total_steps", "9"), "did you mean 'max_steps'?"),
        (("--distill.train_dataset", "x"), "did you mean 'text'?"),
        (("--distill.val_data", "x"), "did you mean 'eval_text'?"),
        (("--distill.lora_rank", "9"), "did you mean 'lora.r'?"),
        (("--distill.precision", "x"), "did you mean 'bf16'?"),
        (("--distill.dtype", "x"), "did you mean 'bf16'?"),
        (("--distill.load_in_4bit", "true"), "did you mean 'base_dtype'?"),
        (("--distill.n_layers", "9"), "did you mean 'prune.target.layers'?"),
        (("--distill.tasks", "x"), "did you mean 'evaluate.tasks'?"),
        (("--evaluate.lr", "1"), "did you mean 'distill.learning_rate'?"),
        (("--score.nsamples", "9"), "did you mean 'tokens'?"),
        (("--prune.ffn", "9"), "did you mean 'target.ffn'?"),
        (("--prune.sparsity", "0.5"), "did you mean 'target'?"),
        (("--kv_heads", "9"), "did you mean 'prune.target.kv_heads'?"),
        (("--prune.target.n_kv_heads", "9"), "did you mean 'kv_heads'?"),
        (("--prune.target.d_ff", "9"), "did you mean 'ffn'?"),
        (("--distill.model_name", "x"), "did you mean 'model' at the top of the recipe?"),
        (("--distill.max_time", "9"), "did you mean 'minutes' at the top of the recipe?"),
        (("--output_dir", "x"), "did you mean 'run'?"),
        (("--num_gpus", "8"), "--num_gpus is not an option of plan; did you mean --gpus?"),
        (("--distill.sparkle", "9"), "and the fields of transformers.TrainingArguments"),
    ],
)
def test_names_from_elsewhere_are_suggested(project, capsys, option, message):
    assert main(["plan", str(project["path"]), *option]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "recipe.yaml"), "'train' is not a verb; did you mean 'distill'?"),
        (("upload", "recipe.yaml"), "did you mean 'publish'?"),
        (("create", "owner/model"), "did you mean 'init'?"),
        (("quantize", "folder"), "did you mean 'export'?"),
        (("help",), "did you mean '--help'?"),
        (("init", "owner/model", "--dataset", "x"), "--dataset is not an option of init; did you mean --text?"),
        (("init", "owner/model", "--ratio", "50%"), "--ratio is not an option of init; did you mean --keep?"),
        (("run", "recipe.yaml", "--push_to_hub"), "--push_to_hub is not an option of run; did you mean --push?"),
        (
            ("plan", "recipe.yaml", "--context", "many"),
            "--context: invalid int value: 'many'; hf-minitron plan --help says more",
        ),
        (("run",), "the following arguments are required: recipe; hf-minitron run --help says more"),
        (("export", "folder", "--to", "onnx"), "--to: invalid choice: 'onnx'"),
    ],
)
def test_verbs_and_options_from_elsewhere_are_suggested_in_one_line(capsys, words, message):
    assert main(list(words)) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_every_name_that_is_suggested_is_a_key():
    """None is of a key that is called otherwise now."""
    known = {key for names in known_keys().values() for key in names or ()} | TOP_LEVEL.keys()
    assert {name.partition(".")[0] for names in RENAMED.values() for name in names} <= known
    assert set(VERBS.values()) <= {*STAGES, *RUNS}


def test_every_loss_is_suggested_by_its_name():
    for name in (*TOKEN_LOSSES, CROSS_ENTROPY):
        assert RENAMED[name] == (f"losses.{name}",)


@pytest.mark.parametrize(("value", "expected"), [("arc_easy", ["arc_easy"]), ("arc_easy, piqa", ["arc_easy", "piqa"])])
def test_a_list_may_be_written_as_its_items(project, value, expected):
    run = load_recipe(project["path"], {"evaluate.tasks": value}, SECTIONS)
    assert run.section("evaluate")["tasks"] == expected
    assert bind(run, "evaluate", SECTIONS["evaluate"]).tasks == expected


def test_a_bare_search_recipe_needs_no_target(project, tmp_path, capsys):
    recipe = {key: value for key, value in project["recipe"].items() if key != "prune"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"run": str(tmp_path / "run"), "search": {"budget": {"parameters": "90%"}}}))
    for verb in ("score", "search"):
        assert main([verb, str(path)]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({"hidden": 576}, {"hidden": 504}, "hidden: 504 does not divide by 32, so .* take 480 or 512"),
        ({"ffn": 1536}, {"ffn": 1056}, "ffn: 1056 does not divide by 256, so .* Q5_0 in its place.*: take 1024 or 1280"),
        ({"hidden": 576}, {"hidden": 480}, None),
        ({"ffn": 1536}, {"ffn": 1280}, None),
        ({"hidden": 40}, {"hidden": 24}, None),
    ],
)
def test_sizes_that_quantized_formats_do_not_take_are_told(before, after, expected):
    shape = Architecture.of(tiny.config(hidden_size=before.get("hidden", 64), intermediate_size=before.get("ffn", 64))).shape
    notes = [f"{axis}: {note}" for axis, note in unquantizable(shape, shape.cut_to(after)).items()]
    assert len(notes) == bool(expected)
    assert not expected or re.fullmatch(expected, notes[0])


def test_sizes_that_are_chosen_divide_by_what_quantized_formats_need_where_the_model_is_large_enough(tmp_path):
    tiny.config(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, head_dim=64).save_pretrained(tmp_path)
    recipe = {"model": str(tmp_path), "prune": {"target": "60%"}}
    assert all(size % 64 == 0 for size in with_sizes(recipe)["prune"]["target"].values())
    recipe["prune"]["target"] = {"hidden": "51%", "ffn": "51%"}
    assert with_sizes(recipe)["prune"]["target"] == {"hidden": 512, "ffn": 2048}
    recipe["prune"]["multiple_of"] = {"hidden": 8}
    assert with_sizes(recipe)["prune"]["target"] == {"hidden": 520, "ffn": 2089}
