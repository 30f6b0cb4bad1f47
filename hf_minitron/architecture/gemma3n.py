"""Gemma 3n's text models: the stream is several states wide (AltUp), a narrow map stands beside attention (Laurel), every layer
has an embedding of its own, and the last layers reuse the keys and values of earlier ones. Tables only, no functions.
"""

from hf_minitron.architecture.gemma4 import LAYER, PER_LAYER_NORM, PER_LAYER_ROLES, PER_LAYER_ROWS
from hf_minitron.architecture.llama import ATTENTION_ROWS, CONFIG_KEYS, EMBEDDING_ROWS, HEAD_ROWS, MLP_ROWS, NORMS

ALTUP, LAUREL = f"{LAYER}.altup", f"{LAYER}.laurel"
# Layers whose names do not tell them apart: by whose keys and values they use, and which of these others use.
KINDS = {
    "kv_layers": ("kv_sharing_modes", (None,)),
    "store_layers": ("kv_sharing_modes", ("store",)),
    "shared_layers": ("kv_sharing_modes", ("reuse",)),
}
# Of keys and values, which the layers that reuse others' lack.
OF_KEYS = ("k_proj", "v_proj", "k_norm")
KEY_ROWS = {row: pattern for row, pattern in ATTENTION_ROWS.items() if row.split(".")[-2] in OF_KEYS}
QUERY_ROWS = {row: pattern for row, pattern in ATTENTION_ROWS.items() if row not in KEY_ROWS}
GEMMA3N_NORMS = (
    *NORMS, PER_LAYER_NORM, f"{LAUREL}.post_laurel_norm", f"{ALTUP}.router_norm",
)  # fmt: skip
ROWS = {
    **EMBEDDING_ROWS,
    **QUERY_ROWS,
    **{row.replace("{layers}", f"{{{kind}}}"): p for kind in ("kv_layers", "store_layers") for row, p in KEY_ROWS.items()},
    **MLP_ROWS,
    f"{ALTUP}.correct_output_scale": "hidden",
    f"{ALTUP}.correction_coefs.weight": "altup altup",
    f"{ALTUP}.prediction_coefs.weight": "(altup altup) altup",
    f"{ALTUP}.modality_router.weight": "altup hidden",
    f"{LAUREL}.linear_left.weight": "laurel_rank hidden",
    f"{LAUREL}.linear_right.weight": "hidden laurel_rank",
    **PER_LAYER_ROWS,
    "model.embed_tokens_per_layer.weight": "vocab_per_layer (layers per_layer_dim)",
    "model.altup_projections.{altups}.weight": "hidden hidden",
    "model.altup_unembed_projections.{altups}.weight": "hidden hidden",
    **{f"{norm}.weight": "hidden" for norm in GEMMA3N_NORMS},
    **HEAD_ROWS,
}
ROLES = PER_LAYER_ROLES | {
    "correct_output_scale": "mixer", "correction_coefs": "mixer", "prediction_coefs": "mixer",
    "modality_router": "altup_router", "linear_left": "mixer", "linear_right": "mixer",
    "altup_projections.{altups}": "mixer", "altup_unembed_projections.{altups}": "mixer",
}  # fmt: skip
KEPT = "(2 kv_heads head_dim)"
FIXED = {
    "store_layers": "the last layers use their keys and values",
    "kv_heads": "its last layers use the KV heads of earlier ones, which must be the best for all of them",
    "vocab": "its table with an embedding for every layer has tokens of its own number",
}
SPARSE = "only what stands out from all channels of an MLP passes its first layers, and they are fewer after the cut"
# What makes the family of the model type.
TABLES = {
    "gemma3n_text": {
        "rows": ROWS, "norms": GEMMA3N_NORMS, "config_keys": CONFIG_KEYS, "roles": ROLES, "kinds": KINDS, "fixed": FIXED,
        "caches": {"kv_layers": KEPT, "store_layers": KEPT},
        "rescaled": {"hidden": {"embedding": 0.5, "per_layer": -0.5, "altup_router": -1.0}},
        "inexact_if": {"ffn": ("activation_sparsity_pattern", SPARSE)},
    },
}  # fmt: skip
