"""Sequential least squares: a pruned model's projections are fitted, layer by layer, on what its own layers before give.

`least_squares` regresses what the teacher's projections give on the teacher's inputs. Here the inputs are the pruned model's
and the outputs the teacher's, so that a projection also makes up for the cuts before it (asymmetric calibration: GPTAQ,
2504.02692; AA-SVD, 2604.02119). What the fit has not seen decides its ridge: parts of the text that are left out in turn.
"""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.checkpoint.tensors import Tensors, tensors_of
from hf_minitron.importance.projections import LayerProjections, name_in_student
from hf_minitron.importance.streamed import LayerLoader, Spill, check_streamable, whole_name
from hf_minitron.importance.taps import run_batch
from hf_minitron.memory import give_back_freed_memory
from hf_minitron.plan import RANKS, Plan
from hf_minitron.probe import Visit, probe, submodule
from hf_minitron.pruning.reconstruction import Fit

EVERY = 2  # of the tokens, that fits are made of
FOLDS = 3  # of a text of one source


def sequential_least_squares(
    teacher: PreTrainedModel | str | Path | Tensors,
    student: PreTrainedModel | str | Path,
    plan: Plan,
    blocks: Dataset,
    sources: Sequence[int] | None = None,
    batch_size: int = 4,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    state_bytes: int = 4_000_000_000,
) -> None:
    """Fit the projections of a student, in place, to give what its teacher's give, from the inputs that the student has.

    The layers of both pass through memory one at a time. Every projection is fitted on what it reads in the student, once those
    before it are: q, k, v, then the output projection, gate and up, then down. A projection that writes to the residual stream
    takes over, too, by how much the student's stream before it differs from the teacher's (RMS-norm models whose sublayers
    are added as they are). The change of a projection is weighed by a ridge, the one of `RIDGES` that is best for the worst
    source among those left out of the fit in turn; where each is worse than no change, the projection stays as it is.

    Args:
        teacher (`PreTrainedModel`, `str`, `Path` or `Tensors`): In memory, a folder, or its tensors.
        student (`PreTrainedModel`, `str` or `Path`): What `prune_model` has made of it with this plan, or the folder that
            `prune_checkpoint` has; its weights are overwritten.
        plan (`Plan`): What was kept.
        blocks (`Dataset`): Calibration text, `input_ids` of shape `(seq,)` per row, and `attention_mask` where rows are padded.
        sources (`Sequence[int]`, *optional*): The source of every block. With one, every third block is left out in turn.
        batch_size (`int`, *optional*, defaults to 4): Blocks per forward pass.
        dtype (`torch.dtype`, *optional*): In which the layers run; as the teacher's weights when left out.
        device (`torch.device`, *optional*, defaults to the CPU): Where they run.
        state_bytes (`int`, *optional*, defaults to 4 GB): Memory for what waits between layers; the rest is spilled.

    Raises:
        ValueError: for a plan or a model that it is not for, naming the reason.

    Example:

    ```python
    >>> student = prune_model(teacher, plan, statistics)
    >>> sequential_least_squares(teacher, student, plan, calibration)
    ```
    """
    dense = tensors_of(teacher) if isinstance(teacher, PreTrainedModel | str | Path) else teacher
    pruned = tensors_of(student)
    check_sequential(dense.architecture, pruned.architecture, plan)
    batches = _batches(blocks, sources, batch_size)
    dtype = dtype or getattr(dense.architecture.config, "dtype", None) or torch.float32
    with torch.inference_mode(), tempfile.TemporaryDirectory(prefix="hf_minitron-states-") as folder:
        held = Spill(Path(folder), state_bytes)
        loaders = [LayerLoader(tensors, dtype, torch.device(device)) for tensors in (dense, pruned)]
        streams = [_Stream(side, loader, held) for side, loader in zip(("teacher", "student"), loaders, strict=True)]
        _Sweep(*streams, pruned, plan, batches, held).run()


