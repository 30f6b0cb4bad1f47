"""Sequential least squares: a pruned model's projections are fitted, layer by layer, on what its own layers before give.

`least_squares` regresses what the teacher's projections give on the teacher's inputs. Here the inputs are the pruned model's
and the outputs the teacher's, so that a projection also makes up for the cuts before it (asymmetric calibration: GPTAQ,
2504.02692; AA-SVD, 2604.02119).
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
from hf_minitron.checkpoint.checkpoint import require_space
from hf_minitron.checkpoint.tensors import Tensors, tensors_of
from hf_minitron.importance.projections import LayerProjections, name_in_student
from hf_minitron.importance.streamed import LayerLoader, Spill, check_streamable, whole_name
from hf_minitron.importance.taps import run_batch
from hf_minitron.memory import give_back_freed_memory
from hf_minitron.plan import RANKS, Plan
from hf_minitron.probe import Visit, probe, submodule
from hf_minitron.pruning.reconstruction import RIDGE, change_of

# Of how much the stream differs, what a projection takes over: of 0.5 and 1, text of other domains prefers the former.
BETA = 0.5
# What a model is run on, and the places of the tokens that fits are made of.
Batch = tuple[Mapping[str, Tensor], Tensor]
ENOUGH = 16_384  # tokens that every one of is read; of more, every fourth at least


def sequential_least_squares(
    teacher: PreTrainedModel | str | Path | Tensors,
    student: PreTrainedModel | str | Path,
    plan: Plan,
    blocks: Dataset,
    batch_size: int = 4,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    state_bytes: int = 4_000_000_000,
    ridge: float = RIDGE,
    beta: float = BETA,
) -> None:
    """Fit the projections of a student, in place, to give what its teacher's give, from the inputs that the student has.

    The layers of both pass through memory one at a time. Every projection is fitted on what it reads in the student, once those
    before it are: q, k, v, then the output projection, gate and up, then down. A projection that writes to the residual stream
    takes over, too, by how much the student's stream before it differs from the teacher's (RMS-norm models whose sublayers
    are added as they are). Calibrate on text of several domains: what is fitted to one may cost others.

    Args:
        teacher (`PreTrainedModel`, `str`, `Path` or `Tensors`): In memory, a folder, or its tensors.
        student (`PreTrainedModel`, `str` or `Path`): What `prune_model` has made of it with this plan, or the folder that
            `prune_checkpoint` has; its weights are overwritten.
        plan (`Plan`): What was kept.
        blocks (`Dataset`): Calibration text, `input_ids` of shape `(seq,)` per row, and `attention_mask` where rows are padded.
        batch_size (`int`, *optional*, defaults to 4): Blocks per forward pass.
        dtype (`torch.dtype`, *optional*): In which the layers run; as the teacher's weights when left out.
        device (`torch.device`, *optional*, defaults to the CPU): Where they run.
        state_bytes (`int`, *optional*, defaults to 4 GB): Memory for what waits between layers; the rest is spilled.
        ridge (`float`, *optional*, defaults to `RIDGE`): Weight of a projection's change beside its error, relative to the mean
            energy of an input.
        beta (`float`, *optional*, defaults to `BETA`): Share of the stream's difference that a projection takes over.

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
    batches = _batches(blocks, batch_size)
    dtype = dtype or getattr(dense.architecture.config, "dtype", None) or torch.float32
    layers = [
        LayerProjections.of(dense.architecture, pruned.architecture, plan, old, new) for new, old in enumerate(plan.kept_layers)
    ]
    waiting = sum(batch["input_ids"].numel() for batch, _ in batches) * (plan.before["hidden"] + plan.after["hidden"])
    waiting += sum(len(places) for _, places in batches) * max(layer.width for layer in layers)
    if (spilled := waiting * dtype.itemsize - state_bytes) > 0:
        require_space(Path(tempfile.gettempdir()), spilled, "what waits between layers beyond state_bytes")
    with torch.inference_mode(), tempfile.TemporaryDirectory(prefix="hf_minitron-states-") as folder:
        held = Spill(Path(folder), state_bytes)
        loaders = [LayerLoader(tensors, dtype, torch.device(device)) for tensors in (dense, pruned)]
        streams = [_Stream(side, loader, held) for side, loader in zip(("teacher", "student"), loaders, strict=True)]
        _Sweep(*streams, layers, pruned, plan, batches, held, ridge, beta).run()


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


