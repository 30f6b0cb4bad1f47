"""Every number of a card against a computation of its own: an odd run, and what its card says, word by word."""

import json
import math
import re
from collections import Counter

import pytest
import tiny
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_minitron import load_text, token_blocks
from hf_minitron.__main__ import main
from hf_minitron.checkpoint.checkpoint import best_dtype
from hf_minitron.environment import environment
from hf_minitron.evaluation.report import load_samples

BATCH, ACCUMULATION, BLOCK, EPOCHS = 3, 2, 16, 2


@pytest.fixture(scope="module")
def odd(project, tmp_path_factory):
    """Layers gone, a LoRA student of another teacher, epochs that do not fill a step, two losses, the best step kept."""
    folder = tmp_path_factory.mktemp("odd")
    others = {"peer": {"seed": 3, "vocab_size": 120}, "master": {"seed": 5, "hidden_size": 56}}
    for name, changes in {"teacher": {"tie_word_embeddings": True}, **others}.items():
        model = tiny.model(dtype=torch.bfloat16, **changes)
        model.save_pretrained(folder / name)
        tensors = load_file(folder / name / "model.safetensors")
        tensors |= {key: value.float() for key, value in tensors.items() if "norm" in key}
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        tiny.tokenizer([*tiny.WORDS[::-1], "extra"] if name == "peer" else tiny.WORDS).save_pretrained(folder / name)
    recipe = {**project["recipe"], "model": str(folder / "teacher"), "run": str(folder / "run"), "seed": 11}
    recipe["prune"] = {"target": {"layers": 2, "ffn": 48}, "corrections": []}
    recipe["distill"] = {
        **recipe["distill"], "max_steps": -1, "num_train_epochs": EPOCHS, "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION, "logging_steps": 3, "include_num_input_tokens_seen": "all",
        "lora": {"r": 2}, "teacher": str(folder / "master"), "bf16": True,
        "losses": {"forward_kl": 0.75, "cross_entropy": 0.25},
        "eval_text": str(project["folder"] / "calibration.jsonl"), "eval_tokens": 64, "eval_strategy": "steps",
        "eval_steps": 12, "save_steps": 12, "save_total_limit": None, "load_best_model_at_end": True, "learning_rate": 0.3,
    }  # fmt: skip
    recipe["evaluate"] = {
        **recipe["evaluate"], "models": {"peer": str(folder / "peer")}, "limit": 20, "few_shot": 1, "tokens": 256,
        "speed": {"batch_sizes": [3], "prompt": [7], "new_tokens": 2, "rounds": 1},
    }  # fmt: skip
    recipe["publish"] = {}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", str(folder / "recipe.yaml")]) == 0
    return folder


@pytest.fixture(scope="module")
def text(odd):
    return " ".join(ModelCard.load(odd / "run/publish/model/README.md").text.split())


@pytest.fixture(scope="module")
def tables(odd):
    """The card's tables: first cell of the header to rows, as lists of cells."""
    found = {}
    for block in re.findall(r"(?:^\|.*\n)+", (odd / "run/publish/model/README.md").read_text(), re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in block.splitlines()]
        found[" ".join(rows[0][:3])] = [rows[0], *rows[2:]]
    return found


def folders(odd):
    places = {"teacher": "teacher", "pruned": "run/prune/student", "distilled": "run/distill/student", "peer": "peer"}
    return {name: odd / place for name, place in places.items()}


def stored(folder):
    """Numbers of a folder's tensors by dtype, from its files' headers."""
    numbers = Counter()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_slice(name)
                numbers[tensor.get_dtype()] += math.prod(tensor.get_shape())
    return numbers


def number(cell):
    return float(re.match(r"[+-]?[\d,.]+", cell)[0].replace(",", ""))


def close(cell, value):
    """Whether a cell shows a value to the digits that it has."""
    shown = re.match(r"[+-]?[\d,]+(\.\d+)?", cell)[0].replace(",", "")
    digits = len(shown.partition(".")[2])
    return float(shown) == pytest.approx(value, abs=0.5001 * 10**-digits)


def test_sizes_are_those_of_the_files(odd, tables, text):
    rows = {row[0]: row for row in tables["model parameters weights on disk"][1:]}
    assert list(rows) == list(folders(odd))
    for name, folder in folders(odd).items():
        numbers, config = stored(folder), json.loads((folder / "config.json").read_text())
        assert rows[name][1] == f"{numbers.total():,}", name
        assert rows[name][2].endswith(" kB"), name
        assert close(rows[name][2], (2 * numbers["BF16"] + 4 * numbers["F32"]) / 1e3), name
        assert rows[name][3] == "bfloat16, float32", name
        assert numbers["BF16"] > numbers["F32"] > 0, name
        if name != "peer":
            cache = 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
            assert close(rows[name][4], cache / 1e3), name
    before, after = (f"{stored(folders(odd)[name]).total():,}" for name in ("teacher", "distilled"))
    assert f"{after} parameters, pruned from the model in `.../{odd.name}/teacher` ({before}) and" in text
    assert f"taught by .../{odd.name}/master with knowledge distillation" in text
    assert "It is a stock Transformers checkpoint" in text


