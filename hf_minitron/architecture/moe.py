"""Mixtures of experts with Llama's module names. Tables only, no functions.

Layers come in two kinds here, so a row says in which it stands: `{layers}` in all, `{moe_layers}` in those with experts,
`{dense_layers}` in those with one plain MLP. In memory the experts of a layer are one tensor; most checkpoints store every
expert by itself, under names that Transformers' conversion mapping gives.
"""

from hf_minitron.architecture.llama import (
    ATTENTION_ROWS,
    CONFIG_KEYS,
    EMBEDDING_ROWS,
    FULL_NORM,
    FULL_NORM_ATTENTION_ROWS,
    HEAD_ROWS,
    NORM_ROWS,
    SCALED_EMBEDDING,
)

BLOCK = "model.layers.{moe_layers}.mlp"

ROUTER_ROWS = {
    f"{BLOCK}.gate.weight": "experts hidden",
    f"{BLOCK}.router.weight": "experts hidden",  # aria, phimoe
    f"{BLOCK}.router.bias": "experts",  # gpt_oss
    f"{BLOCK}.router.gate.weight": "experts hidden",  # afmoe
    f"{BLOCK}.gate.wg.weight": "experts hidden",  # hunyuan
    # what is added to the scores that experts are chosen by
    f"{BLOCK}.gate.e_score_correction_bias": "experts",
    f"{BLOCK}.gate.moe_statics.e_score_correction_bias": "one experts",  # ernie4_5
    f"{BLOCK}.e_score_correction_bias": "experts",  # hy_v3, minimax_m2
    f"{BLOCK}.expert_bias": "experts",  # afmoe
}
EXPERT_ROWS = {
    f"{BLOCK}.experts.gate_up_proj": "experts ffn+ffn hidden",
    f"{BLOCK}.experts.down_proj": "experts hidden ffn",
}
# llama4 has one, too, aria several; deepseek's are one MLP as wide as several experts
SHARED_NAMES = ("shared_expert", "shared_experts", "shared_mlp")
SHARED_ROWS = {
    f"{BLOCK}.shared_expert_gate.weight": "one hidden",
    f"{BLOCK}.shared_experts.gate_up_proj.weight": "shared_ffn+shared_ffn hidden",  # minimax_m3
} | {
    f"{BLOCK}.{name}.{projection}.weight": "hidden shared_ffn" if projection == "down_proj" else "shared_ffn hidden"
    for name in SHARED_NAMES
    for projection in ("gate_proj", "up_proj", "down_proj")
}
DENSE_LAYER_ROWS = {
    "model.layers.{dense_layers}.mlp.gate_proj.weight": "dense_ffn hidden",
    "model.layers.{dense_layers}.mlp.up_proj.weight": "dense_ffn hidden",
    "model.layers.{dense_layers}.mlp.down_proj.weight": "hidden dense_ffn",
    "model.layers.{dense_layers}.mlp.gate_up_proj.weight": "dense_ffn+dense_ffn hidden",  # minimax_m3
}
# input first: llama4, aria
TRANSPOSED_ROWS = {
    f"{BLOCK}.experts.gate_up_proj": "experts hidden ffn+ffn",
    f"{BLOCK}.experts.down_proj": "experts ffn hidden",
}
# input first, with biases, gate and up interleaved
GPT_OSS_ROWS = {
    f"{BLOCK}.experts.gate_up_proj": "experts hidden (ffn gate_up)",
    f"{BLOCK}.experts.gate_up_proj_bias": "experts (ffn gate_up)",
    f"{BLOCK}.experts.down_proj": "experts ffn hidden",
    f"{BLOCK}.experts.down_proj_bias": "experts hidden",
}
WITHOUT_ATTENTION = EMBEDDING_ROWS | ROUTER_ROWS | EXPERT_ROWS | SHARED_ROWS | DENSE_LAYER_ROWS | NORM_ROWS | HEAD_ROWS
MOE_ROWS = ATTENTION_ROWS | WITHOUT_ATTENTION
FULL_NORM_ROWS = MOE_ROWS | FULL_NORM_ATTENTION_ROWS
TRANSPOSED_ROWS = MOE_ROWS | TRANSPOSED_ROWS
GPT_OSS_ROWS = MOE_ROWS | GPT_OSS_ROWS
# granite and llama4 have other names for the block of experts, and granite one matrix for gate and up of its shared expert
GRANITE_ROWS = {row.replace(".mlp.", ".block_sparse_moe."): pattern for row, pattern in MOE_ROWS.items()} | {
    "model.layers.{moe_layers}.shared_mlp.input_linear.weight": "shared_ffn+shared_ffn hidden",
    "model.layers.{moe_layers}.shared_mlp.output_linear.weight": "hidden shared_ffn",
}
LLAMA4_ROWS = {row.replace(".mlp.", ".feed_forward."): pattern for row, pattern in TRANSPOSED_ROWS.items()}

