"""`Shape`: the size of every axis of one model, and which cuts are legal."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from hf_minitron.costs import Costs
from hf_minitron.known_names import CONFIG_NAMES
from hf_minitron.sizes import (
    AXES,
    CUTTABLE,
    divisor_problems,
    expert_problems,
    head_problems,
    limited,
    number_problems,
    selected,
)


class ShapeError(ValueError):
    """A target shape that the model cannot be cut to."""


@dataclass(frozen=True)
class Shape(Costs):
    """The size of every axis that a model has.

    Args:
        sizes (`Mapping[str, int]`): Number of entries of each axis of `AXES`; with them, what a family's patterns or its router
            need and no cut changes (`qkv`, `experts_per_token`). NumPy arrays of sizes make it many shapes, whose costs are
            then counted at once.
        layer_kinds (`Mapping[str, tuple[int, ...]]`, *optional*): Where layers differ in kind, the layers of each:
            `attention_layers`, `mamba_layers`.
        coupled (`Mapping[str, str]`, *optional*): Axis to the one that it keeps its ratio to.
        fixed (`Mapping[str, str]`, *optional*): Axis to the reason why it cannot be cut; or a kind of layers, to the reason why
            they stay.
        reused (`Mapping[str, str]`, *optional*): Kind of the layers that hold shared weights, to that of those that use them.
        by_kind (`Mapping[str, int]`, *optional*): Of a cut, how many layers of a kind shall stay.
        windows (`tuple[int | None, ...]`, *optional*): How many tokens the attention of each layer sees and keeps: a sliding
            window; 0 in a layer without attention; `None` for all. Of more or fewer layers, of a kind where kinds differ, their
            average is taken.
        states (`Mapping[str, str]`, *optional*): Kind of layers to the numbers that each keeps whatever the number of tokens.
        caches (`Mapping[str, str]`, *optional*): Kind of layers to the numbers that each keeps of a token, where kinds differ.
        head_sizes (`Mapping[str, str]`, *optional*): Then, kind of layers to the axis of a head's channels.
        by_layer (`Mapping[str, tuple[int, ...]]`, *optional*): Where layers differ in size, axis to its size in each of them,
            0 where it is absent; `sizes` has the largest. Of a cut, by the layers before it; costs take their average.
    """

    sizes: Mapping[str, int]
    layer_kinds: Mapping[str, tuple[int, ...]] = field(default_factory=dict, compare=False)
    coupled: Mapping[str, str] = field(default_factory=dict, compare=False)
    by_kind: Mapping[str, int] = field(default_factory=dict, compare=False)
    fixed: Mapping[str, str] = field(default_factory=dict, compare=False)
    reused: Mapping[str, str] = field(default_factory=dict, compare=False)
    windows: tuple[int | None, ...] = field(default=(), compare=False)
    states: Mapping[str, str] = field(default_factory=dict, compare=False)
    caches: Mapping[str, str] = field(default_factory=dict, compare=False)
    head_sizes: Mapping[str, str] = field(default_factory=dict, compare=False)
    by_layer: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __getitem__(self, axis: str) -> int:
        return self.sizes[axis]

    @property
    def axes(self) -> dict[str, int]:
        """The sizes of the axes of the vocabulary, in its order."""
        return {axis: self.sizes[axis] for axis in AXES if axis in self.sizes}

    def at(self, layer: int | None) -> Mapping[str, int]:
        """Return the sizes in force in one layer; outside of the layers those of all."""
        if not self.by_layer or layer is None:
            return self.sizes
        return {**self.sizes, **{axis: sizes[layer] for axis, sizes in self.by_layer.items()}}

    def of_layer(self, layer: int | None) -> "Shape":
        """Return the shape with one layer's sizes in all of them; outside of the layers those of all."""
        return replace(self, sizes=self.at(layer), by_layer={})

    def with_sizes(self, sizes: Mapping[str, int]) -> "Shape":
        """Return this shape with other sizes, where layers differ the largest: smaller layers stay as they are."""
        layers = [limited(self.at(layer), sizes) for layer in range(self["layers"])] if self.by_layer else []
        return replace(self, sizes=sizes, by_layer={axis: tuple(own[axis] for own in layers) for axis in self.by_layer})

    @property
    def staying(self) -> set[int]:
        """The layers that no cut drops."""
        return set().union(*(layers for kind, layers in self.layer_kinds.items() if kind in self.fixed))

    @property
    def droppable(self) -> list[int]:
        """The layers that a cut may drop."""
        staying = self.staying
        return [layer for layer in range(self["layers"]) if layer not in staying]

    @property
    def kv_groups(self) -> int:
        """The number of KV groups: `kv_heads`, or `heads` where every head has its own key and value; 0 without attention."""
        return self.sizes.get("kv_heads", self.sizes.get("heads", 0))

    @property
    def largest_group(self) -> int:
        """The query heads of a KV head, in the layer where they are most."""
        layers = [self.at(layer) for layer in range(self["layers"])] if self.by_layer else [self.sizes]
        return max((own["heads"] // own.get("kv_heads", own["heads"]) for own in layers if own.get("heads")), default=1)

    def cut_to(self, target: Mapping[str, int], multiple_of: Mapping[str, int] | None = None) -> "Shape":
        """Return the shape after a cut, or say everything that is illegal about it.

        Args:
            target (`Mapping[str, int]`): Wanted sizes. Axes left out keep theirs, except that `kv_heads` alone takes the
                heads of the dropped groups along. `layers` may be a number for each of some kinds, `{"attention": 4, "mamba":
                20}`: layers of the other kinds stay.
            multiple_of (`Mapping[str, int]`, *optional*): Divisor that the new size of an axis must have.

        Returns:
            `Shape`: The sizes after the cut.

        Raises:
            ShapeError: with the axis, the value, what is allowed and what to do, for every illegal size at once.
        """
        multiple_of = multiple_of or {}
        bad = [axis for axis, n in multiple_of.items() if axis not in CUTTABLE or type(n) is not int or n < 1]
        if bad:
            raise ShapeError(f"multiple_of: {bad[0]!r}: {multiple_of[bad[0]]!r} is not an axis of {', '.join(CUTTABLE)} with a "
                             "whole number from 1 on")  # fmt: skip
        target, by_kind, problems = self._depth(target)
        if problems := problems + [p for axis, size in target.items() for p in self.size_problems(axis, size, multiple_of)]:
            raise ShapeError("; ".join(problems))
        sizes = self._with_dependent_sizes({**self.sizes, **target}, target, by_kind)
        before = {**self.sizes, "heads": self.kv_groups * self.largest_group} if "heads" in self.sizes else self.sizes
        if problems := [*head_problems(before, sizes), *expert_problems(sizes)]:
            raise ShapeError("; ".join(problems))
        return replace(self.with_sizes(sizes), by_kind=by_kind)

    def _depth(self, target: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int], list[str]]:
        """Return a target with its number of layers, how many of a kind where it says so, and what is wrong with these."""
        named, kinds = target.get("layers"), {kind: len(layers) for kind, layers in self.layer_kinds.items()}
        if not isinstance(named, Mapping):
            return dict(target), {}, []
        by_kind, rest = {f"{kind}_layers": count for kind, count in named.items()}, dict(target)
        del rest["layers"]
        # by attention the caches of Transformers count tokens
        least = {"attention_layers": 1, **{kind: count for kind, count in kinds.items() if kind in self.fixed}}
        known = [f"{kind.removesuffix('_layers')} ({least.get(kind, 0)} to {count})" for kind, count in kinds.items()]
        known = ", ".join(known) or "of one kind"
        if "layer_period" in self.sizes:
            return rest, {}, [f"layers: {dict(named)}: kinds of layers repeat in this model; give the number of all layers"]
        bad = [
            kind
            for kind, count in by_kind.items()
            if type(count) is not int or not least.get(kind, 0) <= count <= kinds.get(kind, -1)
        ]
        if bad or not by_kind:
            return rest, {}, [f"layers: {dict(named)} are not numbers of layers of a kind; this model's are {known}"]
        chosen = set().union(*(self.layer_kinds[kind] for kind in by_kind))
        if len(chosen) < sum(kinds[kind] for kind in by_kind):
            return rest, {}, [f"layers: {dict(named)}: some layers are of several of these kinds; name others of {known}"]
        return {**rest, "layers": sum(by_kind.values()) + self["layers"] - len(chosen)}, by_kind, []

    def _with_dependent_sizes(
        self, after: dict[str, int], target: Mapping[str, int], by_kind: Mapping[str, int]
    ) -> dict[str, int]:
        """Let the sizes that depend on others follow them, unless the target names them."""
        for axis, leader in self.coupled.items():
            after[axis] = self[axis] * after[leader] // self[leader]
        if "kv_heads" in self.sizes:
            group = self.largest_group
            if "heads" not in (*target, *self.coupled) and after["kv_heads"] != self["kv_heads"]:
                after["heads"] = after["kv_heads"] * group
            elif group == 1 and "kv_heads" not in target:
                after["kv_heads"] = after["heads"]
        if "projector" in self.sizes:
            after["projector"] = after["hidden"]
        kept = set(self.first_layers(after["layers"], by_kind))  # until a plan says which layers stay
        return after | {kind: len(kept & set(layers)) for kind, layers in self.layer_kinds.items()}

    def with_layers(self, kept: Sequence[int]) -> "Shape":
        """Return the shape of some layers of this model, such as one that is run by itself."""
        sizes = {**self.sizes, "layers": len(kept)}
        if not self.by_layer:
            return replace(self, sizes=sizes)
        sizes |= {axis: max(own[layer] for layer in kept) for axis, own in self.by_layer.items()}
        windows = tuple(self.windows[layer] for layer in kept if self.windows)
        kinds = {kind: tuple(new for new, old in enumerate(kept) if old in layers) for kind, layers in self.layer_kinds.items()}
        return replace(self, sizes=sizes, by_layer=selected(self.by_layer, kept), windows=windows, layer_kinds=kinds)

    def first_layers(self, count: int, by_kind: Mapping[str, int]) -> list[int]:
        """Return so many layers: the first ones, of each kind where their numbers are given, beside those of other kinds."""
        if not by_kind:
            staying = self.staying
            kept = sorted([*staying, *self.droppable[: count - len(staying)]])
            attention = self.layer_kinds.get("attention_layers", (0,))
            return kept if attention[0] < count else [*kept[:-1], attention[0]]  # one layer of attention at least
        kinds = {kind: self.layer_kinds[kind] for kind in by_kind}
        dropped = {layer for kind, layers in kinds.items() for layer in layers[by_kind[kind] :]}
        return [layer for layer in range(self["layers"]) if layer not in dropped]

    def unit(self, axis: str) -> int:
        """Return what a size of an axis must be a multiple of, for layers to stay in whole periods and followers in ratio."""
        units = [self.sizes.get("layer_period", 1) if axis == "layers" else 1]
        for follower, leader in self.coupled.items():
            if leader == axis:
                own = self[follower] // (self.sizes.get("ssm_groups", 1) if follower == "ssm_heads" else 1)
                units.append(self[axis] // math.gcd(own, self[axis]))
        return math.lcm(*units)

    def size_problems(self, axis: str, size: int, multiple_of: Mapping[str, int]) -> list[str]:
        """Say what is wrong with the new size of one axis, whatever the others are."""
        if reason := self.fixed.get(axis):
            return [] if size == self[axis] else [f"{axis}: cannot be cut in this model: {reason}"]
        known = [known for known in CUTTABLE if known in self.sizes and known not in self.fixed]
        if axis not in known:
            near = [CONFIG_NAMES[axis]] if CONFIG_NAMES.get(axis) in known else difflib.get_close_matches(str(axis), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return [f"{axis}: not an axis of this model that can be cut; those are {', '.join(known)}{hint}"]
        if leader := self.coupled.get(axis):
            ratio = f"{self[axis] / self[leader]:g} times as large"
            return [f"{axis}: follows {leader} in this model ({ratio}); cut {leader} instead"]
        if problems := number_problems(axis, size, self[axis]):
            return problems
        if axis == "layers" and size < len(self.staying):
            why = next(why for kind, why in self.fixed.items() if kind in self.layer_kinds)
            return [f"layers: {size} are fewer than {len(self.staying)}: {why}"]
        if size % self.unit(axis):
            followers = ", ".join(follower for follower, leader in self.coupled.items() if leader == axis)
            why = "in which kinds of layers repeat" if axis == "layers" else f"so that {followers} can keep their ratio to it"
            return [f"{axis}: {size} is not a multiple of {self.unit(axis)}, {why}"]
        divisor = multiple_of.get(axis, 1)
        return divisor_problems(axis, size, self[axis], divisor) if size != self[axis] else []
