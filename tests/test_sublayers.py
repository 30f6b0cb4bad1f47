"""Sublayers tuned one by one, a prototype: benchmarks/sublayers.py."""

import sys
from pathlib import Path

import pytest
import tiny
import torch

from hf_minitron import calibrate, make_plan, prune_model
from hf_minitron.architecture.architecture import Architecture

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import sublayers  # noqa: E402

HOW = sublayers.Tuning(steps=6, batch=2, rate=3e-3, held_out=2, dtype=torch.float32)


@pytest.fixture
def pair():
    teacher = tiny.model(dtype=torch.float32).eval()
    shape = Architecture.of(teacher.config).shape
    plan = make_plan(calibrate(teacher, tiny.blocks()).scores, shape, shape.cut_to({"hidden": 24, "ffn": 48}))
    return teacher, prune_model(teacher, plan).float().eval(), torch.tensor(plan.keep["hidden"])


def test_every_sublayer_gets_closer_to_the_teachers_stream_or_stays(pair):
    teacher, student, kept = pair
    ids = tiny.blocks(rows=8)["input_ids"][:]
    found = list(sublayers.tune(student, teacher, kept, ids, HOW))
    assert [(layer, kind) for layer, kind, *_ in found] == [(n, k) for n in range(3) for k in ("attention", "mlp")]
    for layer, kind, before, after in found:
        assert after <= before, (layer, kind)
    assert sum(after < before for *_, before, after in found) >= 4


def test_the_streams_are_those_of_the_models(pair):
    """A student that is its teacher has nothing to learn: what it writes is the target."""
    teacher, _, _ = pair
    everything = torch.arange(teacher.config.hidden_size)
    ids = tiny.blocks(rows=6)["input_ids"][:]
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    for _, _, first, _ in sublayers.tune(teacher, teacher, everything, ids, HOW):
        assert first == pytest.approx(0, abs=1e-10)
    for name, weight in teacher.state_dict().items():
        assert torch.allclose(weight, before[name], atol=2e-2), name


def test_weights_that_do_not_help_on_held_out_text_are_put_back(pair):
    teacher, student, kept = pair
    wild = sublayers.Tuning(steps=6, batch=2, rate=10.0, held_out=2, dtype=torch.float32)
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    list(sublayers.tune(student, teacher, kept, tiny.blocks(rows=6)["input_ids"][:], wild))
    for name, weight in student.state_dict().items():
        assert torch.equal(weight, before[name]), name
