"""Dense families of GPT's line, with learned positions or fused queries, keys and values. Tables only, no functions.

Their classes take `head_dim` to be hidden / heads, so that the two must be cut together; some also take `ffn` to be four times
hidden, and have no key for it.
"""

from hf_minitron.architecture.llama import SCALED_EMBEDDING

GPT2_KEYS = {"layers": "n_layer", "hidden": "n_embd", "ffn": "n_inner", "heads": "n_head", "vocab": "vocab_size"}
GPT2_ROWS = {
    "transformer.wte.weight": "vocab hidden",
    "transformer.wpe.weight": "positions hidden",
    "transformer.h.{layers}.ln_1.weight": "hidden",
    "transformer.h.{layers}.ln_1.bias": "hidden",
    "transformer.h.{layers}.attn.c_attn.weight": "hidden (qkv heads head_dim)",  # Conv1D: input first
    "transformer.h.{layers}.attn.c_attn.bias": "(qkv heads head_dim)",
    "transformer.h.{layers}.attn.c_proj.weight": "(heads head_dim) hidden",
    "transformer.h.{layers}.attn.c_proj.bias": "hidden",
    "transformer.h.{layers}.ln_2.weight": "hidden",
    "transformer.h.{layers}.ln_2.bias": "hidden",
    "transformer.h.{layers}.mlp.c_fc.weight": "hidden ffn",
    "transformer.h.{layers}.mlp.c_fc.bias": "ffn",
    "transformer.h.{layers}.mlp.c_proj.weight": "ffn hidden",
    "transformer.h.{layers}.mlp.c_proj.bias": "hidden",
    "transformer.ln_f.weight": "hidden",
    "transformer.ln_f.bias": "hidden",
    "lm_head.weight": "vocab hidden",
}
GPT2_NORMS = ("transformer.h.{layers}.ln_1", "transformer.h.{layers}.ln_2", "transformer.ln_f")
GPT2_INEXACT = {
    "layers": ("scale_attn_by_inverse_layer_idx", "attention is divided by the number of the layer, which a cut changes")
}

GPT_NEOX_KEYS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "vocab": "vocab_size",
}
GPT_NEOX_ROWS = {
    "gpt_neox.embed_in.weight": "vocab hidden",
    "gpt_neox.layers.{layers}.input_layernorm.weight": "hidden",
    "gpt_neox.layers.{layers}.input_layernorm.bias": "hidden",
    "gpt_neox.layers.{layers}.post_attention_layernorm.weight": "hidden",
    "gpt_neox.layers.{layers}.post_attention_layernorm.bias": "hidden",
    "gpt_neox.layers.{layers}.attention.query_key_value.weight": "(heads qkv head_dim) hidden",
    "gpt_neox.layers.{layers}.attention.query_key_value.bias": "(heads qkv head_dim)",
    "gpt_neox.layers.{layers}.attention.dense.weight": "hidden (heads head_dim)",
    "gpt_neox.layers.{layers}.attention.dense.bias": "hidden",
    "gpt_neox.layers.{layers}.mlp.dense_h_to_4h.weight": "ffn hidden",
    "gpt_neox.layers.{layers}.mlp.dense_h_to_4h.bias": "ffn",
    "gpt_neox.layers.{layers}.mlp.dense_4h_to_h.weight": "hidden ffn",
    "gpt_neox.layers.{layers}.mlp.dense_4h_to_h.bias": "hidden",
    "gpt_neox.final_layer_norm.weight": "hidden",
    "gpt_neox.final_layer_norm.bias": "hidden",
    "lm_head.weight": "vocab hidden",
}
GPT_NEOX_STORED = {"lm_head.weight": {"embed_out.weight": "vocab hidden"}}
GPT_NEOX_NORMS = (
    "gpt_neox.layers.{layers}.input_layernorm",
    "gpt_neox.layers.{layers}.post_attention_layernorm",
    "gpt_neox.final_layer_norm",
)

