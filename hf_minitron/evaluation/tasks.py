"""lm-eval's tasks on a model in memory, with a record of every sample.

Under `accelerate launch` the documents are split over the processes.
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_minitron.architecture.config import text_config
from hf_minitron.data.packing import adds_bos_token
from hf_minitron.evaluation.report import Entry
from hf_minitron.evaluation.task_data import check_data
from hf_minitron.evaluation.task_results import records_of, task_entries

logger = logging.getLogger(__name__)

# A task's documents, and the tokens of one with its answers, where nobody has looked: for estimates of time.
DOCUMENTS, DOCUMENT_TOKENS = 1000, 128


@dataclass(frozen=True)
class Tasks:
    """Which lm-eval tasks to run, and how.

    Args:
        names (`Sequence[str]`): Tasks known to lm-eval or in `include_paths`.
        include_paths (`Sequence[str]`, *optional*): Folders with task files.
        limit (`int`, *optional*): Documents per task; all when left out.
        few_shot (`int`, *optional*): Worked examples before each question; as each task says when left out.
        chat_template (`bool`, *optional*, defaults to `False`): Whether to wrap questions in the tokenizer's chat template.
        add_bos_token (`bool`, *optional*): Whether questions begin with the BOS token; as the tokenizer does when left out.
    """

    names: Sequence[str] = ()
    include_paths: Sequence[str] = ()
    limit: int | None = None
    few_shot: int | None = None
    chat_template: bool = False
    add_bos_token: bool | None = None

    @classmethod
    def find(cls, tasks: Sequence[str], include_path: str | Path | None = None, **settings) -> "Tasks":
        """Look tasks up: names known to lm-eval or in `include_path`, or paths of YAML files.

        Raises:
            ValueError: for a missing folder or file, a file that names no task, or a name that lm-eval does not know.
        """
        folders, names = [], []
        if include_path is not None:
            folders.append(Path(include_path).expanduser())
            if not folders[0].is_dir():
                raise ValueError(f"include_path: no folder at {include_path}")
        for task in tasks:
            if not isinstance(task, str):
                raise ValueError(f"tasks: {task!r} is not a name or a path")
            path = Path(task).expanduser()
            if path.suffix in (".yaml", ".yml"):
                names.append(_name_in(path))
                folders.append(path.parent)
            else:
                names.append(task)
        found = cls(tuple(names), tuple(dict.fromkeys(str(folder.resolve()) for folder in folders)), **settings)
        known = set(task_manager(found.include_paths, names).all_tasks) if names else set()
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"tasks: lm-eval knows no {unknown[0]!r}; see `lm-eval ls tasks`, or set include_path")
        return found

    def check(self, key: str = "tasks") -> None:
        """Refuse tasks that cannot be run or whose data cannot be had, and settings that have no effect on them.

        Args:
            key (`str`, *optional*, defaults to `"tasks"`): What errors call them.

        Raises:
            ValueError: naming the task or the setting.
        """
        given = {"limit": self.limit, "few_shot": self.few_shot, "chat_template": self.chat_template or None}
        idle = [f"{name}: {value}" for name, value in given.items() if value is not None and not self.names]
        if idle:
            raise ValueError(f"{idle[0]} is of tasks, and there are none: name some in tasks, or leave it out")
        for task in self.names:
            for content in leaves(task, self.include_paths):
                name = content.get("task") or task
                if content.get("unsafe_code"):
                    raise ValueError(f"{key}: {name} runs code that the model writes (unsafe_code), which is not done here: "
                                     "leave it out")  # fmt: skip
                if self.few_shot and content.get("num_fewshot") == 0:
                    raise ValueError(f"few_shot: {self.few_shot}, but the task {name} fixes its worked examples at 0: "
                                     "leave one of them out")  # fmt: skip
            check_data(task, lambda task=task: task_manager(self.include_paths, [task]).load([task])["tasks"], key)

    def check_positions(self, model: str, longest: int | None) -> None:
        """Refuse tasks whose answers are longer than a model's positions, which lm-eval would find out after all other stages.

        Args:
            model (`str`): What errors call the model.
            longest (`int`, *optional*): Its positions; any number when left out.

        Raises:
            ValueError: naming the task and both numbers.
        """
        for task in self.names:
            for content in leaves(task, self.include_paths):
                tokens = (content.get("generation_kwargs") or {}).get("max_gen_toks") or 0
                if longest is not None and tokens >= longest:
                    raise ValueError(f"tasks: {content.get('task') or task} lets models write {tokens} tokens, and {model} has "
                                     f"{longest} positions: leave it out")  # fmt: skip


def entries_of(task: str, folders: Sequence[str | Path]) -> Iterator[Any]:
    """Yield the entry of lm-eval's index of a task, or of a group or a tag and all that it stands for."""
    index, waiting, seen = task_manager(folders, [task]).task_index, [task], set()
    while waiting:
        entry = index.get(waiting.pop())
        if entry is not None and entry.name not in seen:
            seen.add(entry.name)
            waiting += [child for child in children_of(entry) if isinstance(child, str)]
            yield entry


