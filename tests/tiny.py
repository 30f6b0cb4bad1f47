"""Real models made tiny, with pairwise different sizes so that a transposed row cannot pass."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_minitron.architecture.family import FAMILIES

SIZES = {"layers": 3, "hidden": 40, "ffn": 72, "heads": 4, "kv_heads": 2, "head_dim": 6, "vocab": 99}
WIDTHS = {"ffn": 32, "dense_ffn": 44, "shared_ffn": 12, "experts": 3, "layers": 2, "hidden": 24, "heads": 2, "kv_heads": 1,
          "ssm_heads": 4}  # fmt: skip
ROUTER = {"num_local_experts": 5, "num_experts": 5, "num_experts_per_tok": 2}
NARROW = ROUTER | {"moe_intermediate_size": 48}
SPARSE = {"mlp_layer_types": ["sparse", "dense", "sparse"]}
GLM_MOE = {
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
MLA = GLM_MOE | {
    "q_lora_rank": 14, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 7,
    "num_key_value_heads": 4, "head_dim": None,
}  # fmt: skip
QWEN_MOE = ROUTER | {"moe_intermediate_size": 48, "mlp_only_layers": [1]}
GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7, "logits_scaling": 2.0}
# Hybrids: the mixer of every layer, and Mamba-2 under the names of most of them (heads x their size is twice hidden).
MIXERS = ["linear_attention", "full_attention", "linear_attention"]
MAMBA2 = {"mamba_n_heads": 10, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 5, "mamba_chunk_size": 8}
DELTA = {
    "linear_num_value_heads": 8, "linear_num_key_heads": 2, "linear_key_head_dim": 5, "linear_value_head_dim": 7, "head_dim": 8,
    "layer_types": MIXERS,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4}
GEMMA4 = {
    "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 5,
    "global_head_dim": 8, "final_logit_softcapping": 5.0,
}  # fmt: skip
BERTS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "roberta",
    "rembert", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
)  # fmt: skip
# Where a model type needs more than SIZES: other keys, its own head size, a mixture's sizes.
CHANGES = {
    "bamba": {**MAMBA2, "attn_layer_indices": [1], "head_dim": 8},
    "biogpt": {"head_dim": None},
    "bloom": {"head_dim": None},
    "ctrl": {"head_dim": None, "dff": 72},
    "falcon": {"head_dim": None, "ffn_hidden_size": 72, "num_key_value_heads": None},
    "gpt_bigcode": {"head_dim": None, "n_inner": 72},
    "gpt_neo": {"head_dim": None, "window_size": 5, "attention_types": [[["global", "local"], 1], [["global"], 1]]},
    "gptj": {"head_dim": None, "n_inner": 72, "rotary_dim": 4},
    "mpt": {"head_dim": None},
    "openai-gpt": {"head_dim": None},
    "persimmon": {"head_dim": None, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.4}},
    "xglm": {"head_dim": None, "ffn_dim": 72},
    "bitnet": {"head_dim": None},
    "minimax_m3_vl_text": {**ROUTER, **SPARSE, "dense_intermediate_size": 88, "shared_intermediate_size": 28},
    "codegen": {"head_dim": None, "n_inner": 72, "rotary_dim": 4},
    "laguna": {**NARROW, "num_experts": 5, **SPARSE, "shared_expert_intermediate_size": 28, "sliding_window": 5},
    **dict.fromkeys(BERTS, {"head_dim": None, "is_decoder": True}),
    "electra": {"head_dim": None, "is_decoder": True, "embedding_size": 16},
    "rembert": {"head_dim": None, "is_decoder": True, "input_embedding_size": 16, "output_embedding_size": 18},
    "axk1": {**MLA, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "deepseek_v2": {**MLA, "topk_method": "group_limited_greedy"},
    "deepseek_v3": MLA,
    "deepseek_v32": {
        **MLA, "mlp_layer_types": ["dense", "sparse", "sparse"], "index_topk": 5, "index_head_dim": 5, "index_n_heads": 3,
    },
    "glm4_moe_lite": {**MLA, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "axk2": {
        **MLA, "mlp_layer_types": ["dense", "sparse", "sparse"], "index_topk": 5, "index_head_dim": 5, "index_n_heads": 3,
        "gated_norm_rank": 9,
    },
    "glm_moe_dsa": {
        **MLA, "mlp_layer_types": ["dense", "sparse", "sparse"], "index_topk": 5, "index_head_dim": 5, "index_n_heads": 3,
    },
    "roc_bert": {
        "head_dim": None, "is_decoder": True, "pronunciation_vocab_size": 19, "shape_vocab_size": 21,
        "pronunciation_embed_dim": 11, "shape_embed_dim": 13,
    },
    "gpt_neox_japanese": {"head_dim": None, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.4}},
    "minimax": {
        **ROUTER, "layer_types": MIXERS, "block_size": 4, "linear_attn_alpha_factor": 0.7, "full_attn_beta_factor": 0.8,
    },
    "modernbert-decoder": {"head_dim": None, "local_attention": 10, "cls_token_id": 1, "sep_token_id": 2},
    "minicpm3": {**MLA, "scale_emb": 3, "scale_depth": 1.2, "dim_model_base": 16},
    "sarvam_mla": {**MLA, "q_lora_rank": None, "first_k_dense_replace": 2},
    "youtu": MLA,
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "n_mamba_heads": 10,
        "mamba_d_state": 5, "mamba_ngroups": 2, "chunk_size": 8, "adapter_rank": 3, "use_shared_attention_adapter": True,
        "use_mem_rope": True, "head_dim": None, "num_attention_heads": 5, "num_key_value_heads": 5, "tie_word_embeddings": True,
    },
    "falcon_h1": {**MAMBA2, "mamba_n_heads": 8, "mamba_d_ssm": 64, "ssm_multipliers": [0.9, 0.8, 0.7, 0.6, 0.5],
                  "key_multiplier": 0.5, "mlp_multipliers": [0.6, 0.7], "ssm_in_multiplier": 0.8, "embedding_multiplier": 3.0},
    "gemma2": {"query_pre_attn_scalar": 7, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0, "sliding_window": 5},
    "gemma3_text": {"query_pre_attn_scalar": 7, "sliding_window": 5, "sliding_window_pattern": 2},
    "gemma3n_text": {
        "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 5, "laurel_rank": 7,
        "altup_num_inputs": 3, "sliding_window": 5, "final_logit_softcapping": 5.0,
    },
    "gemma4_text": {
        **GEMMA4, "hidden_size_per_layer_input": 5, "vocab_size_per_layer_input": 99, "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
    },
    "gemma4_unified_text": {**GEMMA4, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
    "glm4": {"head_dim": 8},
    "gpt2": {"n_inner": 72, "head_dim": None},
    "gpt_neox": {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.4}, "head_dim": None},
    "gpt_oss": {**ROUTER, "sliding_window": 5, "rope_parameters": ROPE},
    "granite": GRANITE,
    "granitemoehybrid": {**MAMBA2, **ROUTER, "layer_types": MIXERS, "shared_intermediate_size": 28, "residual_multiplier": 0.7},
    "jamba": {**ROUTER, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 4,
              "expert_layer_offset": 2, "mamba_d_state": 5, "mamba_dt_rank": 3},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": True, "block_multiple_of": 12,
             "intermediate_size": 108},
    "lara_mini": {
        **DELTA, "moe_intermediate_size": 48, "num_experts": 5, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 28,
        "sliding_window": 5,
    },
    "lfm3": {"layer_types": ["conv", "full_attention", "conv"], "sliding_window": 5, "head_dim": 8},
    "lfm2_moe": {**ROUTER, "layer_types": ["conv", "conv", "full_attention", "conv"], "num_hidden_layers": 4,
                 "moe_intermediate_size": 48, "num_dense_layers": 2},
    "mamba2": {"num_heads": 10, "head_dim": 8, "n_groups": 2, "state_size": 5, "chunk_size": 8},
    "mamba": {"state_size": 5, "time_step_rank": 3},
    "falcon_mamba": {"state_size": 5, "time_step_rank": 3},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "mlp", "moe", "linear_attention"], "mamba_num_heads": 8,
        "mamba_head_dim": 7, "n_groups": 2, "ssm_state_size": 5, "chunk_size": 8, "n_routed_experts": 8, "n_group": 2,
        "topk_group": 1, "moe_intermediate_size": 48, "moe_shared_expert_intermediate_size": 28,
    },
    "cohere2": {"logit_scale": 0.3, "sliding_window": 5},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 5, "logit_scale": 0.3,
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "helium": {"head_dim": 10},
    "hyperclovax": GRANITE,
    "mixtral": ROUTER,
    "afmoe": {
        **NARROW, "num_dense_layers": 1, "num_shared_experts": 2, "sliding_window": 5, "global_attn_every_n_layers": 2,
        "mup_enabled": False,
    },
    "aria_text": {"moe_num_experts": 5, "moe_topk": 2, "moe_num_shared_experts": 2},
    "beam": {**NARROW, **SPARSE, "num_experts": 8, "n_group": 2, "topk_group": 1, "sliding_window": 5},
    "cohere2_moe": {**ROUTER, **SPARSE, "num_shared_experts": 2, "prefix_dense_intermediate_size": 88, "sliding_window": 5},
    "dots1": GLM_MOE,
    "ernie4_5_moe": {"moe_num_experts": 5, "moe_k": 2, "moe_intermediate_size": 48, "moe_num_shared_experts": 2},
    "exaone_moe": {
        **NARROW, "mlp_layer_types": ["dense", "sparse", "sparse"], "num_experts": 8, "n_group": 2, "topk_group": 1,
        "num_shared_experts": 2, "sliding_window": 5,
    },
    "flex_olmo": ROUTER,
    "flint": {**QWEN_MOE, "shared_expert_intermediate_size": 28, "sliding_window": 5},
    "glm4_moe": GLM_MOE | {"use_qk_norm": True, "head_dim": 8},
    "granitemoe": GRANITE | ROUTER,
    "granitemoe_swa": {**GRANITE, **ROUTER, "shared_intermediate_size": 28, "sliding_window": 5},
    "granitemoeshared": {**GRANITE, **ROUTER, "shared_intermediate_size": 28},
    "hunyuan_v1_moe": {"num_experts": 5, "moe_topk": 2},
    "hy_v3": {**NARROW, **SPARSE, "num_shared_experts": 2},
    "kolibri1": {**NARROW, "shared_expert_intermediate_size": 28, "sliding_window": 5},
    "llama4_text": {
        **ROUTER, "intermediate_size_mlp": 88, "moe_layers": [1], "no_rope_layers": [1, 0, 1], "attention_chunk_size": 5,
    },
    "mellum": {**NARROW, **SPARSE},
    "mimo_v2_flash": {
        "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
        "v_head_dim": 7, "mlp_layer_types": ["dense", *["sparse"] * 3], "sliding_window": 5, "num_key_value_heads": 1,
        "layer_types": ["full_attention", "sliding_attention"] * 2, "num_hidden_layers": 4,
    },
    "minimax_m2": ROUTER,
    "olmo_hybrid": DELTA,
    "olmoe": ROUTER | {"head_dim": None},
    "phimoe": ROUTER,
    "sarvam_moe": GLM_MOE | {"use_qk_norm": True, "head_dim": 8},
    "solar_open": GLM_MOE,
    "opt": {"ffn_dim": 72, "word_embed_proj_dim": 40, "head_dim": None},
    "phi": {"head_dim": 8},
    "qwen2_moe": {**QWEN_MOE, "shared_expert_intermediate_size": 28},
    "qwen3_5_moe_text": {**DELTA, **ROUTER, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 28},
    "qwen3_5_text": DELTA,
    "qwen3_moe": QWEN_MOE,
    "qwen3_next": {**DELTA, **QWEN_MOE, "shared_expert_intermediate_size": 28},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "stablelm": {"qk_layernorm": True, "head_dim": None},
    "vaultgemma": {"query_pre_attn_scalar": 7, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
}  # fmt: skip
MODEL_TYPES = (
    "arcee", "bamba", "cohere2", "deepseek_v3", "falcon_h1", "falcon_mamba", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2",
    "gpt_neox", "gpt_oss", "granite", "granitemoehybrid", "jamba", "lfm2", "lfm2_moe", "llama", "mamba", "mamba2", "ministral",
    "mistral", "mixtral", "nemotron", "nemotron_h", "olmo", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "smollm3", "stablelm", "starcoder2", "vaultgemma",
)  # fmt: skip
# The others, which only the tests of all that is accepted run on.
MORE_TYPES = (
    *BERTS, "minimax_m3_vl_text", "bitnet", "codegen", "diffllama", "doge", "laguna", "glm_moe_dsa", "axk2",
    "gpt_neox_japanese", "minimax", "lara_mini", "lfm3", "modernbert-decoder", "zamba2",
    "apertus1p5_text", "biogpt", "bloom", "ctrl", "falcon", "gpt_bigcode", "gpt_neo", "gptj", "mpt", "openai-gpt", "persimmon",
    "xglm",
    "axk1", "deepseek_v2", "deepseek_v32", "glm4_moe_lite", "minicpm3", "sarvam_mla", "youtu",
    "gemma3n_text", "gemma4_text", "gemma4_unified_text", "mimo_v2_flash", "olmo_hybrid", "sarvam_moe",
    "afmoe", "aria_text", "beam", "cohere2_moe", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "flint", "glm4_moe",
    "granitemoe", "granitemoe_swa", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "kolibri1", "llama4_text", "mellum",
    "minimax_m2", "olmoe", "phimoe", "solar_open",
    "cohere_compass_text",
    "apertus", "cohere", "cwm", "ernie4_5", "exaone", "exaone4", "glm", "granite_swa", "helium", "hunyuan_v1_dense",
    "hyperclovax", "internlm3", "iquestcoder", "jais2", "ministral3", "nanochat", "olmo3", "seed_oss",
)  # fmt: skip
# Settings that move a norm or a reader.
VARIANTS = (
    ("opt", {"do_layer_norm_before": False}),
    ("opt", {"do_layer_norm_before": False, "_remove_final_layer_norm": True}),
    ("opt", {"_remove_final_layer_norm": True}),
    ("stablelm", {"use_parallel_residual": True}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt2", {"tie_word_embeddings": True}),
    ("gemma2", {"tie_word_embeddings": True}),
)
TYPES = (*MODEL_TYPES, *MORE_TYPES)
ACCEPTED = (*((model_type, {}) for model_type in TYPES), *VARIANTS)
WORDS = [f"w{i}" for i in range(SIZES["vocab"] - 3)]


def slow_twins(cases):
    """Return parameters of a test over model types, one type of each family table by default, the others in the slow suite.

    `MODEL_TYPES` are all in the default suite: each has something of its own.
    """
    tables, kept = set(), set()
    for model_type in TYPES:
        table = frozenset(FAMILIES[model_type].rows.items())
        kept |= {model_type} if model_type in MODEL_TYPES or table not in tables else set()
        tables.add(table)
    made = []
    for case in cases:
        case = (case,) if isinstance(case, str) else case
        made.append(pytest.param(*case, marks=[] if case[0] in kept else [pytest.mark.slow]))
    return made


def config(model_type="llama", **changes):
    values = {
        "num_hidden_layers": SIZES["layers"],
        "hidden_size": SIZES["hidden"],
        "intermediate_size": SIZES["ffn"],
        "num_attention_heads": SIZES["heads"],
        "num_key_value_heads": SIZES["kv_heads"],
        "head_dim": SIZES["head_dim"],
        "vocab_size": SIZES["vocab"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    values |= CHANGES.get(model_type, {}) | changes
    made = AutoConfig.for_model(model_type, **{key: value for key, value in values.items() if value is not None})
    return made


def target(shape, *axes):
    """Smaller legal sizes of some axes; of all that can be cut when none is named."""
    wanted = {axis: WIDTHS[axis] for axis in axes or WIDTHS if axis in shape.sizes and axis in WIDTHS}
    wanted = {axis: size for axis, size in wanted.items() if axis not in {**shape.coupled, **shape.fixed}}
    if shape.sizes.get("head_dim") == 10:  # the class takes it to be hidden / heads
        wanted |= (
            {"hidden": 20, "heads": 2}
            if {"hidden", "heads", "kv_heads"} & wanted.keys() and "hidden" not in shape.fixed
            else {}
        )
    if "expert_groups" in shape.sizes and "experts" in wanted:
        wanted["experts"] = 4  # two in each group
    if "kv_heads" not in axes and axes and shape.sizes.get("heads") == shape.kv_groups:
        wanted.pop("kv_heads", None)
    return {axis: size for axis, size in wanted.items() if size != shape[axis]}


def every_kind(shape):
    """One layer less, of a kind that has several, so that some of every kind stay; or two layers."""
    if "layers" in shape.fixed:
        return shape["layers"]
    kinds = {kind: set(layers) for kind, layers in shape.layer_kinds.items()}
    for kind, layers in kinds.items():
        if kind not in shape.fixed and len(layers) > 1 and all(other - {layer} for other in kinds.values() for layer in layers):
            return {kind.removesuffix("_layers"): len(layers) - 1}
    return WIDTHS["layers"]


def model(model_type="llama", dtype=torch.float64, seed=0, **changes):
    dtype = torch.float32 if model_type == "xglm" else dtype  # its class masks in float32 only
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config(model_type, **changes)).to(dtype).eval()
    shake(made)
    return made


def shake(made):
    """Give weights other values than those they are made with."""
    with torch.no_grad():
        for name, parameter in made.named_parameters():  # norms of ones and biases of zeros would hide mistakes
            if parameter.dim() == 1 or "bias" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)
            if name.endswith((".gate.weight", ".router.weight")):  # made of zeros: every expert would be as good
                parameter.normal_()
        for name, buffer in made.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                buffer.uniform_(0, 0.2)


def cached_numbers(made, tokens):
    """The numbers that a model's cache holds after some tokens: keys, values and states."""
    with torch.no_grad():
        out = made(input_ids=torch.arange(3, 3 + tokens)[None], use_cache=True)
    cache = out.get("cache") if out.get("cache") is not None else out.past_key_values
    return sum(map(_numbers, map(vars, cache.layers)))


