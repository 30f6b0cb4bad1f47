"""`hf-minitron plan` on the config.json of public checkpoints: it agrees with the published count, or refuses in one line.

`tests/configs/` holds them as the Hub does: the keys of the version they were made with, old names, nulls, `auto_map`. There
are no weights; what Transformers builds, it builds on the meta device.
"""

import json
import math
import re
from pathlib import Path

import pytest
import tiny
import yaml
from transformers import AutoConfig

from hf_minitron.__main__ import main
from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.layer_settings import LAYER_LISTS
from hf_minitron.architecture.outline import outline
from hf_minitron.architecture.student import student_config
from hf_minitron.plan import Plan
from hf_minitron.stages import prune

CONFIGS = Path(__file__).resolve().parent / "configs"

# Repository to the parameters of its model, as its safetensors headers or its model card count them: numbers from outside, not
# from this code. A head that is tied but stored too (Qwen3-0.6B, Qwen3-1.7B, Qwen1.5-0.5B) and old buffers (Llama-2, gpt2)
# are counted by the Hub's page and not here.
PUBLISHED = {
    "allenai/Olmo-3-1025-7B": 7_298_011_136,
    "allenai/OLMoE-1B-7B-0924": 6_919_161_856,
    "allenai/OLMo-1B-hf": 1_176_764_416,
    "allenai/OLMo-2-0425-1B": 1_484_916_736,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "baidu/ERNIE-4.5-21B-A3B-PT": 21_825_437_888,
    "bigscience/bloom-560m": 559_214_592,
    "bigcode/starcoder": 15_517_456_384,
    "bigcode/starcoder2-3b": 3_030_371_328,
    "ByteDance-Seed/Seed-OSS-36B-Base": 36_151_104_512,
    "codellama/CodeLlama-7b-hf": 6_738_546_688,
    "CohereLabs/aya-expanse-8b": 8_028_033_024,
    "CohereLabs/c4ai-command-r7b-12-2024": 8_028_033_024,
    "deepseek-ai/deepseek-coder-1.3b-base": 1_346_471_936,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "deepseek-ai/DeepSeek-V2-Lite": 15_706_484_224,
    "distilbert/distilgpt2": 81_912_576,
    "EleutherAI/gpt-j-6b": 6_050_882_784,
    "EleutherAI/gpt-neo-125m": 125_198_592,
    "EleutherAI/gpt-neox-20b": 20_554_567_680,
    "EleutherAI/pythia-160m": 162_322_944,
    "EleutherAI/pythia-1.4b": 1_414_647_808,
    "facebook/opt-125m": 125_239_296,
    "facebook/opt-6.7b": 6_658_473_984,
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-7b": 8_537_680_896,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-pt": 999_885_952,
    "google/gemma-3-4b-pt": 4_300_079_472,
    "google/gemma-3-12b-pt": 12_187_325_040,
    "google/gemma-3-27b-pt": 27_432_406_640,
    "HuggingFaceTB/SmolVLM-256M-Instruct": 256_484_928,
    "HuggingFaceTB/SmolVLM-500M-Instruct": 507_482_304,
    "llava-hf/llava-1.5-7b-hf": 7_063_427_072,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "HuggingFaceTB/SmolLM3-3B-Base": 3_075_098_624,
    "huggyllama/llama-7b": 6_738_415_616,
    "ibm-granite/granite-3.0-1b-a400m-base": 1_334_628_352,
    "ibm-granite/granite-3.1-2b-base": 2_533_531_648,
    "kyutai/helium-1-2b": 2_023_868_416,
    "LGAI-EXAONE/EXAONE-3.5-2.4B-Instruct": 2_405_327_360,
    "LGAI-EXAONE/EXAONE-4.0-1.2B": 1_279_391_488,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "microsoft/phi-1_5": 1_418_270_720,
    "microsoft/phi-2": 2_779_683_840,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
    "microsoft/Phi-3.5-MoE-instruct": 41_873_153_344,
    "microsoft/phi-4": 14_659_507_200,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "mistralai/Ministral-8B-Instruct-2410": 8_019_808_256,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Base-2407": 12_247_782_400,
    # its config leaves tie_word_embeddings out, which its class takes for true; so the head it has is not counted
    "mistralai/Mistral-Small-3.1-24B-Base-2503": 24_011_361_280 - 131_072 * 5_120,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "mosaicml/mpt-7b": 6_649_286_656,
    "nvidia/Nemotron-Mini-4B-Instruct": 4_190_509_056,
    "nvidia/nemotron-4-15b": 15_628_775_424,
    "01-ai/Yi-6B": 6_061_035_520,
    "openai-community/gpt2": 124_439_808,
    "openai-community/gpt2-medium": 354_823_168,
    "Qwen/Qwen1.5-0.5B": 463_987_712,
    "Qwen/Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2-VL-2B-Instruct": 2_208_985_600,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen/Qwen3-VL-2B-Instruct": 2_127_532_032,
    "Qwen/Qwen3-VL-4B-Instruct": 4_437_815_808,
    "Qwen/Qwen3-VL-8B-Instruct": 8_767_123_696,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B-Base": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B-Base": 30_532_122_624,
    "rednote-hilab/dots.llm1.base": 142_774_381_696,
    "state-spaces/mamba-130m-hf": 129_135_360,
    "stabilityai/stablelm-2-1_6b": 1_644_515_328,
    "stabilityai/stablelm-3b-4e1t": 2_795_443_200,
    "swiss-ai/Apertus-8B-2509": 8_053_338_240,  # two numbers of each layer's activation among them
    "tencent/Hunyuan-A13B-Instruct": 80_393_183_232,
    "tiiuae/falcon-7b": 6_921_720_704,  # its head is tied, but stored too
    "tiiuae/Falcon3-1B-Base": 1_669_408_768,
    "tiiuae/Falcon3-7B-Base": 7_455_550_464,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "zai-org/GLM-4.5-Air": 110_468_824_832 - 3_616_573_568,  # the layer that predicts a second token
    "zai-org/GLM-4-9B-0414": 9_400_279_040,
    "zai-org/glm-4-9b-chat-hf": 9_399_951_360,
    "LiquidAI/LFM2-350M": 354_483_968,
    "LiquidAI/LFM2-1.2B": 1_170_340_608,
    "mistralai/Mamba-Codestral-7B-v0.1": 7_285_403_648,
    "tiiuae/falcon-mamba-7b": 7_272_665_088,
    "ai21labs/Jamba-v0.1": 51_570_323_328,
    "nvidia/NVIDIA-Nemotron-Nano-9B-v2": 8_888_227_328,
    "tiiuae/Falcon-H1-0.5B-Base": 521_411_104,
    "ibm-granite/granite-4.0-h-micro": 3_191_396_096,
    "Qwen/Qwen3-Next-80B-A3B-Instruct": 79_674_391_296,
    "ibm-granite/granite-4.0-h-tiny": 6_939_037_248,
    "Zyphra/Zamba2-1.2B": 1_215_064_704,
}