def leaves(task: str, folders: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """Yield what lm-eval reads of a task, or of every task of a group or a tag: its YAML file with those that it includes."""
    for entry in entries_of(task, folders):
        children = children_of(entry)
        yield from (child for child in children if isinstance(child, Mapping))
        if not children:
            yield entry.cfg or {}


def children_of(entry) -> list[str | Mapping]:
    """Return the tasks that an entry of lm-eval's index stands for, a group's or a tag's; none of a task."""
    listed = (entry.cfg or {}).get("task") if entry.yaml_path else sorted(entry.tags)
    names = []
    for child in listed if isinstance(listed, list) else ():
        names += [child, child.get("task") or child.get("group")] if isinstance(child, Mapping) else [child]
    return names


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    batch_size: int | str = 8,
    split: bool = True,
    name: str = "model",
) -> tuple[list[Entry], list[dict]]:
    """Run lm-eval on a model in memory.

    Args:
        model (`PreTrainedModel`): A causal language model, the same on every process.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        tasks (`Tasks`): What to run.
        batch_size (`int` or `str`, *optional*, defaults to 8): Sequences per forward pass; `"auto"` for what fits.
        split (`bool`, *optional*, defaults to `True`): Whether processes share the documents; else each runs all of them, as
            tensor parallelism needs.
        name (`str`, *optional*, defaults to `"model"`): What the entries call the model.

    Returns:
        `tuple[list[Entry], list[dict]]`: An entry of every metric of every task and group, and the records of the samples (see
        `save_samples`). The same on every process.
    """
    from lm_eval import simple_evaluate  # seconds to import; only evaluation needs it
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of a model in memory, which is what we want
    if batch_size == "auto" and model.device.type == "cpu":
        batch_size = 8  # lm-eval would try 64 sequences: a CPU gains nothing and does not refuse them
    tokenizer = _with_bos(tokenizer) if tasks.add_bos_token else tokenizer
    longest = getattr(text_config(model.config), "max_position_embeddings", None)  # lm-eval looks for it in the whole config
    lm = HFLM(model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=tasks.add_bos_token, max_length=longest)
    state = PartialState()
    if split and state.num_processes > 1:  # lm-eval leaves this to us for a model that is loaded already
        lm.accelerator, lm._rank, lm._world_size = Accelerator(), state.process_index, state.num_processes
    results = simple_evaluate(
        model=lm,
        tasks=list(tasks.names),
        task_manager=task_manager(tasks.include_paths, tasks.names),
        limit=tasks.limit,
        num_fewshot=tasks.few_shot,
        apply_chat_template=tasks.chat_template,
        fewshot_as_multiturn=tasks.chat_template,
        bootstrap_iters=1000,
        log_samples=True,
    )
    answer = [None]
    if state.is_main_process:  # the only one that gets results
        records = records_of(results)
        answer = [(task_entries(name, results, records), records)]
        for task, shots in results["n-shot"].items():
            if tasks.few_shot is not None and shots != tasks.few_shot:
                logger.warning("%s fixes its number of worked examples: %s, not %s", task, shots, tasks.few_shot)
    return (broadcast_object_list(answer) if state.num_processes > 1 else answer)[0]


def _with_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer that begins texts with its BOS token: lm-eval only asks it to do what it does."""
    if not adds_bos_token(tokenizer):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_bos_token = True
        if not adds_bos_token(tokenizer):
            raise ValueError(f"add_bos_token: true, but a {type(tokenizer).__name__} cannot begin tasks with it; leave it out")
    return tokenizer


def task_manager(include_paths: Sequence[str] | str | Path | None, names: Sequence[str] = ()):
    """Return lm-eval's task manager, which also knows the task files in some folders.

    Where all `names` are tasks of these folders it knows nothing else: lm-eval's own 14,000 files take many seconds to read.
    """
    folders = [include_paths] if isinstance(include_paths, str | Path) else include_paths or ()
    folders = tuple(str(Path(folder).expanduser().resolve()) for folder in folders)
    alone = _task_manager(folders, include_defaults=False)
    complete = not names or set(names) - set(alone.all_subtasks)  # a group may hold tasks of lm-eval
    return _task_manager(folders, include_defaults=True) if complete else alone


@cache
def _task_manager(folders: tuple[str, ...], include_defaults: bool):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders) or None, include_defaults=include_defaults)


def _name_in(path: Path) -> str:
    from lm_eval.tasks._yaml_loader import load_yaml  # lm-eval's files have tags of their own

    if not path.is_file():
        raise ValueError(f"tasks: no file at {path}")
    try:
        content = load_yaml(path.resolve(), resolve_func=False)
    except Exception as error:  # of the reader or of a file it includes
        raise ValueError(f"tasks: {path} cannot be read: {error}") from error
    name = content.get("group") or content.get("task") if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise ValueError(f"tasks: {path} has no `task: name` line")
    return name


def splits_evenly(limit: int | None, processes: int) -> None:
    """Refuse a limit that leaves a process without a document: lm-eval cannot wait for it.

    Raises:
        ValueError: when `limit` is below the number of processes.
    """
    if limit is not None and limit < processes:
        raise ValueError(f"limit: {limit} documents cannot be split over {processes} processes; want at least {processes}")
