"""Hybrids: models whose layers mix tokens in several ways, by attention, Mamba, linear attention or short convolutions.

Tables only, no functions. A row says in which layers it stands: `{attention_layers}`, `{mamba_layers}`, `{linear_layers}`,
`{conv_layers}`, `{mlp_layers}`, `{moe_layers}`, `{dense_layers}`, or `{layers}` for all. The heads of Mamba-2 and the value
heads of linear attention are `ssm_heads`, ranked inside their group, which shares B and C (query and key); a channel of Mamba-1
is a head of one number.
"""

from hf_minitron.architecture.llama import ATTENTION_ROWS, CONFIG_KEYS, EMBEDDING_ROWS, HEAD_ROWS, MLP_ROWS
from hf_minitron.architecture.moe import EXPERT_ROWS, QWEN_MOE_KEYS, ROUTER_KEYS, ROUTER_ROWS

ALL, ATTENTION, MAMBA = "model.layers.{layers}", "model.layers.{attention_layers}", "model.layers.{mamba_layers}"
CONV = "model.layers.{conv_layers}.conv"
DENSE, MOE = "model.layers.{dense_layers}.feed_forward", "model.layers.{moe_layers}.feed_forward"

# What the gated norm behind a Mamba-2 or its like sees.
GATED_NORM = "the norm behind the state-space layer normalises the heads of a group together, fewer of them after the cut"

# Rows of Mamba-2 below the name of its module: gate, what passes the convolution (x, B, C) and the time step in one projection.
CONVOLVED = "(ssm_heads ssm_dim)+(ssm_groups ssm_state)+(ssm_groups ssm_state)"
MAMBA2 = {
    "in_proj.weight": f"(ssm_heads ssm_dim)+{CONVOLVED}+ssm_heads hidden",
    "in_proj.bias": f"(ssm_heads ssm_dim)+{CONVOLVED}+ssm_heads",
    "conv1d.weight": f"{CONVOLVED} one kernel",
    "conv1d.bias": CONVOLVED,
    "dt_bias": "ssm_heads",
    "A_log": "ssm_heads",
    "D": "ssm_heads",
    "norm.weight": "(ssm_heads ssm_dim)",
    "out_proj.weight": "hidden (ssm_heads ssm_dim)",
    "out_proj.bias": "hidden",
}
MAMBA1 = {
    "in_proj.weight": "ssm_heads+ssm_heads hidden",
    "in_proj.bias": "ssm_heads+ssm_heads",
    "conv1d.weight": "ssm_heads one kernel",
    "conv1d.bias": "ssm_heads",
    "x_proj.weight": "dt_rank+ssm_state+ssm_state ssm_heads",
    "dt_proj.weight": "ssm_heads dt_rank",
    "dt_proj.bias": "ssm_heads",
    "dt_layernorm.weight": "dt_rank",
    "b_layernorm.weight": "ssm_state",
    "c_layernorm.weight": "ssm_state",
    "A_log": "ssm_heads ssm_state",
    "D": "ssm_heads",
    "out_proj.weight": "hidden ssm_heads",
    "out_proj.bias": "hidden",
}
# Where attention stands in some layers only.
SOME_ATTENTION_ROWS = {row.replace(ALL, ATTENTION): pattern for row, pattern in ATTENTION_ROWS.items()}
FEED_FORWARD_ROWS = {row.replace(".mlp.", ".feed_forward."): pattern for row, pattern in MLP_ROWS.items()}


def _norm_rows(norms: tuple[str, ...]) -> dict[str, str]:
    return {f"{norm}.weight": "hidden" for norm in norms}


NORMS = (f"{ALL}.input_layernorm", f"{ALL}.post_attention_layernorm", f"{ALL}.pre_ff_layernorm", "model.norm",
         "model.final_layernorm")  # fmt: skip
OUTER_ROWS = EMBEDDING_ROWS | HEAD_ROWS | _norm_rows(NORMS)

