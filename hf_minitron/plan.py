"""`Plan`: the indices that stay, from scores and a target shape.

Per layer for `ffn`, `experts` and `heads` (inside their KV group), one order for `hidden`: what the reference code of
2407.14679 does (its text sums all layers into one network-wide score).
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_minitron.ranking import IN_GROUPS, best, best_heads, best_in_layer, best_layers, check_scores
from hf_minitron.shape import Shape
from hf_minitron.sizes import BY_LAYER, largest, selected

logger = logging.getLogger(__name__)

# Beside plan.json, in a folder of its own: some loaders take every *.safetensors beside config.json for weights.
BASIS = "plan/basis.safetensors"
LARGE_BASIS = 64 * 2**20  # hidden 2,896

# Axes that are cut alike in all of the model; `projector` is the inner width of a vision model's, which follows hidden.
EVERYWHERE = ("hidden", "projector", "vocab")
# Axes without scores, which are cut in a basis that is found with the weights: the first directions stay. Why it is inexact.
RANKS = dict.fromkeys(
    ("kv_rank", "q_rank"),
    "the norm of the narrow row sees the kept directions alone, so that its scale differs from token to token",
)


@dataclass(frozen=True)
class Plan:
    """What pruning keeps.

    Args:
        before (`Shape`): The teacher's shape.
        after (`Shape`): The student's shape.
        keep (`Mapping[str, list]`): Ascending kept indices of every axis that is cut: `layers`, `hidden` and `vocab` one
            list; the others one list per kept layer, in the order of `layers`, empty where a layer has no such axis (or loses
            it: its MLP or its attention goes). Of a routed `ffn` that list holds one list per kept expert. Lists may differ in
            length from layer to layer; `after` has the largest then.
        rotated (`bool`, *optional*, defaults to `False`): Whether the indices of `hidden` count the components of a basis.
        basis (`Tensor` of shape `(hidden, hidden)`, *optional*): That basis, float64, one component per column; `None` of a
            rotated plan that was loaded from a folder without it, which cannot be pruned by.
        corrections (`tuple[str, ...]`, *optional*): The corrections that were made with it, which `prune_model` and
            `prune_checkpoint` make again unless told otherwise.
    """

    before: Shape
    after: Shape
    keep: Mapping[str, list]
    rotated: bool = False
    basis: Tensor | None = field(default=None, compare=False)
    corrections: tuple[str, ...] = field(default=(), compare=False)

    @property
    def kept_layers(self) -> list[int]:
        """The teacher's layers that stay, ascending."""
        return self.keep.get("layers", list(range(self.before["layers"])))

    @property
    def dropped_after(self) -> dict[int, list[int]]:
        """Every kept layer right behind which layers are dropped, to these."""
        ends = [*self.kept_layers[1:], self.before["layers"]]
        dropped = {layer: list(range(layer + 1, end)) for layer, end in zip(self.kept_layers, ends, strict=True)}
        return {layer: layers for layer, layers in dropped.items() if layers}

    @property
    def by_layer(self) -> dict[str, list[int]]:
        """The sizes of `heads`, `kv_heads` and `ffn` in every kept layer, where layers differ; else nothing."""
        return {axis: list(sizes) for axis, sizes in self.after.by_layer.items()}

    @property
    def sizes_by_layer(self) -> dict[str, list[int]]:
        """`by_layer` with every layer of the teacher; 0 for those that go."""
        kept = self.kept_layers
        return {
            axis: [sizes[kept.index(layer)] if layer in kept else 0 for layer in range(self.before["layers"])]
            for axis, sizes in self.by_layer.items()
        }

    def keep_at(self, layer: int | None, expert: int | None = None) -> dict[str, Tensor] | None:
        """Return the index tensors in force at one place of the teacher, or `None` when nothing of that place is kept.

        Args:
            layer (`int`, *optional*): The teacher's layer; `None` for what lies outside the layers, such as embeddings.
            expert (`int`, *optional*): The teacher's expert, where every expert has its own tensors.
        """
        if layer is None:
            return self._everywhere | ({"layers": torch.tensor(self.kept_layers)} if "layers" in self.keep else {})
        if layer not in self.kept_layers:
            return None
        position = self.kept_layers.index(layer)
        kept = {axis: lists[position] for axis, lists in self.keep.items() if axis not in ("layers", *EVERYWHERE)}
        if expert is not None:
            if "experts" in kept and expert not in kept["experts"]:
                return None
            if "ffn" in kept:
                kept["ffn"] = kept["ffn"][self.position("experts", expert, layer)]
        removed = bool(self.by_layer)  # an empty list is a removed sublayer, not one that this layer never had
        return {axis: torch.tensor(indices, dtype=torch.long) for axis, indices in kept.items() if indices or removed} | (
            self._everywhere
        )

    @cached_property
    def _everywhere(self) -> dict[str, Tensor]:
        return {axis: torch.tensor(self.keep[axis]) for axis in EVERYWHERE if axis in self.keep}

    def position(self, axis: str, index: int, layer: int | None) -> int:
        """Return where a kept index of the teacher stands in the student, such as a layer's new number."""
        if axis not in self.keep:
            return index
        kept = self.keep[axis] if axis == "layers" else self.keep[axis][self.kept_layers.index(layer)]
        return kept.index(index)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; of a rotated one also its basis, as `plan/basis.safetensors` beside it, which it names."""
        content = {"before": dict(self.before.sizes), "after": dict(self.after.sizes), "keep": dict(self.keep)}
        if self.before.by_layer or self.after.by_layer:
            content["by_layer"] = {"before": dict(self.before.by_layer), "after": dict(self.after.by_layer)}
        if set(self.before.windows) != {None}:
            content["windows"] = {"before": self.before.windows, "after": self.after.windows}
        if self.corrections:
            content["corrections"] = list(self.corrections)
        if self.rotated:
            file, basis = Path(path).parent / BASIS, self.require_basis().contiguous()
            file.parent.mkdir(exist_ok=True)
            save_file({"basis": basis}, file)
            content["basis"] = {"file": BASIS, "sha256": _sha256(file), "bytes": file.stat().st_size}
        Path(path).write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read what `save` wrote; the basis where it lies beside it.

        Raises:
            ValueError: for a basis that is another plan's, or damaged.
        """
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        windows, sides = content.get("windows", {}), ("before", "after")
        shapes = [Shape(content[s], windows=tuple(windows.get(s, ())), by_layer=_by_layer(content, s)) for s in sides]
        corrections, named = tuple(content.get("corrections", ())), content.get("basis")
        plan = cls(*shapes, content["keep"], corrections=corrections)
        if not named:
            return plan
        file = Path(path).parent / BASIS
        if file.is_file() and _sha256(file) != named["sha256"]:
            raise ValueError(
                f"{file} is not the basis that {path} names (SHA-256 {named['sha256']}): copy it from its run again"
            )
        return replace(plan, rotated=True, basis=load_file(file)["basis"] if file.is_file() else None)

    def require_basis(self) -> Tensor:
        """Return the basis of a rotated plan; refuse one that is missing or of another size."""
        size = self.before["hidden"]
        if self.basis is None or tuple(self.basis.shape) != (size, size):
            problem = "is missing" if self.basis is None else f"has shape {tuple(self.basis.shape)}, not {(size, size)}"
            raise ValueError(f"The plan keeps components of a basis, {BASIS} beside plan.json, which {problem}: copy it "
                             "from the run that made the plan (prune/student)")  # fmt: skip
        return self.basis


