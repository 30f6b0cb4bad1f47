"""Hidden states of teacher and student: which are compared, how they are read, and the maps between different widths.

States are read after the pre-attention or pre-MLP norm, as in 2407.14679 (section 3).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from hf_minitron import axes
from hf_minitron.architecture.architecture import Architecture
from hf_minitron.distillation.batch import at_positions, attention_of, positions_of
from hf_minitron.distillation.losses.states import DISTANCES, relation_kl
from hf_minitron.plan import Plan
from hf_minitron.probe import outputs_of

# Hidden states, with the paper's symbol, and the two kinds of vectors of attention-relation distillation (L_att).
VECTORS = {"embedding": "L_emb", "block": "L_o", "mlp_input": "L_i"}
RELATIONS = {
    "query_query": ("query", "query"),
    "key_key": ("key", "key"),
    "value_value": ("value", "value"),
    "query_key": ("query", "key"),
}
STATE_LOSSES = (*VECTORS, *RELATIONS)
LAYER_RULES = ("last-2", "uniform", "plan")

# A module of the model, and for attention the pattern of what it gives and the part of it that is meant.
Place = tuple[str, axes.Dim | None, str]


class StateLosses(nn.Module):
    """The losses on states between one teacher and one student, with their projections.

    Where widths differ, a linear map lifts the student's states to the teacher's width, one for each kind of state, shared by
    all layers. It belongs to the trainer: trained by an optimizer of its own, in no student's folder.

    Args:
        student (`PreTrainedModel`): The student.
        teacher (`PreTrainedModel`): The teacher.
        names (`Sequence[str]`): Which of `STATE_LOSSES`.
        layers (`str` or `Mapping[int, int]`): `last-2`, `uniform`, `plan`, or the teacher's layers and the student's to each.
        kept_layers (`Sequence[int]`, *optional*): The teacher's layers that the student has kept, for `plan`.
        distance (`str`): One of `DISTANCES`, for vectors.
        chunk_size (`int`): Tokens whose relations exist at the same time.
        seed (`int`): Of the projections.

    Raises:
        ValueError: for a model whose states are not known, or layers that it does not have.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        names: Sequence[str],
        layers: str | Mapping[int, int] = "last-2",
        kept_layers: Sequence[int] | None = None,
        distance: str = "cosine",
        chunk_size: int = 256,
        seed: int = 0,
    ):
        super().__init__()
        self._distance, self._chunk_size = DISTANCES[distance], chunk_size
        self._sizes = [Architecture.of(model.config).shape.sizes for model in (student, teacher)]
        pairs = layer_pairs(layers, self._sizes[1]["layers"], self._sizes[0]["layers"], kept_layers)
        student_at, teacher_at = (_places(model.config, names) for model in (student, teacher))
        self.pairs = {
            name: [(student_at[name][s], teacher_at[name][t]) for t, s in (pairs if name != "embedding" else [(0, 0)])]
            for name in names
        }
        modules = [{name for pair in self.pairs.values() for both in pair for name, _, _ in both[side]} for side in (0, 1)]
        self._read = tuple(zip((student, teacher), modules, strict=True))  # a tuple: they are no modules of this one
        widths = [sizes["hidden"] for sizes in self._sizes]
        lifted = [name for name in names if name in VECTORS and widths[0] != widths[1]]
        with torch.random.fork_rng(devices=[]):  # the same on every process, and no draw that the data would miss
            torch.manual_seed(seed)
            self.projections = nn.ModuleDict({name: nn.Linear(*widths) for name in lifted}).to(
                student.device, torch.promote_types(student.dtype, torch.float32)
            )
        self._optimizer = torch.optim.AdamW(self.projections.parameters()) if lifted else None

    @contextmanager
    def tapped(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Keep the states of the forward passes until the context ends: yield the student's and the teacher's by module."""
        with outputs_of(*self._read[0]) as student, outputs_of(*self._read[1]) as teacher:
            yield student, teacher

    def forward(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Return every named loss of a batch: the sum over tokens, the mean over pairs of layers.

        Args:
            student (`Mapping[str, Tensor]`): What the student's taps have kept.
            teacher (`Mapping[str, Tensor]`): What the teacher's have.
            inputs (`Mapping[str, Tensor]`): The batch: which positions have targets, and which tokens each may attend to.
        """
        positions, attention = positions_of(inputs), attention_of(inputs)
        losses = {}
        for name, pairs in self.pairs.items():
            if name in VECTORS:
                sums = [self._vectors(name, student[s[0][0]], teacher[t[0][0]], positions) for s, t in pairs]
            else:
                sums = [self._relations(s, t, student, teacher, positions, attention) for s, t in pairs]
            losses[name] = sum(sums) / len(sums)
        return losses

    def _vectors(self, name: str, student: Tensor, teacher: Tensor, positions: Tensor) -> Tensor:
        student, teacher = at_positions(student, positions), at_positions(teacher, positions)
        if name in self.projections:
            student = self.projections[name](student.to(self.projections[name].weight.dtype))
        wide = torch.promote_types(student.dtype, torch.float32)
        return self._distance(student.to(wide), teacher.to(wide)).sum()

    def _relations(self, student_places, teacher_places, student, teacher, positions, attention) -> Tensor:
        pairs = []
        for places, seen, sizes in zip((student_places, teacher_places), (student, teacher), self._sizes, strict=True):
            parts = [_heads(seen[name], dim, part, sizes) for name, dim, part in places]
            most = max(part.shape[2] for part in parts)
            pairs.append(tuple(part.repeat_interleave(most // part.shape[2], 2) for part in parts))  # keys of a group
        return at_positions(relation_kl(*pairs, attention, self._chunk_size), positions).sum()

    def step(self, learning_rate: float, max_norm: float, processes: int, scale: float = 1.0) -> None:
        """Train the projections by the gradients of an accumulated batch, the same on every process.

        Args:
            learning_rate (`float`): Of this step.
            max_norm (`float`): What the gradients are clipped to; 0 for not at all.
            processes (`int`): How many take part.
            scale (`float`, *optional*, defaults to 1): What the loss was multiplied by (fp16). A step whose gradients it has
                made infinite is skipped, as the GradScaler skips the student's.
        """
        if self._optimizer is None:
            return
        parameters = [parameter for parameter in self.projections.parameters() if parameter.grad is not None]
        for parameter in parameters if processes > 1 else ():
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= processes
        if scale != 1:
            for parameter in parameters:
                parameter.grad /= scale
            if not all(parameter.grad.isfinite().all() for parameter in parameters):
                self._optimizer.zero_grad()
                return
        if max_norm > 0:
            clip_grad_norm_(parameters, max_norm)
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()

    def save(self, path: Path) -> None:
        """Write projections and their optimizer's state; nothing when there are none."""
        tensors = {}
        for name, parameter in self.projections.named_parameters():
            state = self._optimizer.state[parameter]
            tensors |= {name: parameter.detach()} | {f"{name}:{key}": value for key, value in state.items()}
        if tensors:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Read what `save` wrote."""
        if self._optimizer is None:
            return
        with safe_open(path, framework="pt") as file:
            for name, parameter in self.projections.named_parameters():
                parameter.copy_(file.get_tensor(name))
                keys = [key for key in file.keys() if key.startswith(f"{name}:")]
                device = {key: "cpu" if key.endswith(":step") else parameter.device for key in keys}
                self._optimizer.state[parameter] = {
                    key.rpartition(":")[2]: file.get_tensor(key).to(device[key]) for key in keys
                }


def state_losses_of(args: TrainingArguments, student: PreTrainedModel, teacher: object) -> StateLosses | None:
    """Return the losses on states that arguments name, between a student and a live teacher; `None` where they name none."""
    names = [name for name in args.losses if name in STATE_LOSSES]
    if not names:
        return None
    plan = Path(student.name_or_path) / "plan.json"
    kept = Plan.load(plan).kept_layers if args.layer_pairs == "plan" and plan.is_file() else None
    return StateLosses(student, teacher.model, names, args.layer_pairs, kept, args.state_distance, args.chunk_size, args.seed)


def check_states(
    teacher: PreTrainedConfig,
    student: PreTrainedConfig,
    student_layers: int,
    names: Sequence[str],
    layers: str | Mapping[int, int],
) -> None:
    """Refuse losses and layers that a teacher, or what is left of the model that becomes the student, does not have."""
    for config in (teacher, student):
        _places(config, names)
    before = Architecture.of(student).shape["layers"]
    kept = range(before - student_layers, before)  # plan's are known later; none is after these
    layer_pairs(layers, Architecture.of(teacher).shape["layers"], student_layers, kept)


def layer_pairs(
    rule: str | Mapping[int, int], teacher_layers: int, student_layers: int, kept: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """Return pairs of a teacher's and a student's layer whose states shall be alike.

    Args:
        rule (`str` or `Mapping`): `last-2`, the third from the end of both (2407.14679, table 17); `uniform`, every layer of
            the student with that at the same depth; `plan`, with the one it was; or pairs by the teacher's layer.
        teacher_layers (`int`): The teacher's number of layers.
        student_layers (`int`): The student's.
        kept (`Sequence[int]`, *optional*): The teacher's layers that the student has kept, for `plan`.

    Example:

    ```python
    >>> layer_pairs("uniform", 6, 3)
    [(1, 0), (3, 1), (5, 2)]
    ```
    """
    if rule == "last-2":
        pairs = [(teacher_layers - 3, student_layers - 3)]
    elif rule == "uniform":
        pairs = [(math.ceil((layer + 1) * teacher_layers / student_layers) - 1, layer) for layer in range(student_layers)]
    elif rule == "plan":
        if kept is None:
            raise ValueError("layer_pairs: plan needs the student's plan.json, which is not beside its weights; name the pairs")
        pairs = list(zip(kept, range(student_layers), strict=True))
    else:
        pairs = [(int(teacher), int(student)) for teacher, student in rule.items()]
    for teacher, student in pairs:
        if not (0 <= teacher < teacher_layers and 0 <= student < student_layers):
            raise ValueError(f"layer_pairs: the pair {teacher}, {student} is not in a teacher of {teacher_layers} layers and a "
                             f"student of {student_layers}; layers count from 0")  # fmt: skip
    return pairs


def _places(config, names: Sequence[str]) -> dict[str, list[list[Place]]]:
    """Return the modules whose outputs a loss compares, by its name and the layer; a relation has two."""
    architecture = Architecture.of(config)
    attention, mlp, last = architecture.norms
    layers = architecture.shape["layers"]
    parts = {part: architecture.attention(part) for part in ("query", "key", "value")}
    parts = {part: modules for part, modules in parts.items() if len(modules) == layers}
    found: dict[str, list[list[Place]]] = {
        "embedding": [[(norm, None, "")] for norm in attention[:1]],
        "block": [[(norm, None, "")] for norm in ([*attention[1:], last] if attention and last else [])],
        "mlp_input": [[(norm, None, "")] for norm in mlp],
    }
    for name, kinds in RELATIONS.items():
        if parts.keys() >= set(kinds):
            both = zip(*(parts[kind] for kind in kinds), strict=True)
            found[name] = [[(*place, kind) for place, kind in zip(two, kinds, strict=True)] for two in both]
    # a state that some layers of a hybrid lack has no number for every layer
    found = {name: places for name, places in found.items() if name == "embedding" or len(places) == layers}
    missing = [name for name in names if not found.get(name)]
    if missing:
        raise ValueError(f"losses: {missing[0]} is not for {config.model_type}, whose layers do not all give it; it has "
                         f"{', '.join(name for name in STATE_LOSSES if found.get(name)) or 'none of them'}")  # fmt: skip
    return found


def _heads(output: Tensor, dim: axes.Dim, part: str, sizes: Mapping[str, int]) -> Tensor:
    """Return the queries, keys or values in what a projection gives, shape `(batch, seq, heads, head_dim)`."""
    at, term = ("query", "key", "value").index(part), dim[0]
    if len(dim) > 1:  # one behind the other
        lengths = [axes.dim_size((other,), sizes) for other in dim]
        output, term = output.split(lengths, -1)[at], dim[at]
    output = output.unflatten(-1, [sizes[axis] for axis in term])
    return output.select(term.index("qkv") - len(term), at) if "qkv" in term else output
