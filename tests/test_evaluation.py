"""Text, agreement, tasks and comparisons on tiny models, against full logits and the libraries' own answers."""

import json
import math
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_tokenizers
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM

import hf_minitron
from hf_minitron import token_blocks
from hf_minitron.checkpoint.checkpoint import best_dtype
from hf_minitron.evaluation import compare as compare_module
from hf_minitron.evaluation.compare import check_tensor_parallel, compare
from hf_minitron.evaluation.report import TEXT, Entry, Report, compare_models, load_samples, samples_of, save_samples
from hf_minitron.evaluation.subject import Subject
from hf_minitron.evaluation.task_results import task_entries
from hf_minitron.evaluation.tasks import Tasks, run_tasks, task_manager
from hf_minitron.evaluation.text import in_tokens_of, perplexity, read_text, text_bytes, text_entries, text_records
from hf_minitron.evaluation.text_metrics import TEXT_METRICS, TextMetric
from hf_minitron.evaluation.wording import metric_rows, quality_rows
from hf_minitron.recipe import bind
from hf_minitron.run import made_by
from hf_minitron.stages import evaluate

ROOT = Path(__file__).resolve().parent.parent
METRICS = Path(hf_minitron.__file__).parent / "evaluation/metrics"
EVALUATE = """
import json, sys
import evaluate, numpy as np
top1, kl = (evaluate.load(f"{sys.argv[1]}/{name}") for name in ("top1_match", "teacher_kl"))
for data in map(np.load, sys.argv[2:]):
    found = top1.compute(predictions=data["s"].argmax(1), references=data["t"].argmax(1))
    print(json.dumps(found | kl.compute(predictions=data["s"], references=data["t"])))
"""


def offline(tmp_path):
    return {**os.environ, "HF_EVALUATE_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher, a student that is nearly the teacher, and one with a larger vocabulary of other tokens."""
    root = tmp_path_factory.mktemp("models")
    teacher = tiny.model(dtype=torch.float32)
    for name in ("teacher", "near", "other"):
        model = teacher
        if name == "near":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.01 * parameter.abs().mean() * torch.randn_like(parameter))
        if name == "other":
            model = tiny.model(dtype=torch.float32, seed=3, vocab_size=120)
        model.save_pretrained(root / name)
        words = [*tiny.WORDS[::-1], "extra"] if name == "other" else tiny.WORDS
        tiny.tokenizer(words).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def blocks(project):
    documents = hf_minitron.load_text(str(project["folder"] / "held_out.jsonl"))
    return token_blocks(documents, tiny.tokenizer(), 16, 160, 0)


AGREEING = ("llama", "gemma2", "granite")  # a plain head, a softcap, a scale


@pytest.fixture(scope="module")
def agreement(tmp_path_factory):
    """Of each type two models, their full logits, and what the evaluate modules say of these, in one process for all."""
    folder, made = tmp_path_factory.mktemp("agreement"), {}
    ids = torch.tensor(tiny.blocks()["input_ids"][:].tolist())
    for model_type in AGREEING:
        models = {"t": tiny.model(model_type), "s": tiny.model(model_type, seed=1, hidden_size=24)}
        logits = {name: model(ids).logits[:, :-1].detach() for name, model in models.items()}
        arrays = {name: values.flatten(0, 1).float().numpy() for name, values in logits.items()}
        arrays["t"] = np.concatenate([arrays["t"], np.full((len(arrays["t"]), 2), 50.0)], 1)  # a padded vocabulary
        np.savez(folder / f"{model_type}.npz", **arrays)
        made[model_type] = (models, logits)
    command = [sys.executable, "-c", EVALUATE, METRICS, *(folder / f"{model_type}.npz" for model_type in AGREEING)]
    done = subprocess.run([*map(str, command)], env=offline(folder), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()[-len(AGREEING) :]]
    return {model_type: (*made[model_type], said) for model_type, said in zip(AGREEING, found, strict=True)}


