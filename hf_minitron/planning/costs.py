"""What every stage of a recipe takes: memory of a GPU and of its host, disk, tokens, FLOPs and hours, from configs alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from packaging.version import Version

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.errors import RecipeError
from hf_minitron.importance.footprint import moment_bytes, scoring_bytes, sequential_bytes
from hf_minitron.planning.resources import FLOAT, Training, training_memory
from hf_minitron.pruning.reconstruction import SEQUENTIAL_PASSES
from hf_minitron.recipe_file import KEYS, arguments, listed
from hf_minitron.stages import target
from hf_minitron.stages.resuming import checkpoint_bytes

GB = 1e9
CONTEXT = 1_000_000_000  # CUDA's own, its libraries' and NCCL's
PEAK = 989e12  # dense bfloat16 FLOP/s of an H100 SXM
# Of that peak: what benchmarks/kd_step.py measured on an H100 for a teacher in the shape of Llama-3.2-1B.
UTILIZATION = 0.26
GPUS_PER_HOST = 8
CACHED = {"random": 0.7, "top_k": 3.5}  # bytes of each draw, or of each token kept; docs/distillation.md
BF16 = torch.bfloat16.itemsize
# Activation checkpointing: its name, and the one before transformers 5.23, which later ones call deprecated.
CHECKPOINTING_NAMES = ("activation_checkpointing", "gradient_checkpointing")
CHECKPOINTING = CHECKPOINTING_NAMES[Version(transformers.__version__) < Version("5.23")]
BASES = {"bfloat16": BF16, "nf4": 0.5}  # bytes of a frozen weight, where it is not in float32


@dataclass(frozen=True)
class Machine:
    """What a recipe shall run on.

    Args:
        gpus (`int`, *optional*, defaults to 1): How many.
        gpu_bytes (`float`, *optional*): Memory of each; nothing is judged when left out.
        peak (`float`, *optional*): FLOP/s of each, dense bfloat16; an H100's when left out.
        utilization (`float`, *optional*): The share of it that is reached.

    Raises:
        RecipeError: for a number that is none, by the command's option.
    """

    gpus: int = 1
    gpu_bytes: float | None = None
    peak: float = PEAK
    utilization: float = UTILIZATION

    def __post_init__(self):
        if self.gpus < 1:
            raise RecipeError(f"--gpus: {self.gpus} is not a whole number from 1 on")
        if not 0 < self.utilization <= 1:
            raise RecipeError(f"--utilization: {self.utilization:g} is not a share between 0 and 1")
        if not 0 < self.peak < math.inf:
            raise RecipeError(f"--gpu-tflops: {self.peak / 1e12:g} is not a number above zero")

    def hours(self, flops: float) -> float:
        """Return how long so many operations take on all GPUs."""
        return flops / (self.gpus * self.peak * self.utilization) / 3600


@dataclass(frozen=True)
class Cost:
    """What a stage takes.

    Args:
        stage (`str`): Its name.
        gpu (`Mapping[str, int]`): Bytes of one GPU at the peak, by what takes them.
        host (`int`): Bytes of one host's memory.
        disk (`int`): Bytes that it leaves, or needs to be resumed.
        tokens (`int`): That it reads.
        flops (`float`): Of all GPUs together.
        note (`str`): What else to say.
    """

    stage: str
    gpu: Mapping[str, int] = field(default_factory=dict)
    host: int = 0
    disk: int = 0
    tokens: int = 0
    flops: float = 0
    note: str = ""

    @property
    def gpu_bytes(self) -> int:
        """Bytes of one GPU at the peak."""
        return sum(self.gpu.values()) + CONTEXT if self.gpu else 0


@dataclass(frozen=True)
class Models:
    """The models of a recipe, read once.

    Args:
        teacher (`Architecture`): The one that is cut.
        student (`Architecture`): What is left of it.
        corrects (`bool`): Whether weights are corrected.
        fitted (`int`): Tokens that they are fitted on sequentially.
    """

    teacher: Architecture
    student: Architecture
    corrects: bool
    fitted: int

    @classmethod
    def of(cls, recipe: Mapping[str, Any]) -> "Models":
        """Read those of a recipe."""
        model, args = str(recipe["model"]), arguments(recipe.get("prune") or {}, "prune", target.Args)
        teacher, student = target.teacher(model, args.dequantize), target.student(args, model)
        fitted = args.fitted_tokens(value_of(recipe, "score", "tokens"))
        return cls(teacher, student, bool(args.corrections), fitted)


def costs(recipe: Mapping[str, Any], machine: Machine, models: Models | None = None) -> list[Cost]:
    """Return what each stage of a recipe takes, in their order; its models are read unless they are given."""
    models = models or Models.of(recipe)
    teacher, student = models.teacher, models.student
    found = [training_cost("correct", recipe, models, machine)] if "correct" in recipe else []
    found.append(_score(recipe, teacher, machine))
    found.append(_prune(recipe, models))
    if "cache" in recipe:
        found.append(_cache(recipe, teacher, machine))
    found += [training_cost("distill", recipe, models, machine), _evaluate(recipe, teacher, student, machine)]
    return [*found, Cost("publish", disk=BF16 * _parameters(student))]


def value_of(recipe: Mapping[str, Any], stage: str, key: str) -> Any:
    """Return a setting, or its default."""
    default = KEYS["stages"][stage]["keys"].get(key, {}).get("default")
    return listed(stage, key, (recipe.get(stage) or {}).get(key, default))


def _parameters(architecture: Architecture) -> int:
    return architecture.shape.num_parameters(architecture.rows)


def _flops(architecture: Architecture, context: int) -> int:
    """Return the operations of a token's forward pass in the middle of a packed sequence."""
    return architecture.shape.flops_per_token(architecture.rows, context // 2)


def _host(machine: Machine, num_bytes: int) -> int:
    return min(machine.gpus, GPUS_PER_HOST) * num_bytes


def _score(recipe: Mapping[str, Any], teacher: Architecture, machine: Machine) -> Cost:
    value = {key: value_of(recipe, "score", key) for key in ("tokens", "block_size", "batch_size", "moments", "sublayers")}
    batch = value["batch_size"] * value["block_size"]
    needed = scoring_bytes(teacher, torch.bfloat16, batch, value["moments"])
    note = ""
    if machine.gpu_bytes and needed > 0.8 * machine.gpu_bytes:  # as the stage decides
        needed, note = scoring_bytes(teacher, torch.bfloat16, batch, value["moments"], layer_by_layer=True), "layer by layer"
    moments = sum(size for sizes in moment_bytes(teacher).values() for size in sizes) if value["moments"] else 0
    passes = 1 + (teacher.shape["layers"] if value["sublayers"] else 0)
    flops = passes * value["tokens"] * _flops(teacher, value["block_size"])
    host = _host(machine, BF16 * _parameters(teacher) // (teacher.shape["layers"] if note else 1))
    return Cost("score", {"weights, moments, activations": needed}, host, moments, value["tokens"], flops, note)


def _prune(recipe: Mapping[str, Any], models: Models) -> Cost:
    teacher, block = models.teacher, value_of(recipe, "score", "block_size")
    largest = max((size for sizes in moment_bytes(teacher).values() for size in sizes), default=0) if models.corrects else 0
    layer = FLOAT * _parameters(teacher) // teacher.shape["layers"]
    gpu = {"moments": 3 * largest, "weights": layer, "states": sequential_bytes(teacher, torch.bfloat16, models.fitted)}
    flops = SEQUENTIAL_PASSES * models.fitted * _flops(teacher, block)
    return Cost("prune", gpu, 2 * layer + largest, BF16 * _parameters(models.student), models.fitted, flops)


def _cache(recipe: Mapping[str, Any], teacher: Architecture, machine: Machine) -> Cost:
    training, tokens = training_of(recipe, "distill", machine), tokens_of(recipe, "distill", machine)
    method = value_of(recipe, "cache", "method")
    kept = value_of(recipe, "cache", "draws" if method == "random" else "k") * CACHED.get(method, 0)
    tokens = value_of(recipe, "cache", "tokens") or tokens
    weights = BF16 * _parameters(teacher)
    states = value_of(recipe, "cache", "batch_size") * training.block_size * teacher.shape["hidden"] * 4 * BF16
    tables = training.chunk_size * teacher.shape["vocab"] * 3 * FLOAT
    flops = tokens * _flops(teacher, training.block_size)
    disk = int(tokens * kept)
    if value_of(recipe, "cache", "server"):
        return Cost("cache", disk=disk, tokens=tokens, note="a server reads the text")
    return Cost("cache", {"weights": weights, "states": states, "head": tables}, _host(machine, weights), disk, tokens, flops)


def _evaluate(recipe: Mapping[str, Any], teacher: Architecture, student: Architecture, machine: Machine) -> Cost:
    tokens, block, batch = (value_of(recipe, "evaluate", key) for key in ("tokens", "block_size", "batch_size"))
    batch = batch if isinstance(batch, int) else KEYS["stages"]["evaluate"]["keys"]["batch_size"]["default"]
    weights = BF16 * _parameters(teacher) // (machine.gpus if value_of(recipe, "evaluate", "tensor_parallel") else 1)
    states = batch * block * teacher.shape["hidden"] * 8 * BF16
    tables = 1024 * teacher.shape["vocab"] * 3 * FLOAT
    flops = tokens * (_flops(teacher, block) + 2 * _flops(student, block))
    note = "tasks are not counted" if value_of(recipe, "evaluate", "tasks") else ""
    gpu = {"weights": weights, "states": states, "head": tables}
    return Cost("evaluate", gpu, _host(machine, weights), 0, 3 * tokens, flops, note)


def training_of(recipe: Mapping[str, Any], stage: str, machine: Machine) -> Training:
    """Return what of a section's settings the memory of training depends on."""
    section = recipe.get(stage) or {}
    names = ("per_device_train_batch_size", "block_size", "gradient_accumulation_steps", "optim", "chunk_size")
    batch, block, accumulation, optimizer, chunk = (value_of(recipe, stage, name) for name in names)
    for name, number in zip(names[:3], (batch, block, accumulation), strict=True):
        if type(number) is not int or number < 1:
            raise RecipeError(f"{stage}.{name}: {number!r} is not a whole number from 1 on")
    checkpointing = any(section.get(name) for name in CHECKPOINTING_NAMES)
    mixed = section.get("bf16") is not False
    frozen = BASES.get(section.get("base_dtype"), FLOAT) if section.get("lora") is not None else FLOAT
    settings = (batch, block, accumulation, mixed, checkpointing, str(optimizer), chunk or 1024)
    return Training(*settings, devices=machine.gpus, frozen_item=frozen)


def tokens_of(recipe: Mapping[str, Any], stage: str, machine: Machine) -> int:
    """Count the tokens of `max_steps` on all GPUs; 0 where epochs are counted instead."""
    training = training_of(recipe, stage, machine)
    return max(int(value_of(recipe, stage, "max_steps")), 0) * training.tokens * training.accumulation * machine.gpus


def training_cost(stage: str, recipe: Mapping[str, Any], models: Models, machine: Machine) -> Cost:
    """Return what a stage that trains takes, sharded where several GPUs are there and whole models do not fit on each."""
    student, teacher = (models.student, models.teacher) if stage == "distill" else (models.teacher, None)
    training, trained = training_of(recipe, stage, machine), None
    if (recipe.get(stage) or {}).get("lora") is not None:
        trained = _parameters(student) // 100
    live = BF16 * _parameters(teacher) if teacher and "cache" not in recipe else 0
    gpu = training_memory(student, training, live, trained)
    if machine.gpus > 1 and sum(gpu.values()) + CONTEXT > (machine.gpu_bytes or 0):
        training = replace(training, sharded=True)
        gpu = training_memory(student, training, live, trained)
    tokens, parameters = tokens_of(recipe, stage, machine), _parameters(student)
    per_token = (4 if training.checkpointing else 3) * _flops(student, training.block_size)
    per_token += _flops(teacher, training.block_size) if live else 0
    sampled = float((recipe.get(stage) or {}).get("lmbda") or 0)  # of the steps; sampling reads prompt and completion once
    per_token += sampled * _flops(student, training.block_size)
    when = (value_of(recipe, stage, key) for key in ("save_strategy", "save_steps", "save_total_limit", "max_steps"))
    disk = checkpoint_bytes(parameters if trained is None else trained, *when)
    disk += tokens * (2 if student.shape["vocab"] <= 2**16 else 4)  # of the text, in numbers of two bytes or four
    notes = ["FSDP2" if training.sharded else "DDP"] if machine.gpus > 1 else []
    notes += ["sampling takes longer than its FLOPs say"] if sampled else []
    shards = machine.gpus if training.sharded and trained is None else 1  # a shard each
    loaded = (int(training.frozen_item * parameters) + live) // shards
    return Cost(stage, gpu, _host(machine, loaded), disk, tokens, int(tokens * per_token), ", ".join(notes))
