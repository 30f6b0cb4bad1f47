"""Recipes bind, plan and run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml

from hf_minitron.__main__ import STAGES
from hf_minitron.evaluation.tasks import task_manager
from hf_minitron.families.family import family_of
from hf_minitron.families.student import check_target, student_config
from hf_minitron.plan import Plan
from hf_minitron.recipe import bind, load_recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
sys.path.insert(0, str(ROOT / "recipes"))


def test_they_are_found():
    assert len(RECIPES) == 3


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_section_binds(path):
    arguments = {name: module.Args for name, module in STAGES.items()}
    run = load_recipe(path, {}, arguments)
    found = set(yaml.safe_load(path.read_text()))
    needed = {name for name, module in STAGES.items() if not getattr(module, "OPTIONAL", False)}
    assert {"model", "run", "seed", *needed} <= found <= {"model", "run", "seed", *STAGES}
    for name in found & STAGES.keys():
        bind(run, name, arguments[name])


CHAIN = ["smollm2-135m-chain/first.yaml", "smollm2-135m-chain/second.yaml"]


@pytest.mark.parametrize(("names", "sizes"), [(["smollm2-135m-width/recipe.yaml"], [100e6]), (CHAIN, [100e6, 70e6])])
def test_targets_are_legal_one_after_another_and_of_the_size_they_say(names, sizes):
    config = tiny.config(num_hidden_layers=30, hidden_size=576, intermediate_size=1536, num_attention_heads=9,
                         num_key_value_heads=3, head_dim=64, vocab_size=49152, tie_word_embeddings=True)  # fmt: skip
    family = family_of(config)
    shape, rows = family.shape_of(config), family.rows_of(config)
    assert shape.num_parameters(rows) == 134_515_008
    for name, size in zip(names, sizes, strict=True):
        target = yaml.safe_load((ROOT / "recipes" / name).read_text())["prune"]["target"]
        after = shape.cut_to(target, {"hidden": 8, "ffn": 8})
        check_target(config, family, after)
        assert 0.95 * size < after.num_parameters(rows) < 1.05 * size
        config = student_config(config, family, Plan(shape, after, {"layers": list(range(after["layers"]))}))
        assert family_of(config).shape_of(config) == after
        shape = after


def test_the_second_round_prunes_the_first_s_student_and_learns_from_the_original():
    first, second = (yaml.safe_load((ROOT / "recipes" / name).read_text()) for name in CHAIN)
    assert second["model"] == f"{first['run']}/publish/model" and second["distill"]["teacher"] == first["model"]
    readme = (ROOT / "recipes/smollm2-135m-chain/README.md").read_text()
    assert f"hf-minitron run recipes/{CHAIN[0]} recipes/{CHAIN[1]}\n" in readme


def test_offline_text_is_split_by_module(tmp_path, monkeypatch):
    import prepare_offline

    texts = [(f"module{i % 25}", f"text {i} " + "some words that make a passage of prose " * 6 + "end.") for i in range(50)]
    monkeypatch.setattr(prepare_offline, "documents", lambda: iter(texts))
    prepare_offline.prepare_text(tmp_path / "stdlib")
    parts = {}
    for part in ("train", "calibration", "held_out"):
        parts[part] = [json.loads(line) for line in (tmp_path / f"stdlib/{part}.jsonl").read_text().splitlines()]
    modules = [{row["module"] for row in rows} for rows in parts.values()]
    assert all(modules) and sum(map(len, modules)) == len(set.union(*modules)) == 25
    assert "stdlib_last_word" in task_manager(tmp_path / "stdlib/tasks").all_tasks
    assert prepare_offline.part_of("_pydecimal") == prepare_offline.part_of("decimal")


def test_last_words_do_not_overlap():
    import prepare_offline

    text = " ".join(f"word{i}" for i in range(25)) + " stop. " + " ".join(f"next{i}" for i in range(30)) + " halt."
    items = list(prepare_offline.last_words(text))
    assert [item["word"] for item in items] == ["stop", "halt"] and items[1]["context"].startswith("next0")


def test_the_script_runs(project, tmp_path):
    command = [sys.executable, "recipes/width.py", "--output_dir", tmp_path / "out", "--model", project["folder"] / "teacher",
               "--text", project["folder"] / "train.jsonl", "--hidden", 24, "--ffn", 48, "--block_size", 16, "--max_steps", 2,
               "--bf16", "false", "--report_to", "none", "--calibration_tokens", 64]  # fmt: skip
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/config.json").read_text())["intermediate_size"] == 48