# nemotron_h: every layer is one norm and one mixer: Mamba-2, attention, an MLP or routed experts
NEMOTRON_NORMS = (f"{ALL}.norm", "model.norm_f")
NEMOTRON_ROWS = {
    "model.embeddings.weight": "vocab hidden",
    **_norm_rows(NEMOTRON_NORMS),
    **{f"{MAMBA}.mixer.{row}": pattern for row, pattern in MAMBA2.items()},
    **{row.replace(".self_attn.", ".mixer."): pattern for row, pattern in SOME_ATTENTION_ROWS.items()},
    "model.layers.{mlp_layers}.mixer.up_proj.weight": "dense_ffn hidden",
    "model.layers.{mlp_layers}.mixer.up_proj.bias": "dense_ffn",
    "model.layers.{mlp_layers}.mixer.down_proj.weight": "hidden dense_ffn",
    "model.layers.{mlp_layers}.mixer.down_proj.bias": "hidden",
    "model.layers.{moe_layers}.mixer.gate.weight": "experts hidden",
    "model.layers.{moe_layers}.mixer.gate.e_score_correction_bias": "experts",
    "model.layers.{moe_layers}.mixer.experts.up_proj": "experts ffn hidden",
    "model.layers.{moe_layers}.mixer.experts.down_proj": "experts hidden ffn",
    "model.layers.{moe_layers}.mixer.shared_experts.up_proj.weight": "shared_ffn hidden",
    "model.layers.{moe_layers}.mixer.shared_experts.up_proj.bias": "shared_ffn",
    "model.layers.{moe_layers}.mixer.shared_experts.down_proj.weight": "hidden shared_ffn",
    "model.layers.{moe_layers}.mixer.shared_experts.down_proj.bias": "hidden",
    **HEAD_ROWS,
}
NEMOTRON_KEYS = CONFIG_KEYS | {
    "ffn": "moe_intermediate_size",
    "dense_ffn": "intermediate_size",
    "shared_ffn": "moe_shared_expert_intermediate_size",
    "experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_groups": "n_group",
    "groups_per_token": "topk_group",
    "ssm_heads": "mamba_num_heads",
    "ssm_dim": "mamba_head_dim",
    "ssm_groups": "n_groups",
    "ssm_state": "ssm_state_size",
}
NEMOTRON_ROLES = {"embeddings": "embedding", "mixer.gate": "router"}

# bamba, granitemoehybrid, falcon_h1: Mamba-2 under a name of its own
MAMBA2_KEYS = {
    "ssm_heads": "mamba_n_heads",
    "ssm_dim": "mamba_d_head",
    "ssm_groups": "mamba_n_groups",
    "ssm_state": "mamba_d_state",
}
MAMBA2_ROWS = {f"{MAMBA}.mamba.{row}": pattern for row, pattern in MAMBA2.items()}
BAMBA_ROWS = OUTER_ROWS | SOME_ATTENTION_ROWS | MAMBA2_ROWS | FEED_FORWARD_ROWS
BAMBA_KEYS = CONFIG_KEYS | MAMBA2_KEYS
FALCON_H1_ROWS = OUTER_ROWS | ATTENTION_ROWS | FEED_FORWARD_ROWS | {f"{ALL}.mamba.{row}": p for row, p in MAMBA2.items()}
FALCON_H1_FOLLOWS = {"mamba_d_ssm": "(ssm_heads ssm_dim)"}
GRANITE_ROWS = OUTER_ROWS | SOME_ATTENTION_ROWS | MAMBA2_ROWS | {
    "model.layers.{moe_layers}.block_sparse_moe.router.weight": "experts hidden",
    "model.layers.{moe_layers}.block_sparse_moe.experts.gate_up_proj": "experts ffn+ffn hidden",
    "model.layers.{moe_layers}.block_sparse_moe.experts.down_proj": "experts hidden ffn",
    f"{ALL}.shared_mlp.input_linear.weight": "shared_ffn+shared_ffn hidden",
    f"{ALL}.shared_mlp.output_linear.weight": "hidden shared_ffn",
}  # fmt: skip
GRANITE_KEYS = BAMBA_KEYS | ROUTER_KEYS | {"shared_ffn": "shared_intermediate_size"} | {"experts": "num_local_experts"}
GRANITE_ROLES = {"block_sparse_moe.router": "router", "input_linear": "gate_up", "output_linear": "down"}

# jamba: Mamba-1; both kinds of MLP have one width
JAMBA_ROWS = OUTER_ROWS | SOME_ATTENTION_ROWS | {f"{MAMBA}.mamba.{row}": pattern for row, pattern in MAMBA1.items()} | {
    f"{DENSE}.gate_proj.weight": "dense_ffn hidden",
    f"{DENSE}.up_proj.weight": "dense_ffn hidden",
    f"{DENSE}.down_proj.weight": "hidden dense_ffn",
    f"{MOE}.router.weight": "experts hidden",
    f"{MOE}.experts.gate_up_proj": "experts ffn+ffn hidden",
    f"{MOE}.experts.down_proj": "experts hidden ffn",
}  # fmt: skip
JAMBA_KEYS = CONFIG_KEYS | ROUTER_KEYS | {
    "experts": "num_experts",
    "dense_ffn": "intermediate_size",
    "dt_rank": "mamba_dt_rank",
    "ssm_state": "mamba_d_state",
}  # fmt: skip
FEED_FORWARD_ROLES = {"feed_forward.router": "router", "feed_forward.gate": "router", "feed_forward.expert": "router"}

