"""Quality of several models on the same text and tasks, gathered in a `Report`.

One model is in memory at a time. Under `accelerate launch` the text and the tasks' documents are split over the processes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.config import text_config
from hf_minitron.checkpoint.checkpoint import DTYPES, Checkpoint, best_device, best_dtype, load_model
from hf_minitron.checkpoint.model_files import is_hub_id, resolve, revision_of
from hf_minitron.data.packing import text_hash
from hf_minitron.data.vocabulary import check_ids, difference
from hf_minitron.evaluation.report import Report, compare_models, load_samples, save_samples
from hf_minitron.evaluation.tasks import Tasks, run_tasks
from hf_minitron.evaluation.text import (
    TeacherStates,
    in_tokens_of,
    plain_blocks,
    read_text,
    text_bytes,
    text_entries,
    text_records,
)
from hf_minitron.evaluation.text_metrics import TEXT_METRICS, TextMetric, check_metrics
from hf_minitron.head import check_head
from hf_minitron.modeling.configuration_pruned import PrunedConfig

CHECKPOINTS = "checkpoints"  # as a run's, which go when a stage is done


def compare(
    models: Mapping[str, str | Path | PreTrainedModel],
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
    metrics: Sequence[TextMetric] = TEXT_METRICS,
    processing_class: PreTrainedTokenizerBase | None = None,
) -> Report:
    """Measure models on held-out text and by lm-eval tasks, and compare them sample by sample.

    Args:
        models (`Mapping[str, str | Path | PreTrainedModel]`): Name to folder, Hub id (`owner/name@revision` for a pin) or a
            model in memory, teacher first.
        blocks (`Dataset`): Held-out text from `token_blocks`, in the teacher's tokens. A model with another tokenizer reads the
            same text in its own; it is compared per byte, and not with the teacher's distribution.
        tasks (`Sequence[str]`, *optional*): Names of lm-eval tasks, or paths of their YAML files.
        include_path (`str` or `Path`, *optional*): A folder with task files of your own.
        limit (`int`, *optional*): Documents per task; all when left out.
        batch_size (`int` or `str`, *optional*, defaults to 8): Sequences per forward pass; `"auto"` for what fits.
        few_shot (`int`, *optional*), chat_template (`bool`, *optional*): How questions are asked, see `Tasks`.
        tensor_parallel (`bool`, *optional*, defaults to `False`): Split every model over the processes, not the text.
        folder (`Path`, *optional*): Where the records of each model are kept, as `samples/<name>.parquet`. A model that an
            interrupted comparison with this folder has finished is not measured again.
        seed (`int`, *optional*, defaults to 0): Of the bootstrap.
        add_bos_token (`bool`, *optional*): Whether tasks, and the text in another tokenizer's tokens, begin with BOS; as each
            tokenizer does by itself when left out. For the blocks it was decided by `token_blocks`.
        metrics (`Sequence[TextMetric]`, *optional*): What is measured on the text, `TEXT_METRICS` and your own.
        processing_class (`PreTrainedTokenizerBase`, *optional*): The tokenizer of models in memory.

    Returns:
        `Report`: Without speed; the same on every process.

    Example:

    ```python
    >>> report = compare({"teacher": "HuggingFaceTB/SmolLM2-135M-Instruct", "student": "out"}, blocks)  # tasks=["arc_easy"]
    >>> report.save("report.json")
    >>> report.value("student", "perplexity") > 1
    True
    ```
    """
    settings = {"limit": limit, "few_shot": few_shot, "chat_template": chat_template}
    chosen = Tasks.find(tasks, include_path, **settings, add_bos_token=add_bos_token)
    check_metrics(metrics)
    subjects = [_Subject(name, source, processing_class) for name, source in models.items()]
    for subject in subjects:
        subject.take_text(blocks, subjects[0], add_bos_token)
    settings["dtype"] = ", ".join(dict.fromkeys(subject.dtype for subject in subjects))
    text = _text_facts(blocks, subjects[0])
    how = {**settings, **text, "tasks": list(tasks), "metrics": [m.name for m in metrics], "task_bos": add_bos_token}
    _measure(subjects, chosen, metrics, batch_size, not tensor_parallel, folder, how)
    return _report(subjects, text, settings, seed)


def _report(subjects: Sequence["_Subject"], text: Mapping, settings: Mapping, seed: int) -> Report:
    entries = tuple(entry for subject in subjects for entry in subject.report.entries)
    comparisons = compare_models(entries, {subject.name: subject.records for subject in subjects}, seed)
    facts = {subject.name: subject.report.models[subject.name] for subject in subjects}
    return Report(facts, entries, comparisons, text=text, settings=settings)


def _text_facts(blocks: Dataset, teacher: "_Subject") -> dict[str, object]:
    """Return what identifies the held-out text, and its size."""
    sizes = {"tokens": sum(map(len, blocks["input_ids"])), "blocks": len(blocks), "bytes": sum(teacher.num_bytes)}
    return {"sha256": text_hash(blocks), **sizes, "add_bos_token": _opens(blocks, teacher.tokenizer)}


def _opens(blocks: Dataset, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether blocks begin with a BOS token that is not predicted."""
    first = blocks.with_format(None)[0]
    return "labels" in first and (first["input_ids"][0], first["labels"][0]) == (tokenizer.bos_token_id, -100)


