"""Every model type and axis: pruning equals masking, in memory equals on disk, unknown families are refused."""

import copy
import json
import subprocess
import sys
from contextlib import contextmanager

import families_table
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.family import FAMILIES
from hf_minitron.architecture.refused import MISSING
from hf_minitron.architecture.student import check_target, student_config
from hf_minitron.head import check_head, head_of
from hf_minitron.importance.calibrate import calibrate
from hf_minitron.plan import Plan, make_plan
from hf_minitron.probe import last_hidden_states
from hf_minitron.pruning.prune import prune_checkpoint, prune_model
from hf_minitron.shape import ShapeError

IDS = tiny.blocks()["input_ids"][:]

# What is added to the scores of experts to choose them by; it has no gradient.
CHOOSING = ("e_score_correction_bias", "expert_bias")

# Cuts after which the student is not the masked teacher, with the difference of their logits relative to the largest logit,
# as measured here on the tiny models. `Family.inexact` says why.
INEXACT = {
    ("olmo2", "heads"): 0.52,
    ("olmo2", "kv_heads"): 0.65,
    ("olmo3", "heads"): 0.52,
    ("olmo3", "kv_heads"): 0.50,
    ("olmo_hybrid", "heads"): 0.16,
    ("olmo_hybrid", "kv_heads"): 0.48,
    ("flex_olmo", "heads"): 0.28,
    ("flex_olmo", "kv_heads"): 0.75,
    ("olmoe", "hidden"): 0.29,  # with heads
    ("olmoe", "heads"): 0.29,
    ("olmoe", "kv_heads"): 0.78,
    ("minimax_m2", "heads"): 0.79,
    ("minimax_m2", "kv_heads"): 1.02,
    ("minimax", "heads"): 0.24,
    ("minimax", "kv_heads"): 0.35,
    ("beam", "layers"): 0.47,
    ("bitnet", "ffn"): 0.40,
    ("bitnet", "hidden"): 0.10,  # with heads
    ("bitnet", "heads"): 0.10,
    ("bitnet", "kv_heads"): 0.27,
    ("diffllama", "layers"): 0.34,
    ("doge", "kv_heads"): 0.01,
    ("bloom", "hidden"): 0.01,  # with heads
    ("bloom", "heads"): 0.01,
    ("ctrl", "hidden"): 0.46,
    ("ctrl", "heads"): 0.46,  # with hidden
    ("mpt", "hidden"): 0.31,  # with heads
    ("mpt", "heads"): 0.31,
    ("xglm", "hidden"): 0.36,
    ("xglm", "heads"): 0.36,  # with hidden
    ("bamba", "hidden"): 0.62,
    ("granitemoehybrid", "hidden"): 0.27,
    ("mamba2", "hidden"): 1.06,
    ("nemotron_h", "ssm_heads"): 0.38,
    ("zamba2", "hidden"): 0.33,
}

# What is left of these when norms over all heads or channels are corrected by norm_ratio. The heads of the tiny models hold
# equal energy; test_compensate.py shows what it does where they do not.
CORRECTED = {
    ("olmo2", "heads"): 0.43,
    ("olmo2", "kv_heads"): 0.61,
    ("olmo3", "heads"): 0.41,
    ("olmo3", "kv_heads"): 0.49,
    ("olmo_hybrid", "heads"): 0.14,
    ("olmo_hybrid", "kv_heads"): 0.50,
    ("flex_olmo", "heads"): 0.30,
    ("flex_olmo", "kv_heads"): 0.74,
    ("olmoe", "heads"): 0.30,
    ("olmoe", "kv_heads"): 0.78,
    ("minimax_m2", "heads"): 0.81,
    ("minimax_m2", "kv_heads"): 1.01,
    ("minimax", "heads"): 0.28,
    ("minimax", "kv_heads"): 0.39,
    ("bitnet", "ffn"): 0.29,
    ("bitnet", "heads"): 0.10,
    ("bitnet", "kv_heads"): 0.26,
}


def cases():
    for model_type in tiny.TYPES:
        shape = Architecture.of(tiny.config(model_type)).shape
        for axis in tiny.WIDTHS:
            if axis in (target := tiny.target(shape, axis)):
                follow = {follower for follower, leader in shape.coupled.items() if leader in target}
                yield (model_type, axis), (target.keys() | follow) & FAMILIES[model_type].inexact.keys()


CASES = dict(cases())


def plan_for(model, **target):
    shape = Architecture.of(model.config).shape
    return make_plan(calibrate(model, tiny.blocks()).scores, shape, shape.cut_to(target))


def logits(model):
    if model.dtype == torch.float64 and any("experts" in name for name, _ in model.named_modules()):
        model.set_experts_implementation("eager")  # the default kernel takes no float64
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def test_the_matrix_is_complete():
    assert sorted(FAMILIES) == sorted(tiny.TYPES)
    assert {axis for _, axis in CASES} == set(tiny.WIDTHS)
    assert {case for case, inexact in CASES.items() if inexact} == set(INEXACT)


def vector(size, kept):
    mask = torch.zeros(size, dtype=torch.float64)
    mask[kept] = 1
    return mask


