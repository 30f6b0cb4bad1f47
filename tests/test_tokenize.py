"""The stage `tokenize`: what distill and cache read is made once, and an interrupted one is made anew."""

import json
import shutil

import pytest
import yaml
from datasets import Dataset

from hf_minitron.__main__ import main
from hf_minitron.data.mixture import read_mixture
from hf_minitron.stages import training


@pytest.fixture(scope="module")
def pruned(project, tmp_path_factory):
    """A recipe with a `tokenize:` section, and its run, scored and pruned."""
    folder = tmp_path_factory.mktemp("tokenize")
    sources = [str(project["folder"] / f"{name}.jsonl") for name in ("train", "calibration")]
    recipe = {**project["recipe"], "run": str(folder / "run"), "tokenize": {"tokens": 16 * 20}}
    recipe["distill"] = {**recipe["distill"], "text": dict.fromkeys(sources, 0.5), "cross_documents": False}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for stage in ("score", "prune"):
        assert main([stage, str(folder / "recipe.yaml")]) == 0
    return folder


def do(folder, stage, *more):
    return main([stage, str(folder / "recipe.yaml"), *more])


def losses(folder):
    history = json.loads((folder / "run/distill/log.json").read_text())["history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_distill_and_cache_read_what_was_tokenized(project, pruned, tmp_path, capsys, monkeypatch):
    assert do(pruned, "distill") == 1
    assert "distill needs tokenize first: hf-minitron tokenize" in capsys.readouterr().err
    assert do(pruned, "tokenize") == 0, capsys.readouterr().err
    assert "320 tokens in 20 sequences" in capsys.readouterr().out
    hashed = json.loads((pruned / "run/tokenize/done.json").read_text())["files"]
    assert {"train/0/00000.arrow", "train/1/00000.arrow", "train/rows.npy"} == set(hashed)
    with monkeypatch.context() as patch:
        patch.setattr(training, "mixed_blocks", lambda *args, **kwargs: 1 / 0)  # nothing is tokenized again
        assert do(pruned, "distill") == 0, capsys.readouterr().err
        found = losses(pruned)
        assert do(pruned, "cache", "--cache.method", "top_k", "--cache.k", "99", "--cache.dtype", "float32") == 0
        assert "of 12 sequences" in capsys.readouterr().out, "of 20, those of its steps"
        assert do(pruned, "distill", "--cache", "{method: top_k, k: 99, dtype: float32}") == 0, capsys.readouterr().err
        assert losses(pruned) == pytest.approx(found, rel=1e-4)
    recipe = yaml.safe_load((pruned / "recipe.yaml").read_text())
    del recipe["tokenize"]
    (pruned / "plain.yaml").write_text(yaml.safe_dump(recipe))
    capsys.readouterr()
    for stage in ("score", "prune", "distill"):
        assert main([stage, str(pruned / "plain.yaml"), "--run", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    assert losses(tmp_path) == found, "to the bit what distill makes itself"


def test_only_what_changes_tokens_makes_them_again(pruned, capsys):
    assert do(pruned, "tokenize") == 0
    capsys.readouterr()
    assert do(pruned, "tokenize", "--distill.learning_rate", "0.1", "--distill.max_steps", "9") == 0
    assert "tokenize: done before, skipped" in capsys.readouterr().out
    assert do(pruned, "tokenize", "--distill.block_size", "8") == 0
    assert "tokenize runs again: distill.block_size 16 -> 8\n" in capsys.readouterr().out


@pytest.mark.parametrize("cut", [0, 1])
def test_an_interrupted_stage_never_looks_complete(pruned, tmp_path, monkeypatch, capsys, cut):
    """Killed while it writes the first source, or the second: what is half-written is gone, and the rest is equal."""
    assert do(pruned, "tokenize", "--seed", "8") == 0
    expected = read_mixture(pruned / "run/tokenize/train")["input_ids"][:]
    unfinished, left = pruned / "run/tokenize.tmp", tmp_path / "left"

    def half(*args, folder, **kwargs):
        original(*args, folder=folder, **kwargs)
        parts = sorted(folder.glob("*/*.arrow"))
        for path in parts[cut:]:
            path.write_bytes(path.read_bytes()[:100])
        shutil.copytree(folder, left)
        raise ZeroDivisionError

    original = training.mixed_blocks
    with monkeypatch.context() as patch:
        patch.setattr(training, "mixed_blocks", half)
        with pytest.raises(ZeroDivisionError):
            do(pruned, "tokenize", "--seed", "9")
    assert not (unfinished / "train").exists()
    left.rename(unfinished / "train.tmp")  # as kill -9 would have left it
    assert do(pruned, "tokenize", "--seed", "9") == 0, capsys.readouterr().err
    assert not unfinished.exists()
    assert do(pruned, "tokenize", "--seed", "8") == 0
    assert read_mixture(pruned / "run/tokenize/train")["input_ids"][:].equal(expected)


def test_more_than_there_is_is_told(pruned, tmp_path, caplog):
    assert do(pruned, "tokenize", "--tokenize.tokens", "64") == 0
    assert do(pruned, "distill", "--tokenize.tokens", "64") == 0
    assert "tokenize has made 4 of the 12 blocks asked for" in caplog.text
    assert len(losses(pruned)) == 6


def test_all_of_a_text_is_tokenized_without_a_number(project, pruned, capsys):
    text = str(project["folder"] / "train.jsonl")
    assert do(pruned, "tokenize", "--tokenize", "{}", "--distill.text", text, "--distill.streaming", "true") == 0
    rows = Dataset.from_json(text)
    assert f"in {len(rows) * 41 // 16} sequences" in capsys.readouterr().out
