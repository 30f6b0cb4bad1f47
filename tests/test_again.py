"""A nonuniform student as a teacher: scored in memory and from disk, pruned again and exported."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3PreTrainedModel,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from hf_minitron import axes
from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.family import FAMILIES
from hf_minitron.checkpoint.tensors import tensors_of
from hf_minitron.importance.calibrate import calibrate
from hf_minitron.importance.removal import greedy_removal, removal_costs, sublayer_costs
from hf_minitron.modeling import PrunedForCausalLM
from hf_minitron.plan import Plan, make_nonuniform_plan, make_plan
from hf_minitron.pruning import search
from hf_minitron.pruning.export import export
from hf_minitron.pruning.nonuniform import nonuniform_plan
from hf_minitron.pruning.prune import prune_checkpoint, prune_model
from hf_minitron.shape import ShapeError

IDS = tiny.blocks()["input_ids"][:]
# The first layer has no attention, the second no MLP.
SIZES = {"heads": [0, 4, 2, 4], "kv_heads": [0, 2, 2, 2], "ffn": [72, 0, 30, 51]}
TARGETS = {
    "ffn": {"ffn": 40},
    "hidden": {"hidden": 24},
    "kv_heads": {"kv_heads": 1},
    "heads": {"heads": 2},
    "layers": {"layers": 3},
    "all": {"ffn": 40, "hidden": 24, "kv_heads": 1, "layers": 3},
}


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A nonuniform model, its folder and its statistics."""
    whole = tiny.model("qwen3", torch.float32, num_hidden_layers=4)
    shape = Architecture.of(whole.config).shape
    model = prune_model(whole, make_nonuniform_plan(calibrate(whole, tiny.blocks()).scores, shape, SIZES))
    folder = tmp_path_factory.mktemp("again") / "model"
    model.save_pretrained(folder, max_shard_size="40KB")
    tiny.tokenizer().save_pretrained(folder)
    return model, folder, calibrate(model, tiny.blocks(40), moments=True)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def masked(model, plan):
    """The model with zeros where what goes goes out."""
    architecture = Architecture.of(model.config)
    made = type(model)(model.config).eval()
    made.load_state_dict(model.state_dict())
    with torch.no_grad():
        for axis in ("heads", "ffn"):
            for layer, name in architecture.taps(axis):
                own, place = architecture.shape.at(layer), plan.kept_layers.index(layer) if layer in plan.kept_layers else None
                kept = [] if place is None else plan.keep[axis][place] if axis in plan.keep else range(own[axis])
                gone = torch.tensor(sorted(set(range(own[axis])) - set(kept)), dtype=torch.long)
                position, dim = architecture.weights[name].dim_of(axis)
                if len(gone):
                    index = axes.dim_index(dim, {axis: gone}, own)
                    made.get_parameter(f"{name}.weight").index_fill_(position, index, 0)
    return made


@pytest.mark.parametrize("target", [name for name in TARGETS if "hidden" not in TARGETS[name]])
def test_the_second_student_is_the_masked_first(taught, target):
    model, _, statistics = taught
    shape = Architecture.of(model.config).shape
    plan = make_plan(statistics.scores, shape, shape.cut_to(TARGETS[target]))
    student = prune_model(model, plan)
    expected = logits(masked(model, plan))
    assert torch.allclose(logits(student), expected, rtol=0, atol=1e-5 * expected.abs().max())
    assert Architecture.of(student.config).shape.by_layer == plan.after.by_layer


def test_a_limit_leaves_smaller_layers_as_they_are(taught):
    shape, scores = Architecture.of(taught[0].config).shape, taught[2].scores
    for target, expected in (
        ({"ffn": 40}, {"heads": (0, 4, 2, 4), "kv_heads": (0, 2, 2, 2), "ffn": (40, 0, 30, 40)}),
        ({"kv_heads": 1}, {"heads": (0, 2, 1, 2), "kv_heads": (0, 1, 1, 1), "ffn": (72, 0, 30, 51)}),
        ({"heads": 2}, {"heads": (0, 2, 2, 2), "kv_heads": (0, 2, 2, 2), "ffn": (72, 0, 30, 51)}),
    ):
        assert make_plan(scores, shape, shape.cut_to(target)).after.by_layer == expected, target
    with pytest.raises(ShapeError, match="heads: 3 do not divide over 2 KV heads"):
        shape.cut_to({"heads": 3})


