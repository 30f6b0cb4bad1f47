"""score: one forward pass over some text that says how much every layer, head and channel matters."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.config import dequantizing, text_config
from hf_minitron.checkpoint.checkpoint import best_device, best_dtype, load_model, resolve
from hf_minitron.checkpoint.model_files import revision_of
from hf_minitron.checkpoint.tensors import CheckpointTensors
from hf_minitron.data.mixture import check_sources, mixed_blocks, read_sources
from hf_minitron.data.packing import adds_bos_token, check_first_block
from hf_minitron.data.vocabulary import check_ids
from hf_minitron.evaluation.task_files import check_folder, task_files
from hf_minitron.evaluation.tasks import DOCUMENT_TOKENS, DOCUMENTS, Tasks, run_tasks, task_manager
from hf_minitron.importance.baselines import BASELINES
from hf_minitron.importance.calibrate import calibrate
from hf_minitron.importance.footprint import fits, scoring_bytes
from hf_minitron.importance.metrics import DEFAULT, metrics_of
from hf_minitron.importance.metrics import METRICS as INDEX_METRICS
from hf_minitron.importance.removal import (
    METRICS,
    check_removal,
    greedy_removal,
    layer_scores,
    removal_costs,
    removal_scores,
    sublayer_costs,
    task_costs,
)
from hf_minitron.importance.streamed import check_streamable
from hf_minitron.inputs import text_files
from hf_minitron.memory import free_memory
from hf_minitron.run import Run
from hf_minitron.stage import Stage
from hf_minitron.stages.training import check_positions

# The text that was read, for corrections that look at it again.
BLOCKS = "blocks.parquet"


@dataclass(frozen=True)
class Args:
    """The `score:` section."""

    text: str | dict = field(
        metadata={
            "help": "Calibration text: a file, a folder or pattern of files, or a dataset's Hub id; several by name: weight.",
            "reads": text_files,
        }
    )
    text_column: str = field(
        default="text", metadata={"help": "Column of the text, messages, completions beside their prompt, or tokens."}
    )
    split: str = field(default="train", metadata={"help": "Split of a folder or a Hub dataset."})
    tokens: int = field(
        default=524_288, metadata={"min": 1, "help": "Tokens to read; 1024 blocks as in 2407.14679, section 4."}
    )
    block_size: int = field(default=512, metadata={"min": 2, "help": "Tokens per block."})
    add_bos_token: bool | None = field(
        default=None, metadata={"help": "Begin documents and blocks with the BOS token; as the tokenizer does when left out."}
    )
    batch_size: int = field(default=4, metadata={"min": 1, "help": "Blocks per forward pass."})
    dtype: str = field(default="auto", metadata={"help": "Weights' dtype; auto: bf16 where the processor has it."})
    metric: str | dict = field(
        default=DEFAULT,
        metadata={"help": f"How indices are scored, for all widths or axis: name: {', '.join([*INDEX_METRICS, *BASELINES])}."},
    )
    layers: str = field(
        default="block_importance",
        metadata={
            "help": f"How layers are ranked: {', '.join(METRICS)}, or by an lm-eval task: winogrande, piqa:acc_norm.",
            "reads": lambda value, section: task_files([_task(value)[0]] if value and value not in METRICS else [], section),
        },
    )
    layers_block: int = field(default=1, metadata={"min": 1, "help": "Contiguous layers that go together."})
    layers_remove: int | None = field(
        default=None, metadata={"min": 1, "help": "Remove so many layers greedily, each time measuring without those before."}
    )
    layers_limit: int | None = field(
        default=None, metadata={"min": 1, "help": "Blocks of text, or a task's documents, that rank layers; all when left out."}
    )
    include_path: str | None = field(default=None, metadata={"help": "Folder with lm-eval task files of your own."})
    sublayers: bool = field(
        default=False, metadata={"help": "Measure what each layer's attention and MLP is worth, for prune.nonuniform."}
    )
    moments: bool = field(
        default=True, metadata={"help": "Measure what prune.corrections need as well; takes disk and some time."}
    )
    device_map: str | None = field(default=None, metadata={"help": "auto: spread a large model over all GPUs and the CPU."})
    layer_by_layer: bool | None = field(
        default=None, metadata={"help": "Read one layer at a time from disk; by itself when the model does not fit in memory."}
    )
    state_bytes: int = field(
        default=4_000_000_000,
        metadata={"min": 0, "bits": False, "help": "Memory for states between layers; what is beyond goes to disk."},
    )


def check(args: Args, run: Run) -> None:
    """Refuse what can be refused before any weight is read."""
    if args.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype: {args.dtype!r} is none of auto, float32, bfloat16, float16")
    metrics_of(args.metric)
    if args.device_map not in (None, "auto"):
        raise ValueError(f"device_map: {args.device_map!r} is neither auto nor left out")
    if args.device_map and PartialState().num_processes > 1:
        raise ValueError("device_map spreads one model over all devices; several processes hold one model each: unset it")
    if args.device_map and args.layer_by_layer:
        raise ValueError("device_map spreads a whole model, layer_by_layer holds one layer: set one of them")
    sources = read_sources(args.text, args.split, args.text_column)
    check_sources(sources, args.block_size, args.tokens)
    folder = resolve(run.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    if args.layer_by_layer:
        check_streamable(Architecture.of(config))
    check_positions(config, args.block_size)
    adds_bos_token(tokenizer, args.add_bos_token)
    for source in sources:
        check_first_block(source.name, tokenizer, args.block_size, args.tokens, source.split, source.column)
    check_layers(args, config)
    target = run.section("prune").get("target")
    if isinstance(target, dict) and "layers" in target:
        check_layers_target(run.section("score"), Architecture.of(config).shape["layers"], target["layers"])
    CheckpointTensors(folder, dequantize=bool(run.section("prune").get("dequantize", False)))


def check_layers(args: Args, config: PreTrainedConfig) -> None:
    """Refuse a way of ranking layers that is unknown or that this model or these settings do not allow."""
    if args.sublayers and args.layer_by_layer:
        raise ValueError("sublayers: true runs the whole model, layer_by_layer holds one layer: set one of them")
    if not _needs_extra_pass(args):
        return
    task, metric = _task(args.layers)
    if args.layers_block > 1 and args.layers_remove:
        raise ValueError("layers_block removes contiguous layers, layers_remove greedily: set one of them")
    check_removal(Architecture.of(config).shape["layers"], size=args.layers_block, count=args.layers_remove or 1)
    if args.layer_by_layer:
        raise ValueError(f"layers: {args.layers} runs the model without some layers, layer_by_layer holds one: set one of them")
    if args.layers in METRICS:
        return
    check_folder(args.include_path)
    if args.include_path and not Path(args.include_path).expanduser().is_dir():
        raise ValueError(f"include_path: no folder at {args.include_path}")
    if task not in task_manager(args.include_path, [task]).all_tasks:
        raise ValueError(f"layers: {task!r} is none of {', '.join(METRICS)}, and lm-eval knows no such task; see `lm-eval ls "
                         "tasks`, or set include_path")  # fmt: skip
    Tasks.find([task], args.include_path).check("layers")
    if args.layers_remove:
        raise ValueError(f"layers_remove takes one of {', '.join(METRICS)}; a task ranks single layers or a layers_block")
    from lm_eval.api.registry import is_higher_better  # seconds to import

    if is_higher_better(metric) is False:
        raise ValueError(f"layers: {args.layers} is better when it is lower; name a metric that is better when it is higher")


def check_layers_target(score: Mapping, layers: int, target: object) -> None:
    """Refuse a number of layers that the scores of a `score:` section do not rank."""
    size, count = score.get("layers_block", 1), score.get("layers_remove") or 0
    if isinstance(target, Mapping) and (size != 1 or count):
        raise ValueError(f"prune.target.layers {dict(target)} takes the best layers of each kind, which score.layers_block and "
                         "layers_remove do not rank: leave both out, or give the number of all layers")  # fmt: skip
    if not all(isinstance(number, int) for number in (size, count, target)):
        return  # refused where it is read
    if size > 1 and target not in (layers, layers - size):
        raise ValueError(f"prune.target.layers is {target}, but score.layers_block ranks blocks of {size} of {layers} layers: "
                         f"set the target to {layers - size}, or the block to the number of layers to drop")  # fmt: skip
    if count and target < layers - count:
        raise ValueError(f"prune.target.layers is {target} of {layers}, but score.layers_remove ranks {count} layers to drop: "
                         f"set it to {layers - target}")  # fmt: skip


def work(args: Args, run: Run) -> dict[str, float]:
    """Return the units of work, see `hf_minitron.planning.estimate`: the pass that scores, and those without some layers.

    A pass without a layer begins at that layer, so it counts as half of one.
    """
    config = AutoConfig.from_pretrained(resolve(run.model))
    layers = Architecture.of(config).shape["layers"]
    limited = args.tokens if args.layers_limit is None else min(args.tokens, args.layers_limit * args.block_size)
    read = limited * layers if args.sublayers else 0
    if _needs_extra_pass(args) and args.layers in METRICS:
        read += limited * layers / 2 * (args.layers_remove or 1)
    elif _needs_extra_pass(args):
        read += (args.layers_limit or DOCUMENTS) * DOCUMENT_TOKENS * layers / args.layers_block
    return {"score": args.tokens, "read": read}


def run(args: Args, run: Run, out: Path) -> None:
    """Write statistics and the text. Under `accelerate launch` every process reads its share of it."""
    folder, device = resolve(run.model), best_device()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sources = read_sources(args.text, args.split, args.text_column)
    blocks = mixed_blocks(sources, tokenizer, args.block_size, args.tokens, run.seed, add_bos_token=args.add_bos_token)
    check_ids(blocks, text_config(AutoConfig.from_pretrained(folder)).vocab_size, tokenizer)
    set_seed(run.seed)  # metric: random
    dtype = best_dtype(device) if args.dtype == "auto" else getattr(torch, args.dtype)
    streamed = _is_streamed(args, folder, dtype, device)
    how = dequantizing(AutoConfig.from_pretrained(folder))
    model = folder if streamed else load_model(folder, dtype, args.device_map or device, **how)
    statistics = calibrate(
        model, blocks, args.batch_size, dtype, device, args.state_bytes, args.moments, args.metric, save_to=out
    )
    if streamed and (_needs_extra_pass(args) or args.sublayers):
        model = load_model(folder, dtype, device, **how)
    scores, costs, provenance = dict(statistics.scores), {}, statistics.provenance | {"model": run.model}
    if revision := revision_of(folder):
        provenance["revision"] = revision
    if _needs_extra_pass(args):
        scores["layers"], how = score_layers(args, model, blocks, tokenizer)
        provenance |= how | {"metrics": {**provenance["metrics"], "layers": args.layers}}
    if args.sublayers:
        costs = sublayer_costs(model, _limited(args, blocks), batch_size=args.batch_size)
    if PartialState().is_main_process:
        blocks.to_parquet(out / BLOCKS)
        text = {"source": args.text, **statistics.text}
        replace(statistics, scores=scores, sublayer_costs=costs, text=text, provenance=provenance).save(out)


def _is_streamed(args: Args, folder: Path, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether to read layer by layer, the same on all processes; say what it needs where the recipe does not tell."""
    if args.layer_by_layer is not None or args.device_map is not None:
        return bool(args.layer_by_layer)
    architecture, tokens = Architecture.of(AutoConfig.from_pretrained(folder)), args.batch_size * args.block_size
    whole = fits(folder, dtype, device, tokens, args.moments)
    weights_fit = whole or fits(folder, dtype, device, tokens)
    whole, weights_fit = broadcast_object_list([whole, weights_fit])
    if not weights_fit and (_needs_extra_pass(args) or args.sublayers):
        what = f"layers: {args.layers}" if _needs_extra_pass(args) else "sublayers: true"
        raise ValueError(f"{what} needs the whole model, which does not fit in memory. Set device_map: auto, or "
                         "rank layers by block_importance, one at a time")  # fmt: skip
    if not whole:
        needed, layer = (scoring_bytes(architecture, dtype, tokens, args.moments, way) / 1e9 for way in (False, True))
        PartialState().print(f"The model{' and its moments' if args.moments else ''} need {needed:,.1f} GB, and "
                             f"{free_memory(device) / 1e9:,.1f} are free on {device}: it is read layer by layer, which needs "
                             f"{layer:,.1f} GB")  # fmt: skip
    return not whole


