"""A recipe that evaluates while it trains: the best student is the saved one, and an interrupted run ends as another."""

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_minitron.__main__ import main
from hf_minitron.distillation.trainer import DistillationTrainer

SPOILING = {"learning_rate": 0.2, "max_steps": 4, "lr_scheduler_type": "constant", "save_steps": 1, "save_total_limit": 2}
PLAIN = ("eval_strategy", "eval_steps", "eval_text", "eval_tokens", "load_best_model_at_end", "save_total_limit")


@pytest.fixture
def recipe(project, tmp_path):
    """Writes a recipe whose `distill:` evaluates after every step, and returns its path."""

    def write(name, drop=(), sections=None, **section):
        held_out = str(project["folder"] / "held_out.jsonl")
        evaluation = {"eval_strategy": "steps", "eval_steps": 1, "eval_text": held_out, "eval_tokens": 128}
        evaluation |= {"load_best_model_at_end": True, **SPOILING, **section}
        content = {**project["recipe"], "run": str(tmp_path / name), **(sections or {})}
        content["distill"] = {k: v for k, v in {**content["distill"], **evaluation}.items() if k not in drop}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def distilled(path, *stages):
    for stage in (*stages, "score", "prune", "distill"):
        assert main([stage, str(path)]) == 0
    run = path.with_suffix("")
    return load_file(run / "distill/student/model.safetensors"), json.loads((run / "distill/log.json").read_text())


def unfinished(path, monkeypatch):
    """Distill, and be killed behind the end of training, with all its checkpoints there."""
    for stage in ("score", "prune"):
        assert main([stage, str(path)]) == 0
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("hf_minitron.stages.trained.save_trained", lambda *args: 1 / 0)
        main(["distill", str(path)])


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def spoiled(recipe):
    """A student that gets worse, its log, and the step after which it was best."""
    student, log = distilled(recipe("spoiled"))
    losses = [entry["eval_loss"] for entry in log["history"] if "eval_loss" in entry]
    assert len(losses) == 4
    assert log["best"]["loss"] == min(losses)
    best = losses.index(min(losses)) + 1
    assert log["best"]["step"] == best < 3, "it must get worse, or the test shows nothing"
    return student, log, best


def test_the_saved_student_is_the_best_one(recipe, spoiled, monkeypatch):
    """It is that of a run that never evaluates, after as many steps."""
    student, _, best = spoiled
    path = recipe("plain", PLAIN)
    unfinished(path, monkeypatch)
    after = [load_file(path.with_suffix("") / f"distill.tmp/checkpoints/checkpoint-{n}/model.safetensors") for n in (best, 4)]
    assert equal(student, after[0])
    assert not equal(student, after[1])


def test_early_stopping_ends_training_and_stays_ended(recipe, spoiled, monkeypatch):
    student, log, best = spoiled
    for name in ("stopped", "killed"):
        path = recipe(name, early_stopping_patience=2)
        if name == "killed":
            unfinished(path, monkeypatch)
        found, stopped = distilled(path)
        assert equal(found, student)
        assert stopped["history"][-2]["step"] == best + 2 < 4, name
        assert stopped["best"] == log["best"], name
        assert stopped["tokens"] == (best + 2) * 2 * 16


def test_a_kill_between_evaluations_changes_nothing(recipe, spoiled, monkeypatch):
    student, log, _ = spoiled
    path = recipe("killed")
    for stage in ("score", "prune"):
        assert main([stage, str(path)]) == 0
    evaluate = DistillationTrainer.evaluate
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(
            DistillationTrainer, "evaluate", lambda self, **kw: 1 / 0 if self.state.global_step == 3 else evaluate(self, **kw)
        )
        main(["distill", str(path)])
    found, again = distilled(path)
    assert equal(found, student)
    assert again["best"] == log["best"]


def test_a_cache_answers_for_the_evaluation_too(recipe):
    settings = {"learning_rate": 0.003, "metric_for_best_model": "forward_kl", "max_steps": 2}
    _, live = distilled(recipe("live", **settings))
    path = recipe("cached", sections={"cache": {"method": "top_k", "k": 99, "dtype": "float32"}}, **settings)
    _, cached = distilled(path, "cache")
    found, expected = ([e["eval_forward_kl"] for e in log["history"] if "eval_forward_kl" in e] for log in (cached, live))
    assert len(found) == 2
    assert found == pytest.approx(expected, rel=1e-4)
    assert cached["best"]["step"] == live["best"]["step"]


def test_a_correction_is_evaluated_as_well(project, recipe):
    train, held_out = (str(project["folder"] / f"{name}.jsonl") for name in ("train", "held_out"))
    section = {**project["recipe"]["distill"], "text": train, "warmup_steps": 0, "max_steps": 2, "eval_text": held_out}
    section |= {"eval_strategy": "epoch", "eval_on_start": True, "eval_tokens": 64, "save_strategy": "epoch"}
    section |= {"load_best_model_at_end": True, "lora": {"r": 2}, "label_smoothing_factor": 0.1}
    path = recipe("corrected", sections={"correct": section})
    assert main(["correct", str(path)]) == 0
    log = json.loads((path.with_suffix("") / "correct/log.json").read_text())
    assert sum("eval_loss" in entry for entry in log["history"]) >= 2
    assert log["best"]["step"] == 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("eval_delay", 2, "eval_delay: 2.0 has no effect without evaluation: set eval_strategy and eval_text, or leave it out"),
        ("per_device_eval_batch_size", 3, "per_device_eval_batch_size: 3 has no effect without evaluation"),
        ("include_for_metrics", ["loss"], r"include_for_metrics: \['loss'\] has no effect without evaluation"),
        ("trackio_bucket_id", "b", "trackio_bucket_id: 'b' has no effect without report_to: trackio"),
        ("project", "p", "project: 'p' has no effect without report_to: trackio"),
        ("trackio_static_space_id", 1.5, "trackio_static_space_id: 1.5 is neither text nor false"),
        ("parallelism_config", "/", "parallelism_config: '/' is no accelerate.ParallelismConfig"),
        ("include_num_input_tokens_seen", "some", "include_num_input_tokens_seen: 'some' is none of all, non_padding, no"),
        ("torch_compile_mode", "fast", "torch_compile_mode: 'fast' is none of default, "),
        ("torch_compile_backend", "x", "torch_compile_backend: 'x' is none of torch.compiler.list_backends"),
    ],
)
def test_settings_of_a_recipe_without_effect_are_refused(project, tmp_path, capsys, name, value, message):
    recipe = {**project["recipe"], "run": str(tmp_path / "run")}
    recipe["distill"] = {**recipe["distill"], name: value}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["distill", str(tmp_path / "recipe.yaml")]) == 1
    assert re.search(f"error: distill: {message}", capsys.readouterr().err.strip().splitlines()[-1])
