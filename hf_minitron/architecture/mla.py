"""Multi-head latent attention: keys and values of all heads come from one narrow row. Tables only, no functions."""

from hf_minitron.architecture import llama, moe

# Queries, keys and values pass through a narrow row.
MLA_ROWS = {
    "model.layers.{layers}.self_attn.q_proj.weight": "(heads qk_dim) hidden",
    "model.layers.{layers}.self_attn.q_a_proj.weight": "q_rank hidden",
    "model.layers.{layers}.self_attn.q_a_proj.bias": "q_rank",
    "model.layers.{layers}.self_attn.q_a_layernorm.weight": "q_rank",
    "model.layers.{layers}.self_attn.q_b_proj.weight": "(heads qk_dim) q_rank",
    "model.layers.{layers}.self_attn.kv_a_layernorm.weight": "kv_rank",
    "model.layers.{layers}.self_attn.kv_a_proj_with_mqa.weight": "kv_rank+rope hidden",
    "model.layers.{layers}.self_attn.kv_a_proj_with_mqa.bias": "kv_rank+rope",
    "model.layers.{layers}.self_attn.kv_b_proj.weight": "(heads k_and_v_dim) kv_rank",
    "model.layers.{layers}.self_attn.o_proj.weight": "hidden (heads v_dim)",
    "model.layers.{layers}.self_attn.o_proj.bias": "hidden",
    # deepseek_v32 chooses the tokens that a query looks at by a smaller attention of its own, which stays as it is
    "model.layers.{layers}.self_attn.indexer.wq_b.weight": "(index_heads index_dim) q_rank",
    "model.layers.{layers}.self_attn.indexer.wk.weight": "index_dim hidden",
    "model.layers.{layers}.self_attn.indexer.k_norm.weight": "index_dim",
    "model.layers.{layers}.self_attn.indexer.k_norm.bias": "index_dim",
    "model.layers.{layers}.self_attn.indexer.weights_proj.weight": "index_heads hidden",
}
MOE_ROWS = moe.WITHOUT_ATTENTION | MLA_ROWS
DENSE_ROWS = llama.EMBEDDING_ROWS | MLA_ROWS | llama.MLP_ROWS | llama.NORM_ROWS | llama.HEAD_ROWS
# axk1 has a norm after its experts
AXK_ROWS = MOE_ROWS | {"model.layers.{moe_layers}.mlp.post_mlp_layernorm.weight": "hidden"}
AXK_NORMS = (*llama.NORMS, "model.layers.{moe_layers}.mlp.post_mlp_layernorm")
# axk2: a gate behind norms, told by what they give; queries and their gates in one projection
AXK2_GATED = ("model.layers.{layers}.input_layernorm", "model.layers.{moe_layers}.post_attention_layernorm")
AXK2_NORMS = (*(f"{norm}.norm" for norm in AXK2_GATED), "model.layers.{dense_layers}.post_attention_layernorm", "model.norm")
AXK2_ROWS = (
    {row: pattern for row, pattern in MOE_ROWS.items() if not row.endswith("post_attention_layernorm.weight")}
    | {f"{norm}.weight": "hidden" for norm in AXK2_NORMS}
    | {f"{norm}.mlp.fc1.weight": "gate_rank hidden" for norm in AXK2_GATED}
    | {f"{norm}.mlp.fc2.weight": "hidden gate_rank" for norm in AXK2_GATED}
    | {"model.layers.{layers}.self_attn.q_gate_proj.weight": "(heads q_and_gate_dim) q_ranks"}
)
AXK2_FIXED = "its queries read the narrow row before the norm, too"
AXK2_ROLES = {"layernorm.mlp.fc1": "mixer", "layernorm.mlp.fc2": "mixer", "q_gate_proj": "query"}

RANKS = {"kv_rank": "kv_lora_rank", "q_rank": "q_lora_rank"}
# The sizes of a head's parts are read off the parameters.
MOE_KEYS = {axis: key for axis, key in moe.GLM_KEYS.items() if axis not in ("kv_heads", "head_dim")} | RANKS
DENSE_KEYS = {axis: key for axis, key in llama.CONFIG_KEYS.items() if axis not in ("kv_heads", "head_dim")} | RANKS

# What a layer adds is divided by the square root of the number of layers, what the head reads by one that grows with hidden.
MINICPM_RESCALED = {"layers": {"output": -0.5, "down": -0.5}, "hidden": {"last_norm": -1.0}}

# Model type to what its family has of its own, beside MOE_ROWS and MOE_KEYS.
TABLES = {
    "deepseek_v2": {},
    "deepseek_v3": {},
    "deepseek_v32": {},
    "glm4_moe_lite": {},
    "sarvam_mla": {},
    "glm_moe_dsa": {},
    "axk2": {"rows": AXK2_ROWS, "norms": AXK2_NORMS, "roles": AXK2_ROLES, "fixed": {"q_rank": AXK2_FIXED}},
    "axk1": {"rows": AXK_ROWS, "norms": AXK_NORMS},
    "youtu": {"rows": DENSE_ROWS, "config_keys": DENSE_KEYS},
    "minicpm3": {
        "rows": DENSE_ROWS,
        "config_keys": DENSE_KEYS,
        "rescaled": MINICPM_RESCALED,
    },
}
FOLLOWS = {"num_key_value_heads": "heads"}
