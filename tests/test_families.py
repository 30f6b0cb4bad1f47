"""Every model type and axis: pruning equals masking, in memory equals on disk, unknown families are refused."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from hf_minitron.families.family import FAMILIES, family_of
from hf_minitron.importance.calibrate import calibrate
from hf_minitron.plan import Plan, make_plan
from hf_minitron.pruning.prune import prune_checkpoint, prune_model

IDS = tiny.blocks()["input_ids"][:]


def plan_for(model, **target):
    shape = family_of(model.config).shape_of(model.config)
    return make_plan(calibrate(model, tiny.blocks()), shape, shape.cut_to(target))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def test_the_matrix_is_complete():
    assert sorted(FAMILIES) == sorted(tiny.MODEL_TYPES)


@pytest.mark.parametrize("target", [{"ffn": 31}, {"heads": 2}, {"kv_heads": 1}, {"ffn": 8, "kv_heads": 1, "heads": 1}])
@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_pruned_equals_masked(model_type, target):
    teacher = tiny.model(model_type)
    plan = plan_for(teacher, **target)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    pruned = logits(prune_model(teacher, plan))
    hooks = []
    for i, layer in enumerate(teacher.model.layers):
        keep = plan.keep_at(i)
        for axis, module, width in (("ffn", layer.mlp.down_proj, 1), ("heads", layer.self_attn.o_proj, 6)):
            if axis in keep:
                mask = torch.zeros(tiny.SIZES[axis], dtype=torch.float64)
                mask[keep[axis]] = 1
                mask = mask.repeat_interleave(width)
                hooks.append(module.register_forward_pre_hook(lambda m, args, mask=mask: (args[0] * mask,)))
    unmasked = hooks and logits(prune_model(teacher, plan))
    assert torch.allclose(pruned, logits(teacher), atol=1e-10)
    for hook in hooks:
        hook.remove()
    assert not torch.allclose(pruned, logits(teacher), atol=1e-3), "the cut changed nothing: the test cannot fail"
    assert torch.equal(unmasked, pruned)
    assert all(torch.equal(before[name], p) for name, p in teacher.named_parameters())


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_dropped_layers_equal_skipped_layers(model_type):
    teacher = tiny.model(model_type)
    plan = plan_for(teacher, layers=2)
    pruned = logits(prune_model(teacher, plan))
    (dropped,) = set(range(3)) - set(plan.kept_layers)
    layer = teacher.model.layers[dropped]
    layer.forward = lambda hidden_states, **kwargs: hidden_states
    assert torch.allclose(pruned, logits(teacher), atol=1e-10)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_in_memory_equals_on_disk_and_loads_as_stock(model_type, tied, tmp_path):
    teacher = tiny.model(model_type, dtype=torch.float32, tie_word_embeddings=tied)
    plan = plan_for(teacher, layers=2, hidden=24, ffn=32, heads=2)
    teacher.save_pretrained(tmp_path / "teacher", max_shard_size="30KB")
    tiny.tokenizer().save_pretrained(tmp_path / "teacher")
    prune_checkpoint(tmp_path / "teacher", plan, tmp_path / "student", max_shard_bytes=20_000)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(loaded) is type(teacher) and loaded.config.head_dim == 6 and not loaded.config.name_or_path.endswith("teacher")
    assert '"head_dim": 6' in (tmp_path / "student" / "config.json").read_text()
    assert torch.equal(logits(loaded), logits(prune_model(teacher, plan)))
    assert (tmp_path / "student" / "plan.json").is_file() and (tmp_path / "student" / "tokenizer.json").is_file()
    assert loaded.generate(IDS[:1], max_new_tokens=3, do_sample=False, eos_token_id=None).shape[1] == IDS.shape[1] + 3
    loaded(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in loaded.parameters())


@pytest.mark.parametrize(("model_type", "missing"), [("phi3", "self_attn.qkv_proj.weight"), ("olmo2", "q_norm.weight")])
def test_an_unknown_family_is_refused_naming_the_missing_rows(model_type, missing):
    with pytest.raises(ValueError, match=f"does not cover model type '{model_type}'") as caught:
        family_of(tiny.config(model_type))
    assert missing in str(caught.value) and "llama" in str(caught.value)


def test_an_unknown_family_with_llamas_names_works():
    teacher = tiny.model("gemma")
    assert teacher.config.model_type not in FAMILIES
    assert prune_model(teacher, plan_for(teacher, ffn=8)).config.intermediate_size == 8


@pytest.mark.parametrize("drop", [0, 1, 2])
def test_the_student_shares_no_weight_with_its_teacher(drop):
    """A dropped layer shifts the names of those after it, which are otherwise uncut."""
    teacher = tiny.model()
    shape = family_of(teacher.config).shape_of(teacher.config)
    kept = [layer for layer in range(3) if layer != drop]
    student = prune_model(teacher, Plan(shape, shape.cut_to({"layers": 2}), {"layers": kept}))
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], p) for name, p in teacher.named_parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_pruned_hidden_equals_masked_with_the_norms_corrected(model_type, tied):
    """Masking leaves the norms to divide by the full width: that is undone in their weight and epsilon."""
    teacher = tiny.model(model_type, tie_word_embeddings=tied)
    plan = plan_for(teacher, hidden=24, ffn=32, heads=2)
    pruned = logits(prune_model(teacher, plan))
    mask = torch.zeros(tiny.SIZES["hidden"], dtype=torch.float64)
    mask[plan.keep["hidden"]] = 1
    share = 24 / tiny.SIZES["hidden"]
    with torch.no_grad():
        teacher.model.embed_tokens.weight.mul_(mask)
        for i, layer in enumerate(teacher.model.layers):
            keep = plan.keep_at(i)
            for module, axis, width in ((layer.mlp.down_proj, "ffn", 1), (layer.self_attn.o_proj, "heads", 6)):
                inner = torch.zeros(tiny.SIZES[axis], dtype=torch.float64)
                inner[keep[axis]] = 1
                module.weight.mul_(mask[:, None] * inner.repeat_interleave(width))
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.mul_(share**0.5)
                norm.variance_epsilon *= share
        teacher.model.norm.weight.mul_(mask * share**0.5)
        teacher.model.norm.variance_epsilon *= share
    # the norms of transformers compute in float32
    assert torch.allclose(pruned, logits(teacher), rtol=1e-4, atol=1e-4)