@contextmanager
def masked(model, plan, narrow_gated=False):
    """The teacher with everything that the plan drops switched off where it acts, by hand and without the axis map."""
    architecture, sizes = Architecture.of(model.config), plan.before.sizes
    modules, hooks = dict(model.named_modules()), []

    def scaled_input(module, mask):
        for user in users(model, module):
            hooks.append(user.register_forward_pre_hook(lambda m, args: (args[0] * mask.to(args[0]),)))

    for axis in architecture.tapped:
        for layer, name in architecture.taps(axis):
            module, keep = modules[name], plan.keep_at(layer)
            if axis == "layers" and keep is None:
                module.forward = without_layer(name in architecture.trace.tuples)
            elif keep is None:
                continue
            elif axis in ("dense_ffn", "shared_ffn") or (axis == "ffn" and not name.endswith("experts")):
                if axis in keep:
                    kept = vector(sizes[axis], keep[axis])
                    scaled_input(module, kept.repeat(getattr(module, "in_features", len(kept)) // len(kept)))
            elif axis in ("heads", "ssm_heads", "conv_channels") and axis in keep:
                width = (module.nx if hasattr(module, "nx") else module.in_features) // sizes[axis]
                scaled_input(module, vector(sizes[axis], keep[axis]).repeat_interleave(width))
                mixer = modules[name.rpartition(".")[0]]
                if narrow_gated and axis == "ssm_heads" and hasattr(mixer, "norm"):
                    narrow_gated_norm(mixer.norm, sizes, keep[axis])
                if hasattr(mixer, "x_proj"):  # Mamba-1
                    scaled_input(mixer.x_proj, vector(sizes[axis], keep[axis]))
            elif axis == "ffn" and axis in keep:
                for expert, kept in enumerate(keep["ffn"] if "experts" not in keep else []):
                    dropped = vector(sizes["ffn"], kept) == 0
                    down = module.down_proj.data[expert]
                    (down if getattr(module, "is_transposed", True) else down.T)[dropped] = 0
            elif axis == "experts" and axis in keep:
                silence_experts(modules[name.rpartition(".")[0]], vector(sizes["experts"], keep["experts"]) == 0, hooks)
            elif axis == "hidden" and axis in keep:
                for norm in users(model, module):
                    narrow_norm(norm, keep["hidden"], sizes["hidden"])
    if "hidden" in plan.keep:
        mask = vector(sizes["hidden"], plan.keep["hidden"])
        for name, module in modules.items():
            if name in ("cls.predictions.transform.LayerNorm", "lm_head.layer_norm", "lm_head.norm"):  # of BERT's head
                narrow_norm(module, torch.as_tensor(plan.keep["hidden"]), sizes["hidden"])
            if name.endswith("shared_transformer.input_layernorm"):  # reads the stream and the embeddings
                kept, width = torch.as_tensor(plan.keep["hidden"]), sizes["hidden"]
                narrow_norm(module, torch.cat([kept, kept + width]), 2 * width)
            if name in architecture.weights and architecture.weights[name].role in ("output", "down"):
                if isinstance(module, torch.nn.Linear):  # some attention reads the stream without a norm
                    for user in users(model, module):
                        hooks.append(user.register_forward_hook(lambda m, args, output: output * mask.to(output)))
            embedding = isinstance(module, torch.nn.Embedding) and module.embedding_dim == sizes["hidden"]
            between = (".altup_projections", ".altup_unembed_projections")  # Gemma 3n's states
            made = name.endswith(("embeddings_project", "embedding_hidden_mapping_in", "map_inputs_layer"))
            if embedding or made or name.rpartition(".")[0].endswith(between):
                hooks.append(module.register_forward_hook(lambda m, args, output: output * mask.to(output)))
    yield
    for hook in hooks:
        hook.remove()


def users(model, module):
    """The modules that have the very weights of one, itself among them."""
    weight = getattr(module, "weight", None)
    return [module] if weight is None else [m for m in model.modules() if getattr(m, "weight", None) is weight]


def without_layer(in_tuple):
    """What a layer that is not there returns."""
    return lambda hidden_states, *args, **kwargs: (hidden_states, None) if in_tuple else hidden_states


def silence_experts(block, dropped, hooks):
    """Give the dropped experts a logit of minus infinity (and minus infinity in what is added to choose by)."""
    router, linear = block.gate if hasattr(block, "gate") else block.router, torch.nn.functional.linear
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        if name.endswith(CHOOSING):
            tensor.data[..., dropped] = -torch.inf

    def silenced(*args):
        return linear(*args).masked_fill(dropped, -torch.inf)

    def before(module, args):
        torch.nn.functional.linear = silenced

    def after(module, args, output):
        torch.nn.functional.linear = linear

    hooks += [router.register_forward_pre_hook(before), router.register_forward_hook(after)]


def narrow_gated_norm(norm, sizes, kept):
    """Let the norm behind a Mamba-2 see the kept heads only, a group at a time, and give zeros for the others."""
    width = norm.weight.numel() // sizes["ssm_heads"]
    at = (torch.tensor(kept)[:, None] * width + torch.arange(width)).flatten()
    narrow = copy.deepcopy(norm)
    narrow.weight, narrow.group_size = torch.nn.Parameter(norm.weight.data[at]), len(at) // sizes["ssm_groups"]
    norm.forward = lambda states, gate: torch.zeros_like(states).index_copy(-1, at, narrow(states[..., at], gate[..., at]))


def narrow_norm(norm, kept, hidden):
    """Let a norm see the kept channels only, and give zeros for the others."""
    narrow = copy.deepcopy(norm)
    for name, parameter in list(narrow.named_parameters()):
        setattr(narrow, name, torch.nn.Parameter(parameter.data[kept]))
    if hasattr(narrow, "normalized_shape"):
        narrow.normalized_shape = (len(kept),)

    def forward(states):
        return torch.zeros_like(states).index_copy(-1, kept, narrow(states[..., kept]))

    assert all(p.shape == (hidden,) for p in norm.parameters())
    norm.forward = forward


@pytest.mark.parametrize(("model_type", "axis"), tiny.slow_twins(CASES))
def test_pruned_equals_masked(model_type, axis):
    teacher = tiny.model(model_type)
    shape = Architecture.of(teacher.config).shape
    plan = plan_for(teacher, **tiny.target(shape, axis))
    if axis == "layers":  # the first one goes, so that the others change their numbers
        plan = Plan(shape, plan.after, {"layers": sorted(shape.staying) or [1, 2]})
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    pruned, whole = logits(prune_model(teacher, plan)), logits(teacher)
    assert all(torch.equal(before[name], p) for name, p in teacher.named_parameters())
    assert relative(pruned, whole) > 1e-3, "the cut changed nothing: the test cannot fail"
    with masked(teacher, plan):
        error = relative(pruned, logits(teacher))
    if (model_type, axis) in INEXACT:
        assert abs(error - INEXACT[model_type, axis]) < 0.02, error
    else:
        bar = 1e-4 if teacher.dtype == torch.float32 else 1e-5 if model_type.startswith(("gemma3n", "gemma4", "lara")) else 1e-6
        assert error < bar, error  # norms, routers and rotations compute in float32, and Gemma 4 does not scale its scores


@pytest.mark.parametrize(("model_type", "axis"), tiny.slow_twins(CORRECTED))
def test_norms_over_all_heads_are_corrected(model_type, axis):
    """Without its effect on norms of hidden channels, which the masked model has not."""
    teacher = tiny.model(model_type)
    architecture, statistics = Architecture.of(teacher.config), calibrate(teacher, tiny.blocks(), moments=True)
    for _, norm in architecture.taps("hidden"):
        statistics.moments[norm] = torch.ones_like(statistics.moments[norm])
    plan = make_plan(statistics.scores, architecture.shape, architecture.shape.cut_to(tiny.target(architecture.shape, axis)))
    corrected = logits(prune_model(teacher, plan, statistics, ["norm_ratio"]))
    with masked(teacher, plan):
        assert abs(relative(corrected, logits(teacher)) - CORRECTED[model_type, axis]) < 0.02


BIASES = {"attention_bias": True, "mlp_bias": True}
MAMBA = [
    ("bamba", {}, "hidden"),
    ("bamba", {"mamba_proj_bias": True, **BIASES}, "hidden"),
    ("falcon_h1", {"projectors_bias": True, "mamba_proj_bias": True, **BIASES}, "hidden"),
    ("falcon_h1", {"mamba_rms_norm": True, "mamba_norm_before_gate": False}, "ssm_heads"),
    ("granitemoehybrid", {}, "hidden"),
    ("granitemoehybrid", {"num_local_experts": 0, "shared_intermediate_size": 48}, "ffn"),
    ("jamba", {"mamba_proj_bias": True}, "hidden"),
    ("jamba", {"num_experts": 1}, "ffn"),
    ("lfm2", {"conv_bias": True}, "hidden"),
    ("mamba", {"use_bias": True}, "hidden"),
    ("mamba2", {}, "hidden"),
    ("nemotron_h", {}, "ssm_heads"),
    ("nemotron_h", {"use_bias": True, **BIASES}, "hidden"),
    ("nemotron_h", {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]}, "ffn"),
    ("qwen3_5_text", {"attn_output_gate": False}, "heads"),
    ("zamba2", {}, "hidden"),
    ("zamba2", {"tie_word_embeddings": False, "use_mem_rope": False, "add_bias_linear": True}, "hidden"),
    ("zamba2", {"num_mem_blocks": 2, "layers_block_type": ["hybrid", "linear_attention", "hybrid", "hybrid"]}, "hidden"),
    ("zamba2", {"num_mem_blocks": 2, "layers_block_type": ["hybrid", "linear_attention", "hybrid", "hybrid"]}, "layers"),
]


@pytest.mark.parametrize(("model_type", "changes", "axis"), MAMBA, ids=str)
def test_variants_of_hybrids_are_cut_exactly_but_for_the_norm_behind_mamba(model_type, changes, axis):
    teacher = tiny.model(model_type, **changes)
    shape = Architecture.of(teacher.config).shape
    plan = plan_for(teacher, **tiny.target(shape, axis) | ({"layers": len(shape.staying)} if axis == "layers" else {}))
    pruned = logits(prune_model(teacher, plan))
    with masked(teacher, plan, narrow_gated=True):
        assert relative(pruned, logits(teacher)) < 1e-6


def assert_head_is_a_matrix(model):
    """What losses and perplexity take for its logits are its logits, or the model is refused by them."""
    with last_hidden_states(model) as last:
        expected = logits(model)
    with torch.no_grad():
        head, hidden = head_of(model), last.pop()
        same = head.weight.shape[1] == hidden.shape[-1] and relative(head.logits(hidden), expected) < 1e-5
    try:
        check_head(model.config)
        assert same
    except ValueError as error:
        assert not same
        assert "is more than a matrix" in str(error)


# Every second of the less common types is tied, and the one whose class shares the blocks of layers with its head.
TIED = [t for i, t in enumerate(tiny.TYPES) if i % 2 or t == "zamba2"]
STORED = [(t, tied) for t in tiny.TYPES for tied in (True, False) if t in tiny.MODEL_TYPES or tied == (t in TIED)]


@pytest.mark.parametrize(("model_type", "tied"), tiny.slow_twins(STORED))
def test_in_memory_equals_on_disk_and_loads_as_stock(model_type, tied, tmp_path):
    teacher = tiny.model(model_type, dtype=torch.float32, tie_word_embeddings=tied)
    shape = Architecture.of(teacher.config).shape
    plan = plan_for(teacher, **tiny.target(shape) | {"layers": tiny.every_kind(shape)})
    teacher.save_pretrained(tmp_path / "teacher", max_shard_size="30KB")
    tiny.tokenizer().save_pretrained(tmp_path / "teacher")
    prune_checkpoint(tmp_path / "teacher", plan, tmp_path / "student", max_shard_bytes=20_000)
    loaded = tiny.load_complete(tmp_path / "student")
    assert type(loaded) is type(teacher)
    assert not loaded.config.name_or_path.endswith("teacher")
    assert Architecture.of(loaded.config).shape == plan.after
    stored = {t.data_ptr(): t.numel() for t in loaded.state_dict().values()}
    assert sum(stored.values()) == plan.after.num_parameters(Architecture.of(loaded.config).rows)
    assert torch.equal(logits(loaded), logits(prune_model(teacher, plan)))
    assert (tmp_path / "student" / "plan.json").is_file()
    assert (tmp_path / "student" / "tokenizer.json").is_file()
    assert_head_is_a_matrix(loaded)
    assert loaded.generate(IDS[:1], max_new_tokens=3, do_sample=False, eos_token_id=None).shape[1] == IDS.shape[1] + 3
    loaded(input_ids=IDS, labels=IDS).loss.backward()
    unused = ("lm_head.bias", "cls.predictions.bias", "bert.pooler.weight", "bert.pooler.bias")  # the decoder has its own
    unused = unused if model_type in tiny.BERTS else ()
    for name, parameter in loaded.named_parameters():
        gradient = parameter.grad is not None and parameter.grad.isfinite().all()
        assert gradient or name.endswith(CHOOSING) or ".indexer." in name or name in unused, name
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(loaded))


