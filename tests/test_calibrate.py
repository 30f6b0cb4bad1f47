"""Scores against a hand-written reference, and what they do not depend on."""

import pytest
import tiny
import torch
from datasets import Dataset

from hf_minitron.data import text_hash
from hf_minitron.importance.calibrate import calibrate
from hf_minitron.scores import Scores


def reference(model, rows):
    """The paper's formulas, one row at a time, from recorded activations."""
    seen = {}
    hooks = []
    for name, module in model.named_modules():
        if name.endswith(("down_proj", "o_proj")):
            hooks.append(module.register_forward_pre_hook(lambda m, a, n=name: seen.setdefault(n, []).append(a[0][0])))
        elif name.endswith("layernorm") or name == "model.norm":
            hooks.append(module.register_forward_hook(lambda m, a, o, n=name: seen.setdefault(n, []).append(o[0])))
    changes = [[] for _ in range(3)]
    for row in rows:
        with torch.no_grad():
            streams = model(input_ids=row[None], output_hidden_states=True, use_cache=False).hidden_states
            last = []
            hook = model.model.norm.register_forward_pre_hook(lambda m, a, last=last: last.append(a[0]))
            model(input_ids=row[None], use_cache=False)
            hook.remove()
        streams = [*streams[:-1], last[0]]
        for i in range(3):
            changes[i] += (1 - torch.nn.functional.cosine_similarity(streams[i][0], streams[i + 1][0], dim=-1)).tolist()
    for hook in hooks:
        hook.remove()
    seen = {name: found[::2] for name, found in seen.items()}  # two passes a row

    def score(samples):
        return torch.stack([x.abs().mean(0) for x in samples]).square().sum(0).sqrt()

    layers = [f"model.layers.{i}" for i in range(3)]
    heads = [[x.view(-1, 4, 6).norm(dim=-1) for x in seen[f"{layer}.self_attn.o_proj"]] for layer in layers]
    norms = [f"{layer}.{norm}" for layer in layers for norm in ("input_layernorm", "post_attention_layernorm")] + ["model.norm"]
    return {
        "ffn": torch.stack([score(seen[f"{layer}.mlp.down_proj"]) for layer in layers]),
        "heads": torch.stack([score(samples) for samples in heads]),
        "hidden": sum(score(seen[name]) for name in norms),
        "layers": torch.tensor([sum(c) / len(c) for c in changes]),
    }


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_scores_equal_the_formulas(model_type):
    model = tiny.model(model_type)
    blocks = tiny.blocks()
    expected = reference(model, blocks["input_ids"][:])
    for batch_size in (1, 4):
        scores = calibrate(model, blocks, batch_size)
        assert set(scores.by_axis) == set(expected)
        for axis, values in expected.items():
            assert scores.by_axis[axis].dtype == torch.float32
            assert torch.allclose(scores.by_axis[axis].double(), values.double(), rtol=1e-5, atol=1e-6), axis


def test_padding_counts_for_nothing():
    model = tiny.model()
    rows = [tiny.blocks(1, length, seed=length)["input_ids"][0] for length in (5, 12, 9)]
    padded = {
        "input_ids": [torch.cat([row, row.new_full((12 - len(row),), 7)]).tolist() for row in rows],
        "attention_mask": [[1] * len(row) + [0] * (12 - len(row)) for row in rows],
    }
    scores = calibrate(model, Dataset.from_dict(padded).with_format("torch"), batch_size=3)
    for axis, values in reference(model, rows).items():
        assert torch.allclose(scores.by_axis[axis].double(), values.double(), rtol=1e-5, atol=1e-6), axis
    assert scores.meta["tokens"] == "26"


def test_provenance_survives_the_file(tmp_path):
    blocks = tiny.blocks()
    scores = calibrate(tiny.model(), blocks)
    scores.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(tmp_path / "scores.safetensors")
    assert all(torch.equal(loaded.by_axis[axis], scores.by_axis[axis]) for axis in scores.by_axis)
    assert loaded.meta == scores.meta and loaded.meta["text_sha256"] == text_hash(blocks) and loaded.meta["tokens"] == "72"
    assert {"hf_minitron", "transformers", "torch", "model_type"} <= set(loaded.meta)


def test_a_weight_that_is_not_a_number_is_named():
    model = tiny.model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.up_proj.weight' holds NaN"):
        calibrate(model, tiny.blocks())


def test_an_activation_that_overflows_is_named():
    model = tiny.model(dtype=torch.float32)
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1e38)
    with pytest.raises(ValueError, match=r"activations at 'model.layers.1.mlp.down_proj' \(ffn\).*float32"):
        calibrate(model, tiny.blocks())
