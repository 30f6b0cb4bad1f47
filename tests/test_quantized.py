"""Checkpoints in fp8 and mxfp4, dequantized on the way: what Transformers makes of them, and what is done where it cannot."""

import json

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_families import logits
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from hf_minitron.__main__ import main
from hf_minitron.architecture.architecture import Architecture
from hf_minitron.importance.calibrate import calibrate
from hf_minitron.plan import make_plan
from hf_minitron.pruning.prune import prune_checkpoint, prune_model

BLOCK = 16
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
KEPT = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "router")  # in the model's dtype


def fp8(weight):
    """A matrix in fp8 and the scale of each block; the last blocks may be smaller."""
    rows, columns = weight.shape
    down, right = -rows % BLOCK, -columns % BLOCK
    blocks = torch.nn.functional.pad(weight.float(), (0, right, 0, down)).unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    scales = blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-8) / 448
    return (blocks / scales).flatten(2).flatten(0, 1)[:rows, :columns].to(torch.float8_e4m3fn).contiguous(), scales[:, 0, :, 0]


def save_quantized(model, folder, scale_name=".weight_scale_inv"):
    """Save a model in fp8, or the experts of gpt_oss in mxfp4: any numbers will do for these."""
    model.save_pretrained(folder)
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if model.config.model_type == "gpt_oss" and name.endswith("_proj") and weight.dim() == 3:
            experts, given, made = weight.shape
            shape = experts, made, given // 32, 16
            tensors[f"{name}_blocks"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            tensors[f"{name}_scales"] = torch.randint(120, 126, shape[:-1], dtype=torch.uint8, generator=generator)
        elif model.config.model_type != "gpt_oss" and weight.dim() == 2 and not any(part in name for part in KEPT):
            tensors[name], tensors[name.replace(".weight", scale_name)] = fp8(weight)
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    method = {"quant_method": "mxfp4"}
    if model.config.model_type != "gpt_oss":
        method = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    content = json.loads((folder / "config.json").read_text()) | {"quantization_config": method}
    (folder / "config.json").write_text(json.dumps(content))


CASES = [
    ("qwen3", WIDE, ".weight_scale_inv", FineGrainedFP8Config),
    ("minimax_m2", WIDE, ".weight_scale_inv", FineGrainedFP8Config),
    ("mistral", WIDE, ".qscale_weight", FineGrainedFP8Config),
    ("gpt_oss", WIDE, None, Mxfp4Config),
]


@pytest.mark.parametrize(("model_type", "sizes", "scale_name", "method"), CASES)
def test_a_quantized_checkpoint_gives_the_student_of_what_transformers_dequantizes(
    model_type, sizes, scale_name, method, tmp_path
):
    save_quantized(tiny.model(model_type, torch.bfloat16, **sizes), tmp_path / "teacher", scale_name)
    how = {"dtype": "auto", "quantization_config": method(dequantize=True)}
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", **how).eval()
    statistics = calibrate(tmp_path / "teacher", tiny.blocks(), moments=True)  # layer by layer
    expected = calibrate(reference, tiny.blocks())
    assert statistics.scores.keys() == expected.scores.keys()
    assert all(torch.allclose(statistics.scores[a], score, rtol=0.05, equal_nan=True) for a, score in expected.scores.items())

    shape = Architecture.of(reference.config).shape
    plan = make_plan(expected.scores, shape, shape.cut_to({"ffn": 32, "heads": 2, "layers": 2}))
    prune_checkpoint(tmp_path / "teacher", plan, tmp_path / "student", dequantize=True)
    student = tiny.load_complete(tmp_path / "student")
    assert student.dtype == torch.bfloat16
    assert getattr(student.config, "quantization_config", None) is None
    assert torch.equal(logits(student), logits(prune_model(reference, plan)))
    prune_checkpoint(tmp_path / "teacher", plan, tmp_path / "corrected", statistics=statistics, dequantize=True)
    assert not torch.equal(logits(tiny.load_complete(tmp_path / "corrected")), logits(student))


def test_blocks_of_fp8_at_the_end_may_be_smaller(tmp_path):
    """Those of DeepSeek-V3's kv_a_proj_with_mqa are, of 576 rows; Transformers refuses or misreads them."""
    teacher = tiny.model("deepseek_v3", torch.bfloat16)
    save_quantized(teacher, tmp_path / "teacher")
    shape = Architecture.of(teacher.config).shape
    plan = make_plan(calibrate(tmp_path / "teacher", tiny.blocks()).scores, shape, shape.cut_to({}))
    prune_checkpoint(tmp_path / "teacher", plan, tmp_path / "student", dequantize=True)
    stored, student = (load_file(tmp_path / name / "model.safetensors") for name in ("teacher", "student"))
    names = [name for name in stored if f"{name}_scale_inv" in stored]
    assert any(len(stored[name]) % BLOCK for name in names)
    for name in names:
        rows, columns = stored[name].shape
        grid = stored[f"{name}_scale_inv"].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
        assert torch.equal(student[name], (stored[name].float() * grid).bfloat16()), name


def test_a_recipe_asks_for_it_and_plan_says_when_it_does_not(tmp_path, capsys):
    project = tiny.make_project(tmp_path, tiny.model("qwen3", torch.float32, **WIDE))
    for path in (tmp_path / "teacher").glob("*.safetensors*"):
        path.unlink()
    save_quantized(tiny.model("qwen3", torch.float32, **WIDE), tmp_path / "teacher")
    recipe = project["recipe"] | {"prune": {"target": {"ffn": 48}}}
    recipe["distill"]["max_steps"], recipe["evaluate"]["tasks"] = 1, []

    def command(verb, **changes):
        recipe["prune"] |= changes
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        code = main([verb, str(tmp_path / "recipe.yaml")])
        return code, capsys.readouterr().err

    for verb in ("plan", "run"):
        code, errors = command(verb)
        assert code == 1
        assert "is quantized; save it dequantized first (fp8: from_pretrained(" in errors
        assert "or set dequantize to true, which does it on the way" in errors
    for verb in ("plan", "run"):
        code, errors = command(verb, dequantize=True)
        assert code == 0, errors
    for made in ("prune/student", "distill/student"):
        assert tiny.load_complete(tmp_path / "run" / made).config.intermediate_size == 48
    recipe["model"] = str(tmp_path / "run" / "prune" / "student")
    code, errors = command("plan")
    assert code == 1
    assert "dequantize: true, but" in errors
    assert "is not quantized; leave it out" in errors
