"""How long a run takes, and a run that fits into its minutes."""

import dataclasses
import json
import re

import pytest

from hf_minitron.__main__ import main
from hf_minitron.command import own_stages
from hf_minitron.planning import estimate
from hf_minitron.recipe import load_recipe
from hf_minitron.stages.every import STAGES

RATES = {"score": 0.5, "train": 2.0, "step": 3.0, "read": 0.25, "compare": 0.5, "prune": 7.0, "decode": 0.125}


def recipe(project, folder, **overrides):
    values = {"run": str(folder), "evaluate.limit": 8} | overrides
    return load_recipe(project["path"], values, {name: stage.args for name, stage in STAGES.items()})


def seconds(run, values=None):
    return estimate.seconds_by_stage(estimate.with_values(run, values or {}), own_stages(run), RATES)


def test_every_stage_counts_its_work(project, tmp_path):
    speed = {"batch_sizes": [1, 4], "prompt": [8], "new_tokens": 6, "rounds": 2}
    found = seconds(recipe(project, tmp_path / "run", **{"evaluate.speed": speed}))
    task = 3 * 8 * 128 * 0.25  # three models read the documents of a task
    turns = 2 * 5 * (1 + 4) * 8 * 0.25 + 2 * 2 * 3 * 6 * 0.125  # prompts of two models, then tokens one by one
    assert found["score"] == 256 * 0.5
    assert found["prune"] == 7
    assert found["distill"] == 6 * 2 * 16 * 2.0 + 6 * 3.0
    assert found["evaluate"] == 256 * 0.25 + 2 * 256 * 0.5 + task + turns
    assert found["publish"] == 0


def test_what_ranks_layers_is_counted(project, tmp_path):
    plain = recipe(project, tmp_path / "run")
    removed = recipe(project, tmp_path / "run", **{"score.layers": "perplexity", "score.layers_limit": 4})
    sublayers = recipe(project, tmp_path / "run", **{"score.sublayers": True})
    task = recipe(project, tmp_path / "run", **{"score.layers": "tiny_last_word", "score.layers_limit": 8})
    more = [seconds(run)["score"] - seconds(plain)["score"] for run in (removed, sublayers, task)]
    assert more == [4 * 16 * 3 / 2 * 0.25, 256 * 3 * 0.25, 8 * 128 * 3 * 0.25]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_run_fits_into_its_minutes(project, tmp_path, share):
    large = {"score.tokens": 25_600, "distill.max_steps": 600, "evaluate.tokens": 25_600, "evaluate.limit": 800}
    whole = recipe(project, tmp_path / "run", **large)
    stages, limit = own_stages(whole), share * sum(seconds(whole).values())
    run = dataclasses.replace(whole, recipe={**whole.recipe, "minutes": limit / 60})
    values = estimate.fit(run, stages, RATES)
    assert values.keys() == {"score.tokens", "distill.max_steps", "evaluate.tokens", "evaluate.limit"}
    assert values["score.tokens"] % 16 == 0
    assert values["evaluate.tokens"] % 16 == 0
    assert all(0.9 * share < value / large[key] <= share for key, value in values.items()), values
    assert 0.98 * limit <= sum(seconds(run, values).values()) <= limit


def test_a_run_that_fits_stays_whole(project, tmp_path):
    run = recipe(project, tmp_path / "run", minutes=sum(seconds(recipe(project, tmp_path / "run")).values()) / 60 + 1)
    assert estimate.fit(run, own_stages(run), RATES) == {}


def test_too_few_minutes_are_refused_with_those_that_suffice(project, tmp_path):
    run = recipe(project, tmp_path / "run", minutes=0.5)
    with pytest.raises(ValueError, match=r"minutes: 0.5 is too little on this machine: .* takes \d+\.\d minutes, all of them"):
        estimate.fit(run, own_stages(run), RATES)