def _by_layer(content: Mapping, side: str) -> dict[str, tuple[int, ...]]:
    """Return the sizes in every layer; an older version has not written those of the student, whose lists tell."""
    if "by_layer" in content:
        return {axis: tuple(sizes) for axis, sizes in content["by_layer"][side].items()}
    uniform = not set(BY_LAYER) <= content["keep"].keys() or any(axis.endswith("_layers") for axis in content["before"])
    if side == "before" or uniform:
        return {}
    return selected({axis: tuple(map(len, content["keep"][axis])) for axis in BY_LAYER}, range(content["after"]["layers"]))


def copy_plan(source: Path, target: Path) -> None:
    """Copy a folder's plan; its basis only up to `LARGE_BASIS` bytes, for what is copied will be published."""
    shutil.copyfile(source / "plan.json", target / "plan.json")
    basis = source / BASIS
    if basis.is_file() and basis.stat().st_size <= LARGE_BASIS:
        (target / BASIS).parent.mkdir(exist_ok=True)
        shutil.copyfile(basis, target / BASIS)
    elif basis.is_file():
        logger.warning("%s (%s bytes) is not copied to %s and will not be published: keep it with the run", basis,
                       f"{basis.stat().st_size:,}", target)  # fmt: skip


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_plan(scores: Mapping[str, Tensor], before: Shape, after: Shape) -> Plan:
    """Choose the indices that stay: the best-scored ones of every axis that `after` makes smaller.

    Args:
        scores (`Mapping[str, Tensor]`): Axis to the importance of every index, `statistics.scores`.
        before (`Shape`): The teacher's shape.
        after (`Shape`): The student's shape, from `before.cut_to(...)`.

    Returns:
        `Plan`: The kept indices. A KV head is worth the sum of its query heads' scores.

    Example:

    ```python
    >>> plan = make_plan(statistics.scores, shape, shape.cut_to({"hidden": 512, "ffn": 1152}))
    >>> plan.after["ffn"], len(plan.keep["ffn"][0])
    (1152, 1152)
    ```
    """
    cut = [axis for axis in after.axes if after[axis] != before[axis]]
    scored = [axis for axis in cut if axis not in RANKS]
    missing = {"heads" if axis == "kv_heads" else axis for axis in scored} - set(scores)
    if missing:
        how = "; hf_minitron.data.tokens.token_scores gives those of vocab" if "vocab" in missing else ""
        raise ValueError(f"No scores for {', '.join(sorted(missing))}; these axes were scored: {', '.join(scores)}{how}")
    for axis in scored:
        check_scores(scores, axis, before)
    keep: dict[str, list] = {}
    if "layers" in cut:
        keep["layers"] = best_layers(scores["layers"], before, after)
    for axis in [axis for axis in ("hidden", "vocab") if axis in cut]:
        keep[axis] = best(scores[axis], after[axis])
    layers = keep.get("layers", range(before["layers"]))
    shapes = {layer: (before.of_layer(layer), after.of_layer(layer)) for layer in layers}
    for axis in ("ffn", "dense_ffn", "shared_ffn", "experts", "ssm_heads", "conv_channels"):
        if axis in cut:
            groups = before.sizes.get(IN_GROUPS.get(axis), 1)
            keep[axis] = [
                best(scores[axis][layer][..., : own[axis]], left[axis], groups) for layer, (own, left) in shapes.items()
            ]
    keep |= {axis: [list(range(after[axis])) for _ in layers] for axis in RANKS if axis in cut}
    if "experts" in cut and "ffn" in cut:
        keep["ffn"] = [[ffn[e] for e in experts] for ffn, experts in zip(keep["ffn"], keep["experts"], strict=True)]
    if "heads" in cut:
        pairs = [best_heads(scores["heads"][layer][: own["heads"]], own, left) for layer, (own, left) in shapes.items()]
        keep["heads"] = [heads for heads, _ in pairs]
        if "kv_heads" in cut:
            keep["kv_heads"] = [groups for _, groups in pairs]
    kinds = {kind: len(set(layers) & set(found)) for kind, found in before.layer_kinds.items()}
    windows = tuple(before.windows[layer] for layer in layers) if before.windows else ()
    made = after.with_layers(layers)
    return Plan(before, Shape({**made.sizes, **kinds}, windows=windows, by_layer=made.by_layer), keep)


