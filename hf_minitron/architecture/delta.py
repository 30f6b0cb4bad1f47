"""Hybrids of attention and linear attention by gated delta nets. Tables only, no functions.

The value heads of linear attention are `ssm_heads`; those of a group share a query and a key.
"""

from hf_minitron.architecture.hybrid import ALL, ATTENTION, NORMS, OUTER_ROWS, SOME_ATTENTION_ROWS
from hf_minitron.architecture.llama import CONFIG_KEYS, EMBEDDING_ROWS, FULL_NORM, HEAD_ROWS, MLP_ROWS
from hf_minitron.architecture.moe import DENSE_LAYER_ROWS, EXPERT_ROWS, QWEN_MOE_KEYS, ROUTER_ROWS, SHARED_ROWS

LINEAR = "model.layers.{linear_layers}.linear_attn"

# qwen3_5: gated delta net; q_proj gives the query and a gate of every head.
GATED_ATTENTION_ROWS = SOME_ATTENTION_ROWS | {f"{ATTENTION}.self_attn.q_proj.weight": "(heads query_and_gate head_dim) hidden"}
DELTA = "(ssm_groups key_dim)+(ssm_groups key_dim)+(ssm_heads value_dim)"
DELTA_ROWS = {
    f"{LINEAR}.in_proj_qkv.weight": f"{DELTA} hidden",
    f"{LINEAR}.in_proj_z.weight": "(ssm_heads value_dim) hidden",
    f"{LINEAR}.in_proj_b.weight": "ssm_heads hidden",
    f"{LINEAR}.in_proj_a.weight": "ssm_heads hidden",
    f"{LINEAR}.conv1d.weight": f"{DELTA} one kernel",
    f"{LINEAR}.dt_bias": "ssm_heads",
    f"{LINEAR}.A_log": "ssm_heads",
    f"{LINEAR}.norm.weight": "value_dim",
    f"{LINEAR}.out_proj.weight": "hidden (ssm_heads value_dim)",
}
# qwen3_next: what belongs to a group lies together in one projection
NEXT_DELTA_ROWS = {row: pattern for row, pattern in DELTA_ROWS.items() if ".in_proj_" not in row} | {
    f"{LINEAR}.in_proj_qkvz.weight": (
        "ssm_groups|(ssm_groups key_dim)|(ssm_groups key_dim)|(ssm_heads value_dim)|(ssm_heads value_dim) hidden"
    ),
    f"{LINEAR}.in_proj_ba.weight": "ssm_groups|ssm_heads|ssm_heads hidden",
}
# olmo_hybrid: a projection for each; layers of attention have their norms behind what they add
OLMO_LINEAR_ROWS = {
    f"{LINEAR}.q_proj.weight": "(ssm_groups key_dim) hidden",
    f"{LINEAR}.k_proj.weight": "(ssm_groups key_dim) hidden",
    f"{LINEAR}.v_proj.weight": "(ssm_heads value_dim) hidden",
    f"{LINEAR}.a_proj.weight": "ssm_heads hidden",
    f"{LINEAR}.b_proj.weight": "ssm_heads hidden",
    f"{LINEAR}.g_proj.weight": "(ssm_heads value_dim) hidden",
    f"{LINEAR}.conv1d.weight": f"{DELTA} one kernel",
    f"{LINEAR}.dt_bias": "ssm_heads",
    f"{LINEAR}.A_log": "ssm_heads",
    f"{LINEAR}.o_norm.weight": "value_dim",
    f"{LINEAR}.o_proj.weight": "hidden (ssm_heads value_dim)",
}
OLMO_NORMS = (
    "model.layers.{linear_layers}.input_layernorm",
    f"{ALL}.post_attention_layernorm",
    f"{ATTENTION}.post_feedforward_layernorm",
    "model.norm",
)
OLMO_ROWS = EMBEDDING_ROWS | HEAD_ROWS | SOME_ATTENTION_ROWS | OLMO_LINEAR_ROWS | MLP_ROWS | {
    **{f"{norm}.weight": "hidden" for norm in OLMO_NORMS},
    f"{ATTENTION}.self_attn.q_norm.weight": "(heads head_dim)",
    f"{ATTENTION}.self_attn.k_norm.weight": "(kv_heads head_dim)",
}  # fmt: skip
OLMO_ROLES = {f"linear_attn.{name}": "mixer" for name in ("q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj", "o_norm")}
DELTA_KEYS = {
    "ssm_heads": "linear_num_value_heads",
    "ssm_groups": "linear_num_key_heads",
    "key_dim": "linear_key_head_dim",
    "value_dim": "linear_value_head_dim",
}
QWEN_MOE_ROWS = ROUTER_ROWS | EXPERT_ROWS | SHARED_ROWS
QWEN3_5_ROWS = OUTER_ROWS | GATED_ATTENTION_ROWS | DELTA_ROWS | MLP_ROWS
QWEN3_5_KEYS = CONFIG_KEYS | DELTA_KEYS
QWEN3_5_MOE_ROWS = OUTER_ROWS | GATED_ATTENTION_ROWS | DELTA_ROWS | QWEN_MOE_ROWS
QWEN3_5_MOE_KEYS = QWEN_MOE_KEYS | DELTA_KEYS
QWEN3_NEXT_ROWS = OUTER_ROWS | GATED_ATTENTION_ROWS | NEXT_DELTA_ROWS | QWEN_MOE_ROWS | DENSE_LAYER_ROWS
QWEN3_NEXT_KEYS = QWEN_MOE_KEYS | DELTA_KEYS

# lara_mini: queries without gates; checkpoints hold the projections into linear attention in one tensor
LARA_ROWS = OUTER_ROWS | SOME_ATTENTION_ROWS | DELTA_ROWS | QWEN_MOE_ROWS
LARA_FUSED = {f"{LINEAR}.in_proj.weight": tuple(f"{LINEAR}.in_proj_{part}.weight" for part in ("qkv", "z", "b", "a"))}

# What a layer keeps of a text: the state of every head, and what its convolution has seen last.
DELTA_STATE = (
    "(ssm_heads value_dim key_dim)+(ssm_groups key_dim kernel)+(ssm_groups key_dim kernel)+(ssm_heads value_dim kernel)"
)

# What makes the family of each model type.
TABLES = {
    "qwen3_5_text": {
        "rows": QWEN3_5_ROWS, "norms": NORMS, "config_keys": QWEN3_5_KEYS, "states": {"linear_layers": DELTA_STATE},
        "pre_norm_residual": True,
    },
    "qwen3_5_moe_text": {
        "rows": QWEN3_5_MOE_ROWS, "norms": NORMS, "config_keys": QWEN3_5_MOE_KEYS, "states": {"linear_layers": DELTA_STATE},
    },
    "qwen3_next": {
        "rows": QWEN3_NEXT_ROWS, "norms": NORMS, "config_keys": QWEN3_NEXT_KEYS, "only_ffn": "dense_ffn",
        "states": {"linear_layers": DELTA_STATE},
    },
    "lara_mini": {
        "rows": LARA_ROWS, "norms": NORMS, "config_keys": QWEN3_5_MOE_KEYS, "fused": LARA_FUSED,
        "states": {"linear_layers": DELTA_STATE},
    },
    "olmo_hybrid": {
        "rows": OLMO_ROWS, "norms": OLMO_NORMS, "config_keys": QWEN3_5_KEYS, "roles": OLMO_ROLES,
        "states": {"linear_layers": DELTA_STATE}, **FULL_NORM,
    },
}  # fmt: skip
