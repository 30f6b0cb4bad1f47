"""Per-layer sizes in other projects' words: transformers' `per_layer_config`, NVIDIA's `block_configs`, plain layer lists.

Every function reads or makes `sizes`: the three per-layer lists of `PrunedConfig` by name, where 0 means that this sublayer
of a layer is absent. Copied beside saved models, so it imports nothing of hf_minitron.
"""

from collections.abc import Mapping, Sequence

HEADS, KV_HEADS, FFN = "layer_num_attention_heads", "layer_num_key_value_heads", "layer_intermediate_size"
# The list of each key of config.json that holds the largest entry of that list.
LIST_OF = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "intermediate_size": FFN}
# What `skip` names, and the keys that say nothing once it is skipped.
SKIPPED = {"attention": ("num_attention_heads", "num_key_value_heads"), "mlp": ("intermediate_size",)}
# NVIDIA's blocks can be other things than attention and MLP, which cannot be expressed here.
OTHER_BLOCKS = ("replace_with_linear", "sparsify", "mamba", "llama4", "moe")

Sizes = dict[str, list[int]]


def to_per_layer_config(sizes: Sizes) -> dict[int, dict]:
    """Return transformers' schema: to every layer that differs from the largest sizes what differs, and what it skips."""
    largest = {key: max(sizes[name]) for key, name in LIST_OF.items()}
    found = {}
    for layer in range(len(sizes[HEADS])):
        own = {key: sizes[name][layer] for key, name in LIST_OF.items()}
        skip = [part for part, keys in SKIPPED.items() if not own[keys[0]]]
        changes = {key: size for key, size in own.items() if size and size != largest[key]}
        if changes or skip:
            found[layer] = changes | ({"skip": skip} if skip else {})
    return found


def from_per_layer_config(per_layer: Mapping[int | str, Mapping], largest: Mapping[str, int], layers: int) -> Sizes:
    """Return the sizes that transformers' schema describes.

    Args:
        per_layer (`Mapping`): Layer (an int, or a string of digits as in JSON) to its changes.
        largest (`Mapping[str, int]`): What holds for the other layers, by key of config.json.
        layers (`int`): Number of layers.
    """
    per_layer = {int(layer): dict(changes) for layer, changes in per_layer.items()}
    strange = [layer for layer in per_layer if not 0 <= layer < layers]
    unknown = {key for changes in per_layer.values() for key in changes} - {*LIST_OF, "skip"}
    unknown |= {part for changes in per_layer.values() for part in changes.get("skip", ())} - SKIPPED.keys()
    if strange or unknown:
        raise ValueError(f"per_layer_config may hold layers 0 to {layers - 1} with {', '.join(LIST_OF)}, and skip with "
                         f"{', '.join(SKIPPED)}; it holds {strange or sorted(unknown)}")  # fmt: skip
    sizes = {name: [largest[key]] * layers for key, name in LIST_OF.items()}
    for layer, changes in per_layer.items():
        own = dict.fromkeys((key for part in changes.pop("skip", ()) for key in SKIPPED[part]), 0)
        for key, size in (changes | own).items():
            sizes[LIST_OF[key]][layer] = size
    return sizes


def to_block_configs(sizes: Sizes) -> list[dict]:
    """Return NVIDIA's schema (Nemotron-NAS and Puzzletron), which has one number of query heads for all layers."""
    if len(set(sizes[HEADS]) - {0}) > 1:
        raise ValueError(f"block_configs have one num_attention_heads for all layers, not {sizes[HEADS]}; "
                         "use per_layer_config or layer lists")  # fmt: skip
    blocks = []
    for heads, kv_heads, ffn in zip(sizes[HEADS], sizes[KV_HEADS], sizes[FFN], strict=True):
        attention = {"num_key_value_heads": kv_heads, "n_heads_in_group": heads // kv_heads} if heads else {}
        mlp = {"intermediate_size": ffn} if ffn else {}
        blocks.append({"attention": attention | {"no_op": not heads}, "ffn": mlp | {"no_op": not ffn}})
    return blocks


def from_block_configs(blocks: Sequence[Mapping], heads: int, hidden: int) -> Sizes:
    """Return the sizes that NVIDIA's schema describes.

    Args:
        blocks (`Sequence[Mapping]`): One block a layer: `attention` with `n_heads_in_group` or `num_key_value_heads`, `ffn`
            with `ffn_mult` or `intermediate_size`; either may be a `no_op`.
        heads (`int`): Query heads of every layer.
        hidden (`int`): Hidden size, which `ffn_mult` multiplies.
    """
    sizes = {name: [] for name in LIST_OF.values()}
    for layer, block in enumerate(blocks):
        attention, mlp = block["attention"], block["ffn"]
        other = [key for key in OTHER_BLOCKS if attention.get(key) or mlp.get(key)]
        if other:
            raise ValueError(f"Block {layer} has {other[0]}; only attention, an MLP and no_op can be held")
        kv_heads = attention.get("num_key_value_heads") or heads // (attention.get("n_heads_in_group") or 1)
        ffn = mlp.get("intermediate_size") or -(-int(2 * (mlp.get("ffn_mult") or 0) * hidden / 3) // 256) * 256
        sizes[HEADS].append(0 if attention.get("no_op") else heads)
        sizes[KV_HEADS].append(0 if attention.get("no_op") else kv_heads)
        sizes[FFN].append(0 if mlp.get("no_op") else ffn)
    return sizes


def to_layer_lists(sizes: Sizes) -> dict[str, list[int]]:
    """Return the two lists that users patch into Qwen models, which keep the number of KV heads in all layers."""
    multi_head = sizes[HEADS] == sizes[KV_HEADS]
    if not multi_head and len(set(sizes[KV_HEADS]) - {0}) > 1:
        raise ValueError(f"layer_head_num has no room for KV heads that differ by layer, {sizes[KV_HEADS]}; use "
                         "per_layer_config")  # fmt: skip
    return {"layer_head_num": list(sizes[HEADS]), "layer_inter_size": list(sizes[FFN])}


def from_layer_lists(layer_head_num: Sequence[int], layer_inter_size: Sequence[int], largest: Mapping[str, int]) -> Sizes:
    """Return the sizes that two layer lists describe; KV heads stay as many, or follow query heads that share none.

    Args:
        layer_head_num (`Sequence[int]`): Query heads per layer.
        layer_inter_size (`Sequence[int]`): Inner width of the MLP per layer.
        largest (`Mapping[str, int]`): The model's sizes by key of config.json.
    """
    groups = largest["num_key_value_heads"] != largest["num_attention_heads"]
    kv_heads = [largest["num_key_value_heads"] if heads and groups else heads for heads in layer_head_num]
    return {HEADS: list(layer_head_num), KV_HEADS: kv_heads, FFN: list(layer_inter_size)}