# lfm2, lfm2_moe: short convolutions, whose channels are as many as hidden's but others
LFM2_NORMS = (f"{ALL}.operator_norm", f"{ALL}.ffn_norm", "model.embedding_norm")
LFM2_MIXER_ROWS = {
    **EMBEDDING_ROWS,
    **HEAD_ROWS,
    **_norm_rows(LFM2_NORMS),
    **SOME_ATTENTION_ROWS,
    f"{ATTENTION}.self_attn.out_proj.weight": "hidden (heads head_dim)",
    f"{CONV}.in_proj.weight": "conv_channels+conv_channels+conv_channels hidden",
    f"{CONV}.in_proj.bias": "conv_channels+conv_channels+conv_channels",
    f"{CONV}.conv.weight": "conv_channels one kernel",
    f"{CONV}.conv.bias": "conv_channels",
    f"{CONV}.out_proj.weight": "hidden conv_channels",
    f"{CONV}.out_proj.bias": "hidden",
}
LFM2_ROWS = LFM2_MIXER_ROWS | {
    f"{ALL}.feed_forward.w1.weight": "ffn hidden",
    f"{ALL}.feed_forward.w3.weight": "ffn hidden",
    f"{ALL}.feed_forward.w2.weight": "hidden ffn",
}
LFM2_MOE_ROWS = LFM2_MIXER_ROWS | {
    f"{DENSE}.w1.weight": "dense_ffn hidden",
    f"{DENSE}.w3.weight": "dense_ffn hidden",
    f"{DENSE}.w2.weight": "hidden dense_ffn",
    f"{MOE}.gate.weight": "experts hidden",
    f"{MOE}.expert_bias": "experts",
    f"{MOE}.experts.gate_up_proj": "experts ffn+ffn hidden",
    f"{MOE}.experts.down_proj": "experts hidden ffn",
}
LFM2_MOE_KEYS = QWEN_MOE_KEYS
# lfm3: norms after the mixer and the MLP, too, and a gate for every head
LFM3_NORMS = (*LFM2_NORMS, f"{ALL}.post_operator_norm", f"{ALL}.post_ffn_norm")
LFM3_ROWS = LFM2_ROWS | _norm_rows(LFM3_NORMS) | {f"{ATTENTION}.self_attn.g_proj.weight": "heads hidden"}
LFM2_FOLLOWS = dict.fromkeys(("block_dim", "conv_dim", "conv_dim_out"), "hidden")
LFM2_ROLES = FEED_FORWARD_ROLES | {"w1": "gate", "w3": "up", "w2": "down", "conv.conv": "mixer"}

# mamba2, mamba, falcon_mamba: no attention
BACKBONE = "backbone.layers.{layers}"
BACKBONE_NORMS = (f"{BACKBONE}.norm", "backbone.norm_f")
BACKBONE_ROWS = HEAD_ROWS | _norm_rows(BACKBONE_NORMS) | {"backbone.embeddings.weight": "vocab hidden"}
PURE_MAMBA2_ROWS = BACKBONE_ROWS | {f"{BACKBONE}.mixer.{row}": pattern for row, pattern in MAMBA2.items()}
PURE_MAMBA1_ROWS = BACKBONE_ROWS | {f"{BACKBONE}.mixer.{row}": pattern for row, pattern in MAMBA1.items()}
PURE_KEYS = {"layers": "num_hidden_layers", "hidden": "hidden_size", "vocab": "vocab_size", "ssm_state": "state_size"}
PURE_MAMBA2_KEYS = PURE_KEYS | {"ssm_heads": "num_heads", "ssm_dim": "head_dim", "ssm_groups": "n_groups"}
PURE_MAMBA1_KEYS = PURE_KEYS | {"ssm_heads": "intermediate_size", "dt_rank": "time_step_rank"}
BACKBONE_ROLES = {"embeddings": "embedding"}

# minimax: linear attention, whose heads forget at a pace of their own, which checkpoints hold
LIGHTNING = "model.layers.{linear_layers}.self_attn"
MINIMAX_ROWS = OUTER_ROWS | ROUTER_ROWS | EXPERT_ROWS | {
    **{row: pattern for row, pattern in SOME_ATTENTION_ROWS.items() if ".qkv_proj." not in row},
    f"{LIGHTNING}.qkv_proj.weight": "(heads qkv head_dim) hidden",
    f"{LIGHTNING}.norm.weight": "(heads head_dim)",
    f"{LIGHTNING}.output_gate.weight": "(heads head_dim) hidden",
    f"{LIGHTNING}.out_proj.weight": "hidden (heads head_dim)",
    f"{LIGHTNING}.slope_rate": "heads one one",
    **dict.fromkeys((f"{LIGHTNING}.query_decay", f"{LIGHTNING}.key_decay"), "heads block one"),
    f"{LIGHTNING}.diagonal_decay": "one heads block block",
}  # fmt: skip
HEADS_NORM = "the norm behind linear attention normalises all heads together, fewer of them after the cut"