@pytest.mark.parametrize(
    ("model_type", "missing"), [("moshi", "q_proj.linear.weight"), ("cpmant", "layernorm_before_attention")]
)
def test_an_unknown_family_is_refused_naming_every_missing_row(model_type, missing, monkeypatch):
    monkeypatch.delitem(MISSING, model_type)
    config = tiny.AutoConfig.for_model(model_type, hidden_size=40, num_attention_heads=4, num_hidden_layers=2)
    with pytest.raises(ValueError, match=f"does not cover model type '{model_type}'") as caught:
        Architecture.of(config)
    assert missing in str(caught.value)
    assert "Choose a model type that docs/families.md lists, or write a family" in str(caught.value)


@pytest.mark.parametrize("changes", [{"new_decoder_architecture": True, "num_kv_heads": 2}, {"multi_query": False}])
def test_falcons_of_another_order_of_rows_are_refused(changes):
    """Those of falcon-40b and falcon-rw, which hold queries, keys and values of one head side by side."""
    with pytest.raises(
        ValueError, match="does not cover this variant of model type 'falcon': .*query_key_value.weight' has sha"
    ):
        Architecture.of(tiny.config("falcon", **changes))


def test_a_bert_that_sees_what_comes_is_refused():
    with pytest.raises(ValueError, match="'bert' is an encoder where is_decoder is false, and does not predict the next token"):
        Architecture.of(tiny.config("bert", is_decoder=False))


