"""A job of eight processes, of which each takes its time, one is killed, and the job started again: the same student."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from safetensors.torch import load_file
from test_accelerate import script

JOB = """
import os, random, signal, sys, time
sys.path.insert(0, {tests!r})
from dataclasses import replace
from pathlib import Path
from accelerate import PartialState
from transformers import TrainerCallback
from hf_minitron.command import run_stages
from hf_minitron.distillation import trainer
from hf_minitron.recipe import load_recipe
from hf_minitron.stages.every import STAGES

state, killed = PartialState(cpu=True), int(sys.argv[2])
luck = random.Random(f"{{killed}} {{state.process_index}}")


def late(run):
    def slow(*args):
        time.sleep(luck.random() * 4)
        run(*args)
        time.sleep(luck.random() * 4)
    return slow


class Late(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(luck.random() / 4)
        if state.global_step == 5 and killed == int(os.environ["RANK"]):
            os.kill(os.getpid(), signal.SIGKILL)


class Trainer(trainer.DistillationTrainer):
    def __init__(self, *args, callbacks=(), **kwargs):
        super().__init__(*args, callbacks=[*callbacks, Late()], **kwargs)


import hf_minitron.stages.trained
hf_minitron.stages.trained.DistillationTrainer = Trainer
STAGES.update({{name: replace(stage, run=late(stage.run)) for name, stage in STAGES.items()}})
sections = {{name: stage.args for name, stage in STAGES.items()}}
run_stages(load_recipe(Path(sys.argv[1]), {{}}, sections), ["score", "prune", "distill"])
"""


@pytest.mark.slow
def test_eight_processes_that_are_killed_and_started_again_make_the_same_student(project, tmp_path):
    def start(name, killed=-1):
        run = tmp_path / name
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**project["recipe"], "run": str(run)}))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=8"]
        command = [*launcher, str(script(tmp_path, JOB)), str(tmp_path / f"{name}.yaml"), str(killed)]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
        return run, done

    killed, done = start("killed", killed=3)
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert not (killed / "distill/done.json").exists()
    killed, done = start("killed")
    assert done.returncode == 0, done.stderr[-4000:]
    for stage in ("score", "prune"):
        assert f"{stage}: done before, skipped" in done.stdout
    whole, done = start("whole")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "skipped" not in done.stdout
    logs = [json.loads((run / "distill/log.json").read_text()) for run in (killed, whole)]
    assert [log["resumed"] for log in logs] == ["checkpoint-4", None]
    assert logs[0]["tokens"] == logs[1]["tokens"]
    found, expected = (load_file(run / "distill/student/model.safetensors") for run in (killed, whole))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].equal(weight), name
