"""Pruning: take the kept indices of every tensor, of a model in memory or of a checkpoint on disk.

Both doors run the same loop. It must not know how the plan was made.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_minitron import axes
from hf_minitron.checkpoint import (
    DTYPES,
    Checkpoint,
    TensorSpec,
    complete_or_absent,
    require_space,
    stored_dtype,
    write_tensors,
)
from hf_minitron.families.config import check_not_quantized
from hf_minitron.families.family import Family, base_prefix, family_of, parameters_of
from hf_minitron.families.student import student_config
from hf_minitron.plan import Plan
from hf_minitron.pruning.compensate import DEFAULT_CORRECTIONS, Corrections, check_names, corrections_for
from hf_minitron.pruning.rotate import rotation_for, untied
from hf_minitron.saving import copy_side_files, repair_generation, save_config


def prune_model(
    model: PreTrainedModel,
    plan: Plan,
    moments: str | Path | None = None,
    corrections: Sequence[str] = DEFAULT_CORRECTIONS,
    gaps: str | Path | None = None,
) -> PreTrainedModel:
    """Return the student of a model in memory; the model stays unchanged.

    Args:
        model (`PreTrainedModel`): The teacher.
        plan (`Plan`): What is kept, from `make_plan`.
        moments (`str` or `Path`, *optional*): The folder that `calibrate(..., moments=...)` wrote; no corrections without it.
        corrections (`Sequence[str]`, *optional*): Which of `hf_minitron.pruning.compensate.CORRECTIONS` to make; those that
            cost no parameter by default.
        gaps (`str` or `Path`, *optional*): The folder that `read_gaps` wrote, for layer_merge.

    Returns:
        `PreTrainedModel`: A model of the same class (or of one that holds the shape) and dtype with the plan's shape;
            `PrunedForCausalLM` when layers differ.

    Example:

    ```python
    >>> shape = family_of(teacher.config).shape_of(teacher.config)
    >>> student = prune_model(teacher, make_plan(scores, shape, shape.cut_to({"ffn": 1152})))
    >>> student.config.intermediate_size
    1152
    ```
    """
    config, family = model.config, family_of(model.config)
    _check_plan(config, family, plan)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or set(parameters_of(config)) - set(model.state_dict()):
        raise ValueError(f"{type(model).__name__} is not a causal language model as its config describes it; load it with "
                         "AutoModelForCausalLM")  # fmt: skip
    if config.tie_word_embeddings and head.weight is not embedding.weight:
        raise ValueError(UNTIED)
    stored = parameters_of(config).keys()
    state = {name: t.detach() for name, t in itertools.chain(model.named_parameters(), model.named_buffers()) if name in stored}
    names = {name: name for name in state}
    config, plan, correct, read = _corrected(config, family, plan, names, state.__getitem__, moments, corrections, gaps)
    student = student_config(config, family, plan)
    pruned = dict(prune_tensors(names, read, family.rows_of(config), plan, correct=correct))
    # a tensor of which nothing is cut is the teacher's own, perhaps under another layer's name: the student must not share it
    originals = {id(tensor) for tensor in state.values()}
    own = {name: tensor.clone() if id(tensor) in originals else tensor for name, tensor in pruned.items()}
    kind = type(model) if type(student) is type(model.config) else AutoModelForCausalLM._model_mapping[type(student)]
    made = kind.from_pretrained(None, config=student, state_dict=own, dtype=model.dtype)
    for name, tensor in made.state_dict(keep_vars=True).items():
        if name in own and own[name].dtype != tensor.dtype:  # from_pretrained knows one dtype for all
            tensor.data = own[name]
    made.generation_config = copy.deepcopy(model.generation_config)
    repair_generation(made.generation_config)
    return made.to(model.device).train(model.training)


def prune_checkpoint(
    source: Path,
    plan: Plan,
    target: Path,
    max_shard_bytes: int = 5_000_000_000,
    moments: Path | None = None,
    corrections: Sequence[str] = DEFAULT_CORRECTIONS,
    gaps: Path | None = None,
) -> None:
    """Prune a model folder into a new folder, tensor by tensor.

    Args:
        source (`Path`): The teacher's folder.
        plan (`Plan`): What is kept.
        target (`Path`): The student's folder: weights, `config.json`, tokenizer, generation config and `plan.json`. It has
            its name only once it is complete.
        max_shard_bytes (`int`, *optional*, defaults to 5 GB): Size limit of one shard.
        moments (`Path`, *optional*): The folder that `calibrate(..., moments=...)` wrote; no corrections without it.
        corrections (`Sequence[str]`, *optional*): Which corrections to make, as for `prune_model`.
        gaps (`Path`, *optional*): As for `prune_model`.

    Raises:
        ValueError: for a missing or truncated shard, NaN or infinity in a weight, or a disk that is too full.
    """
    config = AutoConfig.from_pretrained(source)
    family = family_of(config)
    _check_plan(config, family, plan)
    checkpoint = Checkpoint(source)
    names = stored_names(checkpoint, config, family)
    config, plan, correct, read = _corrected(config, family, plan, names, checkpoint.read, moments, corrections, gaps)
    student = student_config(config, family, plan)
    rows = family.stored_rows(family.rows_of(config))
    specs, keep_at = {}, functools.lru_cache(maxsize=8)(plan.keep_at)
    for stored, name in names.items():
        row, new_name, keep = _rename(name, rows, plan, keep_at)
        if new_name is not None:
            dtype = checkpoint.specs.get(stored, checkpoint.specs[next(iter(names))]).dtype  # a tied head is not stored
            kept = {axis: index.shape[-1] for axis, index in keep.items()}
            specs[new_name] = TensorSpec(dtype, axes.tensor_shape(rows[row], {**plan.after.sizes, **kept}))
    with complete_or_absent(target) as folder:
        require_space(folder, sum(spec.num_bytes for spec in specs.values()), f"the student {target}")
        write_tensors(folder, specs, prune_tensors(names, read, rows, plan, axes.pieces, correct), max_shard_bytes)
        save_config(student, folder, dtype=stored_dtype(specs.values()))
        copy_side_files(source, folder)
        plan.save(folder / "plan.json")


# What goes with a half of a layer, in the families that `PrunedConfig` holds: all have Llama's names.
HALVES = {"heads": (".self_attn.", ".input_layernorm."), "ffn": (".mlp.", ".post_attention_layernorm.")}

UNTIED = ("The config ties the output head to the embedding, but they are different: set tie_word_embeddings to false in "
          "config.json")  # fmt: skip


def _corrected(
    config: PreTrainedConfig,
    family: Family,
    plan: Plan,
    names: dict[str, str],
    read: Callable[[str], Tensor],
    moments: str | Path | None,
    corrections: Sequence[str],
    gaps: str | Path | None,
) -> tuple[PreTrainedConfig, Plan, Corrections | None, Callable[[str], Tensor]]:
    """Return the config, the plan, the corrections and what reads a tensor; a rotation changes them all, and adds a head."""
    check_names(corrections)
    if moments is None or not corrections:
        return config, plan, None, read
    rotation, turned = None, read
    if "rotation" in corrections and "hidden" in plan.keep:
        tied, config = config.tie_word_embeddings, untied(config, family)
        full, rows = {name: stored for stored, name in names.items()}, family.rows_of(config)
        if tied:
            names["lm_head.weight"] = "lm_head.weight"
            full["lm_head.weight"] = full[next(name for name in full if rows[axes.match(name, rows)[0]] == "vocab hidden")]
        rotation = rotation_for(config, family, Path(moments), lambda name: read(full[name]))
        plan = rotation.plan(plan)

        def turned(stored: str) -> Tensor:
            name = names[stored]
            return rotation(name, rows[axes.match(name, rows)[0]], read(full[name]))

    made = corrections_for(config, family, plan, Path(moments), corrections, rotation, None if gaps is None else Path(gaps))
    return config, plan, made, turned


def _check_plan(config: PreTrainedConfig, family: Family, plan: Plan) -> None:
    shape = family.shape_of(config)
    if plan.before != shape:
        raise ValueError(f"The plan is for a model of shape {plan.before.axes}, this one has {shape.axes}; make a plan for it")


def stored_names(checkpoint: Checkpoint, config: PreTrainedConfig, family: Family) -> dict[str, str]:
    """Return the tensors of a checkpoint that a model needs, in their order, with their full names in the axis map.

    What is stored beside them (a tied head, old buffers, layers beyond the last) is left out. A checkpoint may leave out the
    name of the base model (`h.0.ln_1.weight` for `transformer.h.0.ln_1.weight`) and hold every expert by itself.

    Raises:
        ValueError: for a checkpoint that is quantized, lacks a parameter, holds one in a dtype that cannot be cut, or ties its
            head by config but stores another one.
    """
    check_not_quantized(config, checkpoint.folder)
    memory = family.rows_of(config)
    rows, shape, prefix = family.stored_rows(memory), family.shape_of(config), base_prefix(config)
    names = {}
    for stored in checkpoint.specs:
        for name in (stored, f"{prefix}.{stored}"):
            found = axes.match(name, rows)
            if found and all(index < shape[axes.kind_of(axis)] for axis, index in found[1].items()):
                names[stored] = name
                break
    for stored in names:
        if not DTYPES[checkpoint.specs[stored].dtype].is_floating_point:
            raise ValueError(f"{stored!r} in {checkpoint.folder} is stored as {checkpoint.specs[stored].dtype}; save the model "
                             "as bfloat16, float16 or float32 first")  # fmt: skip
    _check_tied(checkpoint, family, memory, names)
    wanted = parameters_of(config)
    present = set(names.values())
    for name in wanted:
        row, indices = axes.match(name, memory)
        parts = [part.format_map({**indices, "experts": i}) for part in family.stored.get(row, ()) for i in
                 (range(shape["experts"]) if "experts" in axes.placeholders(part) else [0])]  # fmt: skip
        if name not in present and not (parts and present.issuperset(parts)):
            lost = next((part for part in parts if part not in present), name) if present.intersection(parts) else name
            raise ValueError(f"The checkpoint {checkpoint.folder} lacks the parameter {lost!r}")
    return names


def _check_tied(checkpoint: Checkpoint, family: Family, memory: Mapping[str, str], names: Mapping[str, str]) -> None:
    """Refuse a head that is stored beside the embedding it is tied to, when it differs: Transformers would use it."""
    absent = [row for row, pattern in family.rows.items() if pattern == "vocab hidden" and row not in memory]
    heads = [head for row in absent for head in (row, *family.stored.get(row, ()))]
    embedding = next((stored for stored, name in names.items() if memory.get(name) == "vocab hidden"), None)
    for head in heads:
        if embedding and head in checkpoint.specs and not torch.equal(checkpoint.read(head), checkpoint.read(embedding)):
            raise ValueError(UNTIED)


def prune_tensors(
    names: Mapping[str, str],
    read: Callable[[str], Tensor],
    rows: Mapping[str, str],
    plan: Plan,
    take: Callable = axes.take,
    correct: Corrections | None = None,
) -> Iterator[tuple[str, Tensor | Iterable[Tensor]]]:
    """Yield name and data of every tensor of the student, in the order of the teacher's.

    Args:
        names (`Mapping[str, str]`): Name under which each tensor is read, to its full name in the axis map.
        read (`Callable`): Returns a tensor by the first of these names.
        rows (`Mapping[str, str]`): Rows for the second.
        plan (`Plan`): What is kept.
        take (`Callable`, *optional*): `axes.take` for tensors, `axes.pieces` for their pieces.
        correct (`Corrections`, *optional*): What corrects the tensors on the way.
    """
    by_name = {name: stored for stored, name in names.items()}
    keep_at = functools.lru_cache(maxsize=8)(plan.keep_at)  # the tensors of a layer or an expert lie together
    for stored, name in names.items():
        row, new_name, keep = _rename(name, rows, plan, keep_at)
        if new_name is not None:
            tensor, sizes = read(stored), plan.before.sizes
            if correct is not None:
                tensor, keep, sizes = correct(name, tensor, keep, lambda other: read(by_name[other]))
            yield new_name, take(tensor, rows[row], keep, sizes)


def _rename(
    name: str, rows: Mapping[str, str], plan: Plan, keep_at: Callable
) -> tuple[str, str | None, dict[str, Tensor] | None]:
    """Return a tensor's row, its name in the student (`None` when it is dropped) and what is kept where it stands."""
    row, indices = axes.match(name, rows)
    layer = axes.layer_in(indices)
    keep = keep_at(layer, indices.get("experts"))
    lost = (
        () if keep is None else [part for axis, parts in HALVES.items() if len(keep.get(axis, "kept")) == 0 for part in parts]
    )
    if keep is None or any(part in name for part in lost):
        return row, None, None
    places = {}
    for axis, index in indices.items():
        axis_cut = axes.kind_of(axis)
        if axis_cut in keep and index not in keep[axis_cut]:
            return row, None, None
        places[axis] = plan.position(axis_cut, index, layer)
    return row, row.format_map(places), keep