OPT_KEYS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "ffn_dim",
    "heads": "num_attention_heads",
    "vocab": "vocab_size",
}
OPT_ROWS = {
    "model.decoder.embed_tokens.weight": "vocab hidden",
    "model.decoder.embed_positions.weight": "positions hidden",
    "model.decoder.layers.{layers}.self_attn_layer_norm.weight": "hidden",
    "model.decoder.layers.{layers}.self_attn_layer_norm.bias": "hidden",
    "model.decoder.layers.{layers}.self_attn.q_proj.weight": "(heads head_dim) hidden",
    "model.decoder.layers.{layers}.self_attn.q_proj.bias": "(heads head_dim)",
    "model.decoder.layers.{layers}.self_attn.k_proj.weight": "(heads head_dim) hidden",
    "model.decoder.layers.{layers}.self_attn.k_proj.bias": "(heads head_dim)",
    "model.decoder.layers.{layers}.self_attn.v_proj.weight": "(heads head_dim) hidden",
    "model.decoder.layers.{layers}.self_attn.v_proj.bias": "(heads head_dim)",
    "model.decoder.layers.{layers}.self_attn.out_proj.weight": "hidden (heads head_dim)",
    "model.decoder.layers.{layers}.self_attn.out_proj.bias": "hidden",
    "model.decoder.layers.{layers}.final_layer_norm.weight": "hidden",
    "model.decoder.layers.{layers}.final_layer_norm.bias": "hidden",
    "model.decoder.layers.{layers}.fc1.weight": "ffn hidden",
    "model.decoder.layers.{layers}.fc1.bias": "ffn",
    "model.decoder.layers.{layers}.fc2.weight": "hidden ffn",
    "model.decoder.layers.{layers}.fc2.bias": "hidden",
    "model.decoder.final_layer_norm.weight": "hidden",
    "model.decoder.final_layer_norm.bias": "hidden",
    "lm_head.weight": "vocab hidden",
}
OPT_NORMS = (
    "model.decoder.layers.{layers}.self_attn_layer_norm",
    "model.decoder.layers.{layers}.final_layer_norm",
    "model.decoder.final_layer_norm",
)
# Keys of config.json that repeat an axis.
OPT_FOLLOWS = {"word_embed_proj_dim": "hidden"}

GPTJ_KEYS = GPT2_KEYS
GPTJ_ROWS = {
    "transformer.wte.weight": "vocab hidden",
    "transformer.h.{layers}.ln_1.weight": "hidden",
    "transformer.h.{layers}.ln_1.bias": "hidden",
    "transformer.h.{layers}.attn.q_proj.weight": "(heads head_dim) hidden",
    "transformer.h.{layers}.attn.k_proj.weight": "(heads head_dim) hidden",
    "transformer.h.{layers}.attn.v_proj.weight": "(heads head_dim) hidden",
    "transformer.h.{layers}.attn.out_proj.weight": "hidden (heads head_dim)",
    "transformer.h.{layers}.mlp.fc_in.weight": "ffn hidden",
    "transformer.h.{layers}.mlp.fc_in.bias": "ffn",
    "transformer.h.{layers}.mlp.fc_out.weight": "hidden ffn",
    "transformer.h.{layers}.mlp.fc_out.bias": "hidden",
    "transformer.ln_f.weight": "hidden",
    "transformer.ln_f.bias": "hidden",
    "lm_head.weight": "vocab hidden",
    "lm_head.bias": "vocab",
}

# The rows of queries, keys and values lie in four groups, one for each of the devices that it was trained on.
FOUR_GROUPS = "queries, keys and values lie in four groups of heads, and the class takes head_dim to be hidden / heads"
CODEGEN_ROWS = GPTJ_ROWS | {"transformer.h.{layers}.attn.qkv_proj.weight": "qkv_rows hidden"}

# Linear layers in place of GPT-2's Conv1D, and one key and value for all heads.
BIGCODE_KEYS = GPT2_KEYS | {"kv_heads": 1}
BIGCODE_ROWS = GPT2_ROWS | {
    "transformer.h.{layers}.attn.c_attn.weight": "(heads head_dim)+(kv_heads head_dim)+(kv_heads head_dim) hidden",
    "transformer.h.{layers}.attn.c_attn.bias": "(heads head_dim)+(kv_heads head_dim)+(kv_heads head_dim)",
    "transformer.h.{layers}.attn.c_proj.weight": "hidden (heads head_dim)",
    "transformer.h.{layers}.mlp.c_fc.weight": "ffn hidden",
    "transformer.h.{layers}.mlp.c_proj.weight": "hidden ffn",
}

