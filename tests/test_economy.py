"""Ways of training that are tried: benchmarks/economy.py."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from hf_minitron import Architecture, calibrate, make_plan, prune_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import economy  # noqa: E402


def test_muon_trains_the_matrices_of_layers_and_adamw_the_rest():
    model = tiny.model(dtype=torch.float32)
    optimizer = economy.MuonAdamW(model, lr=1e-3)
    matrices, others = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        body = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        assert id(parameter) in (matrices if body else others), name
        parameter.grad = torch.randn_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    assert len(optimizer.state_dict()["state"]) == len(before)


def test_a_schedule_changes_the_rates_of_both_optimizers():
    model = tiny.model(dtype=torch.float32)
    optimizer = economy.MuonAdamW(model, lr=1e-3)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_the_least_certain_positions_are_learnt():
    student, teacher = (torch.randn(50, 7, generator=torch.Generator().manual_seed(n)).log_softmax(-1) for n in (0, 1))
    values = economy.uncertain_positions(student, teacher)
    entropy = -(student.exp() * student).sum(-1)
    learnt = values != 0
    assert int(learnt.sum()) == 10
    assert entropy[learnt].min() > entropy[~learnt].max()
    whole = (teacher.exp() * (teacher - student)).sum(-1)
    assert torch.allclose(values[learnt], whole[learnt] * 5)


@pytest.mark.parametrize(("step", "weight"), [(0, 1.0), (15, 0.5), (30, 0.0), (80, 0.0)])
def test_losses_on_states_end_after_a_third(step, weight):
    args = SimpleNamespace(losses={"forward_kl": 1.0, "block": 1.0})
    economy.EarlyStates().on_step_begin(args, SimpleNamespace(global_step=step, max_steps=90), None)
    assert args.losses == {"forward_kl": 1.0, "block": pytest.approx(weight)}


@pytest.mark.slow
@pytest.mark.parametrize("way", list(economy.WAYS))
def test_every_way_trains(way, project, tmp_path, monkeypatch):
    given = dict(economy.WAYS[way])
    if "sublayers" in given:
        given["sublayers"] = economy.Tuning(steps=2, batch=1, held_out=1, dtype=torch.float32)
    monkeypatch.setattr(economy, "BLOCK", 12)
    teacher = tiny.load_complete(project["folder"] / "teacher")
    shape = Architecture.of(teacher.config).shape
    plan = make_plan(calibrate(teacher, tiny.blocks()).scores, shape, shape.cut_to({"hidden": 24, "ffn": 48}))
    prune_model(teacher, plan).save_pretrained(tmp_path / "student")
    plan.save(tmp_path / "student/plan.json")
    rows = list(tiny.blocks(2).with_format(None)["input_ids"])
    common = economy.Given(str(project["folder"] / "teacher"), tiny.blocks(8), tiny.blocks(3), rows, 0, tmp_path / "out")
    found = economy.trained(tmp_path / "student", common, {**given, "bf16": False})
    assert found["validation"] > 1
    assert found["steps"] == 8 // given.get("per_device_train_batch_size", 1)
    assert found["unique_tokens"] == 12 * 8 // given.get("num_train_epochs", 1)
    assert found["tuning_tokens"] == (2 * 12 if "sublayers" in given else 0)
