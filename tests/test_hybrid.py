"""Hybrids: layers of several kinds are cut by kind, removed, scored, pruned, distilled, evaluated and published."""

from pathlib import Path

import pytest
import tiny
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from hf_minitron.__main__ import main
from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.outline import trace
from hf_minitron.architecture.student import student_config
from hf_minitron.distillation.states import check_states
from hf_minitron.head import head_of
from hf_minitron.importance.calibrate import calibrate
from hf_minitron.importance.removal import removal_costs
from hf_minitron.importance.residuals import read_residuals
from hf_minitron.plan import Plan, make_plan, stand_in
from hf_minitron.pruning.compensate import DEFAULT_CORRECTIONS
from hf_minitron.pruning.prune import prune_model
from hf_minitron.shape import ShapeError
from hf_minitron.stages.score import check_layers_target

TARGETS = {
    "qwen3_5_text": {"hidden": 24, "ffn": 48, "layers": {"linear": 1, "attention": 1}, "ssm_heads": 4},
    "nemotron_h": {"hidden": 24, "ffn": 32, "experts": 4, "layers": {"mamba": 1}, "ssm_heads": 4, "heads": 2},
    "zamba2": {"hidden": 24, "ffn": 32, "layers": {"mamba": 1}},
    "gemma3n_text": {"hidden": 24, "ffn": 32, "heads": 2, "layers": {"kv": 1, "shared": 1}},
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TARGETS)
def test_a_whole_run(model_type, project, tmp_path):
    teacher = tiny.model(model_type, dtype=torch.float32)
    teacher.save_pretrained(tmp_path / "teacher")
    tiny.tokenizer().save_pretrained(tmp_path / "teacher")
    recipe = {**project["recipe"], "model": str(tmp_path / "teacher"), "run": str(tmp_path / "run")}
    recipe["prune"] = {"target": TARGETS[model_type]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["plan", str(tmp_path / "recipe.yaml")]) == 0
    assert main(["run", str(tmp_path / "recipe.yaml")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/publish/model")
    shape = Architecture.of(model.config).shape
    assert type(model) is type(teacher)
    assert {axis: shape[axis] for axis in TARGETS[model_type] if axis != "layers"} == {
        axis: size for axis, size in TARGETS[model_type].items() if axis != "layers"
    }
    assert {f"{kind}_layers": count for kind, count in TARGETS[model_type]["layers"].items()}.items() <= shape.sizes.items()


def test_layers_by_kind_keep_the_best_of_each():
    model = tiny.model(
        "nemotron_h", dtype=torch.float32, layers_block_type=[*["linear_attention", "mlp"] * 3, "full_attention"]
    )
    shape = Architecture.of(model.config).shape
    assert shape.layer_kinds == {"mamba_layers": (0, 2, 4), "mlp_layers": (1, 3, 5), "attention_layers": (6,)}
    scores = calibrate(model, tiny.blocks()).scores | {"layers": torch.tensor([5.0, 1, 4, 2, 3, 2.5, 0])}
    after = shape.cut_to({"layers": {"mamba": 2, "mlp": 1}})
    assert {axis: after[axis] for axis in ("layers", "mamba_layers", "mlp_layers", "attention_layers")} == {
        "layers": 4, "mamba_layers": 2, "mlp_layers": 1, "attention_layers": 1,
    }  # fmt: skip
    assert make_plan(scores, shape, after).keep["layers"] == [0, 2, 5, 6]
    for count, kept in ((4, [0, 2, 4, 6]), (6, [0, 2, 3, 4, 5, 6])):  # the attention layer is worth least, and stays
        assert make_plan(scores, shape, shape.cut_to({"layers": count})).keep["layers"] == kept
        assert shape.cut_to({"layers": count})["attention_layers"] == 1


def test_a_plan_without_attention_is_refused():
    model = tiny.model("bamba", dtype=torch.float32)
    shape = Architecture.of(model.config).shape
    with pytest.raises(ValueError, match=r"The plan drops every layer of attention \(1\), by which .* keep one"):
        prune_model(model, Plan(shape, shape.cut_to({"layers": 2}), {"layers": [0, 2]}))


WRONG_KINDS = {
    ("llama", "{'attention': 1}"): "this model's are of one kind",
    ("nemotron_h", "{'mamba': 3}"): r"\{'mamba': 3\} are not numbers of layers of a kind; this model's are mamba \(0 to 2\), ",
    ("nemotron_h", "{'gru': 1}"): "are not numbers of layers of a kind",
    ("nemotron_h", "{'mamba': True}"): "are not numbers of layers of a kind",
    ("nemotron_h", "{}"): "are not numbers of layers of a kind",
    ("qwen3_next", "{'attention': 1, 'dense': 1}"): "some layers are of several of these kinds; name others of ",
    ("nemotron_h", "{'attention': 0}"): "this model's are mamba .0 to 2., attention .1 to 1., mlp .0 to 1., moe .0 to 1.",
}


@pytest.mark.parametrize(("model_type", "layers"), WRONG_KINDS)
def test_layers_of_kinds_that_a_model_has_not_are_refused(model_type, layers):
    shape = Architecture.of(tiny.config(model_type)).shape
    with pytest.raises(ShapeError, match=WRONG_KINDS[model_type, layers]) as caught:
        shape.cut_to({"layers": yaml.safe_load(layers)})
    assert "\n" not in str(caught.value)


def test_a_block_that_layers_share_is_scored_and_corrected_by_all_that_use_it():
    model, seen = tiny.model("zamba2", dtype=torch.float32), []
    shape, statistics = Architecture.of(model.config).shape, calibrate(model, tiny.blocks(), moments=True)
    hooks = [
        model.get_submodule(f"model.layers.{layer}.shared_transformer.feed_forward.down_proj").register_forward_pre_hook(
            lambda module, args: seen.append(args[0])
        )
        for layer in shape.layer_kinds["attention_layers"]
    ]
    with torch.no_grad():
        model(input_ids=tiny.blocks()["input_ids"][:])
    for hook in hooks:
        hook.remove()
    assert len(seen) == 2
    expected = sum(given.abs().mean(1).square().sum(0) for given in seen).sqrt()
    assert torch.allclose(statistics.scores["ffn"][1], expected, rtol=1e-4)
    assert statistics.scores["ffn"][[0, 2, 3]].isnan().all()
    read = torch.cat([given.flatten(0, 1)[::4] for given in seen]).double()
    moment = statistics.moments["model.layers.1.shared_transformer.feed_forward.down_proj"]
    assert torch.allclose(moment[:-1].double(), read.T @ read / len(read), rtol=1e-3, atol=1e-5)
    assert shape.flops_per_token(Architecture.of(model.config).rows) > 2 * shape.num_parameters(
        Architecture.of(model.config).rows
    )  # the block is met twice


def test_layers_that_share_blocks_stay():
    shape = Architecture.of(
        tiny.config("zamba2", num_hidden_layers=6, layers_block_type=["linear_attention", "hybrid"] * 3)
    ).shape
    assert shape.cut_to({"layers": {"mamba": 1}})["layers"] == 4
    scores = {"layers": torch.tensor([3.0, 0, 2, 0, 1, 0])}
    assert make_plan(scores, shape, shape.cut_to({"layers": 5})).keep["layers"] == [0, 1, 2, 3, 5]
    wrong = {
        "2": "2 are fewer than 3: its layers of attention use shared blocks in turn",
        "{attention: 2}": r"this model's are mamba \(0 to 3\), attention \(3 to 3\), shared \(1 to 1\)",
    }
    for layers, message in wrong.items():
        with pytest.raises(ShapeError, match=message):
            shape.cut_to({"layers": yaml.safe_load(layers)})
    model = tiny.model("zamba2", dtype=torch.float32)
    shape = Architecture.of(model.config).shape
    with pytest.raises(ShapeError, match="attention_layers: cannot be cut in a zamba2: its layers of attention use shared"):
        prune_model(model, Plan(shape, shape.with_layers([0, 1]), {"layers": [0, 1]}))


def test_kinds_are_not_ranked_by_blocks_or_greedily():
    for score in ({"layers_block": 2}, {"layers_remove": 1}):
        with pytest.raises(ValueError, match="takes the best layers of each kind"):
            check_layers_target(score, 4, {"mamba": 1})
    check_layers_target({}, 4, {"mamba": 1})


@pytest.mark.parametrize(
    ("model_type", "target", "message"),
    [
        ("bamba", {"hidden": 36}, "hidden: 36 is not a multiple of 8, so that ssm_heads can keep their ratio to it"),
        ("bamba", {"ssm_heads": 4}, r"ssm_heads: follows hidden in this model \(0.25 times as large\); cut hidden instead"),
        ("lfm2", {"conv_channels": 20}, "conv_channels: follows hidden in this model"),
        ("jamba", {"dense_ffn": 32}, "dense_ffn: follows ffn in this model"),
        ("nemotron_h", {"ssm_heads": 3}, "ssm_heads: 3 do not divide over 2 SSM groups; every SSM group keeps the same 1 to 4"),
        ("mamba2", {"heads": 2}, "heads: not an axis of this model"),
    ],
)
def test_sizes_that_follow_others(model_type, target, message):
    shape = Architecture.of(tiny.config(model_type)).shape
    with pytest.raises(ShapeError, match=message):
        shape.cut_to(target)


def test_losses_on_states_that_some_layers_lack_are_refused():
    config = tiny.config("qwen3_5_text")
    check_states(config, config, 3, ["embedding", "block", "mlp_input"], "last-2")
    with pytest.raises(ValueError, match="query_query is not for qwen3_5_text, whose layers do not all give it; it has "):
        check_states(config, config, 3, ["query_query"], "last-2")


@pytest.mark.parametrize("model_type", ["bamba", "falcon_h1", "gemma3n_text", "lfm2", "nemotron_h", "qwen3_5_text", "zamba2"])
def test_a_removed_layer_costs_what_the_model_without_it_loses(model_type):
    model, rows = tiny.model(model_type, dtype=torch.float32), tiny.blocks()["input_ids"][:]
    shape, costs = Architecture.of(model.config).shape, removal_costs(model, tiny.blocks(), "loss")
    layers = range(shape["layers"])
    for layer in layers:
        if (layer,) == shape.layer_kinds.get("attention_layers") or layer in shape.staying:
            continue  # a student without it is refused
        kept = [other for other in layers if other != layer]
        without = prune_model(model, Plan(shape, shape.cut_to({"layers": len(kept)}), {"layers": kept}))
        with torch.no_grad():
            lost = without(input_ids=rows, labels=rows).loss - model(input_ids=rows, labels=rows).loss
        assert abs(float(costs[layer] - lost)) < 1e-4


def test_layers_whose_kinds_repeat_stay_in_whole_periods():
    """Jamba's config says of which layers every so manieth is one of attention or of experts."""
    model = tiny.model("jamba", dtype=torch.float32, num_hidden_layers=8)
    shape = Architecture.of(model.config).shape
    with pytest.raises(ShapeError, match="layers: 6 is not a multiple of 4, in which kinds of layers repeat"):
        shape.cut_to({"layers": 6})
    with pytest.raises(ShapeError, match="kinds of layers repeat in this model; give the number of all layers"):
        shape.cut_to({"layers": {"mamba": 2}})
    plan = make_plan(calibrate(model, tiny.blocks()).scores, shape, shape.cut_to({"layers": 4}))
    assert plan.keep["layers"] in ([0, 1, 2, 3], [4, 5, 6, 7])
    assert prune_model(model, plan).config.layers_block_type == model.config.layers_block_type[:4]


@pytest.mark.parametrize("tokens", [12, 4])
@pytest.mark.parametrize(
    "model_type", ["llama", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "falcon_h1", "jamba",
                   "mimo_v2_flash", "nemotron_h", "qwen3_5_text", "zamba2"]
)  # fmt: skip
def test_the_cache_that_is_counted_is_the_one_that_transformers_keeps(model_type, tokens):
    model = tiny.model(model_type, dtype=torch.float32)
    kept, shape = tiny.cached_numbers(model, tokens), Architecture.of(model.config).shape
    one_less = {
        "gemma2": 3,
        "gemma3_text": 3,
        "gemma3n_text": 2,
        "gemma4_text": 1,
        "gemma4_unified_text": 2,
        "mimo_v2_flash": 3,
    }
    # Transformers keeps a window without the token that is predicted from it
    assert abs(4 * kept - shape.cache_bytes(tokens, 4)) <= 4 * 2 * 2 * 6 * one_less.get(model_type, 0)
    for count in (8, 100):
        grown = shape.cache_bytes(10**6 + count, 4) - shape.cache_bytes(10**6, 4)
        assert grown == count * shape.kv_cache_bytes_per_token(4)


def test_a_long_text_costs_gemma_what_its_few_full_layers_keep():
    config = AutoConfig.from_pretrained(Path(__file__).parent / "configs/gemma-3-1b-pt")
    shape = Architecture.of(config).shape
    assert shape.kv_cache_bytes_per_token(2) == 4 * 2 * 256 * 2  # 4 of 26 layers see everything
    assert shape.cache_bytes(32768, 2) == (4 * 32768 + 22 * 512) * 2 * 256 * 2
    full = shape.flops_per_token(Architecture.of(config).rows)
    assert shape.flops_per_token(Architecture.of(config).rows, 32768) - full == (4 * 32768 + 22 * 512) * 4 * 4 * 256


def test_plan_counts_a_context(project, capsys):
    assert main(["plan", str(project["path"]), "--context", "32768"]) == 0
    out = capsys.readouterr().out
    assert "cache bytes at 32,768 tokens" in out
    assert "FLOPs per token at 32,768 tokens" in out
    assert main(["plan", str(project["path"]), "--context", "0"]) == 1
    assert "--context: 0 is not a number of tokens from 1 on" in capsys.readouterr().err


@pytest.mark.parametrize("model_type", ["bamba", "lfm2", "qwen3_5_text"])
def test_an_mlp_takes_over_what_a_dropped_layer_of_another_kind_added(model_type):
    teacher, blocks = tiny.model(model_type, dtype=torch.float32), tiny.blocks(100)
    shape, states = Architecture.of(teacher.config).shape, []
    plan = Plan(shape, shape.cut_to({"layers": 2}), {"layers": [0, 1]})
    statistics, residuals = calibrate(teacher, blocks, moments=True), read_residuals(teacher, blocks, plan)
    merged = prune_model(teacher, plan, statistics, [*DEFAULT_CORRECTIONS, "layer_merge"], residuals)
    for model in (teacher, prune_model(teacher, plan), merged):
        with torch.no_grad():
            states.append(model(input_ids=blocks["input_ids"][:], use_cache=False, output_hidden_states=True).hidden_states[-1])
    sliced, corrected = ((state - states[0]).square().mean() for state in states[1:])
    assert corrected < 0.9 * sliced


@pytest.mark.parametrize("model_type", ["bamba", "granitemoehybrid", "lfm2", "nemotron_h", "qwen3_5_text", "qwen3_next"])
def test_a_cut_by_kind_costs_what_the_student_does(model_type):
    """Its layers of attention are known before any is chosen: what they keep of a text is not a share of all layers'."""
    architecture = Architecture.of(tiny.config(model_type))
    kinds = {kind: len(layers) for kind, layers in architecture.shape.layer_kinds.items()}
    kind = next(kind for kind, count in kinds.items() if count > 1 and kind in ("mamba_layers", "linear_layers", "conv_layers"))
    after = architecture.shape.cut_to({"layers": {kind.removesuffix("_layers"): 1}})
    student = Architecture.of(student_config(architecture, stand_in(architecture.shape, after)))
    assert after.kv_cache_bytes_per_token(2) == student.shape.kv_cache_bytes_per_token(2) > 0
    assert after.cache_bytes(32768, 2) == student.shape.cache_bytes(32768, 2)
    assert after.flops_per_token(student.rows, 32768) == student.shape.flops_per_token(student.rows, 32768)


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
def test_layers_in_bfloat16_whose_stream_is_in_float32(model_type):
    """As checkpoints on the Hub are: what a norm gives is still what the next module reads, and the head casts it."""
    model = tiny.model(model_type, dtype=torch.bfloat16)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        hidden = model.backbone(ids, use_cache=False).last_hidden_state
        assert hidden.dtype == torch.float32, "the test cannot fail"
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(head_of(model).logits(hidden[0]), expected[0].float(), rtol=0.02, atol=0.02)
    model.config.dtype = torch.bfloat16
    assert "backbone.norm_f.output" in calibrate(model, tiny.blocks(), moments=True).moments.shapes
    assert trace(model.config).reads == trace(tiny.config(model_type)).reads
