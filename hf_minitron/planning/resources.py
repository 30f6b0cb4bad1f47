"""How much memory training takes, from a config alone.

What autograd keeps for the backward pass is counted by running one layer, and two, on fake tensors, which have no data; where a
model's code looks at values, as Mamba's loop does, it is counted from the rows. What an allocator wastes, and the
CUDA context (about 0.5 GB), come on top.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_minitron import axes
from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.config import model_of
from hf_minitron.architecture.roles import ATTENTION
from hf_minitron.evaluation.speed import random_model
from hf_minitron.probe import base_model
from hf_minitron.shape import Shape

logger = logging.getLogger(__name__)

FLOAT = 4
# Bytes of optimizer states for a trained parameter, by a part of the optimizer's name; the first that fits counts. Adam keeps
# two numbers, 8-bit ones a byte each; Lion and SGD with momentum one.
OPTIMIZERS = {"4bit": 1, "8bit": 2, "adafactor": 0, "adalomo": 0, "lomo": 0, "lion": 4, "sgd": 4, "rmsprop": 4, "adagrad": 4,
              "adam": 8}  # fmt: skip
# Of every entry of a chunk of logits, beside the student's: two tables of log-probabilities and three of a loss, in float32.
CHUNK_TABLES = 5
PREFETCHED = 2  # layers that FSDP2 holds unsharded at the same time
# SDPA without a mask, as on tensors with data: of fake ones Transformers cannot see that a causal mask says nothing more.
CAUSAL = "hf_minitron_causal_sdpa"


@dataclass(frozen=True)
class Training:
    """What of a section's settings the memory of training depends on.

    Args:
        batch_size (`int`): Packed sequences of a micro-batch on one device.
        block_size (`int`): Tokens of each.
        accumulation (`int`): Micro-batches of an optimizer step.
        mixed (`bool`): Whether bfloat16 is computed with, by autocast, and weights are float32.
        checkpointing (`bool`): Whether a layer's activations are made again in the backward pass.
        optimizer (`str`): Its name, as for `TrainingArguments`.
        chunk_size (`int`): Tokens whose logits exist at the same time.
        devices (`int`): How many share the batch.
        sharded (`bool`): Whether they share weights, gradients and optimizer states too (FSDP2, ZeRO-3).
        frozen_item (`float`): Bytes of a weight that is not trained, where adapters are.
    """

    batch_size: int
    block_size: int
    accumulation: int = 1
    mixed: bool = True
    checkpointing: bool = False
    optimizer: str = "adamw_torch"
    chunk_size: int = 1024
    devices: int = 1
    sharded: bool = False
    frozen_item: float = FLOAT

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one device."""
        return self.batch_size * self.block_size

    @property
    def item(self) -> int:
        """Bytes of a number that matrices are multiplied in."""
        return 2 if self.mixed else FLOAT


def optimizer_bytes(name: str) -> int:
    """Return the bytes of an optimizer's states for a parameter."""
    return next((size for part, size in OPTIMIZERS.items() if part in name), OPTIMIZERS["adam"])


def training_memory(
    architecture: Architecture, training: Training, teacher: int = 0, trained: int | None = None
) -> dict[str, int]:
    """Return the peak bytes of one device in training, by what takes them.

    Args:
        architecture (`Architecture`): Of the model that is trained.
        training (`Training`): How it is trained.
        teacher (`int`, *optional*, defaults to 0): Bytes of a live teacher's weights.
        trained (`int`, *optional*): Parameters that are trained; all when left out.

    Example:

    ```python
    >>> architecture = Architecture.of(teacher.config)
    >>> parts = training_memory(architecture, Training(4, 512, checkpointing=True))
    >>> parts["weights"] == 4 * architecture.shape.num_parameters(architecture.rows)
    True
    ```
    """
    shape, rows = architecture.shape, architecture.rows
    parameters, share = shape.num_parameters(rows), training.devices if training.sharded else 1
    trained = parameters if trained is None else trained
    outside = sum(_numbers(pattern, shape) for row, pattern in rows.items() if not _layered(row))
    layer = (parameters - outside) // shape["layers"]
    parts = {
        "weights": int(FLOAT * trained + training.frozen_item * (parameters - trained)) // share,
        "teacher": teacher // share,
        "optimizer": optimizer_bytes(training.optimizer) * trained // share,
        # without accumulation they are made while activations go
        "gradients": FLOAT * trained // share if training.accumulation > 1 or training.sharded else 0,
    }
    if training.devices > 1 and not training.sharded:
        parts["DDP's buckets"] = FLOAT * trained
    if training.sharded:  # layers in turn, and what stands outside of them all the time, of the teacher too
        parts["unsharded"] = training.item * (PREFETCHED * layer + outside * (2 if teacher else 1)) + FLOAT * layer
    elif training.mixed:  # of what is in float32
        copied = parameters - shape.num_parameters(_grouped(rows)) if training.frozen_item == FLOAT else trained
        parts["16-bit copies"] = training.item * copied
    every, one = activation_bytes(architecture, training.batch_size, training.block_size, training.mixed)
    if training.checkpointing:
        every = training.tokens * FLOAT * shape["hidden"] * shape["layers"] + one
    parts["activations"] = every
    parts["head"] = _head_bytes(shape, training, bool(teacher))
    late = FLOAT * trained - sum(parts[name] for name in ("activations", "head"))
    if not parts["gradients"]:
        parts["gradients"] = max(late, 0)
    return {name: size for name, size in parts.items() if size}


