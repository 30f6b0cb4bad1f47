"""Pruning: take the kept indices of every tensor, of a model in memory or of a checkpoint on disk, in one pass for both."""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from hf_minitron import axes
from hf_minitron.architecture.architecture import Architecture, Parameter
from hf_minitron.architecture.config import NewIds, model_type_of, text_config
from hf_minitron.architecture.student import check_target, student_config, text_alone
from hf_minitron.checkpoint.checkpoint import TensorSpec, complete_or_absent, require_space, stored_dtype, write_tensors
from hf_minitron.checkpoint.saving import copy_side_files, repair_generation, save_config
from hf_minitron.checkpoint.tensors import CheckpointTensors, ModelTensors, Tensors
from hf_minitron.plan import RANKS, Plan, make_plan
from hf_minitron.pruning.compensate import Corrections, corrections_for
from hf_minitron.pruning.effects import chosen_corrections
from hf_minitron.pruning.parts import in_parts
from hf_minitron.pruning.ranks import RankTensors
from hf_minitron.pruning.rotate import rotated
from hf_minitron.pruning.vocab import cut_tokenizer_files, scores_for
from hf_minitron.statistics import Residuals, Statistics


def prune_model(
    model: PreTrainedModel,
    plan: Plan | Mapping[str, int],
    statistics: Statistics | None = None,
    corrections: Sequence[str] | None = None,
    residuals: Residuals | None = None,
    text_only: bool = False,
) -> PreTrainedModel:
    """Return the student of a model in memory; the model stays unchanged.

    Args:
        model (`PreTrainedModel`): The teacher.
        plan (`Plan` or `Mapping[str, int]`): What is kept, from `make_plan`; or the new size of some axes, of which what the
            statistics score best is kept.
        statistics (`Statistics`, *optional*): Of `calibrate(..., moments=True)`; no corrections without it.
        corrections (`Sequence[str]`, *optional*): Which of `hf_minitron.pruning.compensate.CORRECTIONS` to make; with
            statistics, by default those that the plan was saved with, else those of the three that cost no parameter which
            apply.
        residuals (`Residuals`, *optional*): Of `read_residuals`, for layer_merge.
        text_only (`bool`, *optional*, defaults to `False`): Whether the student of a vision-language model is its text model
            alone, a causal language model.

    Returns:
        `PreTrainedModel`: A model of the same class (or of one that holds the shape) and dtype with the plan's shape;
            `PrunedForCausalLM` when layers differ.

    Raises:
        ValueError: for a plan of another model, moments or residuals that are missing, another model's, or not used, and for a
            correction that has no effect on this plan (`check_corrections`).

    Example:

    ```python
    >>> student = prune_model(teacher, {"ffn": 1152}, statistics)
    >>> student.config.intermediate_size
    1152
    ```
    """
    tensors, edit, corrections = _edited(ModelTensors(model), plan, statistics, corrections, residuals)
    student, pruned = _student(tensors, edit, corrections, text_only)
    state = {name: axes.join(spec.shape, pieces) for name, spec, pieces in pruned}
    kind = type(model) if type(student) is type(model.config) else MODEL_FOR_CAUSAL_LM_MAPPING[type(student)]
    made = kind.from_pretrained(None, config=student, state_dict=state, dtype=model.dtype)
    for name, tensor in made.state_dict(keep_vars=True).items():
        if name in state and state[name].dtype != tensor.dtype:  # from_pretrained knows one dtype for all
            tensor.data = state[name]
    made.generation_config = copy.deepcopy(model.generation_config)
    if "vocab" in edit.keep:
        new = NewIds(edit.keep["vocab"], edit.before["vocab"])
        made.generation_config.update(**new.changes(made.generation_config.to_dict()))
    repair_generation(made.generation_config)
    return made.to(model.device).train(model.training)