@pytest.mark.parametrize("model_type", AGREEING)
def test_agreement_equals_full_logits_and_the_evaluate_modules(agreement, model_type):
    models, logits, found = agreement[model_type]
    blocks = tiny.blocks()["input_ids"][:].tolist()
    _, states = read_text(models["t"], blocks, 4, keep=True, chunk_size=7)
    sums, nothing = read_text(models["s"], blocks, 4, states, chunk_size=5)
    logp = {name: values.log_softmax(-1) for name, values in logits.items()}
    kl = (logp["t"].exp() * (logp["t"] - logp["s"])).sum(-1)
    match = (logits["s"].argmax(-1) == logits["t"].argmax(-1)).double()
    loglikelihood = logp["s"].gather(-1, torch.tensor(blocks)[:, 1:, None])[..., 0]
    for name, expected in (("perplexity", loglikelihood), ("top1_match", match), ("teacher_kl", kl)):
        assert sums[name] == pytest.approx(expected.sum(1).numpy(), rel=1e-6), name
    assert nothing is None
    assert found["teacher_kl"] == pytest.approx(kl.mean().item(), rel=1e-4)
    values = {entry.metric: entry.value for entry in text_entries("s", text_records(sums, blocks, [11] * len(blocks)))}
    assert values["teacher_kl"] == pytest.approx(kl.mean().item(), rel=1e-6)
    assert values["top1_match"] == pytest.approx(match.mean().item())
    assert values["bits_per_byte"] == pytest.approx(-loglikelihood.mean().item() / math.log(2), rel=1e-6)


def test_blocks_of_different_lengths_are_read_as_one_by_one():
    model, rows = tiny.model(), tiny.blocks()["input_ids"][:].tolist()
    ragged = [row[:length] for row, length in zip(rows, (12, 5, 2, 9, 12, 7), strict=True)]
    together, alone = read_text(model, ragged, 4)[0], [read_text(model, [row], 1)[0] for row in ragged]
    assert together["perplexity"] == pytest.approx([found["perplexity"][0] for found in alone], rel=1e-9)


def test_bytes_are_those_of_the_predicted_text():
    tokenizer = tiny.tokenizer()
    blocks = [tokenizer("w1 w22 w3")["input_ids"], [*tokenizer("w1")["input_ids"], tokenizer.eos_token_id]]
    assert text_bytes(blocks, tokenizer) == [len(" w22 w3"), 0]  # a special token is predicted, but is no text


def test_another_tokenizer_reads_the_same_text(blocks):
    ours, other = tiny.tokenizer(), tiny.tokenizer([*tiny.WORDS[::-1], "extra"])
    found, labels = in_tokens_of(other, blocks, ours)
    assert labels == found
    for mine, theirs in zip(blocks["input_ids"][:].tolist(), found, strict=True):
        assert mine != theirs
        assert other.decode(theirs) == ours.decode(mine)
        assert mine.count(ours.eos_token_id) == theirs.count(other.eos_token_id)


def test_another_tokenizer_reads_the_same_text_with_its_own_bos():
    texts = Dataset.from_dict({"text": ["w1 w2", "w3 w4 w5 w6 w7 w8", "w9"]})
    ours, other = tiny.tokenizer(), tiny.tokenizer(tiny.WORDS[::-1], adds_bos=True)
    rows = token_blocks(texts, ours, 6)
    found, labels = in_tokens_of(other, rows, ours)
    assert [other.decode(ids) for ids in found] == ["<s> w1 w2 </s> <s> w3 w4 w5", "<s> w6 w7 w8 </s> <s> w9 </s>"]
    assert [[i for i, label in enumerate(row) if label == -100] for row in labels] == [[0, 4], [0, 5]]
    rows = token_blocks(texts, other, 6)
    back, labels = in_tokens_of(ours, rows, other)
    assert back == labels
    assert [ours.decode(ids) for ids in back] == ["w1 w2 </s> w3", "w4 w5 w6 w7 w8"]


