"""Costs of removal against students that really lack the layers, and what a removal runs."""

from functools import cache

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from hf_minitron import Architecture, calibrate, make_plan, prune_model
from hf_minitron.importance import removal
from hf_minitron.importance.removal import (
    greedy_removal,
    layer_scores,
    removal_costs,
    removal_scores,
    sublayer_costs,
    task_costs,
)
from hf_minitron.importance.without import layer_names, without_layers
from hf_minitron.plan import Plan
from hf_minitron.shape import Shape


def layers_of(model):
    return [model.get_submodule(name) for name in layer_names(model)]


METRICS = ("block_importance", "loss", "perplexity", "logit_mse")
FAMILIES = ("llama", "gpt2", "gpt_neox", "opt", "gemma3_text", "phi", "qwen3_moe", "smollm3", "gpt_oss")
MIXTURES = ("qwen3_moe", "gpt_oss")
LAYERS = 4


def deep(model_type="llama", layers=LAYERS, **changes):
    own = {"smollm3": {"no_rope_layers": [1, 0, 1, 1]}}.get(model_type, {})
    dtype = torch.float32 if model_type in MIXTURES else torch.float64  # experts have no float64
    return tiny.model(model_type, dtype, num_hidden_layers=layers, **own, **changes)


def student(model, removed):
    """The stock model of the other layers."""
    shape = Architecture.of(model.config).shape
    kept = [layer for layer in range(shape["layers"]) if layer not in removed]
    sizes = {**shape.sizes, "layers": len(kept)}
    if "dense_layers" in sizes:
        sizes["dense_layers"] = sum(layer in model.config.mlp_only_layers for layer in kept)
        sizes["moe_layers"] = len(kept) - sizes["dense_layers"]
    return prune_model(model, Plan(shape, Shape(sizes), {"layers": kept}))


def full(model, rows):
    with torch.no_grad():
        return [model(input_ids=row[None], use_cache=False).logits[0].double() for row in rows]


@cache
def deep_sample(model_type):
    """A model that no test changes, its blocks and their rows."""
    model, blocks = deep(model_type), tiny.blocks(3)
    return model, blocks, tuple(blocks["input_ids"][:])


@cache
def logits_without(model, rows, removed):
    """Every metric compares the same students."""
    return full(student(model, removed) if removed else model, rows)


def states(model, rows):
    """The input of every layer and the output of the last one, all rows one after the other."""
    layers, kept = layers_of(model), []
    hooks = [layer.register_forward_hook(lambda m, args, out: kept.append((args[0][0], out[0]))) for layer in layers]
    full(model, rows)
    for hook in hooks:
        hook.remove()
    by_layer = [kept[n :: len(layers)] for n in range(len(layers))]
    return [torch.cat([i for i, _ in seen]) for seen in by_layer] + [torch.cat([o for _, o in by_layer[-1]])]


def reference(model, rows, metric, removed):
    """The formulas on full logits of the model and of the student."""
    if metric == "block_importance":
        seen = states(model, rows)
        before, after = seen[min(removed)], seen[max(removed) + 1]
        return float((1 - torch.nn.functional.cosine_similarity(before, after, dim=-1)).mean())
    whole, without = (logits_without(model, tuple(rows), layers) for layers in ((), tuple(removed)))
    if metric == "logit_mse":
        return float(
            sum((a - b).square().sum() for a, b in zip(whole, without, strict=True)) / sum(a.square().sum() for a in whole)
        )

    def loss(logits):
        pairs = [(x[:-1], row[1:]) for x, row in zip(logits, rows, strict=True)]
        return torch.nn.functional.cross_entropy(torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs]))

    rise = loss(without).exp() - loss(whole).exp() if metric == "perplexity" else loss(without) - loss(whole)
    return float(rise)


