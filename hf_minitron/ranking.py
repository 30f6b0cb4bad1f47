"""Ranking: which indices of an axis are the best, in all of a layer or in every group of it."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from hf_minitron.shape import Shape

# Axes of which every group keeps as many.
IN_GROUPS = {"experts": "expert_groups", "ssm_heads": "ssm_groups"}


def check_scores(scores: Mapping[str, Tensor], axis: str, before: Shape) -> None:
    """Refuse NaN, except where a layer has no index, and for all of a layer that lacks the axis, where layers are of several
    kinds."""
    axis = "heads" if axis == "kv_heads" else axis
    absent = scores[axis].isnan()
    for layer, size in enumerate(before.by_layer.get(axis, ())):
        absent[layer, size:] = False
    by_layer = absent.flatten(1).any(1) if absent.dim() > 1 else absent
    if absent.dim() > 1 and before.layer_kinds:
        by_layer &= ~absent.flatten(1).all(1)
    if by_layer.any():
        raise ValueError(f"The scores of {axis} hold NaN (first at {int(by_layer.nonzero()[0, 0])}); score the model again")


def best_layers(scores: Tensor, before: Shape, after: Shape) -> list[int]:
    """Return the layers that stay: the best of all, or of each kind whose number is given, beside all layers of other kinds.

    One layer of attention is among them: the caches of Transformers count tokens by it. Where kinds repeat, whole periods stay.
    """
    if period := before.sizes.get("layer_period"):
        periods = best(scores.view(-1, period).sum(1), after["layers"] // period)
        return [first * period + place for first in periods for place in range(period)]
    if not after.by_kind:
        staying, others = sorted(before.staying), before.droppable
        kept = staying + [others[i] for i in best(scores[others], after["layers"] - len(staying))]
        attention = before.layer_kinds.get("attention_layers", ())
        if attention and not set(kept) & set(attention):
            kept.remove(min(kept, key=lambda layer: scores[layer]))
            kept.append(max(attention, key=lambda layer: scores[layer]))
        return sorted(kept)
    kinds = [(list(before.layer_kinds[kind]), count) for kind, count in after.by_kind.items()]
    stay = set(range(before["layers"])).difference(*(layers for layers, _ in kinds))
    return sorted(stay.union(*({layers[i] for i in best(scores[layers], count)} for layers, count in kinds)))


def best(scores: Tensor, count: int, groups: int = 1) -> list:
    """Return the ascending indices of the best scores along the last dimension, as many in every group; none of NaN."""
    if scores.isnan().all():
        return []
    if scores.dim() == 2:
        return [best(row, count, groups) for row in scores]
    size = len(scores) // groups
    top = scores.view(groups, size).topk(count // groups, dim=1).indices
    return (top + torch.arange(groups)[:, None] * size).flatten().sort().values.tolist()


def best_heads(scores: Tensor, before: Shape, after: Shape) -> tuple[list[int], list[int]]:
    """Rank heads inside their KV group, and groups by the sum of their heads."""
    if scores.isnan().all():  # a layer without attention
        return [], []
    group = before["heads"] // before.kv_groups
    by_group = scores.view(before.kv_groups, group)
    groups = best(by_group.sum(1), after.kv_groups)
    per_group = after["heads"] // after.kv_groups
    return [g * group + head for g in groups for head in best(by_group[g], per_group)], groups


def best_in_layer(scores: Mapping[str, Tensor], before: Shape, layer: int, sizes: Mapping[str, int]) -> dict[str, list[int]]:
    """Return what stays of one layer when it has so many heads or channels; nothing of an axis whose size is 0.

    Args:
        scores (`Mapping[str, Tensor]`): Of all layers.
        before (`Shape`): The teacher's shape.
        layer (`int`): The layer.
        sizes (`Mapping[str, int]`): `heads` and, where heads share keys, `kv_heads`; or `ffn`; or all of them.
    """
    own, kept = before.of_layer(layer), {}
    left = replace(own, sizes={**own.sizes, **sizes})
    if "heads" in sizes:
        kept = dict.fromkeys(sizes.keys() & {"heads", "kv_heads"}, [])
        if sizes["heads"]:
            found = best_heads(scores["heads"][layer][: own["heads"]], own, left)
            kept = {axis: indices for axis, indices in zip(("heads", "kv_heads"), found, strict=True) if axis in sizes}
    if "ffn" in sizes:
        kept["ffn"] = best(scores["ffn"][layer][: own["ffn"]], sizes["ffn"])
    return kept
