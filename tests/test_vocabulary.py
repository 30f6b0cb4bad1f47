"""axes, shape, scores and plan."""

import re

import pytest
import tiny
import torch

from hf_minitron import axes
from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.student import check_target
from hf_minitron.importance.calibrate import calibrate
from hf_minitron.plan import Plan, make_plan
from hf_minitron.shape import Shape, ShapeError

SHAPE = Shape(tiny.SIZES)


def take(tensor, pattern, keep, sizes):
    counts = {axis: len(index) for axis, index in keep.items()}
    return axes.join(axes.tensor_shape(pattern, {**sizes, **counts}), axes.pieces(tensor, pattern, keep, sizes))


def test_take_follows_products_and_sums():
    sizes = {"heads": 3, "head_dim": 2, "ffn": 4, "hidden": 5}
    weight = torch.arange(6 * 5.0).view(6, 5)
    kept = take(weight, "(heads head_dim) hidden", {"heads": torch.tensor([0, 2]), "hidden": torch.tensor([4])}, sizes)
    assert kept.tolist() == weight[[0, 1, 4, 5]][:, [4]].tolist()
    fused = torch.arange(8 * 5.0).view(8, 5)
    assert take(fused, "ffn+ffn hidden", {"ffn": torch.tensor([1])}, sizes).tolist() == fused[[1, 5]].tolist()


@pytest.mark.parametrize("pattern", ["ffn  hidden", "(heads", "ffn,hidden", ""])
def test_a_bad_pattern_is_refused(pattern):
    if pattern:
        with pytest.raises(axes.AxisError, match="Cannot read the pattern"):
            axes.parse(pattern)


def test_names_match_in_full_only():
    rows = {"model.layers.{layers}.mlp.up_proj.weight": "ffn hidden", "norm.weight": "hidden"}
    assert axes.match("model.layers.12.mlp.up_proj.weight", rows) == (next(iter(rows)), {"layers": 12})
    assert axes.match("model.norm.weight", rows) is None


def test_a_wrong_shape_is_refused():
    with pytest.raises(axes.AxisError, match=r"\(5, 4\) is not that of"):
        take(torch.zeros(5, 4), "ffn hidden", {}, {"ffn": 4, "hidden": 5})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_costs_are_those_of_the_real_model(model_type, tied):
    model = tiny.model(model_type, dtype=torch.float32, tie_word_embeddings=tied)
    architecture = Architecture.of(model.config)
    rows, shape = architecture.rows, architecture.shape
    buffers = sum(b.numel() for name, b in model.named_buffers() if name.endswith(("e_score_correction_bias", "expert_bias")))
    assert shape.num_parameters(rows) == model.num_parameters() + buffers
    flops, tied = 0, model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, p in model.named_parameters():
        if name.endswith(("embed_positions.weight", "wpe.weight")) or (p is model.get_input_embeddings().weight and not tied):
            continue  # looked up
        if ".experts." in name:  # a token meets some of them; their biases are no products
            flops += 0 if p.dim() < 3 else 2 * p.numel() * shape["experts_per_token"] // shape["experts"]
        elif p.dim() == 2 or "conv" in name and p.dim() == 3:
            flops += 2 * p.numel()
    assert shape.flops_per_token(rows) == flops
    assert shape.cache_bytes(3, 2) == 2 * tiny.cached_numbers(model, 3)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"ffn": 80}, "ffn: 80 is larger than the model's 72"),
        ({"ffn": 0}, "ffn: 0 is not a whole number"),
        ({"ffn": 7.5}, "ffn: 7.5 is not"),
        ({"hidden": 30}, "hidden: 30 is not a multiple of 8; nearest: 24, 32"),
        ({"heads": 3}, "heads: 3 do not divide over 2 KV heads.*Use one of 2, 4"),
        ({"heads": 4, "kv_heads": 1}, "heads: 4 do not divide over 1"),
        ({"fnn": 8}, "did you mean 'ffn'"),
        ({"vocab": 100}, "vocab: 100 is larger than the model's 99"),
        ({"ffn": [8, 16, 24]}, r"ffn: \[8, 16, 24\] is a size for each layer, but a cut has one for all layers; give one size"),
        ({"head_dim": 4}, "head_dim: not an axis of this model that can be cut"),
        ({"ffn": -8, "hidden": 48}, "ffn: -8.*hidden: 48"),
    ],
)
def test_an_illegal_target_says_what_is_allowed(target, message):
    with pytest.raises(ShapeError, match=message):
        SHAPE.cut_to(target, {"hidden": 8, "ffn": 8})


def test_kv_heads_take_their_heads_along():
    assert SHAPE.cut_to({"kv_heads": 1}).sizes == {**tiny.SIZES, "kv_heads": 1, "heads": 2}


REFUSED = [
    ("gpt2", {"heads": 3}, r"GPT2Config refuses hidden=40 with heads=3: .*hidden=30 with heads=3, hidden=20 with heads=2"),
    ("gpt_neox", {"hidden": 24}, r"GPTNeoXConfig refuses hidden=24 .*hidden=30 with heads=3, hidden=20 with heads=2"),
    ("opt", {"hidden": 24, "heads": 3}, r"OPTConfig refuses hidden=24 .*hidden=30 with heads=3"),
    ("stablelm", {"kv_heads": 1}, r"StableLmConfig refuses hidden=40 with heads=2: .*hidden=20 with heads=2"),
    ("arcee", {"hidden": 30}, r"ArceeConfig refuses hidden=30 with heads=4: .*hidden=28 with heads=4, hidden=32 with heads=4"),
]