def test_a_width_that_follows_hidden_is_cut_with_it():
    architecture = Architecture.of(tiny.config("bloom"))
    after = architecture.shape.cut_to({"hidden": 20})
    assert after["ffn"] == 80
    with pytest.raises(
        ShapeError, match="BloomConfig refuses hidden=20 with heads=4.* Nearest that it holds: hidden=20 with hea"
    ):
        check_target(architecture, after)


def test_a_known_family_with_an_unknown_variant_is_refused_naming_the_shape():
    message = r"embed_tokens.weight' has shape \(99, 16\), but its row 'vocab hidden' means \(99, 40\)"
    with pytest.raises(ValueError, match=message):
        Architecture.of(tiny.config("opt", word_embed_proj_dim=16))  # as opt-350m, which projects its embedding


def test_a_row_of_all_layers_that_stands_in_some_is_refused():
    """Parameters would be counted wrong."""
    with pytest.raises(ValueError, match=r"indexer\.wq_b\.weight' stands in 2 of 3 layers, but its row means all"):
        Architecture.of(tiny.config("glm_moe_dsa", indexer_types=["full", "shared", "full"]))


@pytest.mark.parametrize(
    ("model_type", "kind", "reason"),
    [
        ("gpt_neox_japanese", "biased", "only its last layer has"),
        ("modernbert-decoder", "normed", "its first layer has no norm"),
    ],
)
def test_layers_that_cannot_be_dropped_are_refused_by_the_reason(model_type, kind, reason):
    shape = Architecture.of(tiny.config(model_type)).shape
    for layers in (2, {kind: 0}):
        with pytest.raises(ShapeError, match=reason):
            shape.cut_to({"layers": layers})


@pytest.mark.parametrize("model_type", ["seed_oss", "exaone4"])  # norms before, norms after attention and MLP
def test_an_unknown_family_with_llamas_names_works(model_type, monkeypatch):
    monkeypatch.delitem(FAMILIES, model_type)
    teacher = tiny.model(model_type)
    plan = plan_for(teacher, hidden=24, ffn=8)
    pruned = logits(prune_model(teacher, plan))
    with masked(teacher, plan):
        assert relative(pruned, logits(teacher)) < 1e-6
    moments = calibrate(teacher, tiny.blocks(), moments=True)
    with pytest.raises(ValueError, match=f"rotation is not for {model_type}: it needs RMS norms that stand before attention"):
        prune_model(teacher, plan, moments, corrections=["rotation"])


ON_PAGE = pytest.mark.skipif(not transformers.__version__.startswith("5.24."), reason="the page is that of transformers 5.24")


def test_how_many_types_of_the_mapping_work():
    assert sum(map(families_table.works, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)) >= 142


@ON_PAGE
def test_the_readme_counts_them():
    types = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    said = f"{sum(map(families_table.works, types))} of Transformers' {len(types)} causal types"
    assert said in (families_table.PAGE.parent.parent / "README.md").read_text(encoding="utf-8"), said


@ON_PAGE
def test_the_page_of_families_holds_every_table():
    page = families_table.PAGE.read_text()
    assert families_table.part(page, "working") == families_table.working(INEXACT, CORRECTED), (
        "run python tests/families_table.py"
    )