def _numbers(value):
    if isinstance(value, torch.Tensor):
        return value.numel() if value.is_floating_point() else 0
    return sum(map(_numbers, value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()))


def load_complete(folder, auto=AutoModelForCausalLM):
    """Load a model by plain Transformers, which finds every tensor in the folder and no other."""
    loaded, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["unexpected_keys"], info["unexpected_keys"]
    return loaded


def blocks(rows=6, length=12, seed=0):
    ids = torch.randint(3, SIZES["vocab"], (rows, length), generator=torch.Generator().manual_seed(seed))
    return Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")


def tokenizer(words=WORDS, adds_bos=False):
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {word: i + 3 for i, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def text(documents, seed):
    ids = torch.randint(0, len(WORDS), (documents, 40), generator=torch.Generator().manual_seed(seed))
    return [" ".join(WORDS[i] for i in row) for row in ids]


def make_project(folder: Path, made=None) -> dict:
    made = made or model(dtype=torch.float32)
    made.save_pretrained(folder / "teacher", max_shard_size="40KB")
    tokenizer().save_pretrained(folder / "teacher")
    for seed, part in enumerate(("train", "calibration", "held_out")):
        rows = [json.dumps({"text": document}) for document in text(30, seed)]
        (folder / f"{part}.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "tasks").mkdir()
    items = [json.dumps({"context": d.rsplit(" ", 1)[0], "word": d.rsplit(" ", 1)[1]}) for d in text(8, 9)]
    (folder / "tasks" / "tiny.jsonl").write_text("\n".join(items) + "\n")
    task = {
        "task": "tiny_last_word",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "tasks" / "tiny.jsonl")}},
        "output_type": "loglikelihood",
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "doc_to_target": " {{word}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "tasks" / "tiny.yaml").write_text(yaml.safe_dump(task))
    recipe = {
        "model": str(folder / "teacher"),
        "run": str(folder / "run"),
        "score": {"text": str(folder / "calibration.jsonl"), "tokens": 256, "block_size": 16},
        "prune": {"target": {"hidden": 24, "ffn": 48}},
        "distill": {
            "text": str(folder / "train.jsonl"),
            "block_size": 16,
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.003,
            "save_steps": 2,
            "save_total_limit": 2,
            "logging_steps": 1,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
        },
        "evaluate": {
            "text": str(folder / "held_out.jsonl"),
            "tokens": 256,
            "block_size": 16,
            "tasks": ["tiny_last_word"],
            "include_path": str(folder / "tasks"),
        },
        "publish": {"base_model": "owner/teacher", "license": "apache-2.0"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return {"folder": folder, "recipe": recipe, "path": folder / "recipe.yaml"}
