"""Dense families of GPT's line, with learned positions or fused queries, keys and values. Tables only, no functions.

They have no `kv_heads` (every head has its own key and value), and their classes take `head_dim` to be hidden / heads: the two
must be cut together.
"""

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