# gpt_neo's layers look at all tokens or at a window of them.
NEO_KEYS = {
    "layers": "num_layers",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_heads",
    "vocab": "vocab_size",
}
NEO_ROWS = BIGCODE_ROWS | {
    "transformer.h.{layers}.attn.attention.q_proj.weight": "(heads head_dim) hidden",
    "transformer.h.{layers}.attn.attention.k_proj.weight": "(heads head_dim) hidden",
    "transformer.h.{layers}.attn.attention.v_proj.weight": "(heads head_dim) hidden",
    "transformer.h.{layers}.attn.attention.out_proj.weight": "hidden (heads head_dim)",
    "transformer.h.{layers}.attn.attention.out_proj.bias": "hidden",
}

FOUR_TIMES = {"ffn": "hidden"}
# Norms after attention and MLP.
OPENAI_KEYS = {axis: key for axis, key in GPT2_KEYS.items() if axis != "ffn"}
OPENAI_ROWS = GPT2_ROWS | {
    "transformer.tokens_embed.weight": "vocab hidden",
    "transformer.positions_embed.weight": "positions hidden",
}

CTRL_KEYS = {"layers": "n_layer", "hidden": "n_embd", "ffn": "dff", "heads": "n_head", "vocab": "vocab_size"}
CTRL_ROWS = {
    "transformer.w.weight": "vocab hidden",
    "transformer.h.{layers}.layernorm1.weight": "hidden",
    "transformer.h.{layers}.layernorm1.bias": "hidden",
    "transformer.h.{layers}.multi_head_attention.Wq.weight": "(heads head_dim) hidden",
    "transformer.h.{layers}.multi_head_attention.Wq.bias": "(heads head_dim)",
    "transformer.h.{layers}.multi_head_attention.Wk.weight": "(heads head_dim) hidden",
    "transformer.h.{layers}.multi_head_attention.Wk.bias": "(heads head_dim)",
    "transformer.h.{layers}.multi_head_attention.Wv.weight": "(heads head_dim) hidden",
    "transformer.h.{layers}.multi_head_attention.Wv.bias": "(heads head_dim)",
    "transformer.h.{layers}.multi_head_attention.dense.weight": "hidden (heads head_dim)",
    "transformer.h.{layers}.multi_head_attention.dense.bias": "hidden",
    "transformer.h.{layers}.layernorm2.weight": "hidden",
    "transformer.h.{layers}.layernorm2.bias": "hidden",
    "transformer.h.{layers}.ffn.0.weight": "ffn hidden",
    "transformer.h.{layers}.ffn.0.bias": "ffn",
    "transformer.h.{layers}.ffn.2.weight": "hidden ffn",
    "transformer.h.{layers}.ffn.2.bias": "hidden",
    "transformer.layernorm.weight": "hidden",
    "transformer.layernorm.bias": "hidden",
    "lm_head.weight": "vocab hidden",
    "lm_head.bias": "vocab",
}
CTRL_NORMS = ("transformer.h.{layers}.layernorm1", "transformer.h.{layers}.layernorm2", "transformer.layernorm")

# The last layer has a bias that the others lack.
LAST_BIAS = "only its last layer has a bias after attention, so that no other one can be the last"
JAPANESE_ROWS = {row.replace("gpt_neox.", "gpt_neox_japanese."): pattern for row, pattern in GPT_NEOX_ROWS.items()} | {
    "gpt_neox_japanese.layers.{biased_layers}.attention.dense_bias": "hidden",
    "embed_out.weight": "vocab hidden",
}
JAPANESE_KEYS = {axis: key for axis, key in GPT_NEOX_KEYS.items() if axis != "ffn"}
JAPANESE_NORMS = tuple(norm.replace("gpt_neox.", "gpt_neox_japanese.") for norm in GPT_NEOX_NORMS)