@pytest.mark.parametrize("target", TARGETS)
def test_disk_equals_memory_with_corrections(taught, target, tmp_path):
    model, folder, statistics = taught
    shape = Architecture.of(model.config).shape
    plan = make_plan(statistics.scores, shape, shape.cut_to(TARGETS[target]))
    prune_checkpoint(folder, plan, tmp_path / "student", statistics=statistics)
    loaded = tiny.load_complete(tmp_path / "student")
    student = prune_model(model, plan, statistics)
    assert torch.allclose(logits(loaded), logits(student), rtol=1e-4, atol=1e-4 * logits(student).abs().max())
    assert Plan.load(tmp_path / "student/plan.json") == plan
    assert loaded.num_parameters() == plan.after.num_parameters(Architecture.of(loaded.config).rows)
    kept = tiny.cached_numbers(loaded, 5) * 4
    assert Architecture.of(loaded.config).shape.cache_bytes(5, 4) == kept


def test_scores_from_disk_are_those_in_memory(taught):
    _, folder, statistics = taught
    streamed = calibrate(folder, tiny.blocks(40), moments=True)
    for axis, expected in statistics.scores.items():
        assert torch.allclose(streamed.scores[axis], expected, rtol=1e-4, atol=1e-6, equal_nan=True), axis
    assert streamed.moments.shapes == statistics.moments.shapes
    assert statistics.scores["ffn"].isnan().sum(1).tolist() == [0, 72, 42, 21], "a layer's own channels have scores"


def test_rotation_and_merged_layers_are_for_it(taught):
    model, _, statistics = taught
    shape = Architecture.of(model.config).shape
    plan = make_plan(statistics.scores, shape, shape.cut_to({"hidden": 39}))
    student = prune_model(model, plan, statistics, corrections=["rotation"])
    assert isinstance(student, PrunedForCausalLM)
    assert not student.config.tie_word_embeddings
    whole = prune_model(
        model, make_plan(statistics.scores, shape, shape.cut_to({"hidden": 39})), statistics, corrections=["norm_ratio"]
    )
    assert (logits(student) - logits(model)).norm() < (logits(whole) - logits(model)).norm()


def test_layers_and_sublayers_are_removed(taught):
    model, _, statistics = taught
    blocks = tiny.blocks()
    assert removal_costs(model, blocks, "loss").shape == (4,)
    assert len(greedy_removal(model, blocks, "loss", 2)[0]) == 2
    costs = sublayer_costs(model, blocks)
    assert [bool(cost) for cost in costs["heads"]] == [False, True, True, True]
    assert [bool(cost) for cost in costs["ffn"]] == [True, False, True, True]
    tensors = tensors_of(model)
    whole = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
    plan = nonuniform_plan(tensors, replace(statistics, sublayer_costs=costs), whole // 2)
    student = prune_model(model, plan, statistics)
    left = sum(p.numel() for name, p in student.named_parameters() if ".layers." in name)
    assert 0.3 * whole < left <= whole // 2


def test_layers_made_alike_are_a_stock_model(taught):
    model, _, statistics = taught
    shape = Architecture.of(model.config).shape
    student = prune_model(model, make_nonuniform_plan(statistics.scores, shape, {
        "heads": [0, 0, 2, 2], "kv_heads": [0, 0, 2, 2], "ffn": [0, 0, 30, 30]}))  # fmt: skip
    assert type(student).__name__ == "Qwen3ForCausalLM"
    assert student.config.num_hidden_layers == 2


def test_the_second_student_is_exported(taught, tmp_path):
    _, folder, statistics = taught
    prune_checkpoint(folder, {"ffn": 40, "hidden": 24}, tmp_path / "student", statistics=statistics)
    export(tmp_path / "student", tmp_path / "stock")
    stock, student = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("stock", "student"))
    assert stock.config.model_type == "qwen3"
    assert torch.allclose(logits(stock), logits(student), rtol=1e-4, atol=1e-5)


