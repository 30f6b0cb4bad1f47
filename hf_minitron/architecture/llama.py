"""Dense families with Llama's module names: full parameter name to the axes of its dimensions. Tables only, no functions.

One table serves them all: rows that a model type has not, or has only under some config flag (biases, q/k norms, an untied
head), are listed too, and `Architecture` keeps those that the model really has. The same goes for norms.
"""

CONFIG_KEYS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab": "vocab_size",
}

# Its class takes head_dim to be hidden / heads.
STABLELM_KEYS = {axis: key for axis, key in CONFIG_KEYS.items() if axis != "head_dim"}

ATTENTION_ROWS = {
    "model.layers.{layers}.self_attn.q_proj.weight": "(heads head_dim) hidden",
    "model.layers.{layers}.self_attn.q_proj.bias": "(heads head_dim)",
    "model.layers.{layers}.self_attn.k_proj.weight": "(kv_heads head_dim) hidden",
    "model.layers.{layers}.self_attn.k_proj.bias": "(kv_heads head_dim)",
    "model.layers.{layers}.self_attn.v_proj.weight": "(kv_heads head_dim) hidden",
    "model.layers.{layers}.self_attn.v_proj.bias": "(kv_heads head_dim)",
    "model.layers.{layers}.self_attn.q_norm.weight": "head_dim",
    "model.layers.{layers}.self_attn.k_norm.weight": "head_dim",
    "model.layers.{layers}.self_attn.o_proj.weight": "hidden (heads head_dim)",
    "model.layers.{layers}.self_attn.o_proj.bias": "hidden",
    # phi3: one matrix for queries, keys and values
    "model.layers.{layers}.self_attn.qkv_proj.weight": "(heads head_dim)+(kv_heads head_dim)+(kv_heads head_dim) hidden",
    # phi
    "model.layers.{layers}.self_attn.dense.weight": "hidden (heads head_dim)",
    "model.layers.{layers}.self_attn.dense.bias": "hidden",
    "model.layers.{layers}.self_attn.q_layernorm.weight": "head_dim",
    "model.layers.{layers}.self_attn.q_layernorm.bias": "head_dim",
    "model.layers.{layers}.self_attn.k_layernorm.weight": "head_dim",
    "model.layers.{layers}.self_attn.k_layernorm.bias": "head_dim",
    # stablelm: a norm of its own for every head
    "model.layers.{layers}.self_attn.q_layernorm.norms.{heads}.weight": "head_dim",
    "model.layers.{layers}.self_attn.k_layernorm.norms.{kv_heads}.weight": "head_dim",
    # gpt_oss: a logit that a head can give its attention to instead of a token
    "model.layers.{layers}.self_attn.sinks": "heads",
}

MLP_ROWS = {
    "model.layers.{layers}.mlp.gate_proj.weight": "ffn hidden",
    "model.layers.{layers}.mlp.gate_proj.bias": "ffn",
    "model.layers.{layers}.mlp.up_proj.weight": "ffn hidden",
    "model.layers.{layers}.mlp.up_proj.bias": "ffn",
    "model.layers.{layers}.mlp.down_proj.weight": "hidden ffn",
    "model.layers.{layers}.mlp.down_proj.bias": "hidden",
    # phi3, glm4: gate and up in one matrix
    "model.layers.{layers}.mlp.gate_up_proj.weight": "ffn+ffn hidden",
    # starcoder2
    "model.layers.{layers}.mlp.c_fc.weight": "ffn hidden",
    "model.layers.{layers}.mlp.c_fc.bias": "ffn",
    "model.layers.{layers}.mlp.c_proj.weight": "hidden ffn",
    "model.layers.{layers}.mlp.c_proj.bias": "hidden",
    # phi
    "model.layers.{layers}.mlp.fc1.weight": "ffn hidden",
    "model.layers.{layers}.mlp.fc1.bias": "ffn",
    "model.layers.{layers}.mlp.fc2.weight": "hidden ffn",
    "model.layers.{layers}.mlp.fc2.bias": "hidden",
}

# The norms that see the whole width; olmo's have no weights, cohere2 has one a layer, gemma2, gemma3 and glm4 four.
NORMS = (
    "model.layers.{layers}.input_layernorm",
    "model.layers.{layers}.post_attention_layernorm",
    "model.layers.{layers}.pre_feedforward_layernorm",
    "model.layers.{layers}.post_feedforward_layernorm",
    "model.layers.{layers}.post_self_attn_layernorm",
    "model.layers.{layers}.post_mlp_layernorm",
    "model.norm",
    "model.final_layernorm",
)
NORM_ROWS = {f"{norm}.{parameter}": "hidden" for norm in NORMS for parameter in ("weight", "bias")}

EMBEDDING_ROWS = {"model.embed_tokens.weight": "vocab hidden"}
HEAD_ROWS = {"lm_head.weight": "vocab hidden", "lm_head.bias": "vocab"}

LLAMA_ROWS = EMBEDDING_ROWS | ATTENTION_ROWS | MLP_ROWS | NORM_ROWS | HEAD_ROWS

# olmo2 normalises queries and keys over all their heads together.
OLMO2_ROWS = LLAMA_ROWS | {
    "model.layers.{layers}.self_attn.q_norm.weight": "(heads head_dim)",
    "model.layers.{layers}.self_attn.k_norm.weight": "(kv_heads head_dim)",
}

LLAMA_MODEL_TYPES = ("cohere2", "glm4", "granite", "nemotron", "olmo", "phi", "starcoder2")

# RMS norms that stand before attention and MLP, both of which are added to the stream as they are.
PRE_NORM_MODEL_TYPES = ("arcee", "llama", "ministral", "mistral", "phi3", "qwen2", "qwen3", "smollm3")

# Their embedding is multiplied by the square root of hidden, so that cutting hidden also changes that factor.
GEMMA_MODEL_TYPES = ("gemma2", "gemma3_text", "vaultgemma")
