"""Recipes where others compute: a job on a rented GPU that is stopped and goes on, and a Space that plans."""

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import yaml
from hub_server import TOKEN

ROOT = Path(__file__).resolve().parents[1]
JOB = ROOT / "recipes/jobs/run_recipe.py"
SPACE = ROOT / "recipes/spaces/planner"
MODEL = ROOT / "tests/configs/Qwen3-4B-Base"


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def machine(name, quantity, vram, price):
    accelerator = {"type": "gpu", "model": name, "quantity": quantity, "vram": vram, "manufacturer": "Nvidia"}
    return {"name": name, "prettyName": name, "cpu": "8 vCPU", "ram": "30 GB", "ephemeralStorage": "100 GB",
            "accelerator": accelerator if quantity else None, "unitCostMicroUSD": int(price * 1e6),
            "unitCostUSD": price, "unitLabel": "minute"}  # fmt: skip


def test_flavors_are_those_that_hold_the_recipe_the_cheapest_first(hub, tmp_path, capsys):
    """By the Hub's own list: memory is that of all GPUs together, prices are by the minute."""
    hub.hardware = [machine("h200", "1", "141 GB", 0.1), machine("cpu-basic", None, "", 0.001),
                    machine("a100-large", "1", "80 GB", 0.05), machine("t4-small", "1", "16 GB", 0.01),
                    machine("l4x4", "4", "96 GB", 0.06)]  # fmt: skip
    path = tmp_path / "recipe.yaml"
    distill = {"block_size": 4096, "max_steps": 10, "per_device_train_batch_size": 1, "gradient_checkpointing": True}
    recipe = {"model": str(MODEL), "run": "run", "score": {"text": "a/b"}, "prune": {"target": "50%"}, "distill": distill}
    path.write_text(yaml.safe_dump(recipe))
    job = module(JOB)
    assert job.main([str(path), "--flavors"]) == 0
    table, command = capsys.readouterr().out.strip().split("\n\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == ["a100-large", "l4x4", "h200"]
    assert [row[1:3] + row[4:] for row in rows] == [["1", "80", "3.00"], ["4", "24", "3.60"], ["1", "141", "6.00"]]
    assert command.startswith("hf jobs uv run --flavor a100-large --secrets HF_TOKEN ")
    hub.hardware = hub.hardware[1:2] + hub.hardware[3:4]
    assert job.main([str(path), "--flavors"]) == 1
    assert "no machine of HF Jobs holds it" in capsys.readouterr().err
    assert job.main([str(path)]) == 1
    assert "--repo is missing" in capsys.readouterr().err


@pytest.mark.slow
def test_a_job_that_is_killed_goes_on_in_an_empty_folder(hub, project, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, JOB, project["path"], "--repo", "me/my-run", "--folder"]

    def start(folder):
        out = (tmp_path / f"{folder}.txt").open("w+")
        said = {"stdout": out, "stderr": subprocess.STDOUT}
        job = subprocess.Popen([*map(str, command), str(tmp_path / folder)], env=environment, start_new_session=True, **said)
        return job, out

    def pushed():
        return set(hub.files("me/my-run")) if "me/my-run" in hub.repos else set()

    job, out = start("first")
    while job.poll() is None and "run/score/done.json" not in pushed():
        threading.Event().wait(0.2)  # time.sleep is patched
    os.killpg(job.pid, 9)
    job.wait()
    assert "run/score/done.json" in pushed(), out.seek(0) or out.read()
    assert "run/publish/done.json" not in pushed()
    assert "run/run.lock" not in pushed()
    assert hub.repos["me/my-run"]["private"]
    shutil.rmtree(tmp_path / "first")
    job, out = start("second")
    code = job.wait(timeout=600)
    out.seek(0)
    said = out.read()
    assert code == 0, said
    assert "score: done before, skipped" in said
    assert {f"run/{stage}/done.json" for stage in ("score", "prune", "distill", "evaluate", "publish")} <= pushed()
    assert {"recipe.yaml", "run/report.html", "run/publish/model/model.safetensors"} <= pushed()
    assert not [name for name in pushed() if ".tmp/" in name]


@pytest.fixture
def space(hub, monkeypatch):
    if importlib.util.find_spec("gradio") is None:  # the page itself needs it, what it shows does not
        monkeypatch.setitem(sys.modules, "gradio", MagicMock())
    hub.add_folder("Qwen/Qwen3-4B-Base", MODEL)
    hub.add_folder("google/flan-t5-small", ROOT / "tests/configs/flan-t5-small")
    return module(SPACE / "app.py")


def test_the_space_plans_a_model_of_the_hub(space):
    sizes, cost, recipe = space.plan("https://huggingface.co/Qwen/Qwen3-4B-Base", 50, 1, 24)
    assert "| parameters               | 4,022,468,096 | 2,023,006,976 | -49.7% |" in sizes
    assert "Every stage fits into 24 GB." in cost
    assert yaml.safe_load(recipe)["model"] == "Qwen/Qwen3-4B-Base"


@pytest.mark.parametrize(
    ("model", "keep", "gpus", "memory", "message"),
    [
        ("google/flan-t5-small", 50, 1, 24, "is an encoder-decoder"),
        ("no/where", 50, 1, 24, "No model at 'no/where'"),
        (str(MODEL), 50, 1, 24, "is not a model of the Hub"),
        ("../tests", 50, 1, 24, "is not a model of the Hub"),
        ("", 50, 1, 24, "is not a model of the Hub"),
        ("Qwen/Qwen3-4B-Base", 50, 1.5, 24, "GPUs: 1.5 is not a whole number"),
        ("Qwen/Qwen3-4B-Base", 50, 0, 24, "0 is not a whole number from 1 on"),
        ("Qwen/Qwen3-4B-Base", 1, 1, 24, "cannot be kept by cutting hidden and ffn"),
    ],
)
def test_what_the_space_cannot_plan_is_told(space, model, keep, gpus, memory, message):
    reason, *rest = space.plan(model, keep, gpus, memory)
    assert message in reason
    assert rest == ["", ""]


def test_the_space_has_what_the_hub_asks_for():
    _, metadata, text = (SPACE / "README.md").read_text().split("---\n", 2)
    found = yaml.safe_load(metadata)
    assert found["sdk"] == "gradio"
    assert (SPACE / found["app_file"]).is_file()
    assert len(found["short_description"]) <= 60
    assert "hf_minitron" in (SPACE / "requirements.txt").read_text().splitlines()
