"""Students whose layers differ: against the masked teacher, on disk and in memory, and padded to a stock model."""

from dataclasses import replace

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.checkpoint.tensors import tensors_of
from hf_minitron.evaluation.compare import compare
from hf_minitron.importance.calibrate import calibrate
from hf_minitron.modeling import PrunedForCausalLM
from hf_minitron.plan import Plan, make_nonuniform_plan, make_plan
from hf_minitron.pruning.export import export
from hf_minitron.pruning.nonuniform import layer_parameters, nonuniform_plan
from hf_minitron.pruning.prune import prune_checkpoint, prune_model
from hf_minitron.shape import ShapeError

IDS = tiny.blocks()["input_ids"][:]
SIZES = {
    "differing": {"ffn": [72, 48, 8], "heads": [2, 4, 2], "kv_heads": [1, 2, 2]},
    "halves": {"ffn": [72, 0, 32], "heads": [2, 4, 0], "kv_heads": [1, 2, 0]},
    "a layer": {"ffn": [64, 0, 32], "heads": [4, 0, 4], "kv_heads": [2, 0, 2]},
    "attention first": {"ffn": [72, 72, 40], "heads": [0, 4, 4], "kv_heads": [0, 2, 2]},
}


def scored(model_type, **changes):
    teacher = tiny.model(model_type, **changes)
    return teacher, calibrate(teacher, tiny.blocks()).scores, Architecture.of(teacher.config).shape


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "ministral"])
def test_a_nonuniform_student_is_the_masked_teacher(model_type, sizes):
    teacher, scores, shape = scored(model_type)
    plan = make_nonuniform_plan(scores, shape, SIZES[sizes])
    student = prune_model(teacher, plan)
    assert isinstance(student, PrunedForCausalLM)
    lists = student.config.layer_sizes
    assert lists["layer_intermediate_size"] == [
        n for n, h in zip(SIZES[sizes]["ffn"], SIZES[sizes]["heads"], strict=True) if n or h
    ]
    for place, layer in enumerate(plan.kept_layers):
        block, kept = teacher.model.layers[layer], {axis: plan.keep[axis][place] for axis in ("heads", "ffn")}
        gone = torch.ones(72, dtype=torch.bool)
        gone[kept["ffn"]] = False
        heads = torch.ones(4, dtype=torch.bool)
        heads[kept["heads"]] = False
        with torch.no_grad():
            block.mlp.down_proj.weight[:, gone] = 0
            block.self_attn.o_proj.weight.view(40, 4, 6)[:, heads] = 0
            for module in (block.mlp.down_proj,) if not kept["ffn"] else ():
                assert module.bias is None
    for layer in set(range(3)) - set(plan.kept_layers):
        with torch.no_grad():
            teacher.model.layers[layer].mlp.down_proj.weight.zero_()
            teacher.model.layers[layer].self_attn.o_proj.weight.zero_()
    with torch.no_grad():
        expected, found = (model(input_ids=IDS, use_cache=False).logits for model in (teacher, student))
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize("sizes", SIZES)
def test_disk_equals_memory_with_corrections_and_the_padded_model_says_the_same(sizes, tmp_path):
    teacher, _, shape = scored("llama", dtype=torch.float32)
    teacher.save_pretrained(tmp_path / "teacher", max_shard_size="40KB")
    tiny.tokenizer().save_pretrained(tmp_path / "teacher")
    statistics = calibrate(teacher, tiny.blocks(40), moments=True)
    plan = make_nonuniform_plan(statistics.scores, shape, SIZES[sizes], hidden=24)
    student = prune_model(teacher, plan, statistics)
    prune_checkpoint(tmp_path / "teacher", plan, tmp_path / "student", statistics=statistics)
    export(tmp_path / "student", tmp_path / "stock")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(info.values())
    assert Plan.load(tmp_path / "student/plan.json") == plan
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert type(stock).__name__ in ("LlamaForCausalLM", "MistralForCausalLM")
    with torch.no_grad():
        found, disk, padded, plain = (m(input_ids=IDS).logits for m in (student, loaded, stock, prune_model(teacher, plan)))
    assert torch.allclose(disk, found, rtol=1e-4, atol=1e-5)
    assert torch.allclose(padded, found, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, found, rtol=1e-2)
    report = compare({"student": tmp_path / "student"}, tiny.blocks())
    assert report.models["student"]["shape"]["layer_intermediate_size"] == student.config.layer_intermediate_size


