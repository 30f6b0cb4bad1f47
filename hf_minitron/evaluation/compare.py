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

from hf_minitron.checkpoint import DTYPES, Checkpoint, best_device, best_dtype, load_model
from hf_minitron.data import text_hash
from hf_minitron.evaluation.report import Entry, Report, compare_models, load_samples, save_samples
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
from hf_minitron.families.family import family_of
from hf_minitron.model_files import is_hub_id, resolve, revision_of
from hf_minitron.modeling.configuration_pruned import PrunedConfig
from hf_minitron.vocabulary import check_ids, difference

CHECKPOINTS = "checkpoints"  # as a run's, which go when a stage is done


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
    metrics: Sequence[TextMetric] = TEXT_METRICS,
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
        metrics (`Sequence[TextMetric]`, *optional*): What is measured on the text, `TEXT_METRICS` and your own.

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
    folders = {name: resolve(source) for name, source in models.items()}
    for path in folders.values() if tensor_parallel else ():
        check_tensor_parallel(AutoConfig.from_pretrained(path), PartialState().num_processes)
    settings["dtype"] = str(best_dtype(best_device())).removeprefix("torch.")
    texts = _texts(folders, blocks, add_bos_token)
    text = _text_facts(blocks, next(iter(texts.values())))
    how = {**settings, **text, "tasks": list(tasks), "metrics": [m.name for m in metrics], "task_bos": add_bos_token}
    kept = _Kept(folder, {name: {**how, "path": str(source)} for name, source in models.items()})
    _measure(kept, folders, texts, chosen, metrics, batch_size, not tensor_parallel)
    return kept.report(text, settings, seed)


def _text_facts(blocks: Dataset, text: "_Text") -> dict[str, object]:
    """Return what identifies the held-out text, and its bytes in the teacher's tokens."""
    sizes = {"tokens": sum(map(len, blocks["input_ids"])), "blocks": len(blocks), "bytes": sum(text.num_bytes)}
    return {"sha256": text_hash(blocks), **sizes, "add_bos_token": "labels" in blocks.column_names}


class _Kept:
    """What is measured of every model, as a report of its own and its records; on disk, where there is a folder."""

    def __init__(self, folder: Path | None, settings: Mapping[str, dict]):
        self.folder, self.settings = folder, settings
        found = [{name: self._load(name) for name in settings} if folder and PartialState().is_main_process else {}]
        if PartialState().num_processes > 1:
            broadcast_object_list(found)  # every process gets what the first one reads
        self.measured = dict.fromkeys(settings) | found[0]

    def _load(self, name: str) -> tuple[Report, list[dict]] | None:
        """Return what an interrupted comparison has left of a model, measured in the same way."""
        path = self.folder / CHECKPOINTS / f"{name}.json"
        report = Report.load(path) if path.is_file() else None
        same = report is not None and report.settings == self.settings[name]
        return (report, load_samples(self._samples(name))) if same else None

    def add(self, name: str, facts: dict, entries: Sequence[Entry], records: list[dict]) -> None:
        """Keep a model's records, then its report: that is there only when all is."""
        report = Report({name: facts}, tuple(entries), settings=self.settings[name])
        self.measured[name] = report, records
        if self.folder is not None and PartialState().is_main_process:
            save_samples(records, self._samples(name))
            path = self.folder / CHECKPOINTS / f"{name}.json"
            path.parent.mkdir(exist_ok=True)
            report.save(path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)

    def report(self, text: Mapping, settings: Mapping, seed: int) -> Report:
        """Return what was measured of all models, compared."""
        reports = [report for report, _ in self.measured.values()]
        models = {name: facts for report in reports for name, facts in report.models.items()}
        entries = tuple(entry for report in reports for entry in report.entries)
        comparisons = compare_models(entries, {name: records for name, (_, records) in self.measured.items()}, seed)
        return Report(models, entries, comparisons, text=text, settings=settings)

    def _samples(self, name: str) -> Path:
        return self.folder / "samples" / f"{name}.parquet"