@ON_PAGE
@pytest.mark.slow
def test_every_other_type_is_refused_in_one_line():
    """Were a type to fit Llama's rows by chance, it would have to come into the tests first."""
    refusals = families_table.refusals()
    assert sorted(refusals) == sorted(t for t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if not families_table.works(t))
    assert MISSING.keys() <= refusals.keys(), "a type that works needs no reason"
    for model_type, why in refusals.items():
        assert "\n" not in why, f"{model_type}: {why}"
        assert len(why) < 500, f"{model_type}: {why}"
        known = "does not make a causal language model" in why or MISSING.get(model_type, "no reason") in why
        assert known, f"{model_type}: {why}"
    page = families_table.PAGE.read_text()
    assert families_table.part(page, "refused") == families_table.refused(), "run python tests/families_table.py"


@pytest.mark.parametrize(("model_type", "changes"), tiny.slow_twins(tiny.ACCEPTED), ids=str)
def test_norms_add_to_their_weights_what_is_measured(model_type, changes):
    """Weights of minus the offset let nothing pass."""
    model = tiny.model(model_type, **changes)
    architecture = Architecture.of(model.config)
    offset = architecture.norm_offset
    adds = (
        "gemma",
        "gemma2",
        "gemma3_text",
        "vaultgemma",
        "nemotron",
        "qwen3_5_text",
        "qwen3_5_moe_text",
        "qwen3_next",
        "minimax_m3_vl_text",
    )
    assert offset == (1 if model_type in adds else 0)
    for _, name in architecture.taps("hidden"):
        norm = model.get_submodule(name)
        if hasattr(norm, "weight"):
            with torch.no_grad():
                for parameter, value in norm.named_parameters():
                    value.fill_(-offset if parameter == "weight" else 0)
                assert not norm(torch.randn(1, 3, 40, dtype=model.dtype)).any(), name


def test_what_cannot_be_traced_is_refused_in_one_line(monkeypatch):
    config = tiny.config("llama", rms_norm_eps=1.25e-6)  # no other test's: results are kept
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", lambda self, x: x if x.sum() > 0 else -x)
    with pytest.raises(
        ValueError, match="Cannot see which norms .* of model type 'llama' read: .*Score it without moments"
    ) as e:
        assert Architecture.of(config).hidden_reads
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("model_type", "wrong"), [("dory", "lambda_1"), ("dory", "self_attn.sqk")])
def test_an_unknown_family_with_almost_llamas_names_is_refused(model_type, wrong, monkeypatch):
    monkeypatch.delitem(MISSING, model_type)
    with pytest.raises(ValueError, match=wrong):
        Architecture.of(tiny.config(model_type))


@pytest.mark.parametrize("model_type", ["afmoe", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "minicpm3", "vaultgemma"])
def test_a_narrower_stream_is_as_large_when_the_head_is_the_embedding(model_type):
    """The last norm takes back what the embedding makes up for."""
    teacher = tiny.model(model_type, tie_word_embeddings=True)
    plan = plan_for(teacher, **tiny.target(Architecture.of(teacher.config).shape, "hidden"))
    pruned = logits(prune_model(teacher, plan))
    with masked(teacher, plan):
        assert relative(pruned, logits(teacher)) < 1e-5  # norms compute in float32


@pytest.mark.parametrize("drop", [0, 1, 2])
def test_the_student_shares_no_weight_with_its_teacher(drop):
    """A dropped layer shifts the names of those after it, which are otherwise uncut."""
    teacher = tiny.model()
    shape = Architecture.of(teacher.config).shape
    kept = [layer for layer in range(3) if layer != drop]
    student = prune_model(teacher, Plan(shape, shape.cut_to({"layers": 2}), {"layers": kept}))
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], p) for name, p in teacher.named_parameters())