def served(model, heads, kv_heads, head_dim):
    """The logits where attention is given rows that one geometry splits, as vLLM's Transformers backend computes it."""

    def attention(module, query, key, value, attention_mask, **kwargs):
        assert "layer_idx" in vars(module)
        rows = [states.transpose(1, 2).reshape(IDS.shape[0], IDS.shape[1], -1) for states in (query, key, value)]
        split = [states.view(*IDS.shape, count, head_dim).transpose(1, 2)
                 for states, count in zip(rows, (heads, kv_heads, kv_heads), strict=True)]  # fmt: skip
        seen.append(module.layer_idx)
        return sdpa_attention_forward(module, *split, None, is_causal=True, **kwargs)

    seen = []
    ALL_ATTENTION_FUNCTIONS.register("one_geometry", attention)
    own = AutoModelForCausalLM.from_config(model.config, attn_implementation="one_geometry").eval()
    own.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits = own(input_ids=IDS, use_cache=False).logits
    assert seen == list(range(model.config.num_hidden_layers)), "every layer dispatches once"
    return logits


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "ministral"])
def test_layers_that_differ_in_ffn_alone_have_one_geometry_of_attention(model_type):
    teacher = tiny.model(model_type, dtype=torch.float32)
    architecture = Architecture.of(teacher.config)
    shape, statistics = architecture.shape, calibrate(teacher, tiny.blocks(40), moments=True)
    statistics = replace(statistics, sublayer_costs={axis: torch.tensor([1.0, 1e-9, 0.3]) for axis in ("heads", "ffn")})
    whole = sum(layer_parameters(architecture, shape.at(layer)) for layer in range(3))
    sizes = (shape["heads"], shape.kv_groups, shape["head_dim"])
    plan = nonuniform_plan(tensors_of(teacher), statistics, int(0.6 * whole), ["ffn"])
    student = prune_model(teacher, plan, statistics)
    assert student.config.layer_intermediate_size[1] == 0, "an MLP may go; attention stays"
    assert student.config.layer_num_attention_heads == [shape["heads"]] * 3
    assert student.config.layer_num_key_value_heads == [shape.kv_groups] * 3
    assert student.is_backend_compatible()
    spent = sum(layer_parameters(architecture, {**shape.at(layer), **plan.after.at(layer)}) for layer in range(3))
    assert 0.5 * whole < spent <= 0.6 * whole
    with torch.no_grad():
        expected = student(input_ids=IDS, use_cache=False).logits
    assert torch.allclose(served(student, *sizes), expected, rtol=1e-4, atol=1e-5)
    other = prune_model(teacher, make_nonuniform_plan(statistics.scores, shape, SIZES["differing"]))
    with pytest.raises(RuntimeError, match="shape"):
        served(other, *sizes)


def test_sizes_that_are_none_are_refused():
    _, scores, shape = scored("llama")
    for sizes, words in (
        ({"ffn": [72, 72]}, r"ffn: \[72, 72\] are not 3 sizes from 0 to 72"),
        ({"ffn": [72, 72, 80]}, "are not 3 sizes from 0 to 72"),
        ({"heads": [4, 3, 4]}, "layer 1: 3 heads do not divide over 2 KV heads with at most 2 for each"),
        ({"heads": [4, 0, 4]}, "layer 1: 0 heads do not divide over 2 KV heads"),
        ({"heads": [4, 4, 4], "kv_heads": [1, 2, 2]}, "layer 0: 4 heads do not divide over 1 KV heads"),
    ):
        with pytest.raises(ValueError, match=words):
            make_nonuniform_plan(scores, shape, sizes)


def test_a_model_type_that_the_class_cannot_hold_is_refused():
    teacher, scores, shape = scored("stablelm")
    plan = make_nonuniform_plan(scores, shape, {"heads": [2, 4, 4], "kv_heads": [1, 2, 2]})
    with pytest.raises(ShapeError, match="Layers of a stablelm cannot differ in size: their class makes '.*q_proj.weight' of"):
        prune_model(teacher, plan)


class NearConfig(LlamaConfig):
    """A config of a type without a table, whose parameters have Llama's names."""

    model_type = "near_llama"
    norms: str = "behind"