# OPT's layers under another prefix.
XGLM_KEYS = OPT_KEYS | {"layers": "num_layers", "hidden": "d_model", "heads": "attention_heads"}
XGLM_ROWS = {row.replace(".decoder.", "."): pattern for row, pattern in OPT_ROWS.items()} | {
    "model.layer_norm.weight": "hidden",
    "model.layer_norm.bias": "hidden",
}
XGLM_NORMS = (*(norm.replace(".decoder.", ".") for norm in OPT_NORMS), "model.layer_norm")
BIOGPT_KEYS = GPT_NEOX_KEYS
BIOGPT_ROWS = {row.replace("model.", "biogpt.", 1): pattern for row, pattern in XGLM_ROWS.items()} | {
    "output_projection.weight": "vocab hidden"
}
BIOGPT_NORMS = tuple(norm.replace("model.", "biogpt.", 1) for norm in XGLM_NORMS)

# GPT-NeoX's layers under Llama's prefix, with norms of single heads
PERSIMMON_ROWS = {
    row.replace("gpt_neox.", "model.")
    .replace(".attention.", ".self_attn.")
    .replace("final_layer_norm", "final_layernorm"): pattern
    for row, pattern in GPT_NEOX_ROWS.items()
} | {
    "model.embed_tokens.weight": "vocab hidden",
    "model.layers.{layers}.self_attn.q_layernorm.weight": "head_dim",
    "model.layers.{layers}.self_attn.q_layernorm.bias": "head_dim",
    "model.layers.{layers}.self_attn.k_layernorm.weight": "head_dim",
    "model.layers.{layers}.self_attn.k_layernorm.bias": "head_dim",
}
PERSIMMON_NORMS = (
    "model.layers.{layers}.input_layernorm",
    "model.layers.{layers}.post_attention_layernorm",
    "model.final_layernorm",
)

SINES = (
    "positions are told by sines whose wavelengths follow from hidden, and the embedding may be multiplied by its square root"
)
SCALED = {"rescaled": SCALED_EMBEDDING, "rescaled_if": "scale_embedding"}
# Model type to its family.
TABLES = {
    "biogpt": {"rows": BIOGPT_ROWS, "norms": BIOGPT_NORMS, "config_keys": BIOGPT_KEYS, **SCALED},
    "codegen": {
        "rows": CODEGEN_ROWS,
        "norms": GPT2_NORMS,
        "config_keys": GPTJ_KEYS,
        "fixed": dict.fromkeys(("hidden", "heads"), FOUR_GROUPS),
    },
    "ctrl": {"rows": CTRL_ROWS, "norms": CTRL_NORMS, "config_keys": CTRL_KEYS, "inexact": {"hidden": SINES}},
    "gpt2": {"rows": GPT2_ROWS, "norms": GPT2_NORMS, "config_keys": GPT2_KEYS, "inexact_if": GPT2_INEXACT},
    "gpt_bigcode": {"rows": BIGCODE_ROWS, "norms": GPT2_NORMS, "config_keys": BIGCODE_KEYS},
    "gpt_neo": {"rows": NEO_ROWS, "norms": GPT2_NORMS, "config_keys": NEO_KEYS},
    "gpt_neox": {"rows": GPT_NEOX_ROWS, "norms": GPT_NEOX_NORMS, "config_keys": GPT_NEOX_KEYS, "stored": GPT_NEOX_STORED},
    "gpt_neox_japanese": {
        "rows": JAPANESE_ROWS,
        "norms": JAPANESE_NORMS,
        "config_keys": JAPANESE_KEYS,
        "coupled": FOUR_TIMES,
        "fixed": {"layers": LAST_BIAS},
    },
    "gptj": {"rows": GPTJ_ROWS, "norms": GPT2_NORMS, "config_keys": GPTJ_KEYS},
    "openai-gpt": {"rows": OPENAI_ROWS, "norms": GPT2_NORMS, "config_keys": OPENAI_KEYS, "coupled": FOUR_TIMES},
    "opt": {"rows": OPT_ROWS, "norms": OPT_NORMS, "config_keys": OPT_KEYS, "follows": OPT_FOLLOWS},
    "persimmon": {"rows": PERSIMMON_ROWS, "norms": PERSIMMON_NORMS, "config_keys": GPT_NEOX_KEYS},
    "xglm": {"rows": XGLM_ROWS, "norms": XGLM_NORMS, "config_keys": XGLM_KEYS, "inexact": {"hidden": SINES}},
}