def test_a_shape_that_llama_refuses_becomes_a_mistral_with_equal_logits(tmp_path):
    teacher = tiny.model("llama", dtype=torch.float32, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32})  # fmt: skip
    plan = plan_for(teacher, hidden=30)
    student = prune_model(teacher, plan)
    assert student.config.model_type == "mistral"
    assert student.config.sliding_window is None
    teacher.save_pretrained(tmp_path / "teacher")
    prune_checkpoint(tmp_path / "teacher", plan, tmp_path / "student")
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["model_type"] == "mistral"
    assert config["architectures"] == ["MistralForCausalLM"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.equal(logits(loaded), logits(student))
    with masked(teacher.double(), plan):
        assert relative(logits(loaded).double(), logits(teacher)) < 1e-4


@pytest.mark.parametrize("rotated", [1.0, 0.5])
@pytest.mark.parametrize("target", [{"hidden": 24, "ffn": 32}, {"heads": 2, "layers": 2}, {"kv_heads": 1}], ids=str)
def test_a_phi3_of_longrope_becomes_a_mistral_with_equal_logits(rotated, target, tmp_path):
    """Its class counts the factors by hidden / heads; Mistral's rotates all channels of a head, and of Phi-4 only some are."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": rotated, "short_factor": [1.0, 1.1, 1.3, 1.7],
            "long_factor": [1.5, 2.0, 4.0, 9.0]}  # fmt: skip
    width = int(32 / rotated)
    teacher = tiny.model("phi3", torch.float32, hidden_size=width, head_dim=None, rope_parameters=rope,
                         original_max_position_embeddings=9, partial_rotary_factor=rotated)  # fmt: skip
    plan = plan_for(teacher, **target)
    student = prune_model(teacher, plan)
    assert (student.config.model_type, student.config.architectures) == ("mistral", ["MistralForCausalLM"])
    teacher.save_pretrained(tmp_path / "teacher")
    prune_checkpoint(tmp_path / "teacher", plan, tmp_path / "student")
    loaded = tiny.load_complete(tmp_path / "student")
    assert torch.equal(logits(loaded), logits(student))
    student = prune_model(teacher.double(), plan)
    with masked(teacher, plan), torch.no_grad():
        for tokens in (8, 12):  # by the short factors, and by the long ones
            found, expected = (model(input_ids=IDS[:, :tokens], use_cache=False).logits for model in (student, teacher))
            assert relative(found, expected) < 1e-6


LAYER_KINDS = [
    ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, "no_rope_layers", [0, 1, 0]),
    ("gemma3_text", {"layer_types": ["full_attention", *["sliding_attention"] * 3]}, "layer_types", ["sliding_attention"] * 3),
    ("qwen3_moe", {"mlp_only_layers": [1, 3]}, "mlp_only_layers", [0, 2]),
    ("qwen3_moe", {"mlp_only_layers": [], "decoder_sparse_step": 2}, "mlp_only_layers", [1]),
    ("deepseek_v3", {"first_k_dense_replace": 2}, "first_k_dense_replace", 1),
]


@pytest.mark.parametrize(("model_type", "changes", "key", "expected"), LAYER_KINDS)
def test_settings_by_layer_follow_a_depth_cut(model_type, changes, key, expected):
    """Layer 0 goes; what the others are is written in their new numbers, and they compute what they did."""
    teacher = tiny.model(model_type, num_hidden_layers=4, **changes)
    shape = Architecture.of(teacher.config).shape
    plan = Plan(shape, shape.cut_to({"layers": 3}), {"layers": [1, 2, 3]})
    student = prune_model(teacher, plan)
    assert getattr(student.config, key) == expected
    with masked(teacher, plan):
        assert relative(logits(student), logits(teacher)) < 1e-6


def rename(folder, change):
    """Store a checkpoint's tensors under other names."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    save_file({change(name): t for name, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("model_type", "change"),
    [
        ("gpt2", lambda name: name.removeprefix("transformer.")),  # as openai-community/gpt2
        ("gpt_neox", lambda name: name.replace("lm_head", "embed_out")),  # as Pythia
        ("deepseek_v3", lambda name: name),
        ("mixtral", lambda name: name),
    ],
)
def test_checkpoints_as_they_lie_on_the_hub(model_type, change, tmp_path):
    teacher = tiny.model(model_type, dtype=torch.float32)
    teacher.save_pretrained(tmp_path / "teacher")
    rename(tmp_path / "teacher", change)
    if model_type == "deepseek_v3":  # a layer beyond the last, that predicts a second token
        tensors = load_file(tmp_path / "teacher" / "model.safetensors")
        tensors |= {n.replace("layers.2", "layers.3"): t.clone() for n, t in tensors.items() if "layers.2" in n}
        save_file(tensors, tmp_path / "teacher" / "model.safetensors", metadata={"format": "pt"})
    names = load_file(tmp_path / "teacher" / "model.safetensors").keys()
    assert model_type != "mixtral" or any("block_sparse_moe.experts.0.w1" in name for name in names)
    plan = plan_for(teacher, **tiny.target(Architecture.of(teacher.config).shape))
    prune_checkpoint(tmp_path / "teacher", plan, tmp_path / "student")
    loaded = tiny.load_complete(tmp_path / "student")
    assert torch.equal(logits(loaded), logits(prune_model(teacher, plan)))


def test_parts_that_transformers_saves_as_equal_chunks_have_their_own_sizes_on_the_hub(tmp_path):
    """The convolutions of query, key and value of OLMo-Hybrid; both kinds of checkpoint give the same student."""
    teacher = tiny.model("olmo_hybrid", dtype=torch.float32)
    plan = plan_for(teacher, hidden=24, ssm_heads=4)
    teacher.save_pretrained(tmp_path / "teacher")
    tensors, convolution = load_file(tmp_path / "teacher" / "model.safetensors"), "model.layers.2.linear_attn.conv1d.weight"
    chunks = [convolution.replace("conv1d", f"{part}_conv1d") for part in "qkv"]
    assert [len(tensors[name]) for name in chunks] == [26, 26, 24]
    own = torch.cat([tensors[name] for name in chunks]).split([10, 10, 56])
    tensors |= {name: part.clone() for name, part in zip(chunks, own, strict=True)}
    save_file(tensors, tmp_path / "teacher" / "model.safetensors", metadata={"format": "pt"})
    prune_checkpoint(tmp_path / "teacher", plan, tmp_path / "student")
    loaded = tiny.load_complete(tmp_path / "student")
    assert torch.equal(logits(loaded), logits(prune_model(teacher, plan)))
    assert [len(load_file(tmp_path / "student" / "model.safetensors")[name]) for name in chunks] == [10, 10, 28]


def test_queries_keys_and_values_that_lie_in_one_tensor_are_cut_apart(tmp_path):
    """Sarvam's, which Transformers splits by the sizes of its parameters."""
    teacher = tiny.model("sarvam_moe", dtype=torch.float32, attention_bias=True)
    teacher.save_pretrained(tmp_path / "teacher")
    names = load_file(tmp_path / "teacher" / "model.safetensors").keys()
    assert {"model.layers.2.attention.query_key_value.weight", "model.layers.2.attention.query_key_value.bias"} <= names
    plan = plan_for(teacher, hidden=24, kv_heads=1)
    prune_checkpoint(tmp_path / "teacher", plan, tmp_path / "student")
    assert torch.equal(logits(tiny.load_complete(tmp_path / "student")), logits(prune_model(teacher, plan)))


def test_experts_that_are_fused_on_disk_too(tmp_path):
    teacher = tiny.model("qwen3_moe", dtype=torch.float32)
    plan = plan_for(teacher, **tiny.target(Architecture.of(teacher.config).shape))
    teacher.save_pretrained(tmp_path / "teacher")
    state = {name: t.clone() for name, t in teacher.state_dict().items()}
    save_file(state, tmp_path / "teacher" / "model.safetensors", metadata={"format": "pt"})
    prune_checkpoint(tmp_path / "teacher", plan, tmp_path / "student")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "student")), logits(prune_model(teacher, plan)))