def test_perplexity_is_that_of_the_text_without_bos(tmp_path, monkeypatch):
    """Token by token: what is predicted behind a document's start is not BOS; bytes are all of the text's."""
    model, tokenizer = tiny.model(dtype=torch.float32), tiny.tokenizer(adds_bos=True)
    texts = Dataset.from_dict({"text": ["w1 w2 w3 w4", "w5", "w6 w7 w8 w9 w10 w11 w12"]})
    rows = token_blocks(texts, tokenizer, 8)
    expected = []
    for ids in rows["input_ids"]:
        with torch.no_grad():
            logp = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        expected += [float(logp[i, token]) for i, token in enumerate(ids[1:]) if token != tokenizer.bos_token_id]
    found = perplexity(model, rows)
    assert found.value == pytest.approx(math.exp(-np.mean(expected)), rel=1e-5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(compare_module, "best_dtype", lambda device: torch.float32)
    report = compare({"teacher": tmp_path}, rows, folder=tmp_path / "kept")
    assert report.text["add_bos_token"] is True
    assert report.value("teacher", "perplexity") == pytest.approx(found.value)
    records = samples_of(load_samples(tmp_path / "kept/samples/teacher.parquet"))[TEXT, "perplexity"]
    assert sum(tokens for _, tokens in records.values()) == len(expected)
    plain = [tokenizer.decode(ids, skip_special_tokens=True) for ids in rows["input_ids"]]
    assert report.text["bytes"] == sum(len(text.encode()) for text in plain)  # nothing is a block's first token but BOS
    assert compare({"teacher": tmp_path}, tiny.blocks()).text["add_bos_token"] is False


def test_tasks_begin_with_bos_as_the_tokenizer_does_or_as_told(project, monkeypatch):
    model, seen = tiny.model(dtype=torch.float32), []
    monkeypatch.setattr(model, "forward", lambda input_ids, *args, original=model.forward, **kwargs: (
        seen.append(input_ids[:, 0].unique().tolist()), original(input_ids, *args, **kwargs))[1])  # fmt: skip
    task = str(project["folder"] / "tasks/tiny.yaml")
    for adds, wanted in ((False, None), (True, None), (True, False), (False, True)):
        seen.clear()
        run_tasks(model, tiny.tokenizer(adds_bos=adds), Tasks.find([task], add_bos_token=wanted))
        assert all(first == [1] for first in seen) == (adds if wanted is None else wanted), (adds, wanted)


def test_models_are_compared_sample_by_sample(folders, blocks, project, tmp_path):
    models = {name: folders / name for name in ("teacher", "near", "other")}
    task = str(project["folder"] / "tasks/tiny.yaml")  # by path
    report = compare(models, blocks, [task], batch_size="auto", folder=tmp_path)
    assert {entry.model for entry in report.entries if entry.metric in ("top1_match", "teacher_kl")} == {"near"}
    kl = report.entry("near", "teacher_kl")
    assert 0.5 < report.value("near", "top1_match") <= 1
    assert 0 < kl.value < 1
    assert kl.interval[0] < kl.value < kl.interval[1]
    found = {(c.model, c.baseline, c.task, c.metric): c for c in report.comparisons}
    assert {pair[:2] for pair in found} == {("near", "teacher"), ("other", "teacher"), ("other", "near")}
    for model, baseline in (("other", "teacher"), ("other", "near")):  # tokens differ, bytes do not
        assert (model, baseline, TEXT, "perplexity") not in found
        assert (model, baseline, TEXT, "bits_per_byte") in found
    assert found["near", "teacher", "tiny_last_word", "acc"].samples == 8
    records = {name: load_samples(tmp_path / f"samples/{name}.parquet") for name in models}
    for name, rows in records.items():
        accuracy = samples_of(rows)["tiny_last_word", "acc"].values()
        assert sum(value for value, _ in accuracy) / 8 == report.value(name, "acc", "tiny_last_word")
        text = np.array([*samples_of(rows)[TEXT, "perplexity"].values()])
        assert math.exp(-text[:, 0].sum() / text[:, 1].sum()) == pytest.approx(report.value(name, "perplexity"))
        text = np.array([*samples_of(rows)[TEXT, "bits_per_byte"].values()])
        assert name == "other" or report.text["bytes"] == text[:, 1].sum() > 0
    expected = report.value("near", "perplexity") - report.value("teacher", "perplexity")
    assert found["near", "teacher", TEXT, "perplexity"].difference == pytest.approx(expected)
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report


def test_a_metric_of_one_s_own_is_one_value(folders, blocks, tmp_path):
    """It is in the report, compared and shown; two models of other tokens are not compared per token."""

    def entropy(predictions):
        logp = predictions.logits.log_softmax(-1)
        return -(logp.exp() * logp).sum(-1)

    own = TextMetric("entropy", entropy, "lower", unit="nats per token")
    report = compare({name: folders / name for name in ("teacher", "near", "other")}, blocks, metrics=[*TEXT_METRICS, own])
    model = AutoModelForCausalLM.from_pretrained(folders / "near", dtype=best_dtype()).eval()
    with torch.no_grad():
        logp = model(blocks["input_ids"][:]).logits[:, :-1].float().log_softmax(-1)
    expected = -(logp.exp() * logp).sum(-1)
    entry = report.entry("near", "entropy")
    assert entry.value == pytest.approx(expected.mean().item(), rel=1e-2)
    assert (entry.direction, entry.unit, entry.n) == ("lower", "nats per token", len(blocks))
    pairs = [(c.model, c.baseline) for c in report.comparisons if c.metric == "entropy"]
    assert pairs == [("near", "teacher")]
    assert "entropy" in quality_rows(report)[0]
    assert ["entropy ↓"] == [row[0] for row in metric_rows(report) if "entropy" in row[0]]
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json").entry("near", "entropy") == entry
    for metrics, message in (
        ([own, own], "metrics: 'entropy' is there twice"),
        ([entropy], "metrics: <function .* is no TextMetric"),
    ):
        with pytest.raises(ValueError, match=message):
            compare({"teacher": folders / "teacher"}, blocks, metrics=metrics)
    for wrong in ({"direction": "up"}, {"aggregation": "median"}, {"per": "word"}):
        with pytest.raises(ValueError, match="entropy: .* is none of"):
            TextMetric(**{"name": "entropy", "values": entropy, "direction": "lower"} | wrong)


def test_other_settings_are_measured_anew_in_the_same_folder(folders, blocks, tmp_path):
    models = {"teacher": folders / "teacher"}
    assert compare(models, blocks, folder=tmp_path, metrics=TEXT_METRICS[:1]).entry("teacher", "bits_per_byte") is None
    assert compare(models, blocks, folder=tmp_path).value("teacher", "bits_per_byte") > 0


def test_a_comparison_goes_on_with_the_models_that_are_missing(folders, blocks, tmp_path, monkeypatch):
    models = {"teacher": folders / "teacher", "near": folders / "near"}
    whole = compare(models, blocks, folder=tmp_path / "whole")
    opened, real = [], compare_module.open_model

    def open_model(folder, tensor_parallel):
        opened.append(folder.name)
        if len(opened) == 2:
            raise KeyboardInterrupt
        return real(folder, tensor_parallel)

    monkeypatch.setattr(compare_module, "open_model", open_model)
    with pytest.raises(KeyboardInterrupt):
        compare(models, blocks, folder=tmp_path / "killed")
    assert not (tmp_path / "killed/samples/near.parquet").exists()
    opened[:] = ["", ""]
    assert compare(models, blocks, folder=tmp_path / "killed") == whole
    assert opened[2:] == ["teacher", "near"]
    assert compare(models, blocks, folder=tmp_path / "killed") == whole
    assert len(opened) == 4


def test_an_evaluation_opens_a_model_once_and_for_speed_all_together(whole, tmp_path, monkeypatch):
    """Text, tasks and prompts are measured with the model that is open; speed is measured in turns, with all in memory."""
    run, opened, real = made_by(str(whole / "run/publish/model")), [], compare_module.load_model
    monkeypatch.setattr(compare_module, "load_model", lambda *given, **how: opened.append(given[0]) or real(*given, **how))
    args = bind(run, "evaluate", evaluate.Args)
    evaluate.run(args, run, tmp_path)
    names = [folder.relative_to(whole).as_posix() for folder in opened]
    assert names[:4] == ["teacher", "run/correct/teacher", "run/prune/student", "run/distill/student"]
    assert names[4:] == ["teacher", "run/distill/student"]
    there, found = (Report.load(folder / "report.json") for folder in (whole / "run/evaluate", tmp_path))
    assert replace(found, speed={}, machine={}) == replace(there, speed={}, machine={})
    assert len(found.answers) == 2
    opened.clear()
    evaluate.run(replace(args, speed=False), run, tmp_path)  # as after an interruption
    assert opened == []
    assert replace(Report.load(tmp_path / "report.json"), machine={}) == replace(there, speed={}, machine={})


@pytest.mark.slow
def test_a_group_is_compared_through_its_tasks(project, tmp_path):
    task = yaml.safe_load((project["folder"] / "tasks/tiny.yaml").read_text())
    for name in ("tiny_one", "tiny_two"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**task, "task": name}))
    group = {"group": "tiny_group", "task": ["tiny_one", "tiny_two"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "group.yaml").write_text(yaml.safe_dump(group))
    entries, records = run_tasks(
        tiny.model(dtype=torch.float32), tiny.tokenizer(), Tasks.find([str(tmp_path / "group.yaml")], limit=5), name="teacher"
    )
    (group,) = (entry for entry in entries if entry.task == "tiny_group")
    assert group.of == ("tiny_one", "tiny_two")
    assert group.n == 10
    text = {"task": TEXT, "doc": 0, "metric": "perplexity", "value": -1.0, "weight": 1.0}
    both = [*entries, *(replace(entry, model="student") for entry in entries)]
    found = compare_models(both, dict.fromkeys(("teacher", "student"), [*records, text]))
    assert {c.task: c.samples for c in found} == {"tiny_one": 5, "tiny_two": 5, "tiny_group": 10}
    both = ["tiny_one", "hellaswag"]
    assert set(both) <= set(task_manager(tmp_path, both).all_tasks)


def test_a_task_of_a_folder_is_found_without_reading_those_of_lm_eval(project):
    assert task_manager(project["folder"] / "tasks", ["tiny_last_word"]).all_tasks == ["tiny_last_word"]


def test_few_shot_limit_and_chat_template_reach_the_prompts(project, tmp_path, monkeypatch):
    import lm_eval

    seen, real = {}, lm_eval.simple_evaluate
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **kwargs: seen.update(result=real(**kwargs)) or seen["result"])
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}w7 {{ m['content'] }} w8 {% endfor %}"
    tasks = Tasks.find(["tiny_last_word"], project["folder"] / "tasks", limit=3, few_shot=2, chat_template=True)
    (entry,), records = run_tasks(tiny.model(dtype=torch.float32), tokenizer, tasks)
    prompts = [sample["arguments"][0][0] for sample in seen["result"]["samples"]["tiny_last_word"]]
    assert entry.n == len(prompts) == 3 == len(records)
    assert all(prompt.startswith("w7 ") and prompt.count("w8") >= 3 for prompt in prompts)


