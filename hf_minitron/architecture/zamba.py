"""Zamba: Mamba layers, before some of which an attention block with its MLP stands, whose weights several layers share.

Tables only, no functions. The shared weights stand in the first layers that use them, `{shared_layers}`; adapters are a
layer's own, and stand beside the weights that they are for.
"""

from hf_minitron.architecture.hybrid import GATED_NORM, HEAD_ROWS, MAMBA2, MAMBA2_KEYS, MAMBA2_STATE
from hf_minitron.architecture.llama import CONFIG_KEYS, EMBEDDING_ROWS

MAMBA, HYBRID = "model.layers.{mamba_layers}", "model.layers.{attention_layers}"
SHARED = "model.layers.{shared_layers}.shared_transformer"
ATTENTION, MLP = f"{SHARED}.self_attn", f"{SHARED}.feed_forward"

NORMS = (
    f"{MAMBA}.input_layernorm",
    f"{HYBRID}.mamba_decoder.input_layernorm",
    f"{SHARED}.pre_ff_layernorm",
    "model.final_layernorm",
)
# The block reads the stream and the embeddings side by side.
BOTH = "hidden+hidden"
OUTPUTS = {"q": "(heads head_dim)", "k": "(kv_heads head_dim)", "v": "(kv_heads head_dim)"}
ROWS = {
    **EMBEDDING_ROWS,
    **{f"{norm}.weight": "hidden" for norm in NORMS},
    **{f"{MAMBA}.mamba.{row}": pattern for row, pattern in MAMBA2.items()},
    **{f"{HYBRID}.mamba_decoder.mamba.{row}": pattern for row, pattern in MAMBA2.items()},
    f"{HYBRID}.linear.weight": "hidden hidden",
    f"{SHARED}.input_layernorm.weight": BOTH,
    **{f"{ATTENTION}.{part}_proj.weight": f"{given} {BOTH}" for part, given in OUTPUTS.items()},
    **{f"{ATTENTION}.linear_{part}_adapter_list.{{adapters}}.0.weight": f"adapter_rank {BOTH}" for part in OUTPUTS},
    **{f"{ATTENTION}.linear_{part}_adapter_list.{{adapters}}.1.weight": f"{out} adapter_rank" for part, out in OUTPUTS.items()},
    f"{ATTENTION}.o_proj.weight": "hidden (heads head_dim)",
    f"{MLP}.gate_up_proj.weight": "ffn+ffn hidden",
    f"{MLP}.gate_up_proj.bias": "ffn+ffn",
    f"{MLP}.gate_up_proj_adapter_list.{{adapters}}.0.weight": "adapter_rank hidden",
    f"{MLP}.gate_up_proj_adapter_list.{{adapters}}.1.weight": "ffn+ffn adapter_rank",
    f"{MLP}.down_proj.weight": "hidden ffn",
    f"{MLP}.down_proj.bias": "hidden",
    **HEAD_ROWS,
}
ROLES = {
    **{f"linear_{part}_adapter_list.{{adapters}}.{at}": "mixer" for part in OUTPUTS for at in (0, 1)},
    **{f"gate_up_proj_adapter_list.{{adapters}}.{at}": "gate_up" for at in (0, 1)},
    "linear": "mixer",
    "shared_transformer.input_layernorm": "mixer",
}
KEYS = CONFIG_KEYS | MAMBA2_KEYS | {
    "head_dim": "attention_head_dim", "ssm_heads": "n_mamba_heads", "ssm_dim": "mamba_headdim", "ssm_groups": "mamba_ngroups",
}  # fmt: skip
IN_TURN = "its layers of attention use shared blocks in turn, each with an adapter of its own, so that all of them stay"
# What makes the family of each model type.
TABLES = {
    "zamba2": {
        "rows": ROWS, "norms": NORMS, "config_keys": KEYS, "roles": ROLES,
        # the class makes both mixers twice as wide as hidden
        "coupled": dict.fromkeys(("heads", "kv_heads", "ssm_heads"), "hidden"), "inexact": {"ssm_heads": GATED_NORM},
        "fixed": dict.fromkeys(("attention_layers", "shared_layers"), IN_TURN), "reused": {"shared_layers": "attention_layers"},
        "follows": {"attention_hidden_size": BOTH, "num_query_groups": "heads"},
        "states": dict.fromkeys(("mamba_layers", "attention_layers"), MAMBA2_STATE),
    },
}  # fmt: skip
