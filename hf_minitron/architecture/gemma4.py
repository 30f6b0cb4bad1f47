"""Gemma 4's text models: layers of full attention have larger heads than sliding ones, the last layers may reuse the keys and
values of earlier ones, and an embedding of its own may go into every layer. Tables only, no functions.
"""

from hf_minitron.architecture.llama import CONFIG_KEYS, EMBEDDING_ROWS, HEAD_ROWS, NORMS

LAYER, PER_LAYER_NORM = "model.layers.{layers}", "model.layers.{layers}.post_per_layer_input_norm"
# Layers whose names do not tell them apart: by their attention, by whose keys and values they use.
KINDS = {
    "full_layers": ("layer_types", ("full_attention",)),
    "sliding_layers": ("layer_types", ("sliding_attention",)),
    "full_kv_layers": ("layer_types", ("full_attention",)),
    "sliding_kv_layers": ("layer_types", ("sliding_attention",)),
    "own_layers": ("kv_sharing_modes", (None, "store")),
    "shared_layers": ("kv_sharing_modes", ("reuse",)),
}


def _attention(kind: str, kv_heads: str, dim: str) -> dict[str, str]:
    attention, keys = f"model.layers.{{{kind}_layers}}.self_attn", f"model.layers.{{{kind}_kv_layers}}.self_attn"
    return {
        f"{attention}.q_proj.weight": f"(heads {dim}) hidden",
        f"{attention}.q_norm.weight": dim,
        f"{attention}.o_proj.weight": f"hidden (heads {dim})",
        f"{keys}.k_proj.weight": f"({kv_heads} {dim}) hidden",
        f"{keys}.v_proj.weight": f"({kv_heads} {dim}) hidden",
        f"{keys}.k_norm.weight": dim,
    }


def _mlp(kind: str, width: str) -> dict[str, str]:
    mlp = f"model.layers.{{{kind}_layers}}.mlp"
    return {
        f"{mlp}.gate_proj.weight": f"{width} hidden",
        f"{mlp}.up_proj.weight": f"{width} hidden",
        f"{mlp}.down_proj.weight": f"hidden {width}",
    }


# How an embedding of its own goes into every layer, but for the table of these embeddings.
PER_LAYER_ROWS = {
    f"{LAYER}.per_layer_input_gate.weight": "per_layer_dim hidden",
    f"{LAYER}.per_layer_projection.weight": "hidden per_layer_dim",
    "model.per_layer_model_projection.weight": "(layers per_layer_dim) hidden",
    "model.per_layer_projection_norm.weight": "per_layer_dim",
}
PER_LAYER_ROLES = {
    "per_layer_input_gate": "gate", "per_layer_projection": "mixer", "embed_tokens_per_layer": "mixer",
    "per_layer_model_projection": "per_layer", "per_layer_projection_norm": "mixer",
}  # fmt: skip
GEMMA4_NORMS = (*NORMS, PER_LAYER_NORM)
ROWS = {
    **EMBEDDING_ROWS,
    **_attention("full", "global_kv_heads", "global_dim"),
    **_attention("sliding", "kv_heads", "head_dim"),
    **_mlp("own", "ffn"),
    **_mlp("shared", "(wide ffn)"),
    f"{LAYER}.layer_scalar": "one",
    **PER_LAYER_ROWS,
    "model.embed_tokens_per_layer.weight": "vocab (layers per_layer_dim)",
    **{f"{norm}.weight": "hidden" for norm in GEMMA4_NORMS},
    **HEAD_ROWS,
}
ROLES = PER_LAYER_ROLES | {"layer_scalar": "mixer"}
KEPT = {"full_kv_layers": "(2 global_kv_heads global_dim)", "sliding_kv_layers": "(2 kv_heads head_dim)"}
FIXED = {
    "layers": "its last layers use the keys and values of earlier ones, and one table holds an embedding for every layer",
    "kv_heads": "layers of full attention have KV heads of their own number",
}
TABLE = {
    "rows": ROWS, "norms": GEMMA4_NORMS, "config_keys": CONFIG_KEYS, "roles": ROLES, "kinds": KINDS, "caches": KEPT,
    "head_sizes": {"full_layers": "global_dim", "sliding_layers": "head_dim"}, "fixed": FIXED,
    "follows": {"vocab_size_per_layer_input": "vocab"},
    "rescaled": {"hidden": {"embedding": 0.5, "per_layer": -0.5}},
}  # fmt: skip
# What makes the family of each model type.
TABLES = {"gemma4_text": TABLE, "gemma4_unified_text": TABLE}
