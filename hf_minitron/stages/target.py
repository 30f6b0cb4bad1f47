"""The `prune:` section, and the sizes that it asks for: from `config.json` alone, which `hf-minitron plan` looks at."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.student import axes_by_layer, check_target, student_config, text_alone
from hf_minitron.checkpoint.model_files import resolve
from hf_minitron.checkpoint.tensors import config_of
from hf_minitron.plan import stand_in
from hf_minitron.pruning.compensate import CORRECTIONS, DEFAULT_CORRECTIONS
from hf_minitron.pruning.reconstruction import TOKENS
from hf_minitron.pruning.rotate import untied
from hf_minitron.shape import Shape
from hf_minitron.sizes import CUTTABLE, QUANTIZED, SIZES_OF, not_quantized

UNITS = (256, 128, 64, 32, 8)  # of channels
EXPERTS = (8, 4, 2)  # of experts, which are spread over GPUs
MULTIPLE_OF = {"hidden": 8, "ffn": 8, "dense_ffn": 8, "shared_ffn": 8}


@dataclass(frozen=True)
class Args:
    """The `prune:` section."""

    target: dict = field(
        metadata={
            "help": f"New sizes, or shares such as 50%, of any of: {', '.join(CUTTABLE)}; or a share of all parameters. "
            "The verb search finds sizes for a budget."
        }
    )
    nonuniform: float | None = field(
        default=None,
        metadata={
            "help": "Share of the layers' parameters that stays, each layer's heads and ffn as they matter; target: {} then."
        },
    )
    nonuniform_axes: list | None = field(
        default=None,
        metadata={
            "help": "What nonuniform chooses by layer, of heads (with their KV heads) and ffn; [ffn] keeps attention as it is "
            "in all layers, as vLLM needs it. All that the model's class holds when left out."
        },
    )
    multiple_of: dict = field(
        default_factory=lambda: dict(MULTIPLE_OF),
        metadata={"help": "Divisors of new sizes; GPUs like multiples of 8 at least, 64 for tensor parallel."},
    )
    corrections: list = field(
        default_factory=lambda: list(DEFAULT_CORRECTIONS),
        metadata={
            "help": f"How kept weights are corrected for dropped ones, any of {', '.join(CORRECTIONS)}; [] for plain slicing."
        },
    )
    sequential: bool = field(
        default=False,
        metadata={
            "help": "Fit projections again, layer by layer, on what the pruned layers before give; reads score's text again."
        },
    )
    sequential_tokens: int | None = field(
        default=None,
        metadata={"min": 1, "help": f"Tokens of score's text that sequential reads, evenly spread; {TOKENS:,} when left out."},
    )
    text_only: bool = field(
        default=False,
        metadata={"help": "Whether the student of a vision-language model is its text model alone, a causal language model."},
    )
    dequantize: bool = field(
        default=False, metadata={"help": "Whether a model that is stored in fp8 or mxfp4 is dequantized on the way."}
    )
    max_shard_bytes: int = field(default=5_000_000_000, metadata={"min": 1, "help": "Size limit of one weights file."})

    def fitted_tokens(self, scored: int) -> int:
        """Return the tokens that a sequential fit reads, of as many as are scored; none without one."""
        return min(self.sequential_tokens or TOKENS, scored) if self.sequential else 0


def shapes(args: Args, model: str) -> tuple[Shape, Shape, dict[str, str]]:
    """Return the shapes before and after and the rows of the model, from `config.json` alone; refuse an illegal target."""
    architecture = teacher(model, args.dequantize)
    before = architecture.shape
    after = before.cut_to(args.target, args.multiple_of)
    check_target(architecture, after)
    if args.text_only:
        text_alone(architecture)
    return before, after, architecture.rows


def teacher(model: str, dequantize: bool = False) -> Architecture:
    """Return the architecture of a run's model, from its small files alone; refuse a quantized one."""
    return Architecture.of(config_of(resolve(model, weights=False), dequantize))


def uncut(args: Args, model: str) -> Architecture:
    """Return the architecture that is cut: the model's, with a head of its own when its stream is rotated."""
    architecture = teacher(model, args.dequantize)
    return untied(architecture) if uses_rotation(args) else architecture


def student_rows(args: Args, model: str) -> dict[str, str]:
    """Return the rows of the student: the model's, and a head of its own when its stream is rotated."""
    student = uncut(args, model)
    return {row: p for row, p in student.rows.items() if not args.text_only or row not in student.family.outside}


def student(args: Args, model: str) -> Architecture:
    """Return the architecture of the student: of a nonuniform one, whose sizes scoring chooses, the teacher's.

    Raises:
        ShapeError: for a target that no class holds.
    """
    before, after, _ = shapes(args, model)
    config = student_config(uncut(args, model), stand_in(before, after))
    return Architecture.of(text_alone(Architecture.of(config))[0] if args.text_only else config)


def suited(shape: Shape) -> dict[str, int]:
    """Return the divisors of sizes that are chosen for a model: what suits GPUs, and quantized formats where it is large."""
    return {axis: max(least, coarse(shape[axis])) for axis, least in MULTIPLE_OF.items() if axis in shape.axes}


def coarse(size: int, units: Sequence[int] = UNITS) -> int:
    """Return what a new size shall be a multiple of: the largest unit that divides the old one, and that 16 times over."""
    return next((unit for unit in units if size % unit == 0 and size >= 16 * unit), 1)


def unquantizable(before: Shape, after: Shape) -> dict[str, str]:
    """Return the axes whose new size quantized formats do not take while they took the old one, with what to do."""
    found = {}
    for axis in [axis for axis in MULTIPLE_OF if axis in before.axes]:
        unit = next((unit for unit in QUANTIZED if before[axis] % unit == 0 and after[axis] % unit), None)
        if unit:
            found[axis] = not_quantized(after[axis], unit, before[axis])
    return found


def uses_rotation(args: Args) -> bool:
    """Return whether the student's stream is rotated."""
    return "rotation" in args.corrections and "hidden" in args.target


def differing(args: Args, model: str) -> list[str]:
    """Return the axes whose sizes `nonuniform` chooses by layer; none of a uniform cut.

    Raises:
        ValueError: for a choice that the student's class does not leave.
    """
    if args.nonuniform is None:
        return []
    try:
        chosen = axes_by_layer(teacher(model, args.dequantize), args.nonuniform_axes)
    except ValueError as error:
        raise ValueError(f"nonuniform_axes: {error}") from error
    return [axis for sublayer in chosen for axis in SIZES_OF[sublayer]]


def inexact(args: Args, model: str, before: Shape, after: Shape) -> dict[str, str]:
    """Return the axes of a cut that changes more than masking would, with the reason."""
    cut = {axis for axis in before.axes if before[axis] != after[axis]} | set(differing(args, model))
    return {axis: reason for axis, reason in teacher(model, args.dequantize).inexact.items() if axis in cut}
