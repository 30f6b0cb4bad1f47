"""Sequential least squares: a pruned model's projections are fitted, layer by layer, on what its own layers before give.

`least_squares` regresses what the teacher's projections give on the teacher's inputs. Here the inputs are the pruned model's
and the outputs the teacher's, so that a projection also makes up for the cuts before it (asymmetric calibration: GPTAQ,
2504.02692; AA-SVD, 2604.02119).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from hf_minitron.pruning.reconstruction import RIDGE, TOKENS, change_of

# What float32 products of numbers that were bfloat16 are made in.
PRODUCTS = {torch.backends.cuda.matmul: "tf32", getattr(torch.backends.mkldnn, "matmul", None): "bf16"}
# Of how much the stream differs, what a projection takes over: of 0.5 and 1, text of other domains prefers the former.
BETA = 0.5
PART = 2_048  # tokens that are multiplied at once: their states stay in a processor's cache


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
    text = _Text(blocks, tokens)
    with torch.inference_mode():
        loaders = [LayerLoader(tensors, dtype, torch.device(device)) for tensors in (dense, pruned)]
        streams = (_Stream(loader, batches) for loader, batches in zip(loaders, (text.parts, [text.whole]), strict=True))
        _Sweep(text, *streams, layers, pruned, plan, ridge, beta).run()


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


class _Text:
    """Calibration text of as many tokens, in evenly spaced blocks, at least one; and its parts."""

    def __init__(self, blocks: Dataset, tokens: int):
        seq = len(blocks[0]["input_ids"])
        count = min(len(blocks), max(1, tokens // seq))
        self.whole = blocks.select(torch.linspace(0, len(blocks) - 1, count).long().tolist()).with_format("torch")[:]
        rows = max(1, PART // seq)
        each = zip(*(self.whole[key].split(rows) for key in self.whole), strict=True)
        self.parts = [dict(zip(self.whole, tensors, strict=True)) for tensors in each]

    def split(self, states: Tensor) -> list[Tensor]:
        """Return the states of the tokens that count, `(tokens, size)` of every part."""
        flat = states.reshape(self.whole["input_ids"].numel(), -1).split([part["input_ids"].numel() for part in self.parts])
        return [tokens_of(states, part) for states, part in zip(flat, self.parts, strict=True)]


def tokens_of(states: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the states of the tokens of a batch that count, `(tokens, size)`."""
    states, mask = states.reshape(batch["input_ids"].numel(), -1), batch.get("attention_mask")
    return states if mask is None or mask.all() else states[mask.flatten().to(states.device) > 0]


class _Stream:
    """One of the two models, run layer by layer on all batches; between layers their states wait."""

    def __init__(self, loader: LayerLoader, batches: Sequence[Mapping[str, Tensor]]):
        self.loader, self.batches = loader, batches
        self._states: list[Tensor | None] = [None] * len(batches)  # before the next layer
        self._running = 0  # the batch that runs

    def model_of(self, layer: int) -> PreTrainedModel:
        """Return the model of one layer."""
        return self.loader.model_of(layer, self.loader.read(layer))

    def run(
        self, model: PreTrainedModel, after: Iterable[tuple[str, Observer]] = (), before: Iterable[tuple[str, Observer]] = ()
    ) -> None:
        """Run a model of one layer from the states before it to those behind it."""
        module = Architecture.of(model.config).taps("layers")[0][1]

        def leave(visit: Visit) -> None:
            self._states[self._running] = visit.states

        enter = [] if self._states[0] is None else [(module, lambda visit: self._states[self._running])]
        with probe(model, [*after, (module, leave)], [*enter, *before]):
            for place, batch in enumerate(self.batches):
                self._running = place
                run_batch(model, batch, self.loader.device)

    def tokens(self, states: Tensor) -> Tensor:
        """Return the states of the tokens that count of the batch that runs, `(tokens, size)`."""
        return tokens_of(states, self.batches[self._running])

    @property
    def waiting(self) -> list[Tensor]:
        """The states of the tokens that count, before the next layer, by batch."""
        return [tokens_of(states, batch) for states, batch in zip(self._states, self.batches, strict=True)]