def prune_checkpoint(
    source: str | Path,
    plan: Plan | Mapping[str, int],
    target: str | Path,
    max_shard_bytes: int = 5_000_000_000,
    statistics: Statistics | None = None,
    corrections: Sequence[str] | None = None,
    residuals: Residuals | None = None,
    text_only: bool = False,
    dequantize: bool = False,
) -> None:
    """Prune a model folder into a new folder, tensor by tensor.

    Args:
        source (`str` or `Path`): The teacher's folder.
        plan (`Plan` or `Mapping[str, int]`): As for `prune_model`.
        target (`str` or `Path`): The student's folder: weights, `config.json`, tokenizer, generation config and `plan.json`,
            which, applied with the same statistics, gives the same student. It has its name once complete.
        max_shard_bytes (`int`, *optional*, defaults to 5 GB): Size limit of one shard.
        statistics (`Statistics`, *optional*): As for `prune_model`.
        corrections (`Sequence[str]`, *optional*): As for `prune_model`.
        residuals (`Residuals`, *optional*): As for `prune_model`.
        text_only (`bool`, *optional*, defaults to `False`): As for `prune_model`.
        dequantize (`bool`, *optional*, defaults to `False`): Whether weights in fp8 or mxfp4 are dequantized on the way.

    Raises:
        ValueError: as `prune_model`; for a missing or truncated shard, NaN or infinity in a weight, or a disk that is too full.
    """
    stored = CheckpointTensors(source, dequantize=dequantize)
    tensors, edit, corrections = _edited(stored, plan, statistics, corrections, residuals)
    student, made = _student(tensors, edit, corrections, text_only)
    on_disk = str if text_only else stored.on_disk  # its checkpoint's names, which other tools know, too
    pruned = [(on_disk(name), *rest) for name, *rest in made]
    specs = {name: spec for name, spec, _ in pruned}
    with complete_or_absent(Path(target)) as folder:
        require_space(folder, sum(spec.num_bytes for spec in specs.values()), f"the student {target}")
        write_tensors(folder, specs, ((name, pieces) for name, _, pieces in pruned), max_shard_bytes)
        save_config(student, folder, dtype=stored_dtype(specs.values()))
        copy_side_files(Path(source), folder, processors=not text_only)
        if "vocab" in edit.keep:
            cut_tokenizer_files(folder, edit.keep["vocab"], edit.before["vocab"])
        edit.save(folder / "plan.json")


def _student(
    tensors: Tensors, edit: Plan, corrections: Corrections | None, text_only: bool
) -> tuple[PreTrainedConfig, Iterator[tuple[str, TensorSpec, Iterator[Tensor]]]]:
    """Return the student's config and its tensors, as `prune_tensors` does."""
    architecture = tensors.architecture
    student, pruned = student_config(architecture, edit), prune_tensors(tensors, edit, corrections)
    if architecture.family.fallback_rows and model_type_of(student) != model_type_of(architecture.config):
        pruned = in_parts(architecture, edit, pruned)
    if not text_only:
        return student, pruned
    student, names = text_alone(Architecture.of(student))
    return student, ((names[name], spec, pieces) for name, spec, pieces in pruned if name in names)


def _edited(
    tensors: Tensors,
    plan: Plan | Mapping[str, int],
    statistics: Statistics | None,
    corrections: Sequence[str] | None,
    residuals: Residuals | None,
) -> tuple[Tensors, Plan, Corrections | None]:
    """Return the teacher's tensors, in another basis where the stream is rotated, the plan for them, and the corrections.

    Raises:
        ValueError: as `prune_model`.
    """
    shape = tensors.architecture.shape
    if not isinstance(plan, Plan):
        if statistics is None:
            raise ValueError(f"plan: the sizes {dict(plan)} need statistics to choose by: calibrate(model, ...) measures them")
        after = shape.cut_to(plan)
        check_target(tensors.architecture, after)
        folder = tensors.checkpoint.folder if isinstance(tensors, CheckpointTensors) else None
        plan = make_plan(statistics.scores if folder is None else scores_for(folder, statistics, shape, after), shape, after)
    if plan.before != shape:
        raise ValueError(f"The plan is for a model of shape {plan.before.axes}, this one has {shape.axes}; make a plan for it")
    attention = shape.layer_kinds.get("attention_layers")
    if attention and not set(attention) & set(plan.kept_layers):
        raise ValueError(f"The plan drops every layer of attention ({', '.join(map(str, attention))}), by which the caches of "
                         "Transformers count tokens: keep one")  # fmt: skip
    if not isinstance(statistics, Statistics | None):
        raise ValueError(f"statistics: {statistics!r} is no Statistics: give what calibrate returns, or load the folder")
    plan = with_projector(tensors, plan)
    moments = None if statistics is None else statistics.moments
    names, rotation = chosen_corrections(tensors.architecture, plan, moments, corrections, residuals), None
    if plan.keep.keys() & RANKS.keys():
        tensors = RankTensors(tensors, plan, moments)
    if "rotation" in names or plan.rotated:
        tensors = rotated(tensors, moments, plan.require_basis() if plan.rotated else None)
        rotation = tensors.rotation
        plan = rotation.plan(plan)
    made = corrections_for(tensors.architecture, plan, moments, names, rotation, residuals) if moments else None
    return tensors, replace(plan, corrections=tuple(names)), made