def close(found, expected):
    return torch.allclose(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_costs_are_those_of_students_without_the_layers(model_type, metric):
    model, blocks, rows = deep_sample(model_type)
    for size in (1, 2):
        expected = [reference(model, rows, metric, range(start, start + size)) for start in range(LAYERS - size + 1)]
        for batch_size in (1, 2):
            assert close(removal_costs(model, blocks, metric, size, batch_size), expected)
    assert not any("forward" in vars(layer) or layer._forward_hooks for layer in layers_of(model))


def test_block_importance_of_single_layers_is_that_of_the_one_pass():
    model, blocks = deep(), tiny.blocks()
    assert close(removal_costs(model, blocks, "block_importance"), calibrate(model, blocks).scores["layers"].tolist())


@pytest.mark.parametrize("metric", METRICS)
def test_single_removals_run_half_the_layers(metric):
    model, count = deep(layers=6), 0

    def counting(*_):
        nonlocal count
        count += 1

    for layer in layers_of(model):
        layer.self_attn.register_forward_hook(counting)
    removal_costs(model, tiny.blocks(2), metric, batch_size=2)
    assert count == (6 if metric == "block_importance" else 6 + (5 + 4 + 3 + 2 + 1 + 0))
    count = 0
    removal_costs(model, tiny.blocks(2), metric, size=3, batch_size=1)
    assert count == 2 * (6 if metric == "block_importance" else 6 + (3 + 2 + 1 + 0))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(metric, side):
    model, rows = deep(), [tiny.blocks(1, length, seed=length)["input_ids"][0] for length in (5, 12, 9)]

    def pad(row, value):
        fill = row.new_full((12 - len(row),), value)
        return torch.cat([fill, row] if side == "left" else [row, fill]).tolist()

    columns = {"input_ids": [pad(row, 7) for row in rows], "attention_mask": [pad(torch.ones_like(row), 0) for row in rows]}
    found = removal_costs(model, Dataset.from_dict(columns), metric, batch_size=3)
    assert close(found, [reference(model, rows, metric, [layer]) for layer in range(LAYERS)])


def test_chunks_change_nothing(monkeypatch):
    model, blocks = deep(), tiny.blocks()
    whole = removal_costs(model, blocks, "logit_mse")
    monkeypatch.setattr(removal, "CHUNK", 5)
    assert close(removal_costs(model, blocks, "logit_mse"), whole.tolist())


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("metric", ["loss", "logit_mse"])
def test_greedy_removal_equals_repeated_removals(model_type, metric):
    model, blocks = deep(model_type), tiny.blocks(3)
    rows, removed, last = blocks["input_ids"][:], [], {}
    for _ in range(2):
        left = [layer for layer in range(LAYERS) if layer not in removed]
        now = student(model, removed) if removed else model
        last |= {layer: reference(now, rows, metric, [place]) for place, layer in enumerate(left)}
        removed.append(min(left, key=last.get))
    order, costs = greedy_removal(model, blocks, metric, 2)
    assert order == removed
    assert close(costs, [last[layer] for layer in range(LAYERS)])
    scores = removal_scores(order, costs)
    assert scores.argsort().tolist()[:2] == order
    left = [layer for layer in range(LAYERS) if layer not in order]
    assert torch.equal(scores[left], costs[left])


def test_removed_layers_stay_below_costs_of_any_size():
    scores = removal_scores([3, 1], torch.tensor([3e30, 2e30, 2e30, 1e30]))
    assert scores.argsort().tolist()[:2] == [3, 1]
    assert scores[1] < 2e30


def plan_of(scores, layers, after):
    shape = tiny_shape(layers)
    return make_plan({"layers": scores}, shape, shape.cut_to({"layers": after}))


def tiny_shape(layers):
    config = tiny.config(num_hidden_layers=layers)
    return Architecture.of(config).shape


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_scores_of_layers_drop_the_cheapest_block(size):
    generator = torch.Generator().manual_seed(size)
    for _ in range(10):  # of few values, so that many blocks cost the same
        costs = torch.randint(-1, 3, (7 - size,), generator=generator).float()
        first = int(costs.argmin())
        kept = plan_of(layer_scores(costs, size), 6, 6 - size).kept_layers
        assert kept == [layer for layer in range(6) if not first <= layer < first + size]
    assert layer_scores(torch.tensor([3.0, 1.0, 2.0]), 2).tolist() == pytest.approx([3, 1, 1, 2])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_model_without_layers_is_the_student(model_type):
    model, ids = deep(model_type), tiny.blocks(2)["input_ids"][:]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for removed in ([0], [1, 2], [3]):
            expected = student(model, removed)
            settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
            with without_layers(model, removed):
                assert torch.allclose(model(input_ids=ids).logits, expected(input_ids=ids).logits, atol=1e-5)
                assert torch.equal(model.generate(ids, **settings), expected.generate(ids, **settings))  # with its cache
        with pytest.raises(RuntimeError, match="stop"), without_layers(model, [1]), without_layers(model, [1, 2]):
            raise RuntimeError("stop")
        assert torch.equal(model(input_ids=ids).logits, before)


def test_task_costs_are_falls_of_the_score():
    model, ids = deep(), tiny.blocks(2)["input_ids"][:]

    def measure(model):
        with torch.no_grad():
            return float(model(input_ids=ids).logits.max())

    expected = [measure(model) - measure(student(model, [start, start + 1])) for start in range(3)]
    assert close(task_costs(model, 2, measure), expected)
    with pytest.raises(ValueError, match=r"task without the layers \[0, 1\] is nan"):
        task_costs(model, 2, lambda model: float("nan"))


def test_a_model_on_several_devices(tmp_path):
    model, blocks = tiny.model(dtype=torch.float32), tiny.blocks()
    model.save_pretrained(tmp_path / "m")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.layers.2": "cpu", "model.norm": "cpu", "lm_head": "disk"}
    spread = AutoModelForCausalLM.from_pretrained(tmp_path / "m", device_map=places, offload_folder=tmp_path / "offload")
    for _ in range(2):
        assert close(removal_costs(spread, blocks, "loss"), removal_costs(model, blocks, "loss").tolist())


def test_what_cannot_be_measured_is_told():
    model, blocks = deep(), tiny.blocks()
    with pytest.raises(
        ValueError, match="'ppl' is no metric of layers; there are block_importance, loss, perplexity, logit_mse"
    ):
        removal_costs(model, blocks, "ppl")
    for size in (0, 4):
        with pytest.raises(ValueError, match=f"a block of {size} layers, of 4: 1 to 3 can be removed"):
            removal_costs(model, blocks, "loss", size)
    with pytest.raises(ValueError, match="the removal of 4 layers, of 4"):
        greedy_removal(model, blocks, "loss", 4)
    model.model.layers[2].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"loss without the layers \[0\] is nan: weights hold NaN or infinity"):
        removal_costs(model, blocks, "loss")


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "opt", "mixtral"])
def test_sublayers_cost_what_a_model_without_them_loses(model_type):
    model = tiny.model(model_type, torch.float32 if model_type == "mixtral" else torch.float64)
    ids = tiny.blocks()["input_ids"][:]
    found = sublayer_costs(model, tiny.blocks(), "loss")
    architecture = Architecture.of(model.config)

    def loss():
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).item()

    whole = loss()
    for axis in ("heads", "ffn"):
        for layer, name in architecture.taps(axis):
            hook = model.get_submodule(name).register_forward_hook(lambda m, args, out: torch.zeros_like(out))
            assert found[axis][layer].item() == pytest.approx(loss() - whole, abs=1e-5)
            hook.remove()
    assert loss() == whole