def test_a_metric_that_is_no_mean_of_its_samples_is_not_compared():
    values = {"acc": [0, 1, 1, 0], "median": [0.5, 0.5, 0.5, 9], "perplexity": [math.log(2)] * 4}
    results = {"results": {"task": {f"{name},none": 0.5 for name in (*values, "unknown")}}, "group_subtasks": {}}
    results |= {"n-samples": {"task": {"effective": 4}}, "higher_is_better": {"task": {"perplexity": False}}}
    records = [
        {"task": "task", "doc": doc, "metric": name, "value": value, "weight": 1.0}
        for name, row in values.items() for doc, value in enumerate(row)
    ]  # fmt: skip
    entries = task_entries("teacher", results, records)
    found = {entry.metric: (entry.aggregation, entry.direction) for entry in entries}
    assert found == {"acc": ("mean", "higher"), "median": (None, "higher"), "perplexity": ("perplexity", "lower"),
                     "unknown": (None, "higher")}  # fmt: skip
    both = [*entries, *(replace(entry, model="student") for entry in entries)]
    compared = compare_models(both, {"teacher": records, "student": records})
    assert {comparison.metric for comparison in compared} == {"acc", "perplexity"}


@pytest.mark.parametrize(
    ("kind", "metric", "choices", "chance"),
    [
        ("multiple_choice", "acc_norm", (4, 4), 0.25),
        ("multiple_choice", "acc", (4, 2), 0.375),
        ("multiple_choice", "brier_score", (4, 4), None),
        ("loglikelihood", "acc", (1, 1), None),
    ],
)
def test_chance_is_known_of_tasks_with_choices(kind, metric, choices, chance):
    samples = [{"filtered_resps": [(-1.0, False)] * count} for count in choices]
    results = {"results": {name: {f"{metric},none": 0.5} for name in ("task", "group")}, "group_subtasks": {"group": ["task"]}}
    results |= {"n-samples": {"task": {"effective": 2}}, "higher_is_better": {}, "samples": {"task": samples}}
    results["configs"] = {"task": {"output_type": kind}}
    assert [entry.chance for entry in task_entries("teacher", results, [])] == [chance, chance]