def with_projector(tensors: Tensors, plan: Plan) -> Plan:
    """Return a plan that says which inner channels of a vision model's projector stay: those with the largest weights.

    No text passes it, so the norms of a channel's weights, what it reads by times what it gives by, stand for what it does.
    """
    size = plan.after.sizes.get("projector")
    if size == plan.before.sizes.get("projector") or "projector" in plan.keep:
        return plan
    weights = [p for p in tensors.architecture.parameters.values() if (("projector",),) in p.dims and len(p.dims) == 2]
    norms = [torch.linalg.vector_norm(tensors.read(p.name).float(), dim=1 - p.dim_of("projector")[0]).cpu() for p in weights]
    kept = torch.stack(norms).prod(0).topk(size).indices.sort().values.tolist()
    return replace(plan, keep={**plan.keep, "projector": kept})


def prune_tensors(
    tensors: Tensors, plan: Plan, corrections: Corrections | None = None, layer: int | None = None
) -> Iterator[tuple[str, TensorSpec, Iterator[Tensor]]]:
    """Yield every tensor of the student: its name, its spec, and its data in pieces, which are made when they are asked for.

    Args:
        tensors (`Tensors`): The teacher's.
        plan (`Plan`): What is kept.
        corrections (`Corrections`, *optional*): What changes the values on the way.
        layer (`int`, *optional*): Only the tensors of one layer; all of them when left out.
    """
    architecture = tensors.architecture
    keep_at = functools.lru_cache(maxsize=8)(plan.keep_at)  # the tensors of a layer or an expert lie together
    for name in tensors.names():
        parameter = architecture.stored[name]
        if layer not in (None, parameter.layer):
            continue
        new_name, keep = _destination(parameter, architecture, plan, keep_at)
        if new_name is not None:
            counts = {axis: index.shape[-1] for axis, index in keep.items()}
            shape = axes.tensor_shape(parameter.pattern, {**plan.before.at(parameter.layer), **counts})
            spec = TensorSpec(tensors.spec(name).dtype, shape)
            yield new_name, spec, _pieces(tensors, parameter, plan, keep, corrections)


def _pieces(
    tensors: Tensors, parameter: Parameter, plan: Plan, keep: dict[str, Tensor], corrections: Corrections | None
) -> Iterator[Tensor]:
    """Yield the data of one tensor of the student."""
    tensor, sizes = tensors.read(parameter.name), plan.before.at(parameter.layer)
    if corrections is not None:
        tensor, keep, sizes = corrections(parameter, tensor, keep, tensors.read)
    pieces = axes.pieces(tensor, parameter.pattern, keep, sizes)
    factor, offset = _rescaling(tensors.architecture, parameter, plan)
    if factor == 1:
        yield from pieces
        return
    for piece in pieces:
        wide = piece.to(torch.promote_types(piece.dtype, torch.float32))
        yield ((wide + offset) * factor - offset).to(piece.dtype)


def _rescaling(architecture: Architecture, parameter: Parameter, plan: Plan) -> tuple[float, float]:
    """Return what the values of a student's tensor, plus an offset, are multiplied by.

    Where a class computes a factor from a size that is cut (the square root of hidden), some weights make up for the change. A
    head that is the embedding, too, changes with it: then the last norm makes up for that.
    """
    family, config, factor = architecture.family, text_config(architecture.config), 1.0
    if family.rescaled_if and not getattr(config, family.rescaled_if):
        return 1.0, 0.0
    last = parameter.role == "norm" and parameter.layer is None
    for axis, powers in family.rescaled.items():
        power = powers.get("last_norm" if last else parameter.role, 0.0)
        if last and architecture.tied_head:
            power -= powers.get("embedding", 0.0)
        factor *= (plan.before[axis] / plan.after[axis]) ** power
    return factor, architecture.norm_offset if last and factor != 1 else 0.0


def _destination(
    parameter: Parameter, architecture: Architecture, plan: Plan, keep_at: Callable
) -> tuple[str | None, dict[str, Tensor] | None]:
    """Return a tensor's name in the student, `None` when it is dropped, and what is kept where it stands."""
    layer = parameter.layer
    keep = keep_at(layer, parameter.expert)
    sublayer = architecture.sublayer(parameter) if plan.by_layer else None
    if keep is None or sublayer in keep and not len(keep[sublayer]):
        return None, None
    places = {}
    for placeholder, index in parameter.indices.items():
        axis = axes.axis_of_placeholder(placeholder)
        if axis in keep and index not in keep[axis]:
            return None, None
        places[placeholder] = plan.position(axis, index, layer)
    return parameter.row.format_map(places), keep