@pytest.mark.parametrize(("whole", "said"), [(0.01, "About 1 seconds"), (12, "About 12 seconds"), (1080, "About 18 minutes")])
def test_a_short_time_is_said_in_seconds(project, tmp_path, whole, said):
    run = recipe(project, tmp_path / "run")
    rates = {unit: rate * whole / sum(seconds(run).values()) for unit, rate in RATES.items()}
    text = estimate.time_text(run, {}, own_stages(run), rates)
    assert text.startswith(f"{said} on this machine (")
    stages = [float(time) for time in re.findall(r"[a-z]+ (\d+\.\d)", text.partition("): ")[2].splitlines()[0])]
    assert sum(stages) == pytest.approx(whole / (60 if "minutes" in said else 1), abs=0.3)


@pytest.mark.parametrize("minutes", ["ten", 0, -1, True, float("nan"), float("inf"), [8]])
def test_minutes_are_a_number(project, capsys, minutes):
    assert main(["plan", str(project["path"]), "--minutes", json.dumps(minutes)]) == 1
    assert "minutes: " in (said := capsys.readouterr().err)
    assert "is not a number above zero" in said


def test_a_machine_is_measured_on_the_runs_own_models(project, tmp_path):
    run = recipe(project, tmp_path / "run", **{"prune.target": {"hidden": 24, "ffn": 48, "layers": 2}})
    rates = estimate.rehearse(run, own_stages(run))
    assert rates.keys() == RATES.keys()
    assert all(0 < rate < 10 for rate in rates.values()), rates


def test_a_model_too_large_to_measure_is_run_without_an_estimate(project, tmp_path, monkeypatch):
    run = recipe(project, tmp_path / "run")
    monkeypatch.setattr(estimate, "free_memory", lambda device: 24 * 24_000)  # one layer of 8,000 numbers and embeddings fit
    assert estimate.rehearse(run, own_stages(run)).keys() == RATES.keys()
    monkeypatch.setattr(estimate, "free_memory", lambda device: 1e5)
    values, said = estimate.time_allows(run, own_stages(run), estimate=True)
    assert values == {}
    assert "cannot be measured: one layer and the embeddings need 0.0 GB, and 0.0 are free" in said
    timed = dataclasses.replace(run, recipe={**run.recipe, "minutes": 5})
    with pytest.raises(ValueError, match="minutes: how long this takes cannot be measured: .* Leave minutes out"):
        estimate.time_allows(timed, own_stages(timed), estimate=True)


def test_a_run_keeps_what_its_minutes_gave_it(project, tmp_path, monkeypatch, capsys):
    """However fast the machine is when it is started again: a finished stage is not done with other values."""
    folder, measured = tmp_path / "run", []
    arguments = [
        str(project["path"]),
        "--run",
        str(folder),
        "--minutes",
        "20",
        "--evaluate.speed",
        "false",
        "--evaluate.limit",
        "8",
    ]

    def rehearse(run, stages):
        measured.append(run)
        return RATES if len(measured) == 1 else dict.fromkeys(RATES, 0.001)

    monkeypatch.setattr(estimate, "rehearse", rehearse)
    assert main(["score", *arguments]) == 0
    tokens = json.loads((folder / "budget.json").read_text())["values"]["score.tokens"]
    assert 0 < tokens < 256
    assert main(["run", *arguments]) == 0
    said = capsys.readouterr().out
    assert "score: done before, skipped" in said
    assert f"minutes: 20 leaves score.tokens {tokens} of 256" in said
    log = json.loads((folder / "distill/log.json").read_text())
    assert (
        log["tokens"] == 2 * 16 * json.loads((folder / "budget.json").read_text())["values"]["distill.max_steps"] < 6 * 2 * 16
    )
    assert main(["report", *arguments]) == 0
    assert main(["run", *arguments, "--seed", "1"]) == 0  # another recipe: measured anew
    assert json.loads((folder / "budget.json").read_text())["values"] == {}
