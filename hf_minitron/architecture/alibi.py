"""Dense families whose heads may weigh tokens by their distance (ALiBi) instead of positions. Tables only, no functions.

Their classes take `head_dim` to be hidden / heads, and most take `ffn` to be four times hidden.
"""

from hf_minitron.architecture.gpt import FOUR_TIMES

SLOPES = "the slope by which a head's attention falls with distance follows from its number and the number of heads"
BLOOM_KEYS = {"layers": "n_layer", "hidden": "hidden_size", "heads": "n_head", "vocab": "vocab_size"}
BLOOM_ROWS = {
    "transformer.word_embeddings.weight": "vocab hidden",
    "transformer.word_embeddings_layernorm.weight": "hidden",
    "transformer.word_embeddings_layernorm.bias": "hidden",
    "transformer.h.{layers}.input_layernorm.weight": "hidden",
    "transformer.h.{layers}.input_layernorm.bias": "hidden",
    "transformer.h.{layers}.self_attention.query_key_value.weight": "(heads qkv head_dim) hidden",
    "transformer.h.{layers}.self_attention.query_key_value.bias": "(heads qkv head_dim)",
    "transformer.h.{layers}.self_attention.dense.weight": "hidden (heads head_dim)",
    "transformer.h.{layers}.self_attention.dense.bias": "hidden",
    "transformer.h.{layers}.post_attention_layernorm.weight": "hidden",
    "transformer.h.{layers}.post_attention_layernorm.bias": "hidden",
    "transformer.h.{layers}.mlp.dense_h_to_4h.weight": "ffn hidden",
    "transformer.h.{layers}.mlp.dense_h_to_4h.bias": "ffn",
    "transformer.h.{layers}.mlp.dense_4h_to_h.weight": "hidden ffn",
    "transformer.h.{layers}.mlp.dense_4h_to_h.bias": "hidden",
    "transformer.ln_f.weight": "hidden",
    "transformer.ln_f.bias": "hidden",
    "lm_head.weight": "vocab hidden",
}
BLOOM_NORMS = (
    "transformer.word_embeddings_layernorm",
    "transformer.h.{layers}.input_layernorm",
    "transformer.h.{layers}.post_attention_layernorm",
    "transformer.ln_f",
)

# As falcon-7b: one key and value for all heads. Its later classes have another order of the rows, and other shapes.
FALCON_KEYS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "ffn_hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": 1,
    "vocab": "vocab_size",
}
ONE_KEY = "(heads head_dim)+(kv_heads head_dim)+(kv_heads head_dim)"
FALCON_ROWS = BLOOM_ROWS | {
    "transformer.h.{layers}.self_attention.query_key_value.weight": f"{ONE_KEY} hidden",
    "transformer.h.{layers}.self_attention.query_key_value.bias": ONE_KEY,
}

MPT_KEYS = {"layers": "n_layers", "hidden": "d_model", "heads": "n_heads", "vocab": "vocab_size"}
MPT_ROWS = {
    "transformer.wte.weight": "vocab hidden",
    "transformer.blocks.{layers}.norm_1.weight": "hidden",
    "transformer.blocks.{layers}.attn.Wqkv.weight": "(qkv heads head_dim) hidden",
    "transformer.blocks.{layers}.attn.out_proj.weight": "hidden (heads head_dim)",
    "transformer.blocks.{layers}.norm_2.weight": "hidden",
    "transformer.blocks.{layers}.ffn.up_proj.weight": "ffn hidden",
    "transformer.blocks.{layers}.ffn.down_proj.weight": "hidden ffn",
    "transformer.norm_f.weight": "hidden",
    "lm_head.weight": "vocab hidden",
}
MPT_NORMS = ("transformer.blocks.{layers}.norm_1", "transformer.blocks.{layers}.norm_2", "transformer.norm_f")

# Model type to its family.
TABLES = {
    "bloom": {
        "rows": BLOOM_ROWS,
        "norms": BLOOM_NORMS,
        "config_keys": BLOOM_KEYS,
        "coupled": FOUR_TIMES,
        "inexact": {"heads": SLOPES},
    },
    "falcon": {
        "rows": FALCON_ROWS,
        "norms": BLOOM_NORMS,
        "config_keys": FALCON_KEYS,
        "inexact_if": {"heads": ("alibi", SLOPES)},
    },
    "mpt": {"rows": MPT_ROWS, "norms": MPT_NORMS, "config_keys": MPT_KEYS, "coupled": FOUR_TIMES, "inexact": {"heads": SLOPES}},
}