def check_sequential(teacher: Architecture, student: Architecture, plan: Plan) -> None:
    """Refuse models whose projections cannot be compared one by one, or layer by layer."""
    check_streamable(teacher)
    check_streamable(student)
    if plan.before != teacher.shape:
        raise ValueError(f"The plan is for a model of shape {plan.before.axes}, this one has {teacher.shape.axes}")
    if plan.rotated:
        raise ValueError("sequential: not for a rotated student, whose stream has another basis: leave rotation out")
    if refused := sorted({"vocab", *RANKS} & plan.keep.keys()):
        raise ValueError(f"sequential: not where {refused[0]} is cut: its tensors are in another basis or vocabulary; leave "
                         "sequential out, or that axis whole")  # fmt: skip
    layers = {module: read.layer for module, read in teacher.reads.items() if read.layer in plan.kept_layers}
    names = [name_in_student(module, layer, plan.kept_layers.index(layer)) for module, layer in layers.items()]
    if not any(name in student.weights for name in names):
        raise ValueError(f"sequential: the student's class ({student.config.model_type}) holds its projections in other parts "
                         "than the teacher's: leave sequential out")  # fmt: skip


def _batches(blocks: Dataset, sources: Sequence[int] | None, batch_size: int) -> list[tuple[int, Mapping[str, Tensor]]]:
    """Return batches, each of one fold, and its number."""
    folds = list(sources or ())
    if len(set(folds)) < 2:
        folds = [row % min(FOLDS, len(blocks)) for row in range(len(blocks))]
    if len(folds) != len(blocks):
        raise ValueError(f"sources: {len(folds)} for {len(blocks)} blocks; give every block its own")
    found = []
    for fold in sorted(set(folds)):
        rows = blocks.select([row for row, other in enumerate(folds) if other == fold]).with_format("torch")
        found += [(fold, batch) for batch in rows.iter(batch_size)]
    return found


class _Seen(Exception):
    """All that a pass was for has been seen."""


@dataclass(frozen=True)
class _Stream:
    """One of the two models, run layer by layer; between layers its states wait, a batch each."""

    side: str
    loader: LayerLoader
    held: Spill

    def run(self, model: PreTrainedModel, layer: int, number: int, batch: Mapping[str, Tensor], seen: Sequence) -> None:
        """Run a batch through a model of one layer, from the states before it to those behind it."""
        module, waiting = Architecture.of(model.config).taps("layers")[0][1], f"{self.side}-{number}"

        def leave(visit: Visit) -> None:
            self.held[waiting] = visit.states

        before = [(module, lambda visit: self.held[waiting].to(visit.input.device))] if layer else []
        with probe(model, [*seen, (module, leave)], before):
            run_batch(model, batch, self.loader.device)