def score_layers(
    args: Args, model: PreTrainedModel, blocks: Dataset, tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, dict[str, Any]]:
    """Score layers by what the model loses without them; return the scores and, for their provenance, how they were made."""
    how = {"layers_block": args.layers_block}
    if args.layers not in METRICS:
        task, metric = _task(args.layers)

        def measure(model: PreTrainedModel) -> float:
            chosen = Tasks.find([task], args.include_path, limit=args.layers_limit, add_bos_token=args.add_bos_token)
            entries, _ = run_tasks(model, tokenizer, chosen, args.batch_size)
            values = {entry.metric: entry.value for entry in entries if entry.task == task}
            if metric not in values:
                raise ValueError(f"layers: {task} has no {metric!r}; it has {', '.join(values)}")
            return values[metric]

        return layer_scores(task_costs(model, args.layers_block, measure), args.layers_block), how
    blocks = _limited(args, blocks)
    if args.layers_remove:
        removed, costs = greedy_removal(model, blocks, args.layers, args.layers_remove, args.batch_size)
        return removal_scores(removed, costs), how | {"layers_removed": removed}
    costs = removal_costs(model, blocks, args.layers, args.layers_block, args.batch_size)
    return layer_scores(costs, args.layers_block), how


def _limited(args: Args, blocks: Dataset) -> Dataset:
    return blocks.select(range(min(args.layers_limit or len(blocks), len(blocks))))


def _needs_extra_pass(args: Args) -> bool:
    """Return whether ranking layers takes more than the one pass that scores every axis."""
    return args.layers != "block_importance" or args.layers_block > 1 or args.layers_remove is not None


def _task(layers: str) -> tuple[str, str]:
    """Split the name of a task and its metric."""
    task, _, metric = layers.partition(":")
    return task, metric or "acc"


STAGE = Stage("score", __doc__, Args, check, run, work, scales=("tokens",), distributed=True)
