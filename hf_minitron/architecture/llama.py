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
    # hunyuan
    "model.layers.{layers}.self_attn.query_layernorm.weight": "head_dim",
    "model.layers.{layers}.self_attn.key_layernorm.weight": "head_dim",
    # bitnet: a norm behind all heads
    "model.layers.{layers}.self_attn.attn_sub_norm.weight": "(heads head_dim)",
    # diffllama: how much of a second attention is taken off
    "model.layers.{layers}.self_attn.lambda_q1": "head_dim",
    "model.layers.{layers}.self_attn.lambda_k1": "head_dim",
    "model.layers.{layers}.self_attn.lambda_q2": "head_dim",
    "model.layers.{layers}.self_attn.lambda_k2": "head_dim",
    # doge: which tokens a KV head forgets, told by the values of all; and a weight for every channel of the stream
    "model.layers.{layers}.self_attn.A": "kv_heads",
    "model.layers.{layers}.self_attn.dt_proj.weight": "kv_heads (kv_heads head_dim)",
    "model.layers.{layers}.input_residual": "hidden",
    "model.layers.{layers}.post_attention_residual": "hidden",
    # laguna: a gate for every head
    "model.layers.{layers}.self_attn.g_proj.weight": "heads hidden",
    # stablelm: a norm of its own for every head
    "model.layers.{layers}.self_attn.q_layernorm.norms.{heads}.weight": "head_dim",
    "model.layers.{layers}.self_attn.k_layernorm.norms.{kv_heads}.weight": "head_dim",
    # gpt_oss: a logit that a head can give its attention to instead of a token
    "model.layers.{layers}.self_attn.sinks": "heads",
    # afmoe, beam: a gate for every number that attention gives
    "model.layers.{layers}.self_attn.gate_proj.weight": "(heads head_dim) hidden",
    "model.layers.{layers}.self_attn.gate_bias": "heads",
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
    "model.layers.{layers}.mlp.ffn_sub_norm.weight": "ffn",
    # apertus: the numbers of its activation
    "model.layers.{layers}.mlp.act_fn.alpha_p": "one",
    "model.layers.{layers}.mlp.act_fn.alpha_n": "one",
    "model.layers.{layers}.mlp.act_fn.beta": "",
    "model.layers.{layers}.mlp.act_fn.eps": "",
}

# The norms that see the whole width; olmo's and nanochat's have no weights, cohere's layers have one, those of gemma2, gemma3
# and glm4 four; apertus and hyperclovax have names of their own.
NORMS = (
    "model.layers.{layers}.input_layernorm",
    "model.layers.{layers}.post_attention_layernorm",
    "model.layers.{layers}.pre_feedforward_layernorm",
    "model.layers.{layers}.post_feedforward_layernorm",
    "model.layers.{layers}.post_self_attn_layernorm",
    "model.layers.{layers}.post_mlp_layernorm",
    "model.layers.{layers}.attention_layernorm",
    "model.layers.{layers}.feedforward_layernorm",
    "model.layers.{layers}.pre_mlp_layernorm",
    "model.layers.{layers}.post_norm1",
    "model.layers.{layers}.post_norm2",
    "model.norm",
    "model.final_layernorm",
)
NORM_ROWS = {f"{norm}.{parameter}": "hidden" for norm in NORMS for parameter in ("weight", "bias")}

EMBEDDING_ROWS = {"model.embed_tokens.weight": "vocab hidden"}
HEAD_ROWS = {"lm_head.weight": "vocab hidden", "lm_head.bias": "vocab"}

LLAMA_ROWS = EMBEDDING_ROWS | ATTENTION_ROWS | MLP_ROWS | NORM_ROWS | HEAD_ROWS

# olmo2 and olmo3 normalise queries and keys over all their heads together.
FULL_NORM_ATTENTION_ROWS = {
    "model.layers.{layers}.self_attn.q_norm.weight": "(heads head_dim)",
    "model.layers.{layers}.self_attn.k_norm.weight": "(kv_heads head_dim)",
}
FULL_NORM_ROWS = LLAMA_ROWS | FULL_NORM_ATTENTION_ROWS
# cohere gives every head a norm of its own.
COHERE_ROWS = LLAMA_ROWS | {
    "model.layers.{layers}.self_attn.q_norm.weight": "heads head_dim",
    "model.layers.{layers}.self_attn.k_norm.weight": "kv_heads head_dim",
}

LLAMA_MODEL_TYPES = (
    "cohere2", "cohere_compass_text", "exaone4", "glm4", "granite", "granite_swa", "hyperclovax", "jais2", "nanochat",
    "nemotron", "olmo", "phi", "starcoder2",
)  # fmt: skip

# RMS norms that stand before attention and MLP, both of which are added to the stream as they are.
PRE_NORM_MODEL_TYPES = (
    "apertus", "apertus1p5_text", "arcee", "cwm", "ernie4_5", "exaone", "glm", "helium", "hunyuan_v1_dense", "internlm3",
    "iquestcoder", "llama", "ministral", "ministral3", "mistral", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3",
)  # fmt: skip

# What classes with Llama's names hold in place of phi3's matrices.
PHI3_PARTS = {
    "model.layers.{layers}.self_attn.qkv_proj.weight": {
        f"model.layers.{{layers}}.self_attn.{name}.weight": ATTENTION_ROWS[f"model.layers.{{layers}}.self_attn.{name}.weight"]
        for name in ("q_proj", "k_proj", "v_proj")
    },
    "model.layers.{layers}.mlp.gate_up_proj.weight": {
        f"model.layers.{{layers}}.mlp.{name}.weight": "ffn hidden" for name in ("gate_proj", "up_proj")
    },
}

# Queries and keys are normalised over all heads, so that cutting heads changes that norm.
FULL_NORM_MODEL_TYPES = ("olmo2", "olmo3")

# Their embedding is multiplied by the square root of hidden.
SCALED_EMBEDDING = {"hidden": {"embedding": 0.5}}
GEMMA_MODEL_TYPES = ("gemma2", "gemma3_text", "vaultgemma")

FULL_WIDTH_NORM = "queries and keys are normalised over all their heads together, fewer of them after the cut"
FULL_NORM = {"inexact": dict.fromkeys(("heads", "kv_heads"), FULL_WIDTH_NORM)}

SUB_NORM = "a norm stands behind attention and inside the MLP, over fewer numbers after the cut"
PAIRED_HEADS = "each half of the heads is taken off the other"
NUMBERED_LAYERS = "how much of a second attention is taken off follows from the number of the layer, which a cut changes"
FORGETTING = "which tokens a KV head forgets is told by the values of all KV heads, fewer of them after the cut"
# Model type to what its family has of its own, beside Llama's.
TABLES = {
    "bitnet": {"config_keys": STABLELM_KEYS, "inexact": dict.fromkeys(("ffn", "heads", "kv_heads"), SUB_NORM)},
    "cohere": {"rows": COHERE_ROWS},
    "diffllama": {"fixed": dict.fromkeys(("heads", "kv_heads"), PAIRED_HEADS), "inexact": {"layers": NUMBERED_LAYERS}},
    "doge": {"inexact": {"kv_heads": FORGETTING}},
    "stablelm": {"config_keys": STABLELM_KEYS},
}
