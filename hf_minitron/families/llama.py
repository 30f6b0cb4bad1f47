"""The Llama-style families: full parameter name to the axes of its dimensions. Tables only, no functions.

Rows that a model has only under some config flag (biases, q/k norms, an untied head) are listed too; `Family.rows_of`
keeps those that the model really has.
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

LLAMA_ROWS = {
    "model.embed_tokens.weight": "vocab hidden",
    "model.layers.{layers}.input_layernorm.weight": "hidden",
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
    "model.layers.{layers}.post_attention_layernorm.weight": "hidden",
    "model.layers.{layers}.mlp.gate_proj.weight": "ffn hidden",
    "model.layers.{layers}.mlp.gate_proj.bias": "ffn",
    "model.layers.{layers}.mlp.up_proj.weight": "ffn hidden",
    "model.layers.{layers}.mlp.up_proj.bias": "ffn",
    "model.layers.{layers}.mlp.down_proj.weight": "hidden ffn",
    "model.layers.{layers}.mlp.down_proj.bias": "hidden",
    "model.norm.weight": "hidden",
    "lm_head.weight": "vocab hidden",
}

# Where the activations of an axis are read: the input of a projection (ffn, heads), the output of every norm (hidden),
# the input and output of a whole block (layers).
LLAMA_TAPS = {
    "ffn": ("model.layers.{layers}.mlp.down_proj",),
    "heads": ("model.layers.{layers}.self_attn.o_proj",),
    "hidden": (
        "model.layers.{layers}.input_layernorm",
        "model.layers.{layers}.post_attention_layernorm",
        "model.norm",
    ),
    "layers": ("model.layers.{layers}",),
}

# Config entries with one item per layer; a depth cut keeps the items of the kept layers.
LAYER_LISTS = ("layer_types", "no_rope_layers")

LLAMA_MODEL_TYPES = ("arcee", "llama", "ministral", "mistral", "qwen2", "qwen3", "smollm3")