def test_cuts_are_those_of_the_configs(odd, tables):
    keys = {"layers": "num_hidden_layers", "hidden": "hidden_size", "ffn": "intermediate_size", "heads": "num_attention_heads",
            "kv_heads": "num_key_value_heads", "head_dim": "head_dim", "vocab": "vocab_size"}  # fmt: skip
    before, after = (json.loads((folders(odd)[n] / "config.json").read_text()) for n in ("teacher", "distilled"))
    rows = {row[0]: row[1:] for row in tables["axis before after"][1:]}
    for axis, key in keys.items():
        assert rows.pop(axis) == [str(before[key]), f"**{after[key]}**" if before[key] != after[key] else str(after[key])], axis
    assert not rows


@pytest.fixture(scope="module")
def measured(odd, project):
    """Perplexity, bits, match and KL of every model from full logits, and the bytes of the text."""
    tokenizer = AutoTokenizer.from_pretrained(odd / "teacher")
    blocks = token_blocks(load_text(str(project["folder"] / "held_out.jsonl")), tokenizer, BLOCK, 256, 11)["input_ids"][:]
    logp, found = {}, {}
    for name, folder in folders(odd).items():
        own = AutoTokenizer.from_pretrained(folder)
        ids = blocks if name != "peer" else torch.tensor([_again(row, tokenizer, own) for row in blocks.tolist()])
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=best_dtype()).eval()
        with torch.no_grad():
            logp[name] = model(ids).logits[:, :-1].double().log_softmax(-1)
        nats = -logp[name].gather(-1, ids[:, 1:, None]).mean().item()
        size = sum(len(tokenizer.decode(row[1:], skip_special_tokens=True).encode()) + 1 for row in blocks.tolist())
        bits = nats * blocks[:, 1:].numel() / size / math.log(2)
        found[name] = {"perplexity": math.exp(nats), "bits per byte": bits}
    for name in ("pruned", "distilled"):
        kl = (logp["teacher"].exp() * (logp["teacher"] - logp[name])).sum(-1).mean().item()
        match = (logp["teacher"].argmax(-1) == logp[name].argmax(-1)).double().mean().item()
        found[name] |= {"top-1 match": match, "KL to teacher": kl}
    return found, blocks


def _again(row, tokenizer, own):
    ends = {tokenizer.eos_token_id: own.eos_token_id}
    return [ends.get(token) or own(tokenizer.decode([token]))["input_ids"][0] for token in row]


def test_quality_is_that_of_full_logits(odd, tables, text, measured):
    found, blocks = measured
    header, *rows = tables["metric teacher pruned"]
    assert header[1:] == list(folders(odd))
    shown = {row[0][:-2]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}
    arrows = {row[0][:-2]: row[0][-1] for row in rows}
    lower, higher = ("perplexity", "bits per byte", "KL to teacher"), ("top-1 match", "tiny_last_word acc")
    assert arrows == dict.fromkeys(lower, "↓") | dict.fromkeys(higher, "↑")
    for name, values in found.items():
        for metric, value in values.items():
            assert number(shown[metric][name]) == pytest.approx(value, rel=0.03, abs=0.01), (name, metric)
        samples = load_samples(odd / f"run/evaluate/samples/{name}.parquet")
        right = [row["value"] for row in samples if row["metric"] == "acc"]
        assert len(right) == 8, "all documents there are, fewer than the limit"
        assert close(shown["tiny_last_word acc"][name], sum(right) / 8), name
    assert shown["top-1 match"]["teacher"] == shown["KL to teacher"]["peer"] == ""
    assert f"Perplexity is per token on {blocks[:, 1:].numel()} tokens of held-out text" in text
    size = re.search(r"divide by the ([\d,]+) bytes", text)[1]
    records = load_samples(odd / "run/evaluate/samples/teacher.parquet")
    assert number(size) == sum(row["weight"] for row in records if row["metric"] == "bits_per_byte")
    for fact in (
        f'"teacher" the model that was pruned, not .../{odd.name}/master, "peer" `peer` (',
        "Of peer, which has other tokens, what is counted per token does not compare.",
        f"Models ran in {str(best_dtype()).removeprefix('torch.')}.",
        "Tasks are lm-eval's, at most their first 20 documents, 1-shot.",
    ):
        assert fact in text, fact


