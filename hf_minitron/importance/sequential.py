"""Sequential least squares: a pruned model's projections are fitted, layer by layer, on what its own layers before give.

`least_squares` regresses what the teacher's projections give on the teacher's inputs. Here the inputs are the pruned model's
and the outputs the teacher's, so that a projection also makes up for the cuts before it (asymmetric calibration: GPTAQ,
2504.02692; AA-SVD, 2604.02119).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.checkpoint.tensors import Tensors, tensors_of
from hf_minitron.importance.projections import LayerProjections, name_in_student
from hf_minitron.importance.streamed import LayerLoader, check_streamable, whole_name
from hf_minitron.importance.taps import run_batch
from hf_minitron.memory import give_back_freed_memory
from hf_minitron.plan import RANKS, Plan
from hf_minitron.probe import Observer, Visit, probe, submodule
from hf_minitron.pruning.reconstruction import RIDGE, change_of

# Of how much the stream differs, what a projection takes over: of 0.5 and 1, text of other domains prefers the former.
BETA = 0.5
TOKENS = 65_536  # that fits are made of: more still help text of other domains (docs/measurements.md)


def sequential_least_squares(
    teacher: PreTrainedModel | str | Path | Tensors,
    student: PreTrainedModel | str | Path,
    plan: Plan,
    blocks: Dataset,
    tokens: int = TOKENS,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ridge: float = RIDGE,
    beta: float = BETA,
) -> None:
    """Fit the projections of a student, in place, to give what its teacher's give, from the inputs that the student has.

    The layers of both pass through memory one at a time, each once, with all tokens. Every projection is fitted on what it
    reads in the student, just before it runs there: q, k, v, then the output projection, gate and up, then down. One that
    writes to the residual stream takes over, too, by how much the student's stream before it differs from the teacher's
    (RMS-norm models whose sublayers are added as they are). Calibrate on text of several domains: what is fitted to one may
    cost others.

    Args:
        teacher (`PreTrainedModel`, `str`, `Path` or `Tensors`): In memory, a folder, or its tensors.
        student (`PreTrainedModel`, `str` or `Path`): What `prune_model` has made of it with this plan, or the folder that
            `prune_checkpoint` has; its weights are overwritten.
        plan (`Plan`): What was kept.
        blocks (`Dataset`): Calibration text, `input_ids` of shape `(seq,)` per row, and `attention_mask` where rows are padded.
        tokens (`int`, *optional*, defaults to 65,536): Of the text, in blocks evenly spaced. What a layer holds of all of them
            is in memory at the same time: for Llama-3.1-8B in bfloat16 about 200 kB a token.
        dtype (`torch.dtype`, *optional*): In which the layers run; as the teacher's weights when left out.
        device (`torch.device`, *optional*, defaults to the CPU): Where they run.
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
    dtype = dtype or getattr(dense.architecture.config, "dtype", None) or torch.float32
    layers = [
        LayerProjections.of(dense.architecture, pruned.architecture, plan, old, new) for new, old in enumerate(plan.kept_layers)
    ]
    batch = _batch(blocks, tokens)
    with torch.inference_mode():
        streams = [_Stream(LayerLoader(tensors, dtype, torch.device(device)), batch) for tensors in (dense, pruned)]
        _Sweep(*streams, layers, pruned, plan, ridge, beta).run()


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