class _Subject:
    """A model that is measured, in memory or opened when its turn comes, with the text in its tokens and what was found."""

    def __init__(self, name: str, source: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None):
        self.name, self.report, self.records = name, None, []
        if isinstance(source, PreTrainedModel):
            if tokenizer is None:
                raise ValueError(f"processing_class: {name} is a model in memory, so give its tokenizer")
            self.folder, self.model, self.config, self.tokenizer = None, source, source.config, tokenizer
            self.path, dtype = source.name_or_path or "in memory", source.dtype
        else:
            self.folder, self.model, self.path, dtype = resolve(source), None, str(source), best_dtype(best_device())
            self.config, self.tokenizer = (kind.from_pretrained(self.folder) for kind in (AutoConfig, AutoTokenizer))
        self.dtype = str(dtype).removeprefix("torch.")

    def take_text(self, blocks: Dataset, teacher: "_Subject", add_bos_token: bool | None) -> None:
        """Read the held-out text in this model's tokens."""
        size = min(text_config(config).vocab_size for config in (self.config, teacher.config))
        self.other = bool(difference(self.tokenizer, teacher.tokenizer, size))
        if self.other:
            self.blocks, self.labels = in_tokens_of(self.tokenizer, blocks, teacher.tokenizer, add_bos_token)
        else:
            check_ids(blocks, size, self.tokenizer)
            self.blocks, self.labels = plain_blocks(blocks)
        self.num_bytes = text_bytes(self.blocks, self.tokenizer, self.labels)

    def read(
        self,
        model: PreTrainedModel,
        metrics: Sequence[TextMetric],
        batch_size: int | str,
        teacher: TeacherStates | None,
        keep: bool,
        split: bool,
    ) -> tuple[list[dict], TeacherStates | None]:
        """Return records and, where it is to be kept, the model's reading of this process's share of the text."""
        state = PartialState()
        rank, processes = (state.process_index, state.num_processes) if split else (0, 1)
        first, last = (len(self.blocks) * n // processes for n in (rank, rank + 1))
        blocks, labels, known = self.blocks[first:last], self.labels[first:last], None if self.other else teacher
        name = f"Text of {self.name}"
        sums, reading = read_text(model, blocks, batch_size, known, keep, name, labels=labels, metrics=metrics)
        rows = text_records(sums, labels, self.num_bytes[first:last], first, metrics)
        rows = gather_object(rows) if processes > 1 else rows
        rows.sort(key=lambda row: (row["metric"], row["doc"]))
        return rows, reading

    def facts(self, model: PreTrainedModel) -> dict:
        """Return what the model is: where it came from, and its sizes in memory and on disk."""
        if self.folder is None:
            stored = [(tensor.dtype, tensor.numel(), tensor.nbytes) for tensor in model.parameters()]
        else:
            specs = Checkpoint(self.folder).specs.values()
            stored = [(DTYPES[spec.dtype], torch.Size(spec.shape).numel(), spec.num_bytes) for spec in specs]
        numbers, revision = Counter(), self.folder and revision_of(self.folder)
        for dtype, count, _ in stored:
            numbers[str(dtype).removeprefix("torch.")] += count * dtype.is_floating_point
        return {
            "path": self.path,
            **({"revision": revision} if revision else {}),
            "parameters": model.num_parameters(),
            "bytes": sum(size for _, _, size in stored),
            "dtype": ", ".join(dtype for dtype, count in numbers.most_common() if count),
            "shape": shape_of(model.config),
            **({"tokenizer": "another"} if self.other else {}),
        }

    def load(self, folder: Path | None, how: Mapping) -> None:
        """Take what an interrupted comparison has left of a folder's model, measured in the same way, on every process."""
        saved = [(None, [])]
        path = folder and folder / CHECKPOINTS / f"{self.name}.json"
        if PartialState().is_main_process and path and self.folder and path.is_file():
            report = Report.load(path)
            if report.settings == {**how, "path": self.path}:
                saved = [(report, load_samples(folder / "samples" / f"{self.name}.parquet"))]
        self.report, self.records = (broadcast_object_list(saved) if PartialState().num_processes > 1 else saved)[0]

    def save(self, folder: Path | None) -> None:
        """Write the records, then the report: that is there only when all is."""
        if folder is not None and PartialState().is_main_process:
            save_samples(self.records, folder / "samples" / f"{self.name}.parquet")
            path = folder / CHECKPOINTS / f"{self.name}.json"
            path.parent.mkdir(exist_ok=True)
            self.report.save(path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)


def _measure(
    subjects: Sequence[_Subject],
    tasks: Tasks,
    metrics: Sequence[TextMetric],
    batch_size: int | str,
    split: bool,
    folder: Path | None,
    how: Mapping,
) -> None:
    """Measure one model after the other, but for those that an interrupted comparison has measured."""
    for subject in subjects:
        if not split:
            check_tensor_parallel(subject.config, PartialState().num_processes)
        subject.load(folder, how)
    waiting, reading = any(not subject.report and not subject.other for subject in subjects[1:]), None
    for subject in subjects:
        keep = subject is subjects[0] and waiting  # even where it is measured: the others are compared with its states
        if subject.report and not keep:
            continue
        model = subject.model or open_model(subject.folder, not split)
        training = model.training
        model.eval()
        records, states = subject.read(model, metrics, batch_size, reading, keep, split)
        reading = reading or states
        if subject.report is None:
            entries, more = text_entries(subject.name, records, metrics, subject.other), []
            if tasks.names:
                task_entries, more = run_tasks(model, subject.tokenizer, tasks, batch_size, split, subject.name)
                entries += task_entries
            settings = {**how, "path": subject.path}
            subject.report = Report({subject.name: subject.facts(model)}, tuple(entries), settings=settings)
            subject.records = records + more
            subject.save(folder)
        model.train(training)
        del model


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
        raise ValueError("tensor_parallel splits models over processes, and there is one: start it with "
                         "accelerate launch (one process per GPU), or leave tensor_parallel out")  # fmt: skip
    if isinstance(config, PrunedConfig) or config.is_heterogeneous or not getattr(config, "base_model_tp_plan", None):
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
    check_head(config)
    positions = getattr(text_config(config), "max_position_embeddings", None)
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