def _batches(blocks: Dataset, batch_size: int) -> list[Batch]:
    """Return batches with the places of the tokens that fits are made of, all or every fourth."""
    found = []
    for batch in blocks.with_format("torch").iter(batch_size):
        found.append((batch, batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().nonzero()[:, 0]))
    every = min(4, max(1, sum(len(places) for _, places in found) // ENOUGH))
    return [(batch, places[::every]) for batch, places in found]


class _Seen(Exception):
    """All that a pass was for has been seen."""


@dataclass(frozen=True)
class _Stream:
    """One of the two models, run layer by layer; between layers its states wait, a batch each."""

    side: str
    loader: LayerLoader
    held: Spill

    def run(self, model: PreTrainedModel, layer: int, number: int, batch: Batch, seen: Sequence = ()) -> None:
        """Run a batch through a model of one layer, from the states before it to those behind it."""
        module, waiting = Architecture.of(model.config).taps("layers")[0][1], f"{self.side}-{number}"

        def leave(visit: Visit) -> None:
            self.held[waiting] = visit.states

        before = [(module, lambda visit: self.held[waiting].to(visit.input.device))] if layer else []
        with probe(model, [*seen, (module, leave)], before):
            run_batch(model, batch[0], self.loader.device)


@dataclass(frozen=True)
class _Sweep:
    """The pass over both models."""

    teacher: _Stream
    student: _Stream
    layers: Sequence[LayerProjections]  # of the student
    tensors: Tensors  # the student's
    plan: Plan
    batches: Sequence[Batch]
    held: Spill
    ridge: float
    beta: float

    def run(self) -> None:
        """Go through the layers."""
        layers = iter(tqdm(range(self.plan.before["layers"]), desc="Sequential least squares", unit="layer"))
        for _ in range(self.plan.kept_layers[0]):
            self._run_teacher(next(layers), LayerProjections())
        for new, old in enumerate(self.plan.kept_layers):
            place = self.layers[new]
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
        for number, batch in enumerate(self.batches):

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
        for number, batch in enumerate(self.batches):
            after = self.held[f"{self.teacher.side}-{number}"].flatten(0, 1)[batch[1]][:, place.stream]
            self.held[f"{last}-{number}"] = after - self.held[f"{place.anchored[last]}-{number}"]

    def _fit_layer(self, new: int, place: LayerProjections) -> None:
        """Fit the projections of a layer of the student, in the order in which they run, and go on behind it."""
        model = self.student.loader.model_of(new, self.student.loader.read(new))
        for group in place.groups():
            sums = [0.0, 0.0]
            for number, batch in enumerate(self.batches):
                given, lacking = self._read(model, new, place, group, number, batch)
                sums = [sums[0] + given.T @ given, sums[1] + lacking.T @ given]
            if sums[1].any():
                tokens = sum(len(places) for _, places in self.batches)
                self._change(model, new, place, group, change_of(sums[0] / tokens, sums[1] / tokens, self.ridge))
        for number, batch in enumerate(self.batches):
            self.student.run(model, new, number, batch)
            for name in (*place.rows, *place.norms):
                del self.held[f"{name}-{number}"]

    def _read(
        self, model: PreTrainedModel, new: int, place: LayerProjections, group: Sequence[str], number: int, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Run the student's layer as far as a group of projections; return their input and what lacks of their output."""
        seen: dict[str, Visit] = {}

        def see(visit: Visit) -> None:
            seen[visit.name] = visit
            if all(name in seen for name in group):
                raise _Seen

        with suppress(_Seen):
            self.student.run(model, new, number, batch, [(name, see) for name in (*group, *place.norms)])
        lacking = []
        for name in group:
            visit = seen[name]
            wanted = self.held[f"{name}-{number}"].to(visit.states.device, torch.float32)
            if norm := place.anchored.get(name):
                stream = self.held[f"{norm}-{number}"].to(wanted)
                differs = stream - _tokens(seen[norm].input, batch, seen[norm]).float()
                wanted = wanted + self.beta * differs / sum(other == norm for other in place.anchored.values())
            lacking.append(wanted - _tokens(visit.states, batch, visit).float())
        first = seen[group[0]]
        return _tokens(first.input, batch, first).float(), torch.cat(lacking, 1)

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


def _tokens(states: Tensor, batch: Batch, visit: Visit) -> Tensor:
    """Return the states of the tokens that count, `(tokens, size)`."""
    return states.reshape(visit.batch[0] * visit.batch[1], -1)[batch[1].to(states.device)]
