"""Which corrections have an effect on a cut: one that was asked for and has none is refused by name, before any weight is read.

It decides from a model's config and the axes that are cut alone.
"""

from collections.abc import Callable, Mapping, Sequence

from hf_minitron import axes
from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.binding import inner_norms
from hf_minitron.plan import Plan
from hf_minitron.pruning.compensate import DEFAULT_CORRECTIONS, check_names
from hf_minitron.statistics import Moments, Residuals


def chosen_corrections(
    architecture: Architecture,
    plan: Plan,
    moments: Moments | None,
    corrections: Sequence[str] | None,
    residuals: Residuals | None,
) -> Sequence[str]:
    """Return the corrections to make: those asked for; else, where there are statistics, the plan's own or the default ones.

    Raises:
        ValueError: for what is given and would not be used, and for what is needed and not given.
    """
    default = (plan.corrections or DEFAULT_CORRECTIONS) if moments is not None else ()
    names = default if corrections is None else corrections
    check_corrections(architecture, plan, [*names, *(["rotation"] if plan.rotated else [])])
    if plan.rotated:
        plan.require_basis()
    if not moments and (needy := [name for name in names if name != "rotation" or not plan.rotated]):
        raise ValueError(f"corrections: {needy[0]} needs moments: give the statistics of calibrate(..., moments=True), or "
                         "leave statistics and corrections out for plain slicing")  # fmt: skip
    if moments is not None and not names:
        raise ValueError("statistics: not used with corrections: []; leave statistics out, or name corrections")
    check_residuals(plan, names, residuals)
    return names


def check_corrections(architecture: Architecture, plan: Plan, names: Sequence[str]) -> None:
    """Refuse corrections that do not exist, are not for a model, or have nothing to correct in a cut.

    The default corrections, when all three are named, do what applies to a model and a cut, which may be nothing; any other
    list must have the effect of each of its names.

    Args:
        architecture (`Architecture`): The teacher's.
        plan (`Plan`): What is cut: only the axes in `keep` and the sizes are looked at.
        names (`Sequence[str]`): The corrections.

    Raises:
        ValueError: naming the first such correction, and why.
    """
    check_names(names)
    may_do_nothing = DEFAULT_CORRECTIONS if set(DEFAULT_CORRECTIONS) <= set(names) else ()
    for name in names:
        reason = "" if name in may_do_nothing else _REASONS[name](architecture, plan)
        if reason:
            raise ValueError(f"corrections: {name} {reason}. Leave {name} out")


def check_residuals(plan: Plan, names: Sequence[str], residuals: Residuals | None) -> None:
    """Refuse residuals that are not used, are missing, or were measured for another plan.

    Args:
        plan (`Plan`): What is kept.
        names (`Sequence[str]`): The corrections.
        residuals (`Residuals`, *optional*): What `read_residuals` measured.
    """
    if "layer_merge" not in names:
        if residuals is not None:
            raise ValueError(
                f"residuals: for layer_merge, which is none of corrections {list(names)}; leave one out, or add it"
            )
        return
    if residuals is None:
        raise ValueError("corrections: layer_merge needs residuals, what read_residuals(model, blocks, plan) measures")
    if not plan.dropped_after:
        raise ValueError(
            "corrections: layer_merge has no effect: no kept layer stands before a dropped one. Leave layer_merge out"
        )
    if residuals.dropped != plan.dropped_after:
        dropped = [layer for layers in plan.dropped_after.values() for layer in layers]
        raise ValueError(f"residuals: not those of the layers {dropped} that this plan drops: call read_residuals with it")


def _no_projection(architecture: Architecture, plan: Plan) -> str:
    read = {read.axis for read in architecture.reads.values()}
    return "" if read & plan.keep.keys() else f"has no effect: no projection reads an axis that is cut ({_cut(plan)})"


def _no_bias(architecture: Architecture, plan: Plan) -> str:
    biased = {read.axis for name, read in architecture.reads.items() if f"{name}.bias" in architecture.parameters}
    return (
        ""
        if biased & plan.keep.keys()
        else f"has no effect: no projection that reads an axis that is cut ({_cut(plan)}) has a bias"
    )


def _no_norm(architecture: Architecture, plan: Plan) -> str:
    inner = set().union(*(axes.dim_names(norm.dims[0]) for norm in inner_norms(architecture.parameters.values()).values()))
    if inner & plan.keep.keys():
        return ""
    if "hidden" not in plan.keep:
        return f"has no effect: hidden is not cut ({_cut(plan)})"
    weighted = any(norm in architecture.weights for _, norm in architecture.taps("hidden"))
    return "" if weighted else f"has no effect: the norms of {architecture.config.model_type} have no weights"


def _no_merge(architecture: Architecture, plan: Plan) -> str:
    if not architecture.supports("layer_merge"):
        return f"is not for {architecture.config.model_type}, whose MLPs are not added to the residual stream as they are"
    return "" if "layers" in plan.keep else f"has no effect: no layer is dropped ({_cut(plan)})"


def _no_rotation(architecture: Architecture, plan: Plan) -> str:
    if not architecture.supports("rotation"):
        return (f"is not for {architecture.config.model_type}: it needs RMS norms that stand before attention and MLP, and "
                "both added to the stream as they are")  # fmt: skip
    return "" if "hidden" in plan.keep else f"has no effect: hidden is not cut ({_cut(plan)})"


def _cut(plan: Plan) -> str:
    return f"cut: {', '.join(plan.keep) or 'nothing'}"


# Why a correction cannot be made or changes nothing; an empty text when it does.
_REASONS: Mapping[str, Callable[[Architecture, Plan], str]] = {
    "least_squares": _no_projection,
    "bias": _no_bias,
    "norm_ratio": _no_norm,
    "layer_merge": _no_merge,
    "rotation": _no_rotation,
}
