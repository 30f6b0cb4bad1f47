"""Mixtures of experts with Llama's module names. Tables only, no functions.

Layers come in two kinds here, so a row says in which it stands: `{layers}` in all, `{moe_layers}` in those with experts,
`{dense_layers}` in those with one plain MLP. In memory the experts of a layer are one tensor; most checkpoints store every
expert by itself, under names that `STORED` gives.
"""

from hf_minitron.architecture.llama import (
    ATTENTION_ROWS,
    CONFIG_KEYS,
    EMBEDDING_ROWS,
    HEAD_ROWS,
    NORM_ROWS,
)

BLOCK = "model.layers.{moe_layers}.mlp"

EXPERT_ROWS = {
    f"{BLOCK}.gate.weight": "experts hidden",
    f"{BLOCK}.gate.e_score_correction_bias": "experts",  # deepseek_v3
    f"{BLOCK}.experts.gate_up_proj": "experts ffn+ffn hidden",
    f"{BLOCK}.experts.down_proj": "experts hidden ffn",
    # qwen2_moe
    f"{BLOCK}.shared_expert.gate_proj.weight": "shared_ffn hidden",
    f"{BLOCK}.shared_expert.up_proj.weight": "shared_ffn hidden",
    f"{BLOCK}.shared_expert.down_proj.weight": "hidden shared_ffn",
    f"{BLOCK}.shared_expert_gate.weight": "one hidden",
    # deepseek_v3
    f"{BLOCK}.shared_experts.gate_proj.weight": "shared_ffn hidden",
    f"{BLOCK}.shared_experts.up_proj.weight": "shared_ffn hidden",
    f"{BLOCK}.shared_experts.down_proj.weight": "hidden shared_ffn",
}
DENSE_LAYER_ROWS = {
    "model.layers.{dense_layers}.mlp.gate_proj.weight": "dense_ffn hidden",
    "model.layers.{dense_layers}.mlp.up_proj.weight": "dense_ffn hidden",
    "model.layers.{dense_layers}.mlp.down_proj.weight": "hidden dense_ffn",
}
# gpt_oss: biases, input first, gate and up interleaved
GPT_OSS_ROWS = {
    f"{BLOCK}.router.weight": "experts hidden",
    f"{BLOCK}.router.bias": "experts",
    f"{BLOCK}.experts.gate_up_proj": "experts hidden (ffn gate_up)",
    f"{BLOCK}.experts.gate_up_proj_bias": "experts (ffn gate_up)",
    f"{BLOCK}.experts.down_proj": "experts ffn hidden",
    f"{BLOCK}.experts.down_proj_bias": "experts hidden",
}
# deepseek_v3: queries, keys and values pass through a narrow row, whose ranks stay as they are
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
}

MOE_ROWS = EMBEDDING_ROWS | ATTENTION_ROWS | EXPERT_ROWS | DENSE_LAYER_ROWS | NORM_ROWS | HEAD_ROWS
GPT_OSS_ROWS = EMBEDDING_ROWS | ATTENTION_ROWS | GPT_OSS_ROWS | NORM_ROWS | HEAD_ROWS
DEEPSEEK_ROWS = EMBEDDING_ROWS | MLA_ROWS | EXPERT_ROWS | DENSE_LAYER_ROWS | NORM_ROWS | HEAD_ROWS

EXPERT = f"{BLOCK}.experts.{{experts}}"
STORED = {
    f"{BLOCK}.experts.gate_up_proj": {f"{EXPERT}.gate_proj.weight": "ffn hidden", f"{EXPERT}.up_proj.weight": "ffn hidden"},
    f"{BLOCK}.experts.down_proj": {f"{EXPERT}.down_proj.weight": "hidden ffn"},
}
MIXTRAL_EXPERT = EXPERT.replace(".mlp.", ".block_sparse_moe.")
MIXTRAL_STORED = {
    f"{BLOCK}.gate.weight": {"model.layers.{moe_layers}.block_sparse_moe.gate.weight": "experts hidden"},
    f"{BLOCK}.experts.gate_up_proj": {f"{MIXTRAL_EXPERT}.w1.weight": "ffn hidden", f"{MIXTRAL_EXPERT}.w3.weight": "ffn hidden"},
    f"{BLOCK}.experts.down_proj": {f"{MIXTRAL_EXPERT}.w2.weight": "hidden ffn"},
}

ROUTER_KEYS = {"experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
MIXTRAL_KEYS = CONFIG_KEYS | ROUTER_KEYS
QWEN_MOE_KEYS = CONFIG_KEYS | ROUTER_KEYS | {
    "ffn": "moe_intermediate_size",
    "dense_ffn": "intermediate_size",
    "shared_ffn": "shared_expert_intermediate_size",
    "experts": "num_experts",
}  # fmt: skip
DEEPSEEK_KEYS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "moe_intermediate_size",
    "dense_ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "vocab": "vocab_size",
    "experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_groups": "n_group",
    "groups_per_token": "topk_group",
    "shared_experts": "n_shared_experts",
}
DEEPSEEK_FOLLOWS = {"num_key_value_heads": "heads"}
