"""`Architecture`: a family bound to one config. A parameter is matched to its row once; what it is follows from that."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from transformers import PreTrainedConfig

from hf_minitron import axes
from hf_minitron.architecture.binding import Parameter, Read, advice, check_missing, match_rows, misfits, shape_of, within
from hf_minitron.architecture.config import model_type_of, not_a_language_model, text_config
from hf_minitron.architecture.family import FAMILIES, LLAMA, Family
from hf_minitron.architecture.names import parts_of, stored_rows
from hf_minitron.architecture.nonuniform import norms_elsewhere, not_nonuniform, sublayer_of, without_sublayers
from hf_minitron.architecture.outline import Outline, Trace, norm_offset, outline, trace
from hf_minitron.architecture.roles import ATTENTION, ONLY_SLICED, READ_AT
from hf_minitron.architecture.vision import TOWERS, Tower
from hf_minitron.plan import RANKS
from hf_minitron.shape import Shape

# Which side of a module an activation is read at.
OUTPUT, INPUT = ".output", ".input"

HIDDEN: axes.Dim = (("hidden",),)
# Where activations are read: the layer (`None` outside of the layers) and the module.
Place = tuple[int | None, str]


@dataclass(frozen=True, eq=False)
class Architecture:
    """A family bound to one config; made by `Architecture.of`.

    Args:
        family (`Family`): The axis map.
        outline (`Outline`): The model without weights.

    Example:

    ```python
    >>> architecture = Architecture.of(teacher.config)
    >>> architecture.shape["ffn"], architecture.parameters["model.layers.3.mlp.down_proj.weight"].role
    (1536, 'down')
    ```
    """

    family: Family
    outline: Outline

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Architecture":
        """Return the architecture of a config. An unknown model type is tried as Llama-style; what no row fits is refused.

        Raises:
            AxisError: for what is no causal language model of text, or has a parameter without a row or with another shape
                than its row says.
        """
        check_missing(config.model_type, FAMILIES)
        made = cls.bind(config)
        if problems := list(made.misfits.values()):
            raise axes.AxisError(advice(config.model_type, problems))
        return made

    @classmethod
    def bind(cls, config: PreTrainedConfig) -> "Architecture":
        """Return an architecture that may not fit: its `misfits` say what a table for the model needs.

        Raises:
            AxisError: for what is no causal language model of text.
        """
        if problem := not_a_language_model(config, FAMILIES):
            raise axes.AxisError(problem)
        tower = TOWERS.get(config.model_type)
        kind = (tower.text if tower else {}).get("model_type") or model_type_of(config)
        return _bind(FAMILIES.get(kind, LLAMA), tower, outline(config))

    def like(self, config: PreTrainedConfig) -> "Architecture":
        """Return the architecture of some layers of this model, whose axes keep their names."""
        return Architecture(self.family, outline(config))

    @property
    def config(self) -> PreTrainedConfig:
        """The config; it must not be changed."""
        return self.outline.config

    @property
    def prefix(self) -> str:
        """The name of the model without its head: `model`, `transformer`."""
        return self.outline.prefix

    @cached_property
    def _matched(self) -> dict[str, tuple[str, dict[str, int]]]:
        return match_rows(self.family, self.outline)

    @cached_property
    def rows(self) -> dict[str, str]:
        """The rows that the model has, with their patterns."""
        used = {row for row, _ in self._matched.values()}
        return {row: pattern for row, pattern in self.family.rows.items() if row in used}

    @cached_property
    def shape(self) -> Shape:
        """The size of every axis, from the config, and of fixed axes from the shapes of the parameters."""
        return shape_of(self.family, self.outline, self._matched)

    @cached_property
    def misfits(self) -> dict[str, str]:
        """What is wrong with each parameter that has no row, or another shape than its row says; empty of what is accepted."""
        return misfits(self.family, self.outline, self._matched, self.shape)

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """Every parameter and stored buffer by its name, in the model's order; tied ones once."""
        shapes = self.outline.parameters
        return {name: Parameter.of(self.family, name, shapes[name], *match) for name, match in self._matched.items()}

    @cached_property
    def stored_rows(self) -> dict[str, dict[str, str]]:
        """The rows that checkpoints have in place of a row of the model, by that row."""
        found = {row: stored_rows(row, pattern, self.outline, self.shape) for row, pattern in self.rows.items()}
        return {**{row: rows for row, rows in found.items() if rows}, **self.family.stored}

    @cached_property
    def parts(self) -> dict[str, tuple[Parameter, ...]]:
        """What checkpoints may store in place of a parameter, by its name: several parts, or one for each expert."""
        rows = {row: parts for row, parts in self.stored_rows.items() if list(parts.values()) != [self.family.rows[row]]}
        return {name: parts_of(p, rows[p.row], self.shape) for name, p in self.parameters.items() if p.row in rows}

    @cached_property
    def stored(self) -> dict[str, Parameter]:
        """Parameters and their parts by every name that checkpoints give them, with or without the name of the base model."""
        whole = [p for name, p in self.parameters.items() if p.row in self.stored_rows and name not in self.parts]
        renamed = {next(iter(self.stored_rows[p.row])).format_map(p.indices): p for p in whole}
        every = renamed | self.parameters | {part.name: part for parts in self.parts.values() for part in parts}
        return {name.removeprefix(f"{self.prefix}."): parameter for name, parameter in every.items()} | every

    @cached_property
    def weights(self) -> dict[str, Parameter]:
        """The weights of every module that has its own; of routed experts their down projection, which is read by channel."""
        routed = {p.module: p for p in self.parameters.values() if p.role == "down" and p.kind == "down_proj"}
        outside = (p for p in self.tied.values() if p.layer is None)
        return routed | {p.module: p for p in (*self.parameters.values(), *outside) if p.kind == "weight"}

    @cached_property
    def tied(self) -> dict[str, Parameter]:
        """Parameters that are another one under a further name (a tied head), by that name; `outline.tied` says which one."""
        shapes = {name: self.outline.parameters[first] for name, first in self.outline.tied.items()}
        found = {name: axes.match(name, self.family.rows) for name in shapes}
        return {name: Parameter.of(self.family, name, shapes[name], *match) for name, match in found.items() if match}

    @cached_property
    def tied_head(self) -> bool:
        """Whether the output head is the embedding."""
        return any(parameter.role in ("head", "embedding") for parameter in self.tied.values())

    def supports(self, feature: str) -> bool:
        """Return whether `rotation` and `layer_merge` are for this model."""
        return self.family.pre_norm_residual and feature in ("rotation", "layer_merge")

    @cached_property
    def not_nonuniform(self) -> str:
        """Why layers of this model cannot differ in size; empty when they can."""
        found = not_nonuniform(self.family, self.outline, self.shape, self.parameters)
        return found or norms_elsewhere(self.outline, self.trace.reads)

    @cached_property
    def inexact(self) -> dict[str, str]:
        """The axes whose cut changes more than masking would, with the reasons."""
        images = self.family.tower.inexact if self.family.tower else {}
        return {**images, **self.inexact_for_text, **{axis: why for axis, why in RANKS.items() if axis in self.shape.sizes}}

    @cached_property
    def inexact_for_text(self) -> dict[str, str]:
        """The axes whose cut changes more than masking would of text, too."""
        return self.family.inexact_for(text_config(self.config))

    def taps(self, axis: str) -> list[Place]:
        """Return where the activations of an axis are read.

        `layers`: the layers themselves. `hidden`: what norms give. The others: what the projections of `READ_AT` are given.
        """
        return list(self._taps.get(axis, ()))

    @cached_property
    def _taps(self) -> dict[str, list[Place]]:
        found: dict[str, list[Place]] = {"layers": [(layer, name) for layer, name in enumerate(self._layers)]}
        found["hidden"] = [(layer, name) for norm in self.family.norms for layer, name in self._modules(norm)]
        for module, parameter in self.weights.items():
            for axis in READ_AT.get(parameter.role, ()):
                if any(axis in axes.dim_names(dim) for dim in parameter.dims):
                    found.setdefault(axis, []).append((parameter.layer, module))
        order = (*READ_AT["down"], *READ_AT["output"], "hidden", "layers")
        return {axis: found[axis] for axis in order if found.get(axis)}

    @cached_property
    def _layers(self) -> list[str]:
        """The modules of the layers."""
        row = next(row for row in self.rows if "layers" in map(axes.axis_of_placeholder, axes.placeholders(row)))
        stem = row[: row.index("{")]
        return [f"{stem}{layer}" for layer in range(self.shape["layers"])]

    def _modules(self, row: str) -> Iterator[Place]:
        """Yield layer and name of the modules of this model that a row of names stands for, in the layers of its kind."""
        kind = next(iter(axes.placeholders(row)), "")
        layers = {"": (None,), "layers": range(self.shape["layers"]), **self.shape.layer_kinds}.get(kind, ())
        names = {row.format_map({kind: layer}): layer for layer in layers}
        yield from ((layer, name) for name, layer in names.items() if name in self.outline.modules)

    @property
    def tapped(self) -> tuple[str, ...]:
        """The axes that have taps, in the order in which they are scored."""
        return tuple(self._taps)

    @cached_property
    def trace(self) -> Trace:
        """Which module gives what another one reads."""
        return trace(self.config)

    @cached_property
    def norm_offset(self) -> float:
        """What the norms add to their stored weights."""
        return norm_offset(self.config.model_type, self.trace.modules, (name for _, name in self.taps("hidden")))

    @cached_property
    def hidden_reads(self) -> dict[str, Read]:
        """What the projections that read hidden channels are given, a tied head's too.

        That is `<norm>.output` when a norm of its layer gives that tensor (of the head: a norm, or the model without it), else
        `<projection>.input`, of the first that reads it. A head that reads neither is left out. Routers are only sliced.
        """
        norms, first, found = self._norm_layers, {}, {}
        for module, layer, given in self._readers():
            outputs = [name for name in self.trace.reads.get(module, ()) if name in norms and norms[name] == layer]
            if layer is None and self.prefix in self.trace.reads.get(module, ()):
                outputs.append(self.prefix)
            if given & ONLY_SLICED:
                continue
            if outputs:
                found[module] = Read("hidden", layer, f"{outputs[0]}{OUTPUT}")
            elif layer is not None:
                given_to = first.setdefault((layer, self.trace.inputs[module]), module)
                found[module] = Read("hidden", layer, f"{given_to}{INPUT}")
        return found

    @cached_property
    def reads(self) -> dict[str, Read]:
        """What every projection is given that corrections can change; routed experts and routers are only sliced."""
        found = {
            module: Read(axis, layer, module)
            for axis in (*READ_AT["down"], *READ_AT["output"])
            for layer, module in self.taps(axis)
            if self.weights[module].kind == "weight"
        }
        inner = {name: Read("ssm_heads", p.layer, name) for name, p in self.weights.items() if p.role == "inner"}
        return found | inner | self.hidden_reads

    @cached_property
    def norms(self) -> tuple[list[str], list[str], str | None]:
        """The norms that attention reads, those that MLPs read (the same where both read one), and the last norm.

        The lists are empty for a family whose norms stand elsewhere.
        """
        attention, mlp, last = {}, {}, {}
        for module, layer, _ in self._readers():
            kind = last if layer is None else attention if self.weights[module].role in ATTENTION else mlp
            for norm in self.trace.reads.get(module, ()):
                if norm in self._norm_layers and self._norm_layers[norm] == layer:
                    kind[layer] = norm
        return [attention[layer] for layer in sorted(attention)], [mlp[layer] for layer in sorted(mlp)], last.get(None)

    def _readers(self) -> Iterator[tuple[str, int | None, set[str]]]:
        """Yield the modules whose weights go from hidden channels to something else: name, layer, and the axes of that."""
        for module in self.trace.inputs:
            weight = self.weights.get(module)
            if weight is None or weight.kind != "weight" or len(weight.dims) != 2:
                continue
            given, read = weight.dims[::-1] if module in self.trace.transposed else weight.dims
            if read == HIDDEN != given:  # what gives hidden channels too, in BERT's head, is only sliced
                yield module, weight.layer, axes.dim_names(given)

    @cached_property
    def _norm_layers(self) -> dict[str, int | None]:
        """The norms of the hidden channels, and the layer of each."""
        return {name: layer for layer, name in self.taps("hidden")}

    def sublayer(self, parameter: Parameter) -> str | None:
        """Return the axis of the sublayer that a parameter goes with, `heads` or `ffn`, its norms' too; `None` of neither."""
        return sublayer_of(self.outline, parameter.name)

    def attention(self, part: str) -> list[tuple[str, axes.Dim]]:
        """Return the modules that give a part (`query`, `key` or `value`), one per layer, and the axes of what they give."""
        found = [weight for weight in self.weights.values() if weight.role in (part, "qkv")]
        dims = [(weight.module, weight.dim_of("head_dim")[1]) for weight in found if "head_dim" in weight.pattern]
        return sorted(dims, key=lambda place: self.weights[place[0]].layer)


@lru_cache(maxsize=64)
def _bind(family: Family, tower: Tower | None, model: Outline) -> Architecture:
    made = Architecture(within(family, tower, model) if tower else without_sublayers(family, model), model)
    plain = family.only_ffn and not any("experts" in pattern for pattern in made.rows.values())
    return _bind(family.without_experts(), tower, model) if plain else made