def test_a_checkpoint_that_lacks_one_expert_is_refused(tmp_path):
    teacher = tiny.model("qwen3_moe", dtype=torch.float32)
    teacher.save_pretrained(tmp_path)
    lost = "model.layers.2.mlp.experts.3.up_proj.weight"
    rename(tmp_path, lambda name: "lost" if name == lost else name)
    shape = Architecture.of(teacher.config).shape
    with pytest.raises(ValueError, match=f"lacks the parameter '{lost}'"):
        prune_checkpoint(tmp_path, Plan(shape, shape, {}), tmp_path / "student")


def test_a_quantized_checkpoint_is_refused(tmp_path):
    tiny.model("gpt_oss", dtype=torch.float32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = Architecture.of(tiny.config("gpt_oss")).shape
    with pytest.raises(ValueError, match="is quantized; save it dequantized first"):
        prune_checkpoint(tmp_path, Plan(shape, shape, {}), tmp_path / "student")


def test_the_config_says_all_that_changed():
    config = tiny.config("gpt2", n_inner=None)
    architecture = Architecture.of(config)
    shape = architecture.shape
    assert shape["ffn"] == 160
    assert shape["head_dim"] == 10
    assert config.n_inner is None
    student = student_config(architecture, Plan(shape, shape.cut_to({"hidden": 20, "heads": 2}), {"hidden": []}))
    assert (student.n_embd, student.n_head, student.n_inner, config.n_embd) == (20, 2, 160, 40)


KILLED = """
import os, signal, sys
from pathlib import Path
from hf_minitron import prune_checkpoint, Plan
from hf_minitron.checkpoint import checkpoint
folder = Path(sys.argv[1])
def killed_at(piece):
    pieces = 0
    def kill(name, tensor):
        nonlocal pieces
        pieces += 1
        if pieces == piece:
            os.kill(os.getpid(), signal.SIGKILL)
        return tensor
    checkpoint.check_finite = kill
    prune_checkpoint(folder / "teacher", Plan.load(folder / "plan.json"), folder / "student", max_shard_bytes=20_000)
for piece in (1, 20):
    process = os.fork() or killed_at(piece) or os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), *sorted(path.name for path in folder.glob("student*")))
"""


def test_a_killed_pruning_leaves_nothing_that_looks_complete(tmp_path):
    teacher = tiny.model(dtype=torch.float32)
    plan = plan_for(teacher, hidden=24)
    teacher.save_pretrained(tmp_path / "teacher")
    plan.save(tmp_path / "plan.json")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["-9 student.tmp", "-9 student.tmp"]
    prune_checkpoint(tmp_path / "teacher", plan, tmp_path / "student", max_shard_bytes=20_000)
    assert not (tmp_path / "student.tmp").exists()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "student")), logits(prune_model(teacher, plan)))


def test_a_head_that_the_config_ties_but_differs_is_refused(tmp_path):
    """Transformers uses such a head; a student without it would be another model."""
    teacher = tiny.model(dtype=torch.float32, tie_word_embeddings=True)
    plan = plan_for(teacher, ffn=32)
    teacher.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    same = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(same, tmp_path / "model.safetensors", metadata={"format": "pt"})
    prune_checkpoint(tmp_path, plan, tmp_path / "student")
    save_file(same | {"lm_head.weight": torch.randn(99, 40)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
        prune_checkpoint(tmp_path, plan, tmp_path / "other")
    with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
        prune_model(AutoModelForCausalLM.from_pretrained(tmp_path), plan)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["student"]


def test_what_a_checkpoint_holds_beside_the_model_does_not_matter(tmp_path):
    teacher = tiny.model(dtype=torch.float32)
    plan = plan_for(teacher, ffn=32)
    teacher.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    odd = {"empty": torch.zeros(0, 3), "eight": torch.zeros(3, dtype=torch.int8), "model.rotary_emb.inv_freq": torch.zeros(3)}
    save_file(tensors | odd, tmp_path / "model.safetensors", metadata={"format": "pt"})
    prune_checkpoint(tmp_path, plan, tmp_path / "student")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "student")), logits(prune_model(teacher, plan)))
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(
        tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match=f"'{name}' .* is stored as F8_E4M3; save the model as bfloat16"):
        prune_checkpoint(tmp_path, plan, tmp_path / "other")


def test_a_plan_for_another_model_is_refused():
    teacher = tiny.model()
    plan = plan_for(teacher, ffn=32)
    with pytest.raises(ValueError, match="plan is for a model of shape .*'ffn': 72.* has .*'ffn': 32"):
        prune_model(prune_model(teacher, plan), plan)
    with pytest.raises(ValueError, match="LlamaModel is not a causal language model"):
        prune_model(teacher.model, plan)


@pytest.mark.parametrize(("model_type", "changes"), [("mixtral", {"num_local_experts": 1, "num_experts_per_tok": 1})])
def test_a_mixture_of_one(model_type, changes, tmp_path):
    teacher = tiny.model(model_type, dtype=torch.float32, **changes)
    plan = plan_for(teacher, ffn=32)
    teacher.save_pretrained(tmp_path / "teacher")
    prune_checkpoint(tmp_path / "teacher", plan, tmp_path / "student")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "student")), logits(prune_model(teacher, plan)))


def test_a_deepseek_of_dense_layers_only_can_be_cut_again():
    teacher = tiny.model("deepseek_v3", dtype=torch.float32, first_k_dense_replace=2)
    shape = Architecture.of(teacher.config).shape
    dense = prune_model(teacher, Plan(shape, shape.cut_to({"layers": 2}), {"layers": [0, 1]}))
    assert "experts" not in Architecture.of(dense.config).shape.sizes
    assert prune_model(dense, plan_for(dense, hidden=24, dense_ffn=32)).config.intermediate_size == 32


