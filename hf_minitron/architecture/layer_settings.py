"""What `config.json` says of single layers (lists, indices, counts, periods), which a depth cut renumbers."""

from collections.abc import Sequence

from transformers import PreTrainedConfig

from hf_minitron.shape import Shape

# Entries of config.json with one item per layer; a depth cut keeps the items of the kept layers.
LAYER_LISTS = (
    "layer_types", "no_rope_layers", "layers_block_type", "mlp_layer_types", "layer_rope_theta", "attention_layers", "moe_topk",
    "num_attention_heads_per_layer", "indexer_types", "activation_sparsity_pattern",
)  # fmt: skip
# Entries that list layers by their indices, which a depth cut counts anew.
INDEX_LISTS = ("attn_layer_indices", "full_attn_idxs", "hybrid_layer_ids")
# Entries that say of which layers every so manieth is of a kind: the period, the first one, and the kind.
PERIODS = (
    ("attn_layer_period", "attn_layer_offset", "attention_layers"),
    ("expert_layer_period", "expert_layer_offset", "moe_layers"),
)
# Entries that say which layers of a mixture of experts are dense: a list of their indices, the count of the first ones; and
# which are not.
DENSE_LIST, DENSE_STEP, MOE_LIST = "mlp_only_layers", "decoder_sparse_step", "moe_layers"
DENSE_COUNTS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
# Entries that count the last layers, which reuse something of earlier ones.
LAST_COUNTS = ("num_kv_shared_layers",)
# Of gpt_neo: the layers' kinds of attention, and how often they come.
KINDS = "attention_types"


def layer_settings(config: PreTrainedConfig, shape: Shape, layers: Sequence[int]) -> dict[str, object]:
    """Return what a student's config says of single layers, in their new numbers.

    Args:
        config (`PreTrainedConfig`): The teacher's, of its text model.
        shape (`Shape`): Its shape.
        layers (`Sequence[int]`): The layers that stay.
    """
    kinds = shape.layer_kinds
    names = config.attribute_map or {}
    written = config.to_dict().keys()  # else a property, which follows from other entries

    def now(indices: Sequence[int]) -> list[int]:
        return [new for new, old in enumerate(layers) if old in indices]

    lists = [key for key in LAYER_LISTS if names.get(key, key) in written and isinstance(getattr(config, key), list | tuple)]
    changes = {key: [getattr(config, key)[i] for i in layers] for key in lists}
    changes |= {key: now(getattr(config, key)) for key in INDEX_LISTS if getattr(config, key, None)}
    dense = now(kinds.get("dense_layers", ()))
    if hasattr(config, DENSE_LIST):
        changes |= {DENSE_LIST: dense, DENSE_STEP: 1}
    changes |= {key: len(dense) for key in DENSE_COUNTS if hasattr(config, key)}
    last = {key: shape["layers"] - getattr(config, key) for key in LAST_COUNTS if hasattr(config, key)}
    changes |= {key: sum(layer >= first for layer in layers) for key, first in last.items()}
    if hasattr(config, MOE_LIST):
        changes[MOE_LIST] = [layer for layer in range(len(layers)) if layer not in dense]
    if hasattr(config, KINDS):
        changes[KINDS] = [[changes["attention_layers"], 1]]
    for period, first, kind in PERIODS:
        if hasattr(config, period):
            changes |= dict(zip((period, first), _period(now(kinds.get(kind, ())), len(layers)), strict=True))
    return changes


def _period(places: Sequence[int], layers: int) -> tuple[int, int]:
    """Return period and first place of every so manieth of some layers; of places that are not evenly spaced those of one."""
    period = places[1] - places[0] if len(places) > 1 else layers + 1
    return period, places[0] % period if places else layers