def _measure(
    kept: _Kept,
    folders: Mapping[str, Path],
    texts: Mapping[str, "_Text"],
    tasks: Tasks,
    metrics: Sequence[TextMetric],
    batch_size: int | str,
    split: bool,
) -> None:
    """Measure the models that are not kept."""
    teacher = None
    for number, (name, path) in enumerate(folders.items()):
        waiting = any(kept.measured[other] is None and not texts[other].other for other in list(folders)[1:])
        keep = number == 0 and waiting  # even where it was measured before: the others are compared with its states
        if kept.measured[name] is not None and not keep:
            continue
        model, text = open_model(path, not split), texts[name]
        records, reading = text.read(model, batch_size, teacher, keep, name, split, metrics)
        teacher = teacher or reading
        if kept.measured[name] is None:
            entries, more = text_entries(name, records, metrics, text.other), []
            if tasks.names:
                found, more = run_tasks(model, text.tokenizer, tasks, batch_size, split, name)
                entries += found
            facts = {"path": kept.settings[name]["path"]} | _facts(model, path)
            kept.add(name, facts | ({"tokenizer": "another"} if text.other else {}), entries, records + more)
        del model


def _texts(folders: Mapping[str, Path], blocks: Dataset, add_bos_token: bool | None) -> dict[str, "_Text"]:
    """Return the held-out text in every model's tokens."""
    tokenizers = {name: AutoTokenizer.from_pretrained(path) for name, path in folders.items()}
    sizes, teacher = {name: AutoConfig.from_pretrained(path).vocab_size for name, path in folders.items()}, next(iter(folders))
    return {
        name: _Text(blocks, tokenizer, tokenizers[teacher], min(sizes[name], sizes[teacher]), add_bos_token)
        for name, tokenizer in tokenizers.items()
    }


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
        self.tokenizer, self.other = tokenizer, bool(difference(tokenizer, teachers, vocab_size))
        if self.other:
            self.blocks, self.labels = in_tokens_of(tokenizer, blocks, teachers, add_bos_token)
        else:
            check_ids(blocks, vocab_size, tokenizer)
            self.blocks, self.labels = plain_blocks(blocks)
        self.num_bytes = text_bytes(self.blocks, tokenizer)

    def read(
        self,
        model: PreTrainedModel,
        batch_size: int | str,
        teacher: TeacherStates | None,
        keep: bool,
        name: str,
        split: bool,
        metrics: Sequence[TextMetric],
    ) -> tuple[list[dict], TeacherStates | None]:
        """Return records and, where it is to be kept, the model's reading of this process's share of the text."""
        shared = split and torch.distributed.is_available() and torch.distributed.is_initialized()
        rank, processes = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if shared else (0, 1)
        first, last = (len(self.blocks) * n // processes for n in (rank, rank + 1))
        blocks, labels, known = self.blocks[first:last], self.labels[first:last], None if self.other else teacher
        sums, reading = read_text(model, blocks, batch_size, known, keep, f"Text of {name}", labels=labels, metrics=metrics)
        rows = text_records(sums, labels, self.num_bytes[first:last], first, metrics)
        rows = gather_object(rows) if processes > 1 else rows
        rows.sort(key=lambda row: (row["metric"], row["doc"]))
        return rows, reading


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
    return family_of(config).shape_of(config).axes


def _facts(model: PreTrainedModel, folder: Path) -> dict:
    """Return what a model is: its commit on the Hub, and its sizes in memory and on disk."""
    specs, numbers, revision = Checkpoint(folder).specs.values(), Counter(), revision_of(folder)
    for spec in specs:
        if DTYPES[spec.dtype].is_floating_point:
            numbers[str(DTYPES[spec.dtype]).removeprefix("torch.")] += torch.Size(spec.shape).numel()
    return {
        **({"revision": revision} if revision else {}),
        "parameters": model.num_parameters(),
        "bytes": sum(spec.num_bytes for spec in specs),
        "dtype": ", ".join(dtype for dtype, _ in numbers.most_common()),
        "shape": shape_of(model.config),
    }