def _batch(blocks: Dataset, tokens: int) -> Mapping[str, Tensor]:
    """Return blocks, evenly spaced, of as many tokens, at least one."""
    count = min(len(blocks), max(1, tokens // len(blocks[0]["input_ids"])))
    return blocks.select(torch.linspace(0, len(blocks) - 1, count).long().tolist()).with_format("torch")[:]


class _Stream:
    """One of the two models, run layer by layer on all tokens; between layers their states wait."""

    def __init__(self, loader: LayerLoader, batch: Mapping[str, Tensor]):
        self.loader, self.batch = loader, batch
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        self._places = mask.flatten().nonzero()[:, 0].to(loader.device)
        self._states: Tensor | None = None  # before the next layer

    def model_of(self, layer: int) -> PreTrainedModel:
        """Return the model of one layer."""
        return self.loader.model_of(layer, self.loader.read(layer))

    def run(
        self, model: PreTrainedModel, after: Iterable[tuple[str, Observer]] = (), before: Iterable[tuple[str, Observer]] = ()
    ) -> None:
        """Run a model of one layer from the states before it to those behind it."""
        module = Architecture.of(model.config).taps("layers")[0][1]

        def leave(visit: Visit) -> None:
            self._states = visit.states

        enter = [] if self._states is None else [(module, lambda visit: self._states)]
        with probe(model, [*after, (module, leave)], [*enter, *before]):
            run_batch(model, self.batch, self.loader.device)

    def tokens(self, states: Tensor) -> Tensor:
        """Return the states of the tokens that count, `(tokens, size)`."""
        return states.reshape(self.batch["input_ids"].numel(), -1)[self._places]

    @property
    def waiting(self) -> Tensor:
        """The states of the tokens that count, before the next layer."""
        return self.tokens(self._states)


@dataclass(frozen=True)
class _Sweep:
    """The pass over both models."""

    teacher: _Stream
    student: _Stream
    layers: Sequence[LayerProjections]  # of the student
    tensors: Tensors  # the student's
    plan: Plan
    ridge: float
    beta: float

    def run(self) -> None:
        """Go through the layers."""
        layers = iter(tqdm(range(self.plan.before["layers"]), desc="Sequential least squares", unit="layer"))
        for _ in range(self.plan.kept_layers[0]):
            self._run_teacher(next(layers), LayerProjections())
        for new, old in enumerate(self.plan.kept_layers):
            place = self.layers[new]
            wanted = self._run_teacher(next(layers), place)
            for _ in self.plan.dropped_after.get(old, ()):
                self._run_teacher(next(layers), LayerProjections())
            if place.anchored and old in self.plan.dropped_after:  # the last that writes gives what they add, too
                last = max(place.anchored, key=place.order.index)
                wanted[last] = self.teacher.waiting[:, place.stream] - wanted[place.anchored[last]]
            self._fit_layer(new, place, wanted)
            give_back_freed_memory()
        next(layers, None)

    def _run_teacher(self, layer: int, place: LayerProjections) -> dict[str, Tensor]:
        """Run a layer of the teacher; return what its projections give, and what its norms are given, of what stays."""
        wanted: dict[str, Tensor] = {}

        def keep(visit: Visit) -> None:
            if visit.name in place.norms:
                wanted[visit.name] = self.teacher.tokens(visit.input)[:, place.stream]
            else:
                wanted[visit.name] = self.teacher.tokens(visit.states)[:, place.rows[visit.name]]
                place.order.append(visit.name)

        self.teacher.run(self.teacher.model_of(layer), [(name, keep) for name in (*place.rows, *place.norms)])
        return wanted

    def _fit_layer(self, new: int, place: LayerProjections, wanted: Mapping[str, Tensor]) -> None:
        """Run a layer of the student; fit each group of projections just before the first of them runs."""
        model = self.student.model_of(new)
        streams: dict[str, Tensor] = {}

        def fit(group: Sequence[str], visit: Visit) -> None:
            given = self.student.tokens(visit.input).float()
            crosses = []
            for name in group:
                # by `forward`, which calls no hooks: this is one
                lacking = wanted[name].float() - self.student.tokens(submodule(model, name).forward(visit.input)).float()
                if norm := place.anchored.get(name):
                    differs = wanted[norm].float() - streams[norm].float()
                    lacking += self.beta * differs / sum(other == norm for other in place.anchored.values())
                crosses.append(lacking.T @ given / len(given))
            if (cross := torch.cat(crosses)).any():
                self._change(model, new, place, group, change_of(given.T @ given / len(given), cross, self.ridge))

        def see(visit: Visit) -> None:
            streams[visit.name] = self.student.tokens(visit.input)

        before = [(group[0], partial(fit, group)) for group in place.groups()]
        self.student.run(model, [(name, see) for name in place.norms], before)

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
