"""The command on a tiny model: every stage, resuming, and errors before any slow work."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import tiny
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_minitron import Architecture, Statistics
from hf_minitron.__main__ import main
from hf_minitron.importance import calibrate, footprint
from hf_minitron.importance.footprint import scoring_bytes
from hf_minitron.stage import Stage
from hf_minitron.stages import score
from hf_minitron.stages.every import STAGES


@pytest.fixture(scope="module")
def done(project, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("done") / "run"
    assert main(["run", str(project["path"]), "--run", str(folder)]) == 0
    return folder


def run(project, folder, *more, verb="run"):
    return main([verb, str(project["path"]), "--run", str(folder), *map(str, more)])


def test_every_stage_leaves_what_it_promises(done):
    for stage in (name for name, stage in STAGES.items() if stage.in_run and not stage.optional):
        assert json.loads((done / stage / "done.json").read_text())["digest"]
        assert not (done / f"{stage}.tmp").exists()
    report = json.loads((done / "evaluate/report.json").read_text())
    assert list(report["models"]) == ["teacher", "pruned", "distilled"]
    assert set(report["speed"]) == {"teacher", "distilled"}
    entries = {(entry["model"], entry["metric"]): entry for entry in report["entries"]}
    for model in report["models"]:
        assert entries[model, "perplexity"]["stderr"] > 0, model
        assert entries[model, "acc"]["n"] == 8, model
    pairs = {(found["model"], found["baseline"]) for found in report["comparisons"]}
    assert pairs == {("pruned", "teacher"), ("distilled", "teacher"), ("distilled", "pruned")}
    assert {entry["batch_size"] for entry in report["speed"]["teacher"]} == {1, 4}
    assert {path.name for path in (done / "evaluate").iterdir()} == {"done.json", "report.json", "samples"}
    assert {path.stem for path in (done / "evaluate/samples").iterdir()} == set(report["models"])
    folder = done / "publish/model"
    student = AutoModelForCausalLM.from_pretrained(folder)
    assert student.num_parameters() == report["models"]["distilled"]["parameters"]
    assert student.config.intermediate_size == 48
    ids = AutoTokenizer.from_pretrained(folder)("w1 w2", return_tensors="pt").input_ids
    assert student.generate(ids, max_new_tokens=2, eos_token_id=None).shape[1] == 4
    for name in ("README.md", "plan.json", "report.json", "recipe.yaml", "loss.png", "shapes.png", "generation_config.json"):
        assert (folder / name).stat().st_size > 0, name
    losses = [entry["loss"] for entry in json.loads((done / "distill/log.json").read_text())["history"] if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_a_finished_run_is_skipped_and_a_changed_section_runs_again(project, done, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    (folder / "run.json").write_text(
        json.dumps({"recipe": os.path.relpath(project["path"], folder), "model": project["recipe"]["model"]})
    )
    assert run(project, folder) == 0
    assert capsys.readouterr().out.count("done before, skipped") == 5
    with monkeypatch.context() as patch:  # as without a connection, of texts that were only streamed
        patch.setattr("hf_minitron.data.texts._builder", lambda source, files: 1 / 0)
        assert run(project, folder) == 0
        assert capsys.readouterr().out.count("done before, skipped") == 5, "what is done reads no text"
        assert run(project, folder, "--evaluate.tokens", 128) == 1
        assert "evaluate: " in capsys.readouterr().err, "what is not done is checked"
    quiet = [
        "--distill.logging_steps",
        3,
        "--distill.save_steps",
        5,
        "--distill.report_to",
        "all",
        "--publish.private",
        "false",
    ]
    assert run(project, folder, *quiet) == 0
    assert capsys.readouterr().out.count("done before, skipped") == 5
    assert run(project, folder, "--evaluate.tokens", 128) == 0
    out = capsys.readouterr().out
    assert out.count("done before, skipped") == 3
    assert "evaluate: done in" in out
    assert "publish: done in" in out
    assert "evaluate runs again: tokens 256 -> 128\n" in out
    assert "publish runs again: evaluate " in out


def test_push_and_its_dry_run(project, done, tmp_path, capsys, hub):
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    mark = {"recipe": os.path.relpath(project["path"], folder), "model": project["recipe"]["model"]}
    (folder / "run.json").write_text(json.dumps(mark))
    where = ["--publish.repo_id", "me/small", "--publish.collection", "Small models"]
    assert run(project, folder, *where, "--dry-run", verb="publish") == 1
    assert "--dry-run says what --push would upload, so give both" in capsys.readouterr().err
    assert run(project, folder, *where, "--push", "--dry-run", verb="publish") == 0
    out = capsys.readouterr().out
    files = {path.name: path for path in (folder / "publish/model").iterdir()}
    assert all(f"| {name} " in out for name in files)
    assert "main of me/small" in out
    assert not hub.requests
    assert run(project, folder, *where, "--push", verb="publish") == 0
    assert f"Pushed to {hub.address}/me/small\n" in capsys.readouterr().out
    assert {n: c for n, c in hub.files().items() if n in files} == {n: path.read_bytes() for n, path in files.items()}
    assert [made["title"] for made in hub.collections.values()] == ["Small models"]
    hub.commit("me/small", "main", {"config.json": b"{}"})
    assert run(project, folder, *where, "--push", verb="publish") == 1
    assert "holds a model that hf_minitron did not make" in capsys.readouterr().err
    assert run(project, folder, *where, "--push", "--publish.create_pr", "true", verb="publish") == 1
    assert "publish: collection and create_pr: true" in capsys.readouterr().err


def test_plan_tells_the_truth_without_weights(project, capsys, tmp_path):
    bare = tmp_path / "teacher"
    bare.mkdir()
    shutil.copyfile(project["folder"] / "teacher/config.json", bare / "config.json")
    assert main(["plan", str(project["path"]), "--model", str(bare)]) == 0
    out = capsys.readouterr().out
    assert f"{tiny.model().num_parameters():,}" in out
    student = tiny.model(hidden_size=24, intermediate_size=48).num_parameters()
    assert f"{student:,}" in out
    assert "KV-cache bytes per token" in out
    assert "FLOPs per token" in out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("--prune.target.ffn", "80"), "ffn: 80 is larger"),
        (("--prune.target.ffn", "0"), "ffn: 0 is not"),
        (("--prune.target.hidden", "28"), "28 is not a multiple of 8; nearest: 24, 32"),
        (("--prune.target.heads", "3"), "heads: 3 do not divide"),
        (("--score.halves", "true"), "'halves' in score; did you mean 'sublayers'"),
        (("--distill.learning_rat", "1"), "'learning_rat' in distill; did you mean 'learning_rate'"),
        (("--distil.max_steps", "1"), "'distil' in recipe; did you mean 'distill'"),
        (("--evaluate.tasks", "[tiny_last_wrod]"), "lm-eval knows no 'tiny_last_wrod'"),
        (("--evaluate.tasks", "[./nowhere.yaml]"), "tasks: no file at nowhere.yaml"),
        (("--evaluate.tasks", "[7]"), "tasks: 7 is not a name or a path"),
        (("--evaluate.models", "{teacher: a/b}"), "models: 'teacher' is no name for another model"),
        (("--evaluate.models", "{corrected: a/b}"), "none of teacher, corrected, pruned, distilled, prompt"),
        (("--evaluate.models", "{prompt: a/b}"), "models: 'prompt' is no name for another model"),
        (("--evaluate.models", "{a/b: a/b}"), "models: 'a/b' is no name for another model"),
        (("--evaluate.models", "{other: ./nowhere}"), "No model at './nowhere'"),
        (("--evaluate.models", "{other: 3}"), "models.other: 3 is not a folder or a Hub id"),
        (("--evaluate.batch_size", "many"), "batch_size: 'many' is neither a whole number from 1 on nor auto"),
        (("--evaluate.batch_size", "0"), "batch_size: 0 is neither"),
        (("--evaluate.block_size", "129"), "block_size: 129 is more than the 128 positions"),
        (("--evaluate.chat_template", "true"), "has none; set it to false"),
        (("--evaluate.few_shot", "-1"), "evaluate.few_shot: -1 must be at least 0"),
        (("--evaluate.tensor_parallel", "true"), "tensor_parallel splits models over processes, and there is one"),
        (
            ("--evaluate.speed", "{prompt: 120}"),
            "speed: prompt 120 and 24 new_tokens are more than the 128 positions of teacher",
        ),
        (("--evaluate.speed", "{batches: 1}"), "speed: unknown key 'batches'"),
        (("--evaluate.speed", "fast"), "evaluate.speed: 'fast' is not true or false or a section"),
        (("--score.text", "./nowhere.jsonl"), "score: No text at './nowhere.jsonl'"),
        (("--distill.block_size", "1000000"), "more than the 128 positions"),
        (("--score.tokens", "many"), "score.tokens: 'many' is not a whole number"),
        (("--model", "./nowhere"), "No model at './nowhere'"),
        (("--distill.losses", "{kl: 1}"), "'kl' is not a loss"),
        (("--push",), "--push needs a repository"),
        (("--prune.target", "80"), "prune.target: 80 is not a share such as 50%, above 0 and at most 100%; did you mean 80%?"),
        (
            ("--prune.target", "0.6"),
            "prune.target: 0.6 is not a share such as 50%, above 0 and at most 100%; did you mean 60%?",
        ),
        (
            ("--prune.target.ffn", "0.6"),
            "prune.target.ffn: 0.6 is not a share such as 50%, above 0 and at most 100%; did you me",
        ),
        (("--prune.target", "true"), "prune.target: true is not a section of key: value lines"),
        (("--score.tokens", "null"), "score.tokens: null is not a whole number\n"),
        (("--model", "3"), "model: 3 is not text or null; put it in quotes"),
        (("--run", "[a]"), "run: ['a'] is not text or null"),
        (
            ("--distill.num_train_epochs", "2"),
            "num_train_epochs: 2 has no effect beside max_steps: 6; set max_steps: -1 to count",
        ),
        (("--prune.target", "{1: 2}"), "1: not an axis"),
        (("--prune.multiple_of.hidden", "0"), "'hidden': 0 is not"),
        (("--score.tokens", ".inf"), "score.tokens: inf is not a whole number"),
        (("--score.tokens", "-5"), "score.tokens: -5 must be at least 1"),
        (("--score.block_size", "0"), "score.block_size: 0 must be at least 2"),
        (("--distill.save_total_limit", "x"), "distill.save_total_limit: 'x' is not a whole number or null"),
        (("--score.layers_remove", "two"), "score.layers_remove: 'two' is not a whole number or null"),
        (("--distill.add_bos_token", "maybe"), "distill.add_bos_token: 'maybe' is not true or false or null"),
        (("--evaluate.tasks", "3"), "evaluate.tasks: 3 is not a list"),
        (("--distill.losses", "forward_kl"), "'forward_kl' is not a table of weights"),
        (("--publish.repo_id", "7"), "publish.repo_id: 7 is not text or null; put it in quotes"),
        (("--publish.repo_id", "/"), "publish: "),
        (("--prune.target.ffn", "["), "--prune.target.ffn [ is not YAML"),
        (("--seed", "-1"), "seed: -1 is not"),
    ],
)
def test_bad_input_is_told_before_slow_work(project, tmp_path, capsys, override, message):
    assert run(project, tmp_path / "run", *override) == 1
    assert message in capsys.readouterr().err
    assert not any((tmp_path / "run" / stage).exists() or (tmp_path / "run" / f"{stage}.tmp").exists() for stage in STAGES)


def test_a_damaged_teacher_is_told(project, tmp_path, capsys):
    teacher = tmp_path / "teacher"
    shutil.copytree(project["folder"] / "teacher", teacher)
    shard = sorted(teacher.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    assert run(project, tmp_path / "a", "--model", teacher) == 1
    error = capsys.readouterr().err
    assert repr(name) in error
    assert "holds NaN or infinity" in error
    shard.write_bytes(shard.read_bytes()[:-100])
    assert run(project, tmp_path / "b", "--model", teacher) == 1
    assert f"{shard.name} is truncated" in capsys.readouterr().err
    shard.unlink()
    assert run(project, tmp_path / "c", "--model", teacher) == 1
    assert f"{shard.name} is missing" in capsys.readouterr().err


def test_another_tokenizer_a_full_disk_and_a_foreign_folder_are_told(project, tmp_path, capsys, monkeypatch):
    teacher = tmp_path / "teacher"
    shutil.copytree(project["folder"] / "teacher", teacher)
    tiny.tokenizer([*tiny.WORDS[:-1], "other"]).save_pretrained(teacher)
    assert run(project, tmp_path / "a", "--distill.teacher", teacher) == 1
    assert "different tokenizers" in capsys.readouterr().err
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    assert run(project, tmp_path / "foreign") == 1
    assert "not a run's folder" in capsys.readouterr().err
    assert run(project, tmp_path / "b", verb="prune") == 1
    assert "prune needs score first: hf-minitron score" in capsys.readouterr().err
    assert run(project, tmp_path / "b", "--model", teacher, verb="score") == 1
    assert "belongs to another run" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(10))
    assert run(project, tmp_path / "c") == 1
    err = capsys.readouterr().err
    assert "prune: No disk space for the student: 81,888 bytes needed, 10 free" in err
    assert "Free some, or put the run elsewhere with --run" in err, "the command adds its option"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(100_000))
    assert run(project, tmp_path / "c") == 1
    assert "No disk space for the text and the checkpoints of distill" in capsys.readouterr().err


def test_a_failed_check_does_not_claim_the_folder(project, tmp_path):
    assert run(project, tmp_path / "run", "--model", "./typo", verb="score") == 1
    assert run(project, tmp_path / "run", verb="score") == 0


def test_a_stage_does_not_build_on_other_settings(project, done, tmp_path, capsys):
    shutil.copytree(done, tmp_path / "run")
    mark = {"recipe": os.path.relpath(project["path"], tmp_path / "run"), "model": project["recipe"]["model"]}
    (tmp_path / "run/run.json").write_text(json.dumps(mark))
    assert run(project, tmp_path / "run", "--prune.target.ffn", 40, verb="distill") == 1
    assert "distill needs prune, which was done with other settings" in capsys.readouterr().err
    assert run(project, tmp_path / "run", "--score.tokens", 128, verb="publish") == 1
    assert "which was done with other settings" in capsys.readouterr().err


def test_an_interrupted_stage_leaves_nothing_that_looks_done(project, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_minitron.stages.score.calibrate", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(project, tmp_path / "run", verb="score")
    assert not (tmp_path / "run/score").exists()
    monkeypatch.setattr("hf_minitron.stages.score.calibrate", calibrate.calibrate)
    assert run(project, tmp_path / "run", verb="score") == 0
    assert (tmp_path / "run/score/done.json").is_file()


STEPS = 60


def long_recipe(project, folder):
    """Write a recipe that saves every fifth of its steps."""
    training = {**project["recipe"]["distill"], "max_steps": STEPS, "save_steps": 5}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**project["recipe"], "run": str(folder / "run"), "distill": training}))
    return path


@pytest.fixture(scope="module")
def uninterrupted(project, tmp_path_factory):
    """The student of such a recipe."""
    path = long_recipe(project, tmp_path_factory.mktemp("uninterrupted"))
    for stage in ("score", "prune", "distill"):
        assert main([stage, str(path)]) == 0
    return load_file(path.parent / "run/distill/student/model.safetensors")


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_stopped_in_distillation_it_goes_on_from_the_last_checkpoint(project, uninterrupted, tmp_path, how):
    folder, path = tmp_path / "run", long_recipe(project, tmp_path)
    command, checkpoints = [sys.executable, "-m", "hf_minitron", "run", str(path)], folder / "distill.tmp/checkpoints"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, text=True)
    while not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.005)
    os.killpg(process.pid, how)
    said = process.stdout.read()
    process.wait(120)
    assert not (folder / "distill").exists()
    assert (folder / "prune/done.json").is_file()
    if how == signal.SIGTERM:  # it has saved where it was
        step = re.search(r"error: distill: Stopped by SIGTERM after step (\d+); its checkpoint is written", said)[1]
        assert process.returncode == 1
        assert (checkpoints / f"checkpoint-{step}/trainer_state.json").is_file()
    broken = folder / "distill.tmp/checkpoints/checkpoint-999"  # as if the kill had hit a checkpoint being written
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"global_st')
    before = (folder / "prune/done.json").stat().st_mtime_ns
    for stage in ("prune", "distill"):
        assert main([stage, str(path)]) == 0
    assert (folder / "prune/done.json").stat().st_mtime_ns == before
    history = json.loads((folder / "distill/log.json").read_text())["history"]
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, STEPS + 1))
    assert history[-1]["train_runtime"] > 0
    resumed = load_file(folder / "distill/student/model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted.items())


def test_a_tied_head_is_stored_once(project, tmp_path):
    tiny.model(dtype=torch.float32, tie_word_embeddings=True).save_pretrained(tmp_path / "teacher")
    tiny.tokenizer().save_pretrained(tmp_path / "teacher")
    for stage in ("score", "prune", "distill"):
        assert run(project, tmp_path / "run", "--model", tmp_path / "teacher", verb=stage) == 0
    names = [load_file(tmp_path / f"run/{s}/student/model.safetensors").keys() for s in ("prune", "distill")]
    assert names[0] == names[1]
    assert "lm_head.weight" not in names[0]
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run/distill/student")
    assert torch.equal(student.lm_head.weight, student.model.embed_tokens.weight)


def test_plan_says_which_cut_is_inexact(project, tmp_path, capsys):
    tiny.model("olmo2", dtype=torch.float32).save_pretrained(tmp_path / "olmo2")
    target = "{heads: 2}"
    assert run(project, tmp_path / "run", "--model", tmp_path / "olmo2", "--prune.target", target, verb="plan") == 0
    assert "heads: queries and keys are normalised over all their heads together" in capsys.readouterr().out


def test_plan_of_a_mixture_names_its_axes(project, tmp_path, capsys):
    tiny.model("qwen2_moe", dtype=torch.float32).save_pretrained(tmp_path / "moe")
    target = "{ffn: 32, dense_ffn: 40, shared_ffn: 16, experts: 4}"
    assert run(project, tmp_path / "run", "--model", tmp_path / "moe", "--prune.target", target, verb="plan") == 0
    out = capsys.readouterr().out
    assert all(f"| {axis} " in out for axis in ("dense_ffn", "shared_ffn", "experts"))
    assert "experts_per_token" not in out


def test_scores_layer_by_layer_through_the_command(project, tmp_path, monkeypatch):
    assert run(project, tmp_path / "whole", verb="score") == 0
    assert run(project, tmp_path / "layers", "--score.layer_by_layer", "true", "--score.state_bytes", "0", verb="score") == 0
    monkeypatch.setattr(psutil, "virtual_memory", lambda: namedtuple("memory", "available")(1000))
    seen = []
    read_layers = calibrate.read_layers
    monkeypatch.setattr(calibrate, "read_layers", lambda *args: seen.append(1) or read_layers(*args))
    assert run(project, tmp_path / "small", verb="score") == 0
    assert seen == [1]  # by itself, when the model does not fit
    whole, *others = (Statistics.load(tmp_path / name / "score").scores for name in ("whole", "layers", "small"))
    for other in others:
        assert all(torch.allclose(other[axis], values, rtol=1e-4) for axis, values in whole.items())


def test_calibration_text_of_several_sources(project, tmp_path, capsys):
    train, other = (str(project["folder"] / f"{part}.jsonl") for part in ("train", "calibration"))
    assert run(project, tmp_path / "run", "--score.text", f"{{{train}: 3, {other}: 1}}", verb="score") == 0
    read = Dataset.from_parquet(str(tmp_path / "run/score/blocks.parquet"))["input_ids"][:]
    single = {}
    for name in (train, other):
        assert run(project, tmp_path / Path(name).stem, "--score.text", name, verb="score") == 0
        single[name] = Dataset.from_parquet(str(tmp_path / Path(name).stem / "score/blocks.parquet"))["input_ids"][:]
    assert [sum(block in single[name] for block in read) for name in (train, other)] == [12, 4]  # of 16 blocks
    assert Statistics.load(tmp_path / "run/score").text["source"] == {train: 3, other: 1}
    capsys.readouterr()
    assert run(project, tmp_path / "bad", "--score.text", f"{{{train}: 1, ./nowhere.jsonl: 1}}", verb="score") == 1
    assert "score: No text at './nowhere.jsonl'" in capsys.readouterr().err
    assert run(project, tmp_path / "bad", "--score.text", f"{{{train}: 1, {other}: 0.001}}", verb="score") == 1
    assert f"{other} would give none of 16 blocks: give it more weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--score.device_map", "cuda"], "device_map: 'cuda' is neither auto nor left out"),
        (["--score.device_map", "auto", "--score.layer_by_layer", "true"], "set one of them"),
        (["--score.block_size", "129"], "block_size: 129 is more than the 128 positions of the model"),
    ],
)
def test_scoring_that_cannot_work_is_refused(project, tmp_path, capsys, changes, message):
    assert run(project, tmp_path / "run", *changes, verb="score") == 1
    assert message in capsys.readouterr().err


def test_a_full_disk_does_not_stop_what_is_pruned_already(project, tmp_path, monkeypatch):
    for stage in ("score", "prune"):
        assert run(project, tmp_path / "run", verb=stage) == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(10))
    assert run(project, tmp_path / "run", verb="prune") == 0


def test_corrections_are_made_unless_told_otherwise(project, tmp_path, capsys):
    for name, more in {"corrected": [], "plain": ["--prune.corrections", "[]"]}.items():
        for stage in ("score", "prune"):
            assert run(project, tmp_path / name, *more, verb=stage) == 0
    corrected, plain = (load_file(tmp_path / n / "prune/student/model.safetensors") for n in ("corrected", "plain"))
    changed = {key.rpartition("layers.")[2] for key in plain if not torch.equal(plain[key], corrected[key])}
    projections = ("down_proj", "gate_proj", "up_proj", "q_proj", "k_proj", "v_proj")
    assert {c.split(".")[-2] for c in changed} == {
        *projections,
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
        "lm_head",
    }
    assert run(project, tmp_path / "a", "--prune.corrections", "[magic]") == 1
    assert "corrections: 'magic' is none of least_squares, bias, norm_ratio" in capsys.readouterr().err
    assert run(project, tmp_path / "a", "--score.moments", "false") == 1
    assert "corrections need what score measures with moments: true" in capsys.readouterr().err
    for target, names, message in (
        ("{ffn: 48}", "[rotation]", "rotation has no effect: hidden is not cut (cut: ffn). Leave rotation out"),
        ("{ffn: 48}", "[bias, least_squares]", "bias has no effect: no projection that reads an axis that is cut"),
        ("{ffn: 48}", "[layer_merge]", "layer_merge has no effect: no layer is dropped"),
    ):  # before anything is scored
        changes = ("--prune.target", target, "--prune.corrections", names)
        assert run(project, tmp_path / "a", *changes) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "a" / "score").exists()


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        (["--score.layers", "loss"], {"layers": "loss", "layers_block": 1}),
        (["--score.layers_block", 2, "--prune.target.layers", 1], {"layers": "block_importance", "layers_block": 2}),
        (
            ["--score.layers", "logit_mse", "--score.layers_remove", 2, "--prune.target.layers", 1],
            {"layers": "logit_mse", "layers_block": 1},
        ),
        (["--score.layers", "tiny_last_word", "--score.layers_limit", 4], {"layers": "tiny_last_word", "layers_block": 1}),
    ],
)
def test_layers_are_ranked_by_what_the_model_loses(project, tmp_path, changes, how):
    target = [] if "--prune.target.layers" in changes else ["--prune.target.layers", 2]
    changes = [*changes, *target, "--score.include_path", project["folder"] / "tasks", "--score.moments", "false"]
    for stage in ("score", "prune"):
        assert run(project, tmp_path / "run", *changes, "--prune.corrections", "[]", verb=stage) == 0
    statistics = Statistics.load(tmp_path / "run/score")
    kept = json.loads((tmp_path / "run/prune/student/plan.json").read_text())["keep"]["layers"]
    assert statistics.provenance["metrics"]["layers"] == how["layers"]
    assert statistics.provenance["layers_block"] == how["layers_block"]
    assert statistics.scores["layers"].shape == (3,)
    if removed := statistics.provenance.get("layers_removed"):
        assert sorted(kept + removed) == [0, 1, 2]
    if how["layers"] == "tiny_last_word":
        values = [value * 4 for value in statistics.scores["layers"].tolist()]
        assert values == pytest.approx([round(value) for value in values], abs=1e-5)  # of four documents


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["--score.layers", "lsos"],
            "'lsos' is none of block_importance, loss, perplexity, logit_mse, and lm-eval knows no such",
        ),
        (["--score.layers", "tiny_last_word:word_perplexity"], "is better when it is lower"),
        (["--score.layers", "tiny_last_word", "--score.layers_remove", 1], "layers_remove takes one of block_importance"),
        (["--score.layers", "loss", "--score.layers_block", 3], "a block of 3 layers, of 3: 1 to 2 can be removed"),
        (["--score.layers_remove", 3], "the removal of 3 layers, of 3"),
        (["--score.layers_remove", 1, "--score.layers_block", 2], "set one of them"),
        (["--score.layers", "loss", "--score.layer_by_layer", "true"], "layer_by_layer holds one: set one of them"),
        (["--score.layers_block", 2, "--prune.target.layers", 2], "ranks blocks of 2 of 3 layers: set the target to 1"),
        (["--score.layers_remove", 1, "--prune.target.layers", 1], "ranks 1 layers to drop: set it to 2"),
        (["--score.layers_block", 0], "score.layers_block: 0 must be at least 1"),
    ],
)
def test_a_ranking_of_layers_that_cannot_work_is_refused(project, tmp_path, capsys, changes, message):
    changes = [*changes, "--score.include_path", project["folder"] / "tasks"]
    for verb in ("score", "prune") if "--prune.target.layers" in changes else ("score",):
        assert run(project, tmp_path / "run", *changes, verb=verb) == 1
        assert message in capsys.readouterr().err


def test_a_model_too_large_for_memory_is_not_run_without_layers(project, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: namedtuple("memory", "available")(1000))
    assert run(project, tmp_path / "run", "--score.layers", "loss", verb="score") == 1
    assert "loss needs the whole model, which does not fit in memory" in capsys.readouterr().err


def test_moments_that_do_not_fit_are_measured_layer_by_layer_and_layers_are_still_ranked(
    project, tmp_path, capsys, monkeypatch
):
    settings = ["--score.dtype", "float32", "--score.layers", "loss", "--score.layers_limit", 4]
    assert run(project, tmp_path / "whole", *settings, verb="score") == 0
    assert "layer by layer" not in capsys.readouterr().out
    architecture = Architecture.of(AutoConfig.from_pretrained(project["recipe"]["model"]))
    least, most = (scoring_bytes(architecture, torch.float32, 4 * 16, moments) for moments in (False, True))
    for module in (score, footprint):
        monkeypatch.setattr(module, "free_memory", lambda device: (least + most) / 2 / 0.8)
    assert run(project, tmp_path / "run", *settings, verb="score") == 0
    said = rf"The model and its moments need {most / 1e9:,.1f} GB, .* free on cpu: it is read layer by layer, which needs"
    assert re.search(said, capsys.readouterr().out)
    whole, streamed = (Statistics.load(tmp_path / name / "score") for name in ("whole", "run"))
    for axis, values in whole.scores.items():
        assert torch.allclose(streamed.scores[axis], values, rtol=1e-4), axis
    for name, moment in whole.moments.items():
        assert torch.allclose(streamed.moments[name], moment, rtol=1e-3, atol=1e-5), name


NONUNIFORM = ["--score.sublayers", "true", "--prune.target", "{}", "--prune.nonuniform", "0.5"]


def test_a_nonuniform_student_goes_through_all_stages(project, tmp_path, capsys):
    assert run(project, tmp_path / "run", *NONUNIFORM) == 0
    assert "50% of the layers' parameters stay" in capsys.readouterr().out
    folder = tmp_path / "run/publish/model"
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "minitron_pruned"
    assert (folder / "modeling_pruned.py").is_file()
    report = json.loads((folder / "report.json").read_text())["models"]
    assert report["distilled"]["shape"]["layer_intermediate_size"] == config["layer_intermediate_size"]
    assert 0.3 < report["distilled"]["parameters"] / report["teacher"]["parameters"] < 0.8
    assert (folder / "shapes.png").is_file()
    text = (folder / "README.md").read_text()
    assert "trust_remote_code=True" in text
    assert "vLLM takes it only padded: `hf-minitron export . --to stock`." in text


def test_a_nonuniform_student_may_keep_its_attention(project, tmp_path, capsys):
    for more, words in (
        ([], ", not heads: set nonuniform_axes: [ffn], or it takes"),
        (["--prune.nonuniform_axes", "[ffn]"], "\n"),
    ):
        assert run(project, tmp_path / "run", *NONUNIFORM, *more, verb="plan") == 0
        assert f"vllm: its Transformers backend takes layers that differ in ffn{words}" in capsys.readouterr().out
    for stage in ("score", "prune"):
        assert run(project, tmp_path / "run", *NONUNIFORM, *more, verb=stage) == 0
    config = json.loads((tmp_path / "run/prune/student/config.json").read_text())
    assert set(config["layer_num_attention_heads"]) == {config["num_attention_heads"]}
    assert len(set(config["layer_intermediate_size"])) > 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--prune.nonuniform_axes", "[ffn]"], "nonuniform_axes: ['ffn'] says what nonuniform chooses by layer: set that"),
        ([*NONUNIFORM, "--prune.nonuniform_axes", "[hidden]"], "that may differ by layer are those of heads, ffn; name one"),
        ([*NONUNIFORM, "--prune.nonuniform_axes", "[]"], "nonuniform_axes: []: sizes of a llama that may differ by layer"),
        (
            [*NONUNIFORM, "--prune.nonuniform_axes", "[ffn]", "--prune.nonuniform", "0.2"],
            "is less than what stays of them in any case, 0.",
        ),
        (["--prune.nonuniform", "1.5"], "nonuniform: 1.5 is not a share between 0 and 1"),
        (["--prune.nonuniform", "0.5"], r"set target: {}, or leave nonuniform out"),
        (["--prune.nonuniform", "0.5", "--prune.target", "{}"], "sublayers: true and moments: true; set both in score:"),
    ],
)
def test_a_nonuniform_cut_that_cannot_be_made_is_refused_before_any_work(project, tmp_path, capsys, more, words):
    assert run(project, tmp_path / "run", *more) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_rotation_and_merging_go_through_the_command(project, tmp_path, capsys, monkeypatch):
    more = [
        "--prune.target",
        "{hidden: 24, layers: 2}",
        "--prune.corrections",
        "[least_squares, norm_ratio, rotation, layer_merge]",
    ]
    for stage in ("score", "prune"):
        assert run(project, tmp_path / "run [1]", *more, verb=stage) == 0
    assert run(project, tmp_path / "run [1]", *more, verb="plan") == 0
    assert "unties the output head" in capsys.readouterr().out
    plan = json.loads((tmp_path / "run [1]/prune/student/plan.json").read_text())
    assert plan["keep"]["hidden"] == list(range(24))
    assert len(plan["keep"]["layers"]) == 2
    assert sorted(path.name for path in (tmp_path / "run [1]/prune").iterdir()) == ["done.json", "student"]
    monkeypatch.setattr("hf_minitron.stages.prune.fits", lambda *args: False)
    assert run(project, tmp_path / "run [1]", *more, "--prune.max_shard_bytes", "1000", verb="prune") == 1
    assert "layer_merge runs the whole model, which does not fit in memory" in capsys.readouterr().err


def test_other_models_are_evaluated_too(project, done, tmp_path):
    shutil.copytree(done, tmp_path / "run")
    mark = {"recipe": os.path.relpath(project["path"], tmp_path / "run"), "model": project["recipe"]["model"]}
    (tmp_path / "run/run.json").write_text(json.dumps(mark))
    other = done / "prune/student"
    more = ["--evaluate.models", f"{{other-1.0: {other}}}", "--evaluate.speed", "{batch_sizes: 2, prompt: [4, 8], rounds: 1}"]
    task = project["folder"] / "tasks/tiny.yaml"
    more += ["--evaluate.tasks", f"[{task}]", "--evaluate.batch_size", "auto", "--evaluate.few_shot", 1]
    assert run(project, tmp_path / "run", *more, verb="evaluate") == 0
    report = json.loads((tmp_path / "run/evaluate/report.json").read_text())
    assert set(report["models"]) == {"teacher", "pruned", "distilled", "other-1.0"}
    assert set(report["speed"]) == {"teacher", "distilled", "other-1.0"}
    assert [(entry["batch_size"], entry["prompt"]) for entry in report["speed"]["other-1.0"]] == [(2, 4), (2, 8)]
    (same,) = [
        found for found in report["comparisons"]
        if (found["model"], found["baseline"], found["metric"]) == ("other-1.0", "pruned", "perplexity")
    ]  # fmt: skip
    assert same["value"] == same["baseline_value"]
    assert same["p"] == 1
    assert same["verdict"] == "not distinguishable"
    dtype = report["settings"].pop("dtype")
    assert report["settings"] == {"limit": None, "few_shot": 1, "chat_template": False}
    assert dtype in ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Count:
    """The `count:` section."""

    times: int = dataclasses.field(default=1, metadata={"help": "How often to count."})


def refuse_negative(args, run):
    if args.times < 0:
        raise ValueError(f"times: {args.times} is less than 0")


def write_count(args, run, out):
    scored = len(list(run.path("score").iterdir()))
    (out / "count.txt").write_text(str(args.times * scored))


def test_a_stage_of_ones_own_is_one_value(project, done, tmp_path, monkeypatch, capsys):
    stage = Stage("count", "count: count what was scored.", Count, refuse_negative, write_count, needs=("score",), in_run=False)
    monkeypatch.setitem(STAGES, "count", stage)
    shutil.copytree(done, tmp_path / "run")
    assert run(project, tmp_path / "run", "--count.times", "-1", verb="count") == 1
    assert "error: count: times: -1 is less than 0" in capsys.readouterr().err
    assert run(project, tmp_path / "run", "--count.times", 2, verb="count") == 0
    scored = len(list((tmp_path / "run" / "score").iterdir()))
    assert (tmp_path / "run" / "count" / "count.txt").read_text() == str(2 * scored)
    assert "count: count what was scored." in capsys.readouterr().out
    assert run(project, tmp_path / "run", "--count.times", 2, verb="count") == 0
    assert "count: done before, skipped" in capsys.readouterr().out