# Repository to what is wrong with it and what to do.
REFUSED = {
    "deepseek-ai/DeepSeek-V3": r"is quantized; save it dequantized first \(fp8: .*FineGrainedFP8Config\(dequantize=True\)",
    "facebook/opt-350m": r"this variant of model type 'opt'.*project_out.weight.* Choose another checkpoint",
    "google/flan-t5-small": r"is an encoder-decoder \(t5\), which holds no causal language model. Name a causal language model",
    "internlm/internlm2_5-7b-chat": r"model type 'internlm2' needs code of its own \(auto_map\).* convert it",
    "openai/gpt-oss-20b": r"is quantized; save it dequantized first \(mxfp4: .*Mxfp4Config\(dequantize=True\)",
    "Qwen/Qwen2.5-7B-Instruct-AWQ": r"is compressed with awq, which cannot be loaded here: .* that it was made from",
}
# Keys of config.json that a cut of layers, ffn and experts may change; all others stay what the teacher's are.
CUT = {
    "num_hidden_layers",
    "n_layer",
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "moe_intermediate_size",
    "dtype",
    *LAYER_LISTS,
}
CUT |= {"attn_layer_period", "attn_layer_offset", "expert_layer_period", "expert_layer_offset", "block_auto_adjust_ff_dim"}
CUT |= {
    "full_attn_idxs",
    "hybrid_layer_ids",
    "shared_intermediate_size",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "mlp_only_layers",
    "decoder_sparse_step",
    "first_k_dense_replace",
}
CUT |= {"moe_num_experts", "moe_topk", "attention_layers", "attention_types", "num_layers", "n_layers", "ffn_hidden_size"}


def folder(repository):
    return CONFIGS / repository.rpartition("/")[2]