def test_search_counts_its_shapes(taught):
    model, _, statistics = taught
    architecture = Architecture.of(model.config)
    before, rows = architecture.shape, architecture.rows
    legal = [before.cut_to(target) for target in ({"ffn": 40}, {"kv_heads": 1}, {"hidden": 24}, {"ffn": 24, "heads": 2})]
    many = search._many(legal)
    assert many.num_parameters(rows).tolist() == [shape.num_parameters(rows) for shape in legal]
    assert many.flops_per_token(rows, 9).tolist() == [shape.flops_per_token(rows, 9) for shape in legal]
    assert many.cache_bytes(9, 2).tolist() == [shape.cache_bytes(9, 2) for shape in legal]
    shares = [search.kept_share(statistics.scores, before, {"ffn": size}) for size in (24, 40, 71)]
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] < 1


class LayerwiseConfig(Qwen3Config):
    """A config whose class reads transformers' `per_layer_config`."""

    model_type = "layerwise"


class LayerwiseModel(Qwen3Model):
    config: LayerwiseConfig

    def __init__(self, config):
        whole = type(config)(**{key: value for key, value in config.to_dict().items() if key != "per_layer_config"})
        super().__init__(whole)
        self.config, config._attn_implementation = config, whole._attn_implementation
        self.layers = torch.nn.ModuleList(map(Qwen3DecoderLayer, config.per_layer_config, range(config.num_hidden_layers)))
        self.post_init()


class LayerwiseForCausalLM(Qwen3ForCausalLM):
    config: LayerwiseConfig

    def __init__(self, config):
        Qwen3PreTrainedModel.__init__(self, config)
        self.model = LayerwiseModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


@pytest.fixture
def layerwise(monkeypatch):
    AutoConfig.register("layerwise", LayerwiseConfig, exist_ok=True)
    AutoModel.register(LayerwiseConfig, LayerwiseModel, exist_ok=True)
    AutoModelForCausalLM.register(LayerwiseConfig, LayerwiseForCausalLM, exist_ok=True)
    monkeypatch.setitem(FAMILIES, "layerwise", FAMILIES["qwen3"])
    return tiny.model("layerwise", torch.float32, num_hidden_layers=4)


def test_where_the_stock_class_reads_per_layer_config_a_student_is_stock(layerwise, tmp_path):
    statistics = calibrate(layerwise, tiny.blocks(40), moments=True)
    shape = Architecture.of(layerwise.config).shape
    sizes = {"heads": [4, 4, 2, 4], "kv_heads": [2, 2, 2, 2], "ffn": [72, 24, 30, 51]}
    layerwise.save_pretrained(tmp_path / "teacher")
    plan = make_nonuniform_plan(statistics.scores, shape, sizes)
    prune_checkpoint(tmp_path / "teacher", plan, tmp_path / "student", statistics=statistics)
    written = json.loads((tmp_path / "student/config.json").read_text())
    assert written["model_type"] == "layerwise"
    assert written["per_layer_config"] == {
        "1": {"intermediate_size": 24},
        "2": {"num_attention_heads": 2, "intermediate_size": 30},
        "3": {"intermediate_size": 51},
    }
    student = tiny.load_complete(tmp_path / "student")
    assert type(student) is LayerwiseForCausalLM
    first = prune_model(layerwise, plan, statistics)
    assert torch.allclose(logits(student), logits(first), rtol=1e-4, atol=1e-4)
    before = Architecture.of(student.config).shape
    assert before.by_layer == {axis: tuple(found) for axis, found in sizes.items()}
    again = calibrate(tmp_path / "student", tiny.blocks(40), moments=True)
    second = make_plan(again.scores, before, before.cut_to({"ffn": 30, "layers": 3}))
    prune_checkpoint(tmp_path / "student", second, tmp_path / "second", statistics=again)
    made = tiny.load_complete(tmp_path / "second")
    assert Architecture.of(made.config).shape.by_layer == second.after.by_layer
    assert torch.allclose(logits(made), logits(prune_model(student, second, again)), rtol=1e-4, atol=1e-4)
    before = Architecture.of(made.config).shape
    target = before.cut_to({"ffn": 24, "heads": 2})
    alike = prune_model(made, make_plan(calibrate(made, tiny.blocks()).scores, before, target))
    assert not Architecture.of(alike.config).shape.by_layer
    assert not alike.config.to_dict().get("per_layer_config")
    lacking = prune_model(layerwise, make_nonuniform_plan(statistics.scores, shape, SIZES))
    assert isinstance(lacking, PrunedForCausalLM), "its class cannot leave a sublayer out"
