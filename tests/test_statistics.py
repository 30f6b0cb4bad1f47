"""Statistics in their folder: complete or absent, moments read when they are asked for."""

import json

import pytest
import tiny
import torch

from hf_minitron import statistics
from hf_minitron.importance.calibrate import calibrate
from hf_minitron.statistics import Moments, Statistics


@pytest.fixture
def saved(tmp_path):
    return calibrate(tiny.model(dtype=torch.float32), tiny.blocks(), moments=True, save_to=tmp_path / "s"), tmp_path / "s"


@pytest.fixture
def reads(monkeypatch):
    """The files of moments that are read."""
    seen, load_file = [], statistics.load_file
    monkeypatch.setattr(statistics, "load_file", lambda path: seen.append(path.name) or load_file(path))
    return seen


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_moment_is_read_when_it_is_asked_for(saved, reads):
    measured, folder = saved
    loaded = Statistics.load(folder)
    assert reads == ["statistics.safetensors"]
    assert loaded.moments.keys() == measured.moments.keys()
    assert loaded.moments["model.layers.1.mlp.down_proj"].shape == (73, 72)
    assert reads[1:] == ["model.layers.1.mlp.down_proj.safetensors"]
    with pytest.raises(KeyError, match="nothing"):
        loaded.moments["nothing"]


def test_statistics_in_memory_and_in_a_folder_are_the_same(saved, tmp_path):
    measured, folder = saved
    held = calibrate(tiny.model(dtype=torch.float32), tiny.blocks(), moments=True)
    for name, moment in held.moments.items():
        assert torch.equal(measured.moments[name], moment), name
    held.save(tmp_path / "held")
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = {
        path.relative_to(tmp_path / "held"): path.read_bytes() for path in (tmp_path / "held").rglob("*") if path.is_file()
    }
    assert again == files


def test_a_folder_is_complete_or_holds_no_statistics(saved, tmp_path, monkeypatch):
    measured, folder = saved
    with pytest.raises(ValueError, match="holds no statistics: statistics.json is missing. Score the model again"):
        Statistics.load(tmp_path)
    model = tiny.model(dtype=torch.float32)
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="holds NaN"):
        calibrate(tmp_path / "model", tiny.blocks(), moments=True, save_to=folder)
    with pytest.raises(ValueError, match="holds no statistics"):
        Statistics.load(folder)
    measured.save(folder)
    monkeypatch.setattr(statistics, "save_file", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        measured.save(folder)
    with pytest.raises(ValueError, match="holds no statistics"):
        Statistics.load(folder)


def test_a_moment_whose_file_is_gone_is_named(saved):
    _, folder = saved
    (folder / "moments" / "model.norm.output.safetensors").unlink()
    loaded = Statistics.load(folder)
    with pytest.raises(ValueError, match="model.norm.output.safetensors is missing: score the model again"):
        loaded.moments["model.norm.output"]


def test_moments_that_are_written_again_are_those_that_are_read(tmp_path):
    moments = Moments(tmp_path)
    moments["a"] = torch.zeros(2)
    before = moments["a"]
    moments["a"] = torch.ones(3)
    assert moments["a"].tolist() == [1, 1, 1]
    assert before.tolist() == [0, 0], "what was read before stays as it was"


def test_the_record_is_plain_json(saved):
    _, folder = saved
    record = json.loads((folder / "statistics.json").read_text())
    assert record["text"]["tokens"] == 72
    assert record["provenance"]["metrics"] | {"ffn": "l2_mean", "layers": "block_importance"} == record["provenance"]["metrics"]
    assert "model.layers.0.self_attn.o_proj" in record["moments"]