def plan(model, target, tmp_path, capsys):
    """What `hf-minitron plan` says: exit code, its table by name, its errors."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model": str(model), "run": str(tmp_path / "run"), "prune": {"target": target}}))
    code = main(["plan", str(recipe)])
    captured = capsys.readouterr()
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in captured.out.splitlines() if "|" in line]
    return code, {row[0]: row[1:] for row in cells if len(row) > 2}, captured.err


def cut(config):
    """A target that any model allows: a third of its layers, three quarters of its FFN channels and of its experts."""
    shape = Architecture.of(config).shape
    period = shape.unit("layers")
    steps = {
        "layers": lambda size: size // 3 // period * period,
        "ffn": lambda size: size * 3 // 4 // 8 * 8,
        "experts": lambda size: size * 3 // 4,
    }
    return {axis: step(shape[axis]) for axis, step in steps.items() if axis in shape.axes and axis not in shape.coupled}


def test_every_config_is_asked_about():
    assert sorted(path.name for path in CONFIGS.iterdir()) == sorted(folder(name).name for name in [*PUBLISHED, *REFUSED])
    assert len(PUBLISHED) + len(REFUSED) >= 40
    assert {path.name for path in CONFIGS.rglob("*.*") if path.is_file()} == {"config.json"}, "no weights, no index"
    types = {json.loads((folder(name) / "config.json").read_text())["model_type"] for name in [*PUBLISHED, *REFUSED]}
    assert types >= set(tiny.MODEL_TYPES) - {
        "arcee",
        "bamba",
        "lfm2_moe",
        "ministral",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "vaultgemma",
    }


def once_per_type(repositories):
    """Return parameters of a test over models, one of each model type by default, the others in the slow suite."""
    types = {name: json.loads((folder(name) / "config.json").read_text())["model_type"] for name in repositories}
    first = {model_type: name for name, model_type in reversed(types.items())}
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in first.values())) for name in types]


@pytest.mark.parametrize("repository", once_per_type(PUBLISHED))
def test_plan_agrees_with_the_published_count(repository, tmp_path, capsys):
    config = AutoConfig.from_pretrained(folder(repository))
    target = cut(config)
    code, table, errors = plan(folder(repository), target, tmp_path, capsys)
    assert code == 0, errors
    before, after = (int(number.replace(",", "")) for number in table["parameters"][:2])
    assert before == PUBLISHED[repository]
    assert {axis: int(table[axis][1].replace(",", "")) for axis in target} == target

    full, small, _ = prune.shapes(prune.Args(target), str(folder(repository)))
    kept = list(range(full["layers"]))[-small["layers"] :]
    if full.layer_kinds:  # the first ones, which `plan` takes to stay
        kept = full.first_layers(small["layers"], {})
    student = student_config(Architecture.of(config), Plan(full, small, {"layers": kept}))
    student.save_pretrained(tmp_path / "student")
    loaded = AutoConfig.from_pretrained(tmp_path / "student")
    made = sum(math.prod(shape) for shape in outline(loaded).parameters.values())
    assert made == after < before, "what Transformers makes of the student's config.json has another count"
    old, new = (table.to_dict() | table.to_dict().get("text_config", {}) for table in (config, loaded))
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    assert changed <= CUT | {"transformers_version", "_name_or_path", "head_dim", "text_config"}, changed


@pytest.mark.parametrize("repository", ["microsoft/Phi-3.5-mini-instruct", "microsoft/Phi-4-mini-instruct"])
@pytest.mark.parametrize("target", [{"hidden": 2560}, {"heads": 16}, {"kv_heads": 4}], ids=str)
def test_a_phi3_of_longrope_can_be_cut_in_every_width(repository, target, tmp_path, capsys):
    """Its class counts the factors of longrope by hidden / heads; the student is a Mistral where it refuses them."""
    code, table, errors = plan(folder(repository), target, tmp_path, capsys)
    assert code == 0, errors
    assert {axis: int(table[axis][1].replace(",", "")) for axis in target} == target


@pytest.mark.parametrize("repository", REFUSED)
def test_what_cannot_be_pruned_is_refused_in_one_line(repository, tmp_path, capsys):
    code, table, errors = plan(folder(repository), {}, tmp_path, capsys)
    assert code == 1
    assert not table
    (line,) = [line for line in errors.splitlines() if not line.startswith("[transformers]")]
    assert re.search(REFUSED[repository], line), line
    assert len(line) < 1000


BROKEN = {
    "{": r"config.json is not JSON \(.*line 1.*\); download it again",
    "[]": "config.json holds a list, not the keys of a config",
    "{}": "config.json has no model_type; add one",
    '{"model_type": "lama"}': "of model type 'lama' is in no class of Transformers. Name a causal language model",
    '{"auto_map": {"AutoConfig": "my.Config"}}': "config.json has no model_type; add one",
    '{"model_type": "clip"}': "of model type 'clip' is not a causal language model",
    '{"model_type": "bert"}': r"is an encoder \(bert\), which does not predict the next token",
    '{"model_type": "llama", "hidden_size": "64"}': "is no config of a llama: .*'hidden_size' expected int, got str",
    '{"model_type": "llama", "torch_dtype": "float17"}': "is no config of a llama: .*float17",
    '{"model_type": "llama", "num_attention_heads": 31}': "is no config of a llama: .*not a multiple of",
    '{"model_type": "llama", "rope_scaling": {"type": "foo"}}': "A LlamaConfig does not make .*KeyError: 'foo'",
    '{"model_type": "llama", "quantization_config": {"bits": 4}}': "is compressed with None, .*quant_method",
    '{"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes"}}': "is compressed with bitsandbytes, ",
}


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_config_is_named_in_one_line(content, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(content)
    code, _, errors = plan(tmp_path / "model", {}, tmp_path, capsys)
    (line,) = [line for line in errors.splitlines() if not line.startswith("[transformers]")]
    assert code == 1
    assert re.search(BROKEN[content], line), line


def test_every_parameter_without_a_row_can_be_listed():
    misfits = Architecture.bind(AutoConfig.for_model("cpmant")).misfits
    assert len(misfits) == 13
    name = "cpmant.encoder.output_layernorm.weight"
    assert misfits[name] == f"{name!r} (shape (4096,)) has no row"
    assert not Architecture.bind(AutoConfig.from_pretrained(folder("meta-llama/Llama-3.2-1B"))).misfits