def test_a_setting_that_makes_a_cut_inexact_is_told():
    teacher = tiny.model("gpt2", scale_attn_by_inverse_layer_idx=True)
    assert "number of the layer" in Architecture.of(teacher.config).inexact["layers"]
    assert not Architecture.of(tiny.config("gpt2")).inexact
    shape = Architecture.of(teacher.config).shape
    plan = Plan(shape, shape.cut_to({"layers": 2}), {"layers": [1, 2]})
    student = prune_model(teacher, plan)
    with masked(teacher, plan):
        assert relative(logits(student), logits(teacher)) > 1e-3


def test_layers_that_use_others_keys_are_cut_by_kind_and_an_mlp_of_outstanding_channels_is_inexact():
    """Gemma 3n's; every layer has a slice of one table of embeddings."""
    teacher = tiny.model("gemma3n_text")
    shape = Architecture.of(teacher.config).shape
    assert {kind: len(layers) for kind, layers in shape.layer_kinds.items()} == dict.fromkeys(("kv_layers", "store_layers",
                                                                                               "shared_layers"), 2)  # fmt: skip
    with pytest.raises(ShapeError, match="layers: 1 are fewer than 2: the last layers use their keys and values"):
        shape.cut_to({"layers": 1})
    for kept in ([1, 2, 3, 4], [0, 2, 3, 5], [2, 3, 4, 5]):
        teacher = tiny.model("gemma3n_text")
        plan = Plan(shape, shape.cut_to({"layers": 4}), {"layers": kept})
        student = prune_model(teacher, plan)
        assert student.config.num_kv_shared_layers == sum(layer > 3 for layer in kept)
        with masked(teacher, plan):
            assert relative(logits(student), logits(teacher)) < 1e-6
    sparse = tiny.model("gemma3n_text", activation_sparsity_pattern=[0.9, 0.5, *[0.0] * 4])
    plan = plan_for(sparse, ffn=32)
    assert "stands out from all channels" in Architecture.of(sparse.config).inexact["ffn"]
    assert "ffn" not in Architecture.of(teacher.config).inexact
    student = prune_model(sparse, plan)
    with masked(sparse, plan):
        assert relative(logits(student), logits(sparse)) > 1e-3
    plan = Plan(shape, shape.cut_to({"layers": 4}), {"layers": [1, 2, 3, 4]})
    student = prune_model(tiny.model("gemma3n_text", activation_sparsity_pattern=[0.9, 0.5, *[0.0] * 4]), plan)
    assert student.config.activation_sparsity_pattern == [0.5, 0.0, 0.0, 0.0]


def test_mlps_of_widths_that_a_config_lists_are_cut_to_what_each_has(tmp_path):
    """As of the models that are sliced out of Gemma 3n (MatFormer)."""
    teacher = tiny.model("gemma3n_text", dtype=torch.float32, intermediate_size=[72, 40, 56, 72, 40, 56])
    shape = Architecture.of(teacher.config).shape
    assert (shape["ffn"], shape.by_layer) == (72, {"ffn": (72, 40, 56, 72, 40, 56)})
    assert shape.num_parameters(Architecture.of(teacher.config).rows) == sum(p.numel() for p in teacher.parameters())
    plan = plan_for(teacher, ffn=48, layers=5)
    student = prune_model(teacher, plan)
    kept = plan.kept_layers
    assert student.config.intermediate_size == [min(48, shape.by_layer["ffn"][layer]) for layer in kept]
    teacher.save_pretrained(tmp_path / "teacher")
    prune_checkpoint(tmp_path / "teacher", plan, tmp_path / "student")
    loaded = tiny.load_complete(tmp_path / "student")
    assert torch.equal(logits(loaded), logits(student))
    assert Architecture.of(loaded.config).shape.by_layer == plan.after.by_layer
    for layer in set(range(6)) - set(kept):
        teacher.model.layers[layer].forward = without_layer(False)
    with torch.no_grad():
        for position, layer in enumerate(kept):
            down = teacher.model.layers[layer].mlp.down_proj.weight
            down *= vector(down.shape[1], plan.keep["ffn"][position]).to(down)
    assert relative(logits(student), logits(teacher)) < 1e-4


@pytest.mark.parametrize("model_type", ["llama4", "gemma3n", "dbrx", "rwkv", "t5"])
def test_whatever_is_no_family_of_ours_is_refused_in_words(model_type):
    with pytest.raises(ValueError, match="cannot be pruned: |does not make a causal language model"):
        Architecture.of(tiny.AutoConfig.for_model(model_type))


def test_a_type_that_gets_a_table_is_no_longer_refused(monkeypatch):
    config = tiny.config("rwkv")
    with pytest.raises(ValueError, match="'rwkv' cannot be pruned: it has no attention, but a decay .*write a family"):
        Architecture.of(config)
    monkeypatch.setitem(FAMILIES, "rwkv", FAMILIES["llama"])
    with pytest.raises(ValueError, match="does not cover this variant of model type 'rwkv': .*has no row"):
        Architecture.of(config)


@pytest.mark.parametrize("model_type", ["exaone", "mixtral", "hy_v3", "granitemoe", "nemotron_h", "jamba"])
def test_a_student_keeps_the_names_of_its_checkpoint(model_type, tmp_path):
    """Names on disk come from Transformers' conversion mapping; they are what other runtimes read."""
    teacher = tiny.model(model_type, dtype=torch.float32)
    shape = Architecture.of(teacher.config).shape
    teacher.save_pretrained(tmp_path / "teacher")
    prune_checkpoint(tmp_path / "teacher", Plan(shape, shape, {}), tmp_path / "student")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("teacher", "student"))
    assert after.keys() == before.keys() != teacher.state_dict().keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
