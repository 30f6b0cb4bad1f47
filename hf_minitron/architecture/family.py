"""`Family`: the axis map of a group of model types. Data only; `Architecture` binds it to one config."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from hf_minitron import axes
from hf_minitron.architecture import alibi, bert, delta, gemma3n, gemma4, gpt, hybrid, llama, mla, moe, zamba
from hf_minitron.architecture.roles import ROLES
from hf_minitron.architecture.vision import Tower


@dataclass(frozen=True, eq=False)  # hashed by identity: a model is bound to a family once
class Family:
    """The axis map of a group of model types.

    Args:
        rows (`Mapping[str, str]`): Full parameter name (placeholders such as `{layers}` for axes in the name) to pattern. May
            list more than one model has. An axis that no config key gives is fixed: its size is read off the parameters.
        norms (`tuple[str, ...]`): The modules that normalise the hidden channels, in the order of a layer.
        config_keys (`Mapping[str, str | int]`): Axis to its key in `config.json`, or to its size where it is always the same.
        roles (`Mapping[str, str]`, *optional*): Ends of module names to roles, beside those of `architecture/roles.py`.
        stored (`Mapping[str, Mapping[str, str]]`): Rows whose parameters have other names on disk, to the rows they have there;
            beside what Transformers' conversion mapping says.
        fused (`Mapping[str, tuple[str, ...]]`): Rows of checkpoints that hold several rows of the model one after another, to
            these.
        follows (`Mapping[str, str]`): Further keys of `config.json`, to the axis whose size they repeat, or
            a product of several.
        coupled (`Mapping[str, str]`): Axis to the axis that it keeps its ratio to, because the model's class computes it so.
        fixed (`Mapping[str, str]`): Axis to the reason why it cannot be cut; or a kind of layers, to the reason why they stay.
        reused (`Mapping[str, str]`): Kind of the layers that hold shared weights, to that of the layers that use them.
        from_parameters (`tuple[str, ...]`): Axes whose key in `config.json` is not the size that the class makes.
        settings (`Mapping[str, object]`): Entries of the student's `config.json`, for its class to make the sizes as they are.
        periods (`tuple[str, ...]`): Keys of `config.json` that say after how many layers a kind of layer comes again.
        kinds (`Mapping[str, tuple[str, tuple]]`): Kinds of layers that names do not tell apart: a placeholder to the entry of
            the config that has an item for every layer, and the items that are of the kind (`None` where there is no entry).
        caches (`Mapping[str, str]`): Kind of layers to the numbers that each keeps of a token, where kinds differ in this.
        head_sizes (`Mapping[str, str]`): Then, kind of layers to the axis of a head's channels.
        states (`Mapping[str, str]`): Kind of layers to the numbers that each keeps of a text whatever its length.
        only_ffn (`str`, *optional*): The axis that is called `ffn` in models without routed experts.
        inexact (`Mapping[str, str]`): Axis to the reason why cutting it changes more than masking it would.
        inexact_if (`Mapping[str, tuple[str, str]]`): The same, where a key of `config.json` is true, or an item of it: axis to
            key and reason.
        rescaled (`Mapping[str, Mapping[str, float]]`): Axis whose size the class computes a factor from, to the roles whose
            tensors make up for it: to the power of old size / new size that they are multiplied by. `last_norm` is a role here.
        rescaled_if (`str`): The key of `config.json` that says whether it does, where it depends.
        fallback_config (`Mapping`): Changes to `config.json` that give a class with equal logits and fewer limits on shapes.
        fallback_rows (`Mapping[str, Mapping[str, str]]`): Rows that are held in parts there, to the rows of these parts;
            that class rotates every channel of a head.
        pre_norm_residual (`bool`): Whether all norms are RMS norms that stand before attention and MLP, both of which are added
            to the residual stream as they are; rotating it and merging layers take that for granted.
        tower (`Tower`, *optional*): Where the text model stands, in the family of a vision-language model.
        outside (`Mapping[str, str]`, *optional*): Then, the rows of what lies outside of the text model.
    """

    rows: Mapping[str, str]
    norms: tuple[str, ...]
    config_keys: Mapping[str, str | int]
    roles: Mapping[str, str] = field(default_factory=dict)
    stored: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    follows: Mapping[str, str] = field(default_factory=dict)
    coupled: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, str] = field(default_factory=dict)
    reused: Mapping[str, str] = field(default_factory=dict)
    from_parameters: tuple[str, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    periods: tuple[str, ...] = ()
    kinds: Mapping[str, tuple[str, tuple]] = field(default_factory=dict)
    caches: Mapping[str, str] = field(default_factory=dict)
    head_sizes: Mapping[str, str] = field(default_factory=dict)
    states: Mapping[str, str] = field(default_factory=dict)
    only_ffn: str | None = None
    inexact: Mapping[str, str] = field(default_factory=dict)
    inexact_if: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    rescaled: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    rescaled_if: str = ""
    fallback_config: Mapping[str, object] = field(default_factory=dict)
    fallback_rows: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    pre_norm_residual: bool = False
    tower: Tower | None = None
    outside: Mapping[str, str] = field(default_factory=dict)

    def without_experts(self) -> "Family":
        """Return the family of models that have no routed experts, whose only MLPs are `ffn` wide."""
        rows = {row: re.sub(rf"\b{self.only_ffn}\b", "ffn", pattern) for row, pattern in self.rows.items()}
        keys = {axis: key for axis, key in self.config_keys.items() if axis != self.only_ffn}
        return replace(self, rows=rows, config_keys={**keys, "ffn": self.config_keys[self.only_ffn]}, only_ffn=None)

    def inexact_for(self, config: object) -> dict[str, str]:
        """Return the axes whose cut is inexact in models of a config, with the reasons."""
        given = {axis: getattr(config, key, False) for axis, (key, _) in self.inexact_if.items()}
        given = {axis: any(value) if isinstance(value, list) else value for axis, value in given.items()}
        return {**self.inexact, **{axis: why for axis, (_, why) in self.inexact_if.items() if given[axis]}}

    def role(self, row: str) -> str:
        """Return the role of the parameters of a row.

        Raises:
            AxisError: for a row whose role no table gives.
        """
        module = row.removesuffix(".weight").removesuffix(".bias").removesuffix("_bias")
        if row in self.outside:
            return "projector" if axes.is_cut(self.outside[row]) else "passthrough"
        if module in self.norms:
            return "norm"
        roles, parts = {**ROLES, **self.roles}, module.split(".")
        ends = (".".join(parts[last - n : last]) for last in (len(parts), len(parts) - 1) for n in (3, 2, 1))
        found = next((roles[end] for end in ends if end in roles), None)
        if found is None:
            raise axes.AxisError(f"No role is known for the row {row!r}; give its family roles={{{parts[-1]!r}: ...}}")
        return found


LLAMA = Family(llama.LLAMA_ROWS, llama.NORMS, llama.CONFIG_KEYS)
PRE_NORM = replace(LLAMA, pre_norm_residual=True)
MOE = Family(moe.MOE_ROWS, llama.NORMS, moe.QWEN_MOE_KEYS)
MLA = Family(mla.MOE_ROWS, llama.NORMS, mla.MOE_KEYS, follows=mla.FOLLOWS)
GEMMA = {"rescaled": llama.SCALED_EMBEDDING}

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(llama.LLAMA_MODEL_TYPES, LLAMA),
    **dict.fromkeys(llama.PRE_NORM_MODEL_TYPES, PRE_NORM),
    # LlamaConfig insists that hidden divides by heads; Mistral's class does not, and is the same where there is no bias
    "llama": replace(PRE_NORM, fallback_config={"model_type": "mistral", "sliding_window": None}),
    # Phi3Config counts the factors of longrope by hidden / heads
    "phi3": replace(PRE_NORM, fallback_config={"model_type": "mistral"}, fallback_rows=llama.PHI3_PARTS),
    "gemma": replace(PRE_NORM, **GEMMA),
    **dict.fromkeys(llama.GEMMA_MODEL_TYPES, replace(LLAMA, **GEMMA)),
    **dict.fromkeys(llama.FULL_NORM_MODEL_TYPES, replace(LLAMA, rows=llama.FULL_NORM_ROWS, **llama.FULL_NORM)),
    **{name: replace(LLAMA, **table) for name, table in llama.TABLES.items()},
    **{name: Family(**table) for name, table in (gpt.TABLES | alibi.TABLES | bert.TABLES).items()},
    **{name: replace(MOE, **table) for name, table in moe.TABLES.items()},
    **{name: replace(MLA, **table) for name, table in mla.TABLES.items()},
    **{
        name: Family(**table)
        for tables in (hybrid.TABLES, delta.TABLES, gemma3n.TABLES, gemma4.TABLES, zamba.TABLES)
        for name, table in tables.items()
    },
}


def register_family(model_type: str, family: Family) -> None:
    """Let models of a type be pruned by a family, in this process.

    Args:
        model_type (`str`): As in `config.json`.
        family (`Family`): Its axis map.

    Raises:
        AxisError: for a row that cannot be read, or has no role.

    Example:

    ```python
    >>> register_family("seed_oss", FAMILIES["llama"])
    ```
    """
    for row, pattern in family.rows.items():
        axes.parse(pattern)
        family.role(row)
    FAMILIES[model_type] = family
