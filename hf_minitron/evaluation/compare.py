"""Quality of several models on the same text and tasks, gathered in a `Report`.

It must not know how a model was made. One model is in memory at a time. Under `accelerate launch` the text and the tasks'
documents are split over the processes.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.checkpoint import Checkpoint, best_device, best_dtype, load_model
from hf_minitron.data import text_hash
from hf_minitron.evaluation.report import Report, compare_models, load_samples, save_samples
from hf_minitron.evaluation.tasks import Tasks, run_tasks
from hf_minitron.evaluation.text import (
    TeacherStates,
    in_tokens_of,
    plain_blocks,
    read_text,
    text_bytes,
    text_facts,
    text_records,
)
from hf_minitron.model_files import is_hub_id, resolve, revision_of
from hf_minitron.modeling.configuration_pruned import PrunedConfig
from hf_minitron.vocabulary import check_ids, difference


def compare(
    models: Mapping[str, str | Path],
    blocks: Dataset,
    tasks: Sequence[str] = (),
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int | str = 8,
    few_shot: int | None = None,
    chat_template: bool = False,
    tensor_parallel: bool = False,
    folder: Path | None = None,
    seed: int = 0,
    add_bos_token: bool | None = None,
) -> Report:
    """Measure models on held-out text and by lm-eval tasks, and compare them sample by sample.

    Args:
        models (`Mapping[str, str | Path]`): Name to folder or Hub id (`owner/name@revision` for a pin), teacher first.
        blocks (`Dataset`): Held-out text from `token_blocks`, in the teacher's tokens. A model with another tokenizer reads the
            same text in its own; it is compared per byte, and not with the teacher's distribution.
        tasks (`Sequence[str]`, *optional*): Names of lm-eval tasks, or paths of their YAML files.
        include_path (`str` or `Path`, *optional*): A folder with task files of your own.
        limit (`int`, *optional*): Documents per task; all when left out.
        batch_size (`int` or `str`, *optional*, defaults to 8): Sequences per forward pass; `"auto"` for what fits.
        few_shot (`int`, *optional*): Worked examples before each question; as each task says when left out.
        chat_template (`bool`, *optional*, defaults to `False`): Whether questions are wrapped in the chat template.
        tensor_parallel (`bool`, *optional*, defaults to `False`): Split every model over the processes, not the text.
        folder (`Path`, *optional*): Where the records of each model are kept, as `samples/<name>.parquet`. A model that an
            interrupted comparison with this folder has finished is not measured again.
        seed (`int`, *optional*, defaults to 0): Of the bootstrap.
        add_bos_token (`bool`, *optional*): Whether tasks, and the text of a model with another tokenizer, begin with its BOS
            token; as each tokenizer does by itself when left out. For the blocks it was decided by `token_blocks`.

    Returns:
        `Report`: Without speed; the same on every process.

    Example:

    ```python
    >>> report = compare({"teacher": "HuggingFaceTB/SmolLM2-135M-Instruct", "student": "out"}, blocks)  # tasks=["arc_easy"]
    >>> report.save("report.json")
    >>> sorted({comparison["metric"] for comparison in report.comparisons})
    ['bits_per_byte', 'perplexity']
    ```
    """
    settings = {"limit": limit, "few_shot": few_shot, "chat_template": chat_template}
    chosen = Tasks.find(tasks, include_path, **settings, add_bos_token=add_bos_token)
    folders = {name: resolve(source) for name, source in models.items()}
    if tensor_parallel:
        for path in folders.values():
            check_tensor_parallel(AutoConfig.from_pretrained(path), PartialState().num_processes)
    kept = _measure(folders, blocks, chosen, batch_size, not tensor_parallel, folder)
    results, records = ({name: part[i] for name, part in kept.items()} for i in (0, 1))
    for name, source in models.items():
        revision = revision_of(folders[name])
        results[name] = {"path": str(source), **({"revision": revision} if revision else {}), **results[name]}
    text = {"sha256": text_hash(blocks), "tokens": len(blocks) * len(blocks[0]["input_ids"]), "blocks": len(blocks)}
    text["bytes"] = results[next(iter(models))]["bits_per_byte"]["bytes"]
    text["add_bos_token"] = "labels" in blocks.column_names
    return Report(results, text, comparisons=compare_models(results, records, seed), settings=settings)


def _measure(
    folders: Mapping[str, Path], blocks: Dataset, tasks: Tasks, batch_size: int | str, split: bool, folder: Path | None
) -> dict[str, tuple[dict, list[dict]]]:
    """Return facts and records of every model, measuring those that are not kept in `folder`."""
    tokenizers = {name: AutoTokenizer.from_pretrained(path) for name, path in folders.items()}
    sizes, teachers = {name: AutoConfig.from_pretrained(path).vocab_size for name, path in folders.items()}, next(iter(folders))
    texts = {}
    for name, tokenizer in tokenizers.items():
        size = min(sizes[name], sizes[teachers])
        texts[name] = _Text(blocks, tokenizer, tokenizers[teachers], size, tasks.add_bos_token)
    kept, teacher = {name: _kept(folder, name) for name in folders}, None
    for number, (name, path) in enumerate(folders.items()):
        waiting = any(kept[other] is None and not texts[other].other for other in list(folders)[1:])
        keep = number == 0 and waiting  # even where it was measured before: the others are compared with its states
        if kept[name] is not None and not keep:
            continue
        model = open_model(path, not split)
        facts, rows, reading = texts[name].measure(model, batch_size, teacher, keep, name, split)
        teacher = teacher or reading
        if kept[name] is None:
            found, more = run_tasks(model, tokenizers[name], tasks, batch_size, split) if tasks.names else ({}, [])
            kept[name] = {**_facts(model, path), **facts, "tasks": found}, rows + more
            _keep(folder, name, *kept[name])
        del model
    return kept


class _Text:
    """The held-out text in one model's tokens."""

    def __init__(
        self,
        blocks: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        teachers: PreTrainedTokenizerBase,
        vocab_size: int,
        add_bos_token: bool | None,
    ):
        self.other = bool(difference(tokenizer, teachers, vocab_size))
        if self.other:
            self.blocks, self.labels = in_tokens_of(tokenizer, blocks, teachers, add_bos_token)
        else:
            check_ids(blocks, vocab_size, tokenizer)
            self.blocks, self.labels = plain_blocks(blocks)
        self.num_bytes = text_bytes(self.blocks, tokenizer)

    def measure(
        self, model: PreTrainedModel, batch_size: int | str, teacher: TeacherStates | None, keep: bool, name: str, split: bool
    ) -> tuple[dict, list[dict], TeacherStates | None]:
        """Return facts, records and, where it is to be kept, the model's reading of this process's share of the text."""
        shared = split and torch.distributed.is_available() and torch.distributed.is_initialized()
        rank, processes = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if shared else (0, 1)
        first, last = (len(self.blocks) * n // processes for n in (rank, rank + 1))
        blocks, labels, known = self.blocks[first:last], self.labels[first:last], None if self.other else teacher
        sums, reading = read_text(model, blocks, batch_size, known, keep, f"Text of {name}", labels=labels)
        rows = text_records(sums, labels, self.num_bytes[first:last], first)
        rows = gather_object(rows) if processes > 1 else rows
        rows.sort(key=lambda row: (row["metric"], row["doc"]))
        return text_facts(rows) | ({"tokenizer": "another"} if self.other else {}), rows, reading


def open_model(folder: Path, tensor_parallel: bool = False) -> PreTrainedModel:
    """Load a model for evaluation on this process's device, or its share of one that is split over all processes."""
    device = best_device()
    return load_model(folder, best_dtype(device), device, **({"tp_plan": "auto"} if tensor_parallel else {}))


def check_tensor_parallel(config: PreTrainedConfig, processes: int) -> None:
    """Refuse a model that cannot be split over the processes.

    Raises:
        ValueError: for a single process, a model type without a plan, or sizes that do not divide.
    """
    if processes < 2:
        raise ValueError("tensor_parallel: true splits models over processes, and there is one: start it with "
                         "accelerate launch (one process per GPU), or leave tensor_parallel out")  # fmt: skip
    if isinstance(config, PrunedConfig) or not getattr(config, "base_model_tp_plan", None):
        raise ValueError(f"tensor_parallel: Transformers has no tensor-parallel plan for model type {config.model_type!r}; "
                         "leave it out: every process then holds the model and reads a share of the text")  # fmt: skip
    for key in ("num_key_value_heads", "num_attention_heads", "intermediate_size"):
        size = getattr(config, key, None)
        if isinstance(size, int) and size % processes:
            raise ValueError(f"tensor_parallel: {key} {size} does not divide by the {processes} processes; "
                             "start as many as divide it, or leave tensor_parallel out")  # fmt: skip


def check_model(source: str | Path, block_size: int, chat_template: bool = False) -> PreTrainedConfig:
    """Refuse, without its weights, a model that cannot be evaluated; return its config.

    Raises:
        ValueError: when it is missing or damaged, has fewer positions than a block has
            tokens, or lacks a chat template that is asked for.
    """
    local = resolve(source, weights=False)
    if not is_hub_id(source):  # of the Hub there are small files only
        Checkpoint(local)
    config = AutoConfig.from_pretrained(local)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and block_size > positions:
        raise ValueError(f"block_size: {block_size} is more than the {positions} positions of {source}; set it to that or less")
    if chat_template and not AutoTokenizer.from_pretrained(local).chat_template:
        raise ValueError(f"chat_template: the tokenizer of {source} has none; leave chat_template out, or save one with it")
    return config


def shape_of(config: PreTrainedConfig) -> dict[str, int | list[int]]:
    """Return the size of every axis; of a nonuniform model, lists for what differs from layer to layer."""
    if isinstance(config, PrunedConfig):
        return {"layers": config.num_hidden_layers, "hidden": config.hidden_size, **config.layer_sizes}
    return Architecture.of(config).shape.axes


def _facts(model: PreTrainedModel, folder: Path) -> dict:
    size = sum(spec.num_bytes for spec in Checkpoint(folder).specs.values())
    return {"parameters": model.num_parameters(), "bytes": size, "shape": shape_of(model.config)}


def _kept(folder: Path | None, name: str) -> tuple[dict, list[dict]] | None:
    """Return what an interrupted comparison has left of a model; every process gets what the first one reads."""
    found, facts = [None], folder and folder / "checkpoints" / f"{name}.json"
    if facts and PartialState().is_main_process and facts.is_file():
        found = [(json.loads(facts.read_text(encoding="utf-8")), load_samples(folder / "samples" / f"{name}.parquet"))]
    return (broadcast_object_list(found) if PartialState().num_processes > 1 else found)[0]


def _keep(folder: Path | None, name: str, facts: dict, rows: Sequence[dict]) -> None:
    """Write a model's records, then its facts: the facts are there only when all is."""
    if folder is not None and PartialState().is_main_process:
        save_samples(rows, folder / "samples" / f"{name}.parquet")
        path = folder / "checkpoints" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".part").write_text(json.dumps(facts), encoding="utf-8")
        path.with_suffix(".part").replace(path)
