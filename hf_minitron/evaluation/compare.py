"""Quality of several models on the same text, tasks and prompts, gathered in a `Report`.

One model is in memory at a time, and opened once. Under `accelerate launch` text and the tasks' documents are split over the
processes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_minitron.architecture.config import text_config
from hf_minitron.checkpoint.checkpoint import Checkpoint, best_device, best_dtype, load_model
from hf_minitron.checkpoint.model_files import is_hub_id, resolve
from hf_minitron.data.packing import text_hash
from hf_minitron.evaluation.answers import Prompts, answers
from hf_minitron.evaluation.report import Report, compare_models
from hf_minitron.evaluation.scored import num_scored, of_answers
from hf_minitron.evaluation.subject import Subject
from hf_minitron.evaluation.tasks import Tasks, run_tasks
from hf_minitron.evaluation.text import text_entries
from hf_minitron.evaluation.text_metrics import TEXT_METRICS, TextMetric, check_metrics, dropped_mass
from hf_minitron.head import check_head
from hf_minitron.modeling.configuration_pruned import PrunedConfig


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
    prompts: Prompts | None = None,
) -> Report:
    """Measure models on held-out text and by lm-eval tasks, compare them sample by sample, and let them answer prompts.

    Args:
        models (`Mapping[str, str | Path | PreTrainedModel]`): Name to folder, Hub id (`owner/name@revision` for a pin) or a
            model in memory, teacher first.
        blocks (`Dataset`): Held-out text from `token_blocks`, in the teacher's tokens. A model with another tokenizer reads the
            same text in its own; it is compared per byte, and with the teacher where its vocabulary was cut out of its.
        tasks (`Sequence[str]`, *optional*): Names of lm-eval tasks, or paths of their YAML files.
        include_path (`str` or `Path`), limit (`int`), few_shot (`int`), chat_template (`bool`): All optional, see `Tasks`.
        batch_size (`int` or `str`, *optional*, defaults to 8): Sequences per forward pass; `"auto"` for what fits.
        tensor_parallel (`bool`, *optional*, defaults to `False`): Split every model over the processes, not the text.
        folder (`Path`, *optional*): Where the records of each model are kept, as `samples/<name>.parquet`. A model that an
            interrupted comparison with this folder has finished is not measured again.
        seed (`int`, *optional*, defaults to 0): Of the bootstrap.
        add_bos_token (`bool`, *optional*): Whether tasks, and the text in another tokenizer's tokens, begin with BOS; as each
            tokenizer does by itself when left out. For the blocks it was decided by `token_blocks`.
        metrics (`Sequence[TextMetric]`, *optional*): What is measured on the text, `TEXT_METRICS` and your own.
        processing_class (`PreTrainedTokenizerBase`, *optional*): The tokenizer of models in memory.
        prompts (`Prompts`, *optional*): What every model answers, and how.

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
    subjects = [Subject(name, source, processing_class) for name, source in models.items()]
    for subject in subjects:
        subject.take_text(blocks, subjects[0], add_bos_token)
    settings["dtype"] = ", ".join(dict.fromkeys(subject.dtype for subject in subjects))
    text = _text_facts(blocks, subjects[0])
    how = {**settings, **text, "metrics": [m.name for m in metrics], "asked": repr((chosen, prompts))}
    _measure(subjects, chosen, metrics, prompts, batch_size, not tensor_parallel, folder, how)
    return _report(subjects, text, settings, seed)


def _report(subjects: Sequence[Subject], text: Mapping, settings: Mapping, seed: int) -> Report:
    entries = tuple(entry for subject in subjects for entry in subject.report.entries)
    comparisons = compare_models(entries, {subject.name: subject.records for subject in subjects}, seed)
    facts = {subject.name: subject.report.models[subject.name] for subject in subjects}
    rows = zip(*(subject.report.answers for subject in subjects), strict=True)  # of each prompt, by every model
    answered = [dict(item for row in of_models for item in row.items()) for of_models in rows]
    return Report(facts, entries, comparisons, text=text, settings=settings, answers=answered)


def _text_facts(blocks: Dataset, teacher: Subject) -> dict[str, object]:
    """Return what identifies the held-out text, and its size."""
    return {
        "sha256": text_hash(blocks),
        "tokens": sum(map(len, teacher.blocks)),
        "scored": num_scored(teacher.labels),
        "answers": of_answers(teacher.blocks, teacher.labels, teacher.tokenizer),
        "blocks": len(blocks),
        "bytes": sum(teacher.num_bytes),
        "add_bos_token": _opens(blocks, teacher.tokenizer),
    }


def _opens(blocks: Dataset, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether blocks begin with a BOS token that is not predicted."""
    first = blocks.with_format(None)[0]
    return "labels" in first and (first["input_ids"][0], first["labels"][0]) == (tokenizer.bos_token_id, -100)


def _measure(
    subjects: Sequence[Subject],
    tasks: Tasks,
    metrics: Sequence[TextMetric],
    prompts: Prompts | None,
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
    firsts = {subject.vocabulary: subject.name for subject in reversed(subjects)}
    waiting = [s for s in subjects[1:] if not s.report and s.vocabulary != s.name and any(m.teacher for m in metrics)]
    students, readings = {s.vocabulary: s for s in waiting}, {}
    for subject in subjects:
        reads = subject is subjects[0] and students  # even where it is measured: the others are compared with its states
        if subject.report and not reads:
            continue
        model = subject.model or open_model(subject.folder, not split)
        training = model.training
        model.eval()
        known, masses = readings.get(subject.vocabulary, (None, []))
        for vocabulary, student in students.items() if reads else ():
            if vocabulary is not None:
                readings[vocabulary] = student.read_by_teacher(model, batch_size, split)
        keep = bool(reads) and None in students
        if subject.report is None or keep:
            records, states = subject.read(model, metrics, batch_size, known, keep, split)
            readings.setdefault(None, (states, []))
        if subject.report is None:
            records += masses
            tokens_of = subject.vocabulary and firsts[subject.vocabulary]
            entries, more = text_entries(subject.name, records, [*metrics, dropped_mass(())], tokens_of), []
            written = answers(model, subject.tokenizer, prompts) if prompts else ()  # first: lm-eval changes tokenizers
            answered = [{"prompt": prompt, subject.name: text} for prompt, text in written]
            if tasks.names:
                task_entries, more = run_tasks(model, subject.tokenizer, tasks, batch_size, split, subject.name)
                entries += task_entries
            settings = {**how, "path": subject.path}
            subject.report = Report({subject.name: subject.facts(model)}, tuple(entries), settings=settings, answers=answered)
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
        raise ValueError(f"chat_template: the tokenizer of {source} has none; set it to false, or save one with it")
    return config