def activation_bytes(architecture: Architecture, batch_size: int, block_size: int, mixed: bool) -> tuple[int, int]:
    """Return the bytes that autograd keeps of a micro-batch in all layers and around them, and in one of them."""
    layers = architecture.shape["layers"]
    if not architecture.shape.states:  # whose loops go token by token
        try:
            first, two = (batch_size * _sequence_bytes(architecture, n, block_size, mixed) for n in (1, min(2, layers)))
            return first + (layers - 1) * (two - first), two - first if layers > 1 else first
        except Exception as error:  # models raise their own kinds
            logger.info("activations are counted from the rows: %s", error)
    size = batch_size * block_size * saved_bytes(architecture, mixed)
    return size, size // layers


@lru_cache(maxsize=64)
def _sequence_bytes(architecture: Architecture, layers: int, block_size: int, mixed: bool) -> int:
    """Return the bytes that autograd keeps of one packed sequence in a model of some layers: what a second one adds.

    16-bit copies of weights, which are kept once, drop out.
    """
    with torch.device("meta"):
        config = random_model(architecture.config, torch.float32, layers, vocab=None).config
    one, two = (_run_fake(config, torch.Size((count, block_size)), mixed) for count in (1, 2))
    return two - one


def _run_fake(config: PreTrainedConfig, shape: torch.Size, mixed: bool) -> int:
    """Run a model on fake tensors; return the bytes that autograd keeps, but for weights."""
    kept: dict[int, torch.Tensor] = {}
    with FakeTensorMode(), torch.device("cpu"):
        model = model_of(config, dtype=torch.float32).train()
        if model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(CAUSAL)
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage()._cdata not in weights:
                kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=mixed),
            _PlainProducts(),
        ):
            base_model(model)(input_ids=torch.zeros(shape, dtype=torch.long), use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class _PlainProducts(TorchFunctionMode):
    """Computes grouped products of routed experts as plain ones of their sizes: fake tensors have bfloat16 ones only."""

    def __torch_function__(self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None) -> object:
        """Call a function of torch, or a plain product in place of a grouped one, which autocast leaves alone."""
        if getattr(func, "__name__", "").endswith("grouped_mm"):
            tokens, weight = args[:2]
            with torch.autocast("cpu", enabled=False):
                return tokens @ weight[0]
        return func(*args, **(kwargs or {}))


def saved_bytes(architecture: Architecture, mixed: bool) -> int:
    """Return the bytes that autograd keeps of a token in all layers, and the last norm, as the rows tell.

    Every matrix keeps what it reads, in 16 bits a copy of its own where autocast makes one; attention its queries, keys, values
    and output; an MLP the inputs and the output of its product; a norm what it reads and what it has normalised, in float32.
    """
    shape, rows = architecture.shape, architecture.rows
    item, hidden, family = 2 if mixed else FLOAT, shape["hidden"], architecture.family
    gated = any(family.role(row) in ("gate", "gate_up") for row in rows)
    total = 0
    for row, pattern in rows.items():
        if row.endswith("bias") or not _layered(row) and row.removesuffix(".weight") not in family.norms:
            continue
        dims = [axes.dim_size(dim, shape.sizes) for dim in axes.parse(pattern)]
        names = [axes.dim_names(dim) for dim in axes.parse(pattern)]
        copies, role = _tokens_seen(row, names, shape), family.role(row)
        matrix = dims[1:] if names and names[0] == {"experts"} else dims
        if role == "norm":
            kept = 2 * FLOAT * hidden + (0 if mixed else FLOAT * hidden)
        elif len(matrix) != 2 or {"hidden"} not in names:
            kept = 0
        else:
            width = math.prod(matrix) // hidden
            if role == "down":
                kept = item * width * (2 if gated else 1)
            elif role == "output":
                kept = item * width
            else:  # reads hidden channels
                kept = item * width + (item * hidden if mixed else 0)
            if matrix is not dims:  # an expert's tokens are gathered, and added up again
                kept += item * hidden
        total += copies * kept
    heads = shape.sizes.get("heads", 0) if any(family.role(row) in ATTENTION for row in rows) else 0
    return int(total + FLOAT * heads * shape["layers"])


def _tokens_seen(row: str, names: list[set[str]], shape: Shape) -> float:
    """Return how many tensors of a row a token meets; of experts, those that it is sent to."""
    copies = shape.met(row)
    if names and names[0] == {"experts"}:
        return copies * shape["experts_per_token"]
    return copies * shape["experts_per_token"] / shape["experts"] if "experts" in axes.placeholders(row) else copies


def _head_bytes(shape: Shape, training: Training, live: bool) -> int:
    """Return the bytes of the chunked loss: last hidden states, the head's gradient, and the tables of one chunk."""
    hidden, vocab, item = shape["hidden"], shape["vocab"], training.item
    states = training.tokens * hidden * (3 * FLOAT + (item if training.mixed else 0) + (2 * item if live else 0))
    gradient = vocab * hidden * (FLOAT + item)
    return states + gradient + min(training.chunk_size, training.tokens) * vocab * (item + CHUNK_TABLES * FLOAT)


def _grouped(rows: Mapping[str, str]) -> dict[str, str]:
    """Return the rows of routed experts that are one tensor, whose grouped products autocast leaves in float32."""
    return {row: p for row, p in rows.items() if p.startswith("experts ") and len(axes.parse(p)) == 3}


def _layered(row: str) -> bool:
    return any(axis == "layers" or axis.endswith("_layers") for axis in axes.placeholders(row))


def _numbers(pattern: str, shape: Shape) -> int:
    return math.prod(axes.tensor_shape(pattern, shape.sizes))


def _causal_sdpa(module: torch.nn.Module, query, key, value, attention_mask: None, **kwargs):
    return sdpa_attention_forward(module, query, key, value, None, **kwargs)


AttentionInterface.register(CAUSAL, _causal_sdpa)
AttentionMaskInterface.register(CAUSAL, lambda *args, **kwargs: None)