@pytest.mark.parametrize(
    ("second", "dataset"),
    [
        (("o/mmlu", "art", "test"), ("o/mmlu", None, "test")),
        (("o/mmlu", "law", "test"), ("o/mmlu", "law", "test")),
        (("o/other", "law", "test"), ()),
        (("json", None, "test"), ()),
    ],
)
def test_a_group_s_dataset_is_its_tasks(second, dataset):
    keys = ("dataset_path", "dataset_name", "test_split")
    configs = {name: dict(zip(keys, values, strict=True)) for name, values in (("a", ("o/mmlu", "law", "test")), ("b", second))}
    results = {"results": {"mmlu": {"acc,none": 0.5}}, "group_subtasks": {"mmlu": ["a", "b"]}, "configs": configs}
    results |= {"n-samples": {name: {"effective": 2} for name in "ab"}, "higher_is_better": {}}
    (entry,) = task_entries("teacher", results, [])
    assert entry.dataset == dataset


def test_a_report_of_another_version_is_refused_in_one_line(tmp_path):
    path = tmp_path / "report.json"
    Report({}).save(path)
    assert Report.load(path) == Report({}, entries=[], comparisons=[])
    for version in (1, 3):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"version": version}))
        with pytest.raises(ValueError, match=f"report.json is a report of version {version}, and only version 2 is read"):
            Report.load(path)