def test_differences_are_those_of_the_values(tables, measured):
    found, _ = measured
    rows = {row[0]: row[1:] for row in tables["metric difference 95 % interval"][1:]}
    assert list(rows) == ["perplexity", "bits per byte", "tiny_last_word acc"]
    for metric in ("perplexity", "bits per byte"):
        ours, theirs = found["distilled"][metric], found["teacher"][metric]
        assert number(rows[metric][0]) == pytest.approx(ours - theirs, rel=0.1, abs=0.02), metric
        assert rows[metric][3] == "", "no share of anything is retained"
        low, high = (number(bound) for bound in rows[metric][1].split(" to "))
        assert low < number(rows[metric][0]) < high, metric


def test_training_is_what_was_done(odd, project, tables, text):
    log = json.loads((odd / "run/distill/log.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(odd / "teacher")
    blocks = len(token_blocks(load_text(str(project["folder"] / "train.jsonl")), tokenizer, BLOCK))
    assert blocks % (BATCH * ACCUMULATION), "the last step of an epoch is smaller"
    steps = EPOCHS * math.ceil(math.ceil(blocks / BATCH) / ACCUMULATION)
    logged = [entry for entry in log["history"] if "loss" in entry]
    assert logged[-1]["step"] < steps, "the last step is not logged"
    (summary,) = (entry for entry in log["history"] if "train_loss" in entry)
    minutes = f"{summary['train_runtime'] / 60:.1f}"
    tokens = f"{EPOCHS * blocks * BLOCK:,} tokens, {blocks * BLOCK:,} of packed text read {EPOCHS}.0 times"
    assert f"{tokens} in {steps} steps in bf16 mixed precision, {minutes} minutes; losses: 0." in text
    assert "0.75 forward_kl" in text
    assert "0.25 cross_entropy" in text
    assert "; LoRA adapters were trained and merged." in text
    rows = {row[0]: row[1:] for row in tables["loss at first at the end"][1:]}
    assert rows.keys() == {"sum", "forward_kl", "cross_entropy"}, "and nothing else that the Trainer logs"
    for end, entry in enumerate((logged[0], logged[-1])):
        total = 0.75 * number(rows["forward_kl"][end]) + 0.25 * number(rows["cross_entropy"][end])
        assert number(rows["sum"][end]) == pytest.approx(total, abs=2e-3)
        assert close(rows["sum"][end], entry["loss"])
    taken = {entry["step"]: entry["eval_loss"] for entry in log["history"] if "eval_loss" in entry}
    best = min(taken, key=taken.get)
    first, last = (f"{taken[step]:.3f}" for step in (min(taken), max(taken)))
    assert f"On held-out text {first} at first, {last} at the end. The student is that of step {best}, the best" in text


def test_speed_times_and_machine_are_those_that_were_kept(odd, tables, text):
    report = json.loads((odd / "run/evaluate/report.json").read_text())
    header, *rows = tables["model batch x prompt prefill, tokens/s"]
    assert header[2:] == ["prefill, tokens/s", "decode, tokens/s", "first token, ms", "peak memory, MB"]
    for name, shape, prefill, decode, first, peak in rows:
        (case,) = report["speed"][name]
        assert shape == "3 x 7"
        assert number(prefill) == pytest.approx(3 * 7 / case["first_token"]["value"], rel=0.01, abs=0.51), name
        assert close(decode, case["decode"]["value"]), name
        assert close(first, 1e3 * case["first_token"]["value"]), name
        assert close(peak, case["peak_bytes"] / 1e6), name
    seconds = {path.parent.name: json.loads(path.read_text())["seconds"] for path in odd.glob("run/*/done.json")}
    seconds.pop("publish")
    for stage, time in seconds.items():
        assert f"{stage} {time / 60:.1f} min" in text, stage
    assert f"{sum(seconds.values()) / 3600:.2f} hours together" in text
    machine = environment()
    assert "Seed 11; wall time" in text
    assert f"Python {machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}" in text
    assert text.count(machine["hardware"]) == 3


def test_metadata_are_the_values(odd):
    data = ModelCard.load(odd / "run/publish/model/README.md").data
    (result,) = data.eval_results
    samples = load_samples(odd / "run/evaluate/samples/distilled.parquet")
    assert result.metric_value == sum(row["value"] for row in samples if row["metric"] == "acc") / 8
    assert data.license is None
    assert data.base_model is None