@dataclass(frozen=True)
class _Sweep:
    """The pass over both models: the teacher reads the text in parts, the student at once, for it is changed on its way."""

    text: _Text
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
                before, behind = wanted[place.anchored[last]], self.teacher.waiting
                wanted[last] = [after[:, place.stream] - read for after, read in zip(behind, before, strict=True)]
            self._fit_layer(new, place, wanted)
            give_back_freed_memory()
        next(layers, None)

    def _run_teacher(self, layer: int, place: LayerProjections) -> dict[str, list[Tensor]]:
        """Run a layer of the teacher; return, by part, what of its projections' outputs and its norms' inputs stays."""
        wanted: dict[str, list[Tensor]] = defaultdict(list)

        def keep(visit: Visit) -> None:
            if visit.name in place.norms:
                states, rows = visit.input, place.stream
            else:
                states, rows = visit.states, place.rows[visit.name]
            kept = self.teacher.tokens(states)[:, rows]
            wanted[visit.name].append(kept.clone() if isinstance(rows, slice) else kept)  # classes add in place
            if visit.name in place.rows and visit.name not in place.order:
                place.order.append(visit.name)

        self.teacher.run(self.teacher.model_of(layer), [(name, keep) for name in (*place.rows, *place.norms)])
        return wanted

    def _fit_layer(self, new: int, place: LayerProjections, wanted: Mapping[str, Sequence[Tensor]]) -> None:
        """Run a layer of the student; fit each group of projections just before the first of them runs."""
        model = self.student.model_of(new)
        streams: dict[str, list[Tensor]] = {}

        def lacking(name: str, part: int, given: Tensor) -> Tensor:
            # by `forward`, which calls no hooks: this is one
            lacks = wanted[name][part] - submodule(model, name).forward(given)
            if norm := place.anchored.get(name):
                differs = wanted[norm][part] - streams[norm][part]
                lacks.add_(differs, alpha=self.beta / sum(other == norm for other in place.anchored.values()))
            return lacks.float()

        def fit(group: Sequence[str], visit: Visit) -> None:
            moment, crosses, count = 0.0, [0.0] * len(group), 0
            with products_for(visit.input.dtype):
                for part, given in enumerate(self.text.split(visit.input)):
                    inputs = given.float()
                    moment += inputs.T @ inputs
                    for number, name in enumerate(group):
                        crosses[number] += lacking(name, part, given).T @ inputs
                    count += len(given)
            if any(cross.any() for cross in crosses):
                change = change_of(moment / count, torch.cat(crosses) / count, self.ridge)
                for name, part in zip(group, change.split([len(cross) for cross in crosses]), strict=True):
                    self._change(model, new, place, name, part)

        def see(visit: Visit) -> None:
            streams[visit.name] = self.text.split(visit.input.clone())

        before = [(group[0], partial(fit, group)) for group in place.groups()]
        self.student.run(model, [(name, see) for name in place.norms], before)

    def _change(self, model: PreTrainedModel, new: int, place: LayerProjections, name: str, change: Tensor) -> None:
        """Add a change to a projection's weight, in the model at hand and in the student."""
        change = change if place.last[name] else change.T
        stored = self.tensors.architecture.weights[whole_name(name, new)].name
        before = self.tensors.read(stored)
        value = (before.to(change) + change).to(before.dtype)
        submodule(model, name).weight.copy_(value)
        self.tensors.write(stored, value)


@contextmanager
def products_for(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 products be made of rounded factors, where these were computed in bfloat16 anyhow; sums stay float32.

    Set by backend, which torch has from 2.9 on: the one setting for all cannot be read where somebody has set a backend's.
    """
    backends = {backend: value for backend, value in PRODUCTS.items() if hasattr(backend, "fp32_precision")}
    before = {backend: backend.fp32_precision for backend in backends}
    try:
        for backend, value in backends.items() if dtype == torch.bfloat16 else ():
            backend.fp32_precision = value
        yield
    finally:
        for backend, value in before.items():
            backend.fp32_precision = value