def test_values_of_a_report_are_frozen_and_named():
    entry = Entry("student", "task", "acc", 0.5)
    with pytest.raises(FrozenInstanceError):
        entry.value = 1.0
    with pytest.raises(ValueError, match="No 'f1' of 'task' was measured of 'student'; there is task acc"):
        Report({}, [entry]).value("student", "f1", "task")


def test_records_survive_the_disk(tmp_path):
    rows = [{"task": "a", "doc": 3, "metric": "acc", "value": 1.0, "weight": 1.0}]
    save_samples(rows, tmp_path / "samples/model.parquet")
    assert load_samples(tmp_path / "samples/model.parquet") == rows


@pytest.mark.parametrize(
    ("config", "processes", "message"),
    [
        (tiny.config(), 1, "there is one"),
        (tiny.config(), 3, "num_key_value_heads 2 does not divide by the 3 processes"),
        (tiny.config("gpt2"), 2, "no tensor-parallel plan for model type 'gpt2'"),
    ],
)
def test_what_cannot_be_split_over_processes_is_refused(config, processes, message):
    with pytest.raises(ValueError, match=message):
        check_tensor_parallel(config, processes)
    check_tensor_parallel(tiny.config(), 2)


def test_models_in_memory_are_compared_as_their_folders(folders, blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_module, "best_dtype", lambda device: torch.float32)
    models = {name: AutoModelForCausalLM.from_pretrained(folders / name).train() for name in ("teacher", "near")}
    live = compare(models, blocks, processing_class=tiny.tokenizer(), folder=tmp_path)
    stored = compare({name: folders / name for name in models}, blocks)
    assert live.entries == stored.entries
    assert live.comparisons == stored.comparisons
    for name, facts in live.models.items():
        assert facts == dict(stored.models[name]), name
        assert models[name].training, "as it was"
    with torch.no_grad():
        models["near"].lm_head.weight.zero_()
    again = compare(models, blocks, processing_class=tiny.tokenizer(), folder=tmp_path)
    assert again.value("near", "perplexity") == pytest.approx(tiny.SIZES["vocab"]), "not what an earlier call has left"
    with pytest.raises(ValueError, match="processing_class: teacher is a model in memory, so give its tokenizer"):
        compare(models, blocks)


def test_blocks_longer_than_a_models_positions_in_its_own_tokens_are_refused(blocks):
    teacher = Subject("teacher", tiny.model(dtype=torch.float32), tiny.tokenizer())
    teacher.take_text(blocks, teacher, None)
    other = tiny_tokenizers.ALL["byte_level"]
    for kind, fits in (("gpt2", False), ("llama", True)):  # a table of positions, and rotary ones
        made = tiny.model(kind, dtype=torch.float32, vocab_size=len(other), max_position_embeddings=16)
        subject = Subject("peer", made, other)
        if fits:
            subject.take_text(blocks, teacher, None)
            continue
        with pytest.raises(ValueError, match=r"block_size: a block of the text has \d+ tokens in those of peer, which has 16 "):
            subject.take_text(blocks, teacher, None)