# What a layer keeps of a text: the state of every head, and what its convolution has seen last.
MAMBA2_STATE = (
    "(ssm_heads ssm_dim ssm_state)+(ssm_heads ssm_dim kernel)+(ssm_groups ssm_state kernel)+(ssm_groups ssm_state kernel)"
)
MAMBA1_STATE = "(ssm_heads ssm_state)+(ssm_heads kernel)"
MAMBA2_STATES = {"states": {"mamba_layers": MAMBA2_STATE}}

SSM_AS_HIDDEN = {"ssm_heads": "hidden"}  # the class computes the width of Mamba from hidden
GATED = {"inexact": {"ssm_heads": GATED_NORM}} | MAMBA2_STATES
MAMBA1_TABLE = {"rows": PURE_MAMBA1_ROWS, "norms": BACKBONE_NORMS, "config_keys": PURE_MAMBA1_KEYS, "roles": BACKBONE_ROLES,
                "states": {"layers": MAMBA1_STATE}}  # fmt: skip
LFM2_TABLE = {"norms": LFM2_NORMS, "roles": LFM2_ROLES, "follows": LFM2_FOLLOWS, "coupled": {"conv_channels": "hidden"},
              "states": {"conv_layers": "(conv_channels kernel)"}}  # fmt: skip

# What makes the family of each model type.
TABLES = {
    "nemotron_h": {
        **GATED, "rows": NEMOTRON_ROWS, "norms": NEMOTRON_NORMS, "config_keys": NEMOTRON_KEYS, "roles": NEMOTRON_ROLES,
        "only_ffn": "dense_ffn",
    },
    "bamba": {
        **GATED, "rows": BAMBA_ROWS, "norms": NORMS, "config_keys": BAMBA_KEYS, "coupled": SSM_AS_HIDDEN,
        "pre_norm_residual": True,
    },
    "granitemoehybrid": {
        **GATED, "rows": GRANITE_ROWS, "norms": NORMS, "config_keys": GRANITE_KEYS, "roles": GRANITE_ROLES,
        "coupled": SSM_AS_HIDDEN, "only_ffn": "shared_ffn",
    },
    "falcon_h1": {
        "rows": FALCON_H1_ROWS, "norms": NORMS, "config_keys": BAMBA_KEYS, "follows": FALCON_H1_FOLLOWS,
        "inexact_if": {"ssm_heads": ("mamba_rms_norm", GATED_NORM)}, "states": {"layers": MAMBA2_STATE},
    },
    "jamba": {
        "rows": JAMBA_ROWS, "norms": NORMS, "config_keys": JAMBA_KEYS, "roles": FEED_FORWARD_ROLES,
        "periods": ("attn_layer_period", "expert_layer_period"), "coupled": {**SSM_AS_HIDDEN, "dense_ffn": "ffn"},
        "only_ffn": "dense_ffn", "states": {"mamba_layers": MAMBA1_STATE},
    },
    "lfm2": {
        **LFM2_TABLE, "rows": LFM2_ROWS, "config_keys": CONFIG_KEYS, "from_parameters": ("ffn",), "pre_norm_residual": True,
        "settings": {"block_auto_adjust_ff_dim": False},  # else the class rounds intermediate_size
    },
    "lfm3": {**LFM2_TABLE, "rows": LFM3_ROWS, "norms": LFM3_NORMS, "config_keys": CONFIG_KEYS},
    "lfm2_moe": {**LFM2_TABLE, "rows": LFM2_MOE_ROWS, "config_keys": LFM2_MOE_KEYS},
    "mamba2": {
        **GATED, "rows": PURE_MAMBA2_ROWS, "norms": BACKBONE_NORMS, "config_keys": PURE_MAMBA2_KEYS, "roles": BACKBONE_ROLES,
        "coupled": SSM_AS_HIDDEN, "states": {"layers": MAMBA2_STATE},
    },
    "minimax": {
        "rows": MINIMAX_ROWS, "norms": NORMS, "config_keys": CONFIG_KEYS | ROUTER_KEYS,
        "inexact": dict.fromkeys(("heads", "kv_heads"), HEADS_NORM), "states": {"linear_layers": "(heads head_dim head_dim)"},
    },
    "mamba": MAMBA1_TABLE,
    "falcon_mamba": MAMBA1_TABLE,
}  # fmt: skip
