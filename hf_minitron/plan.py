"""`Plan`: the indices that stay, from scores and a target shape.

It must not know a model or a file of weights. Per layer for `ffn` and `heads` (inside their KV group), one global order for
`hidden`: what the reference code of 2407.14679 does (its text sums all layers into one network-wide score).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hf_minitron.scores import Scores
from hf_minitron.shape import Shape


@dataclass(frozen=True)
class Plan:
    """What pruning keeps.

    Args:
        before (`Shape`): The teacher's shape.
        after (`Shape`): The student's shape.
        keep (`Mapping[str, list]`): Ascending kept indices of every axis that is cut: `layers` and `hidden` one list;
            `ffn`, `heads`, `kv_heads` one list per kept layer, in the order of `layers`.
    """

    before: Shape
    after: Shape
    keep: Mapping[str, list]

    @property
    def kept_layers(self) -> list[int]:
        """The teacher's layers that stay, ascending."""
        return self.keep.get("layers", list(range(self.before["layers"])))

    def keep_at(self, layer: int | None) -> dict[str, Tensor] | None:
        """Return the index tensors in force at one teacher layer, or `None` when that layer is dropped.

        Args:
            layer (`int`, *optional*): The teacher's layer; `None` for what lies outside the layers, such as embeddings.
        """
        if layer is None:
            return {axis: torch.tensor(self.keep[axis]) for axis in ("hidden",) if axis in self.keep}
        if layer not in self.kept_layers:
            return None
        position = self.kept_layers.index(layer)
        per_layer = {axis: self.keep[axis][position] for axis in ("ffn", "heads", "kv_heads") if axis in self.keep}
        return {axis: torch.tensor(kept) for axis, kept in per_layer.items()} | self.keep_at(None)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        content = {"before": dict(self.before.sizes), "after": dict(self.after.sizes), "keep": dict(self.keep)}
        Path(path).write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read what `save` wrote."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(Shape(content["before"]), Shape(content["after"]), content["keep"])


def make_plan(scores: Scores, before: Shape, after: Shape) -> Plan:
    """Choose the indices that stay: the best-scored ones of every axis that `after` makes smaller.

    Args:
        scores (`Scores`): Importance of every index.
        before (`Shape`): The teacher's shape.
        after (`Shape`): The student's shape, from `before.cut_to(...)`.

    Returns:
        `Plan`: The kept indices. A KV head is worth the sum of its query heads' scores.

    Example:

    ```python
    >>> plan = make_plan(scores, shape, shape.cut_to({"hidden": 504, "ffn": 1152}))
    >>> plan.after["ffn"], len(plan.keep["ffn"][0])
    (1152, 1152)
    ```
    """
    cut = [axis for axis in after.sizes if after[axis] != before[axis]]
    missing = {"heads" if axis == "kv_heads" else axis for axis in cut} - set(scores.by_axis)
    if missing:
        raise ValueError(f"No scores for {', '.join(sorted(missing))}; these axes were scored: {', '.join(scores.by_axis)}")
    keep: dict[str, list] = {}
    if "layers" in cut:
        keep["layers"] = _best(scores.by_axis["layers"], after["layers"])
    layers = keep.get("layers", range(before["layers"]))
    if "hidden" in cut:
        keep["hidden"] = _best(scores.by_axis["hidden"], after["hidden"])
    if "ffn" in cut:
        keep["ffn"] = [_best(scores.by_axis["ffn"][layer], after["ffn"]) for layer in layers]
    if "heads" in cut:
        pairs = [_best_heads(scores.by_axis["heads"][layer], before, after) for layer in layers]
        keep["heads"] = [heads for heads, _ in pairs]
        if "kv_heads" in cut:
            keep["kv_heads"] = [groups for _, groups in pairs]
    return Plan(before, after, keep)


def _best(scores: Tensor, count: int) -> list[int]:
    return scores.topk(count).indices.sort().values.tolist()


def _best_heads(scores: Tensor, before: Shape, after: Shape) -> tuple[list[int], list[int]]:
    """Rank heads inside their KV group, and groups by the sum of their heads."""
    group = before["heads"] // before["kv_heads"]
    by_group = scores.view(before["kv_heads"], group)
    groups = _best(by_group.sum(1), after["kv_heads"])
    per_group = after["heads"] // after["kv_heads"]
    return [g * group + head for g in groups for head in _best(by_group[g], per_group)], groups
