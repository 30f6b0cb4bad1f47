"""What the command shows while it trains, and what a tracker is told."""

import io
import json
import re
import sqlite3
import sys
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback

from hf_minitron.__main__ import main
from hf_minitron.checkpoint.model_files import resolve
from hf_minitron.command import own_stages
from hf_minitron.distillation.config import DistillationArguments
from hf_minitron.distillation.trainer import DistillationTrainer
from hf_minitron.planning import estimate
from hf_minitron.recipe import load_recipe
from hf_minitron.stages.every import STAGES
from hf_minitron.terminal import StageBar, show_stage


class Tracker(TrainerCallback):
    """Keeps what trackio, wandb and tensorboard are told."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


@pytest.fixture
def trained(tmp_path, monkeypatch, capsys):
    """A trainer after two steps, a tracker, and what was shown."""
    shown, tracker = io.StringIO(), Tracker()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setattr("hf_minitron.terminal.tqdm", partial(tqdm, disable=False))  # the suite shows no bars
    ids = torch.randint(0, tiny.config().vocab_size, (8, 16)).tolist()
    args = DistillationArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                                 logging_steps=1, report_to=[], losses={"forward_kl": 1.0, "cross_entropy": 0.5},
                                 disable_tqdm=False, save_strategy="no")  # fmt: skip
    student, teacher = (tiny.model(dtype=torch.float32) for _ in range(2))
    blocks = Dataset.from_dict({"input_ids": ids}).with_format("torch")
    trainer = DistillationTrainer(student, teacher, args, train_dataset=blocks, callbacks=[tracker])
    show_stage(trainer, "distill")
    trainer.train()
    return trainer, tracker, shown.getvalue(), capsys.readouterr().out


def test_training_shows_one_bar_with_the_stage_and_no_printed_logs(trained):
    trainer, _, shown, printed = trained
    assert "distill: 100%" in shown
    assert "loss=" in shown
    assert "{" not in printed
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(StageBar) == 1
    assert ProgressCallback not in kinds


def test_a_tracker_is_told_every_loss_the_rate_and_the_tokens(trained):
    steps = [logs for logs in trained[1].logs if "loss" in logs]
    assert [logs["tokens"] for logs in steps] == [2 * 2 * 16, 2 * 2 * 2 * 16]
    for logs in steps:
        assert {"loss", "forward_kl", "cross_entropy", "learning_rate", "grad_norm", "tokens_per_second"} <= logs.keys()
        assert logs["tokens_per_second"] > 0


class Terminal(io.StringIO):
    """What would be seen on a terminal."""

    def isatty(self):
        return True


def test_small_files_of_a_hub_model_show_no_bar_and_weights_one(hub, tmp_path, monkeypatch):
    tiny.model().save_pretrained(tmp_path)
    hub.add_folder("owner/tiny", tmp_path)
    hub.add_folder("owner/model", Path(__file__).parent / "configs/SmolLM2-135M-Instruct")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", None)
    for name, value in (("HF_HUB_DISABLE_PROGRESS_BARS", None), ("progress_bar_states", {})):
        monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], name, value)
    monkeypatch.setattr("sys.stderr", Terminal())
    assert main(["plan", "owner/model"]) == 0
    assert main(["init", "owner/model", "--output", str(tmp_path / "recipe.yaml")]) == 0
    assert "%|" not in sys.stderr.getvalue()
    monkeypatch.setattr("sys.stderr", Terminal())
    resolve("owner/tiny")
    shown = sys.stderr.getvalue()
    assert "Weights: 100%" in shown
    assert not {"Fetching", "Downloading", "Reconstruct"} & set(re.findall(r"[A-Z][a-z]+", shown))
    monkeypatch.setattr("sys.stderr", Terminal())
    resolve("owner/tiny")
    assert "%|" not in sys.stderr.getvalue(), "nothing is fetched again"


def test_what_is_done_is_said_and_not_counted(project):
    run = load_recipe(project["path"], {}, {name: stage.args for name, stage in STAGES.items()})
    rates, stages = dict.fromkeys(("score", "prune", "read", "compare", "train", "step", "decode"), 60.0), own_stages(run)
    whole, left = (estimate.time_text(run, {}, stages, rates, done) for done in ((), ("score", "prune")))
    assert "Done already" not in whole
    assert "Done already: score, prune. It can be interrupted" in left
    assert ": score " in whole
    assert ": distill " in left


def test_trackio_is_told_without_a_connection(tmp_path, monkeypatch):
    """Where it is installed: into a database on this machine."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    ids = torch.randint(0, tiny.config().vocab_size, (4, 16)).tolist()
    args = DistillationArguments(str(tmp_path / "out"), max_steps=1, logging_steps=1, report_to=["trackio"], project="mini",
                                 disable_tqdm=True, save_strategy="no")  # fmt: skip
    student, teacher = (tiny.model(dtype=torch.float32) for _ in range(2))
    DistillationTrainer(
        student, teacher, args, train_dataset=Dataset.from_dict({"input_ids": ids}).with_format("torch")
    ).train()
    with sqlite3.connect(tmp_path / "trackio" / "mini.db") as database:
        rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics")]
    assert {"train/loss", "train/forward_kl", "train/learning_rate", "train/tokens", "train/tokens_per_second"} <= rows[
        0
    ].keys()