# Transformers transposes them
ARIA_STORED = {
    f"{BLOCK}.experts.gate_up_proj": {f"{BLOCK}.experts.fc1.weight": "experts hidden ffn+ffn"},
    f"{BLOCK}.experts.down_proj": {f"{BLOCK}.experts.fc2.weight": "experts ffn hidden"},
}

# queries, keys and values in one
SARVAM_FUSED = {
    f"model.layers.{{layers}}.attention.query_key_value.{kind}": tuple(
        f"model.layers.{{layers}}.self_attn.{part}_proj.{kind}" for part in "qkv"
    )
    for kind in ("weight", "bias")
}

ROUTER_KEYS = {"experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
GROUP_KEYS = {"expert_groups": "n_group", "groups_per_token": "topk_group"}
# experts as wide as a dense model's MLP, or of a width of their own
MIXTRAL_KEYS = CONFIG_KEYS | ROUTER_KEYS
NARROW_KEYS = MIXTRAL_KEYS | {"ffn": "moe_intermediate_size", "dense_ffn": "intermediate_size"}

WIDE_KEYS = MIXTRAL_KEYS | {"experts": "num_experts"}
GRANITE_KEYS = MIXTRAL_KEYS | {"shared_ffn": "shared_intermediate_size"}
ARIA_KEYS = MIXTRAL_KEYS | {
    "experts": "moe_num_experts", "experts_per_token": "moe_topk", "shared_experts": "moe_num_shared_experts",
}  # fmt: skip
COHERE_KEYS = WIDE_KEYS | {"dense_ffn": "prefix_dense_intermediate_size", "shared_experts": "num_shared_experts"}
HUNYUAN_KEYS = WIDE_KEYS | {"experts_per_token": "moe_topk", "shared_experts": 1}
LLAMA4_KEYS = MIXTRAL_KEYS | {"dense_ffn": "intermediate_size_mlp", "shared_experts": 1}

MINIMAX_KEYS = GRANITE_KEYS | {"dense_ffn": "dense_intermediate_size"}

KOLIBRI_KEYS = NARROW_KEYS | {"shared_ffn": "shared_expert_intermediate_size"}
QWEN_MOE_KEYS = KOLIBRI_KEYS | {"experts": "num_experts"}
GLM_KEYS = NARROW_KEYS | GROUP_KEYS | {"experts": "n_routed_experts", "shared_experts": "n_shared_experts"}
EXAONE_KEYS = GLM_KEYS | {"experts": "num_experts", "shared_experts": "num_shared_experts"}
ERNIE_KEYS = NARROW_KEYS | {
    "experts": "moe_num_experts", "experts_per_token": "moe_k", "shared_experts": "moe_num_shared_experts",
}  # fmt: skip

# mimo: sliding layers have twice the KV heads, and sinks
MIMO_KINDS = {"full_layers": ("layer_types", ("full_attention",)), "sliding_layers": ("layer_types", ("sliding_attention",))}
MIMO_ROWS = {row: pattern for row, pattern in MOE_ROWS.items() if ".self_attn." not in row} | {
    f"model.layers.{{{kind}}}.self_attn.{name}": pattern
    for kind, kv in (("full_layers", "kv_heads"), ("sliding_layers", "kv_heads wide"))
    for name, pattern in {
        "q_proj.weight": "(heads head_dim) hidden",
        "q_proj.bias": "(heads head_dim)",
        "k_proj.weight": f"({kv} head_dim) hidden",
        "k_proj.bias": f"({kv} head_dim)",
        "v_proj.weight": f"({kv} v_dim) hidden",
        "v_proj.bias": f"({kv} v_dim)",
        "o_proj.weight": "hidden (heads v_dim)",
        "sinks": "heads",
    }.items()
}
MIMO_CACHES = {
    "full_layers": "(kv_heads head_dim)+(kv_heads v_dim)",
    "sliding_layers": "(kv_heads wide head_dim)+(kv_heads wide v_dim)",
}
TWICE_THE_HEADS = "its sliding layers have twice the KV heads, whose groups are halves of the others'"

COUNTED_LAYERS = "what a layer adds is divided by a number that grows with the layers before it"

OWN_HEADS = "its config lists a number of heads for every layer"

# Model type to what its family has of its own, beside MOE_ROWS and QWEN_MOE_KEYS.
TABLES = {
    "qwen2_moe": {},
    "qwen3_moe": {},
    "flint": {},
    "mixtral": {"config_keys": MIXTRAL_KEYS},
    "phimoe": {"config_keys": MIXTRAL_KEYS},
    "minimax_m2": {"rows": FULL_NORM_ROWS, "config_keys": MIXTRAL_KEYS, **FULL_NORM},
    "gpt_oss": {"rows": GPT_OSS_ROWS, "config_keys": MIXTRAL_KEYS},
    "granitemoe": {"rows": GRANITE_ROWS, "config_keys": GRANITE_KEYS},
    "granitemoeshared": {"rows": GRANITE_ROWS, "config_keys": GRANITE_KEYS},
    "granitemoe_swa": {"rows": GRANITE_ROWS, "config_keys": GRANITE_KEYS},
    "olmoe": {"rows": FULL_NORM_ROWS, "config_keys": WIDE_KEYS, **FULL_NORM},
    "flex_olmo": {"rows": FULL_NORM_ROWS, "config_keys": WIDE_KEYS, **FULL_NORM},
    "aria_text": {"rows": TRANSPOSED_ROWS, "config_keys": ARIA_KEYS, "stored": ARIA_STORED},
    "cohere2_moe": {"config_keys": COHERE_KEYS},
    "mellum": {"config_keys": NARROW_KEYS},
    "minimax_m3_vl_text": {"config_keys": MINIMAX_KEYS},
    "kolibri1": {"config_keys": KOLIBRI_KEYS},
    "ernie4_5_moe": {"config_keys": ERNIE_KEYS},
    "exaone_moe": {"config_keys": EXAONE_KEYS},
    "hy_v3": {"config_keys": EXAONE_KEYS},
    "afmoe": {"config_keys": EXAONE_KEYS, "rescaled": SCALED_EMBEDDING, "rescaled_if": "mup_enabled"},
    "beam": {"config_keys": EXAONE_KEYS, "inexact": {"layers": COUNTED_LAYERS}},
    "glm4_moe": {"config_keys": GLM_KEYS},
    "laguna": {"fixed": dict.fromkeys(("heads", "kv_heads"), OWN_HEADS)},
    "mimo_v2_flash": {
        "rows": MIMO_ROWS,
        "config_keys": GLM_KEYS | {"v_dim": "v_head_dim", "wide": 2},
        "kinds": MIMO_KINDS,
        "caches": MIMO_CACHES,
        "fixed": dict.fromkeys(("heads", "kv_heads"), TWICE_THE_HEADS),
    },
    "sarvam_moe": {"config_keys": GLM_KEYS, "fused": SARVAM_FUSED},
    "solar_open": {"config_keys": GLM_KEYS},
    "dots1": {"config_keys": GLM_KEYS},
    "hunyuan_v1_moe": {"config_keys": HUNYUAN_KEYS},
    "llama4_text": {"rows": LLAMA4_ROWS, "config_keys": LLAMA4_KEYS},
}