@dataclass(frozen=True)
class _Sweep:
    """The pass over both models."""

    teacher: _Stream
    student: _Stream
    tensors: Tensors  # the student's
    plan: Plan
    batches: Sequence[tuple[int, Mapping[str, Tensor]]]
    held: Spill

    def run(self) -> None:
        """Go through the layers."""
        layers = iter(tqdm(range(self.plan.before["layers"]), desc="Sequential least squares", unit="layer"))
        for _ in range(self.plan.kept_layers[0]):
            self._run_teacher(next(layers), LayerProjections())
        for new, old in enumerate(self.plan.kept_layers):
            place = LayerProjections.of(self.teacher.loader.architecture, self.tensors.architecture, self.plan, old, new)
            self._run_teacher(next(layers), place)
            for _ in self.plan.dropped_after.get(old, ()):
                self._run_teacher(next(layers), LayerProjections())
            if place.anchored and old in self.plan.dropped_after:
                self._take_over_dropped(place)
            self._fit_layer(new, place)
            give_back_freed_memory()
        next(layers, None)

    def _run_teacher(self, layer: int, place: LayerProjections) -> None:
        """Run a layer of the teacher; keep what its projections give, and what its norms are given."""
        model = self.teacher.loader.model_of(layer, self.teacher.loader.read(layer))
        for number, (_, batch) in enumerate(self.batches):

            def keep(visit: Visit, batch=batch, number=number) -> None:
                if visit.name in place.norms:
                    self.held[f"{visit.name}-{number}"] = _tokens(visit.input, batch, visit)[:, place.stream]
                else:
                    self.held[f"{visit.name}-{number}"] = _tokens(visit.states, batch, visit)[:, place.rows[visit.name]]
                    if not number:
                        place.order.append(visit.name)

            self.teacher.run(model, layer, number, batch, [(name, keep) for name in (*place.rows, *place.norms)])

    def _take_over_dropped(self, place: LayerProjections) -> None:
        """Let the last projection that writes give what the dropped layers behind it add, too."""
        last = max(place.anchored, key=place.order.index)
        for number, (_, batch) in enumerate(self.batches):
            after = self.held[f"{self.teacher.side}-{number}"].flatten(0, 1)[_counted(batch)][:, place.stream]
            self.held[f"{last}-{number}"] = after - self.held[f"{place.anchored[last]}-{number}"]

    def _fit_layer(self, new: int, place: LayerProjections) -> None:
        """Fit the projections of a layer of the student, in the order in which they run, and go on behind it."""
        model = self.student.loader.model_of(new, self.student.loader.read(new))
        for group in place.groups():
            fit = Fit()
            for number, (fold, batch) in enumerate(self.batches):
                fit.add(fold, *self._read(model, new, place, group, number, batch))
            if (change := fit.change()) is not None:
                self._change(model, new, place, group, change)
        for number, (_, batch) in enumerate(self.batches):
            self.student.run(model, new, number, batch, ())
            for name in (*place.rows, *place.norms):
                del self.held[f"{name}-{number}"]

    def _read(
        self, model: PreTrainedModel, new: int, place: LayerProjections, group: Sequence[str], number: int, batch: Mapping
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run the student's layer as far as a group of projections; return their input, what lacks of their output, weights."""
        seen: dict[str, Visit] = {}

        def see(visit: Visit) -> None:
            seen[visit.name] = visit
            if all(name in seen for name in group):
                raise _Seen

        with suppress(_Seen):
            self.student.run(model, new, number, batch, [(name, see) for name in (*group, *place.norms)])
        lacking, weights = [], None
        for name in group:
            visit = seen[name]
            wanted = self.held[f"{name}-{number}"].to(visit.states.device, torch.float32)
            if norm := place.anchored.get(name):
                stream = self.held[f"{norm}-{number}"].to(wanted)
                after = stream + wanted
                weights = 1 / after.square().mean(1).clamp(min=1e-30)  # the norms behind it read shares of this
                missing = stream - _tokens(seen[norm].input, batch, seen[norm]).float()
                wanted = wanted + missing / sum(other == norm for other in place.anchored.values())
            lacking.append(wanted - _tokens(visit.states, batch, visit).float())
        first = seen[group[0]]
        return _tokens(first.input, batch, first).float(), torch.cat(lacking, 1), weights

    def _change(self, model: PreTrainedModel, new: int, place: LayerProjections, group: Sequence[str], change: Tensor) -> None:
        """Add a group's change to its weights, in the model at hand and in the student."""
        for name, part in zip(group, change.split([len(place.rows[name]) for name in group]), strict=True):
            weight = submodule(model, name).weight
            part = part if place.last[name] else part.T
            whole = whole_name(name, new)
            stored = self.tensors.read(self.tensors.architecture.weights[whole].name)
            value = (stored.to(part) + part).to(stored.dtype)
            weight.copy_(value)
            self.tensors.write(self.tensors.architecture.weights[whole].name, value)


def _counted(batch: Mapping[str, Tensor]) -> Tensor:
    """Return which of a batch's tokens fits are made of."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return mask.flatten().nonzero()[::EVERY, 0]


def _tokens(states: Tensor, batch: Mapping[str, Tensor], visit: Visit) -> Tensor:
    """Return the states of the tokens that count, `(tokens, size)`."""
    return states.reshape(visit.batch[0] * visit.batch[1], -1)[_counted(batch).to(states.device)]
