"""Pruning: take the kept indices of every tensor, of a model in memory or of a checkpoint on disk.

Both doors run the same loop. It must not know how the plan was made.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from hf_minitron import axes
from hf_minitron.checkpoint import (
    Checkpoint,
    TensorSpec,
    complete_or_absent,
    copy_side_files,
    require_space,
    write_tensors,
)
from hf_minitron.families.family import family_of, student_config
from hf_minitron.plan import Plan


def prune_model(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Return the student of a model in memory; the model stays unchanged.

    Args:
        model (`PreTrainedModel`): The teacher.
        plan (`Plan`): What is kept, from `make_plan`.

    Returns:
        `PreTrainedModel`: A model of the same class and dtype with the plan's shape.

    Example:

    ```python
    >>> shape = family_of(model.config).shape_of(model.config)
    >>> student = prune_model(model, make_plan(scores, shape, shape.cut_to({"ffn": 1152})))
    ```
    """
    family = family_of(model.config)
    state = {name: tensor.detach() for name, tensor in model.named_parameters()}
    pruned = dict(_prune_tensors(state, state.__getitem__, family.rows_of(model.config), plan))
    # a tensor of which nothing is cut is the teacher's own, perhaps under another layer's name: the student must not share it
    originals = {id(tensor) for tensor in state.values()}
    own = {name: tensor.clone() if id(tensor) in originals else tensor for name, tensor in pruned.items()}
    student = type(model).from_pretrained(
        None, config=student_config(model.config, family, plan), state_dict=own, dtype=model.dtype
    )
    student.generation_config = copy.deepcopy(model.generation_config)
    return student.to(model.device).train(model.training)


def prune_checkpoint(source: Path, plan: Plan, target: Path, max_shard_bytes: int = 5_000_000_000) -> None:
    """Prune a model folder into a new folder, tensor by tensor.

    Args:
        source (`Path`): The teacher's folder.
        plan (`Plan`): What is kept.
        target (`Path`): The student's folder: weights, `config.json`, tokenizer, generation config and `plan.json`. It has
            its name only once it is complete.
        max_shard_bytes (`int`, *optional*, defaults to 5 GB): Size limit of one shard.

    Raises:
        ValueError: for a missing or truncated shard, NaN or infinity in a weight, or a disk that is too full.
    """
    config = AutoConfig.from_pretrained(source)
    family = family_of(config)
    rows = family.rows_of(config)
    checkpoint = Checkpoint(source)
    specs = _student_specs(checkpoint, rows, plan)
    require_space(target.parent, sum(spec.num_bytes for spec in specs.values()), f"the student {target}")
    names = [name for name in checkpoint.specs if axes.match(name, rows)]
    with complete_or_absent(target) as folder:
        write_tensors(folder, specs, _prune_tensors(names, checkpoint.read, rows, plan), max_shard_bytes)
        student_config(config, family, plan).save_pretrained(folder)
        copy_side_files(source, folder)
        plan.save(folder / "plan.json")


def _prune_tensors(
    names: Iterable[str], read: Callable[[str], Tensor], rows: dict[str, str], plan: Plan
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and data of every tensor of the student, in the order of the teacher's names."""
    for name in names:
        row, new_name, layer = _rename(name, rows, plan)
        if new_name is not None:
            yield new_name, axes.take(read(name), rows[row], plan.keep_at(layer), plan.before.sizes)


def _student_specs(checkpoint: Checkpoint, rows: dict[str, str], plan: Plan) -> dict[str, TensorSpec]:
    """Return the student's specs, in the order of the teacher's; refuse a checkpoint that lacks a parameter."""
    layers = range(plan.before["layers"])
    for row in rows:
        for name in [row.format(layers=layer) for layer in layers] if axes.placeholders(row) else [row]:
            if name not in checkpoint.specs:
                raise ValueError(f"The checkpoint {checkpoint.folder} lacks the parameter {name!r}")
    specs = {}
    for name, spec in checkpoint.specs.items():
        if axes.match(name, rows) is None:
            continue  # stored, but no parameter of the model: a tied head, a buffer
        row, new_name, _ = _rename(name, rows, plan)
        if new_name is not None:
            specs[new_name] = TensorSpec(spec.dtype, axes.tensor_shape(rows[row], plan.after.sizes))
    return specs


def _rename(name: str, rows: dict[str, str], plan: Plan) -> tuple[str, str | None, int | None]:
    """Return the row, the student's name (`None` when its layer is dropped) and the teacher's layer of a tensor."""
    row, index = axes.match(name, rows)
    layer = index.get("layers")
    if layer is None:
        return row, name, None
    if layer not in plan.kept_layers:
        return row, None, layer
    return row, row.format(layers=plan.kept_layers.index(layer)), layer