@pytest.mark.parametrize(("model_type", "target", "message"), REFUSED)
def test_a_shape_that_no_class_holds_is_refused_with_the_nearest(model_type, target, message):
    config = tiny.config(model_type)
    architecture = Architecture.of(config)
    shape = architecture.shape
    with pytest.raises(ShapeError, match=message) as caught:
        check_target(architecture, shape.cut_to(target))
    hidden, heads = (int(number) for number in re.findall(r"hidden=(\d+) with heads=(\d+)", str(caught.value))[1])
    legal = {"hidden": hidden, "heads": heads} | ({"kv_heads": heads // 2} if "kv_heads" in shape.sizes else {})
    check_target(architecture, shape.cut_to(legal))


def test_every_shape_that_is_advised_is_legal():
    sizes = {
        "num_hidden_layers": 1,
        "hidden_size": 5120,
        "intermediate_size": 64,
        "vocab_size": 64,
        "partial_rotary_factor": 0.25,
    }
    config = tiny.AutoConfig.for_model("stablelm", num_attention_heads=32, num_key_value_heads=8, **sizes)  # StableLM-2-12B's
    architecture = Architecture.of(config)
    shape = architecture.shape
    with pytest.raises(ShapeError) as caught:
        check_target(architecture, shape.cut_to({"hidden": 4096}))
    advised = re.findall(r"hidden=(\d+) with heads=(\d+)(?: and kv_heads=(\d+))?", str(caught.value))[1:]
    assert len(advised) == 2
    for hidden, heads, kv_heads in advised:
        target = {"hidden": int(hidden), "heads": int(heads)} | ({"kv_heads": int(kv_heads)} if kv_heads else {})
        check_target(architecture, shape.cut_to(target))


@pytest.mark.parametrize("axis", ["layers", "hidden", "ffn", "heads"])
def test_scores_that_are_not_numbers_are_refused(axis):
    model = tiny.model()
    scores = calibrate(model, tiny.blocks()).scores
    scores[axis][1] = torch.nan
    with pytest.raises(ValueError, match=rf"scores of {axis} hold NaN \(first at 1\)"):
        make_plan(scores, SHAPE, SHAPE.cut_to({axis: {"layers": 2, "heads": 2}.get(axis, 24)}))


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_a_shape_that_another_class_holds_is_accepted(model_type):
    check_target(Architecture.of(tiny.config(model_type)), SHAPE.cut_to({"hidden": 30}))


def test_a_llama_with_biases_has_no_other_class():
    config = tiny.config("llama", attention_bias=True)
    with pytest.raises(ShapeError, match=r"LlamaConfig refuses hidden=30.*hidden=28 with heads=4, hidden=32 with heads=4"):
        check_target(Architecture.of(config), SHAPE.cut_to({"hidden": 30}))


EXPERTS = [
    ("mixtral", {"experts": 1}, "experts: 1 cannot serve a router that sends every token to 2 of them; use 2 or more"),
    ("deepseek_v3", {"experts": 5}, "experts: 5 cannot serve.*use 4 or more, a multiple of 2"),
    ("deepseek_v3", {"shared_ffn": 8}, "shared_ffn: follows ffn in this model"),
    ("mixtral", {"dense_ffn": 8}, "dense_ffn: not an axis of this model"),
    ("mixtral", {"experts": [4, 3, 2]}, "a size for each layer, but no class holds layers with different numbers of them"),
]


@pytest.mark.parametrize(("model_type", "target", "message"), EXPERTS)
def test_an_illegal_number_of_experts_says_what_is_allowed(model_type, target, message):
    config = tiny.config(model_type)
    with pytest.raises(ShapeError, match=message):
        Architecture.of(config).shape.cut_to(target)


def test_plan_keeps_the_best_inside_kv_groups(tmp_path):
    heads = torch.tensor([[1.0, 2, 9, 8], [5, 1, 2, 3], [0, 1, 0, 2]])
    scores = {"heads": heads, "layers": torch.tensor([3.0, 1, 2]), "ffn": torch.rand(3, 72)}
    plan = make_plan(scores, SHAPE, SHAPE.cut_to({"heads": 2}))
    assert plan.keep["heads"] == [[1, 2], [0, 3], [1, 3]]  # one of each group, though layer 0 likes group 1 better
    plan = make_plan(scores, SHAPE, SHAPE.cut_to({"kv_heads": 1, "layers": 2, "ffn": 10}))
    assert plan.kept_layers == [0, 2]
    assert plan.keep["kv_heads"] == [[1], [1]]
    assert plan.keep["heads"] == [[2, 3], [2, 3]]
    assert plan.keep["ffn"][1] == sorted(scores["ffn"][2].argsort()[-10:].tolist())
    assert plan.keep_at(1) is None
    assert plan.keep_at(2)["kv_heads"].tolist() == [1]
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_plan_without_scores_says_which():
    with pytest.raises(ValueError, match="No scores for hidden"):
        make_plan({"ffn": torch.rand(3, 72)}, SHAPE, SHAPE.cut_to({"hidden": 8}))