def stand_in(before: Shape, after: Shape) -> Plan:
    """Return a plan of a cut that keeps the first layers, until scores say which ones."""
    kept = before.first_layers(after["layers"], after.by_kind)
    return Plan(before, after.with_layers(kept), {"layers": kept})


def make_nonuniform_plan(
    scores: Mapping[str, Tensor], before: Shape, sizes: Mapping[str, list[int]], hidden: int | None = None
) -> Plan:
    """Choose the indices that stay when every layer has sizes of its own.

    Args:
        scores (`Mapping[str, Tensor]`): Axis to the importance of every index, `statistics.scores`.
        before (`Shape`): The teacher's shape, of a model without experts.
        sizes (`Mapping[str, list[int]]`): `heads`, `kv_heads` and `ffn`, each with one size per layer of the teacher, none
            larger than the layer has. 0 drops the layer's attention or its MLP; a layer that loses both goes.
        hidden (`int`, *optional*): The new hidden size; as it is when left out.

    Returns:
        `Plan`: Within a layer the best-scored indices, as `make_plan` takes them.

    Raises:
        ValueError: for sizes that are no sizes of this model.
    """
    every, axes = [before.at(layer) for layer in range(before["layers"])], [axis for axis in BY_LAYER if axis in before.sizes]
    sizes = {axis: sizes.get(axis, [own[axis] for own in every]) for axis in axes}
    for axis, found in sizes.items():
        if len(found) != len(every) or not all(0 <= size <= own[axis] for size, own in zip(found, every, strict=True)):
            most = " or ".join(str(size) for size in sorted({own[axis] for own in every}))
            raise ValueError(f"{axis}: {found} are not {len(every)} sizes from 0 to {most}, one for each layer")
    for layer, own in enumerate(every):
        heads, groups = sizes["heads"][layer], sizes.get("kv_heads", sizes["heads"])[layer]
        group = own["heads"] // own.get("kv_heads", own["heads"]) if groups else 0
        if bool(heads) != bool(groups) or (groups and (heads % groups or heads // groups > group)):
            raise ValueError(f"layer {layer}: {heads} heads do not divide over {groups} KV heads with at most {group} for each")
    for axis in ("heads", "ffn", *(() if hidden is None else ("hidden",))):
        check_scores(scores, axis, before)
    layers = [layer for layer in range(len(every)) if sizes["heads"][layer] or sizes["ffn"][layer]]
    own = [best_in_layer(scores, before, layer, {axis: found[layer] for axis, found in sizes.items()}) for layer in layers]
    keep: dict[str, list] = {axis: [kept[axis] for kept in own] for axis in axes}
    by_layer = {axis: tuple(map(len, kept)) for axis, kept in keep.items()}
    after = {**before.sizes, "layers": len(layers), **largest(by_layer)}
    after |= {kind: len(set(layers) & set(found)) for kind, found in before.layer_kinds.items()}
    if len(layers) < before["layers"]:
        keep["layers"] = layers
    if hidden is not None:
        keep["hidden"], after["hidden"] = best(scores["hidden"], hidden), hidden
    windows = [before.windows[layer] if heads else 0 for layer, heads in zip(layers, by_layer["heads"], strict=True)]
    return Plan(before, Shape(after, windows=tuple(windows), by_layer=selected(by_layer, range(len(layers)))), keep)