class NearLayer(LlamaDecoderLayer):
    """Llama's parts, but the norms stand behind attention and MLP, or one norm serves both."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.behind = config.norms == "behind"

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, cache=None, **kwargs):
        given = hidden_states if self.behind else self.input_layernorm(hidden_states)
        added, _ = self.self_attn(given, position_embeddings, attention_mask, cache, **kwargs)
        if not self.behind:
            return hidden_states + self.post_attention_layernorm(added + self.mlp(given))
        hidden_states = hidden_states + self.input_layernorm(added)
        return hidden_states + self.post_attention_layernorm(self.mlp(hidden_states))


class NearModel(LlamaModel):
    config: NearConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = torch.nn.ModuleList(NearLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.post_init()


class NearForCausalLM(LlamaForCausalLM):
    config: NearConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = NearModel(config)
        self.post_init()


@pytest.fixture
def near():
    AutoConfig.register("near_llama", NearConfig, exist_ok=True)
    AutoModel.register(NearConfig, NearModel, exist_ok=True)
    AutoModelForCausalLM.register(NearConfig, NearForCausalLM, exist_ok=True)
    return lambda norms: tiny.model("near_llama", torch.float32, norms=norms)


@pytest.mark.parametrize("norms", ["behind", "one for both"])
def test_an_unknown_type_whose_norms_stand_elsewhere_gets_no_wrong_corrections(near, norms):
    teacher = near(norms)
    architecture, statistics = Architecture.of(teacher.config), calibrate(teacher, tiny.blocks(40), moments=True)
    shape = architecture.shape
    plan = make_plan(statistics.scores, shape, shape.cut_to({"hidden": 30}))
    with torch.no_grad():
        expected = teacher(input_ids=IDS).logits
    for correction in ("rotation", "layer_merge"):
        with pytest.raises(ValueError, match=f"corrections: {correction} is not for near_llama"):
            prune_model(teacher, plan, statistics, corrections=[correction])
    losses = {}
    for corrections in ([], ["least_squares"], ["norm_ratio"], None):
        student = prune_model(teacher, plan, statistics if corrections != [] else None, corrections or None)
        with torch.no_grad():
            losses[str(corrections)] = (student(input_ids=IDS).logits - expected).square().mean().item()
    assert max(losses.values()) <= losses["[]"] * 1.05, losses
    moments = {read.moment for read in architecture.hidden_reads.values()}
    assert ("model.layers.1.self_attn.q_proj.input" in moments) is (norms == "behind")


def test_an_unknown_type_may_have_layers_of_different_sizes_where_its_norms_stand_as_their_names_say(near):
    for norms, sizes in (("behind", SIZES["halves"]), ("one for both", SIZES["differing"])):
        teacher = near(norms)
        shape = Architecture.of(teacher.config).shape
        plan = make_nonuniform_plan(calibrate(teacher, tiny.blocks()).scores, shape, sizes)
        if norms == "one for both":
            with pytest.raises(
                ShapeError, match="Layers of a near_llama cannot differ in size: input_layernorm serves mlp, too"
            ):
                prune_model(teacher, plan)
            continue
        student = prune_model(teacher, plan)
        assert [len(list(layer.parameters())) for layer in student.model.layers] == [9, 5, 4]


def test_a_class_that_lists_a_width_for_every_layer_holds_a_nonuniform_student(tmp_path):
    """Gemma 3n's, in the widths of its MLPs; heads stay, and the student is cut again."""
    teacher = tiny.model("gemma3n_text", dtype=torch.float32)
    for share, again in ((0.8, False), (0.9, True)):
        architecture, shape = Architecture.of(teacher.config), Architecture.of(teacher.config).shape
        assert not architecture.not_nonuniform
        statistics = calibrate(teacher, tiny.blocks(), moments=True)
        statistics = replace(statistics, sublayer_costs={axis: torch.arange(1.0, 7) for axis in ("heads", "ffn")})
        whole = sum(layer_parameters(architecture, shape.at(layer)) for layer in range(6))
        with pytest.raises(ValueError, match="sizes of a gemma3n_text that may differ by layer are those of ffn; name one"):
            nonuniform_plan(tensors_of(teacher), statistics, int(share * whole), ["heads"])
        plan = nonuniform_plan(tensors_of(teacher), statistics, int(share * whole))
        student = prune_model(teacher, plan, statistics)
        after = Architecture.of(student.config).shape
        assert type(student) is type(teacher)
        assert student.config.intermediate_size == plan.by_layer["ffn"]
        assert len(set(plan.by_layer["ffn"])) > 1
        assert (after["heads"], after["layers"]) == (shape["heads"], 6)
        spent = sum(layer_parameters(architecture, {**shape.at(layer), **after.at(layer)}) for layer in range(6))
        assert 0.9 * share * whole < spent <= share * whole
        assert bool(shape.by_layer) == again
        teacher.save_pretrained(tmp_path / f"teacher-{again}")
        prune_checkpoint(tmp_path / f"teacher-{again}", plan, tmp_path / f"student-{again}", statistics=statistics)
        loaded = tiny.load_complete(tmp_path / f"student-{again}")
        ids = tiny.blocks()["input_ids"][:]
        with torch.no_grad():
            assert torch.allclose(loaded(ids).logits, student(ids).logits, atol=1e-5)
        teacher = student
