"""Writing a cache: the teacher's outputs for every packed sequence are computed once and kept, bit-packed.

The files are described in `cached.py`. A shard is written into `<shard>.part` with its index beside it, batch by batch, so that
an interrupted write resumes at the batch it was in; the draws of a sequence depend on the seed and its number alone.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from hf_minitron.architecture.config import PRUNED_VOCAB, pruned_vocab, text_config
from hf_minitron.checkpoint.checkpoint import require_space
from hf_minitron.data.packing import text_hash
from hf_minitron.distillation.batch import COLUMNS, POSITIONS
from hf_minitron.distillation.cached import ENTRY, META, UNFINISHED, answers_of, keys_of, shard_path, teacher_identity
from hf_minitron.distillation.records import Arrays, Record, record_of
from hf_minitron.distillation.served import Served, served_teacher
from hf_minitron.distillation.teacher import LiveTeacher
from hf_minitron.head import head_chunks
from hf_minitron.waiting import wait_for

MAX_SHARD_BLOCKS = 1024
MIN_SHARDS = 16  # while there are fewer blocks than fill them, so that this many processes have work


def write_cache(
    model: PreTrainedModel | str | Path,
    blocks: Dataset,
    folder: str | Path,
    method: Mapping[str, int],
    dtype: str = "float16",
    seed: int = 0,
    batch_size: int = 4,
    chunk_size: int = 256,
    init_kwargs: dict | None = None,
    student: str | Path | None = None,
    server: str | None = None,
) -> dict:
    """Precompute a teacher's outputs for packed sequences; an interrupted write is resumed, processes share the shards.

    Args:
        model (`PreTrainedModel`, `str` or `Path`): The teacher, or where to load it from (in bf16 where the device has it).
        blocks (`Dataset`): `input_ids` per row, and `position_ids` for document-masked attention; with `labels` nothing is
            kept of tokens whose label is -100.
        folder (`str` or `Path`): Where to write, or to go on with the same settings.
        method (`Mapping[str, int]`): `{"random": 50}`: draws per token; `{"top_k": 64}`: the likeliest tokens and the mass of
            the rest, or the whole vocabulary if it is no larger. All at temperature 1.
        dtype (`str`, *optional*, defaults to `"float16"`): How log-probabilities are stored (an error of 2**-11 of each), or
            float32; random sampling keeps none.
        seed (`int`, *optional*, defaults to 0): Seed of the draws.
        batch_size (`int`, *optional*, defaults to 4): Sequences per forward pass, or that a server is asked about together.
        chunk_size (`int`, *optional*, defaults to 256): Tokens whose logits exist at the same time.
        init_kwargs (`dict`, *optional*): How a teacher that is named is loaded, as `teacher_model_init_kwargs`.
        student (`str` or `Path`, *optional*): The folder of a student that has some of the teacher's tokens: those, under its
            ids, are what is cached, and the sequences are in its tokens.
        server (`str`, *optional*): One that runs the teacher, see `ServedTeacher`; of `model` the tokenizer is compared.

    Returns: what `cache.json` says, with `bytes_per_token`.

    Raises:
        ValueError: for an unknown method, sequences without a token to predict, a folder that holds another cache, a full disk.

    Example:

    ```python
    >>> facts = write_cache(teacher, blocks, "cache/top_k", {"top_k": 64})
    ```
    """
    folder, state = Path(folder), PartialState(cpu=not torch.accelerator.is_available())
    apart = "position_ids" in blocks.column_names
    served = None if server is None else served_teacher(server, model, method, init_kwargs, student, apart)
    lengths, identity, shared = _lengths(blocks), teacher_identity(model, init_kwargs), _vocabulary(student)
    record = record_of(method, (identity | shared)["vocab_size"], dtype)
    settings = {"format": 1, "method": dict(method), "dtype": dtype, "seed": seed, "teacher": identity}
    settings |= {"text": text_hash(blocks), **shared, **_layout(blocks, lengths), "batch_size": batch_size}
    settings |= {} if served is None else {"served": served.model}
    tokens = _tokens(blocks) if settings["answers"] else sum(lengths) - len(lengths)
    if _claim(folder, settings, state.is_main_process, int(tokens * record.about_bytes)):
        live = None if served else _teacher(model, state.device, init_kwargs, student)
        source = Served(served, record) if served else _Live(live, record, seed, chunk_size)
        _write_shards(folder, settings, blocks, _Recorder(source, record, batch_size), state)
    if state.is_main_process and not (folder / META).is_file():
        _finish(folder, settings, tokens)
    wait_for(folder / META)
    return json.loads((folder / META).read_text(encoding="utf-8"))


def _teacher(model: object, device: torch.device, init_kwargs: dict | None, student: str | Path | None) -> LiveTeacher:
    """Return a teacher with the tokens of its student, where that has some of them."""
    teacher = LiveTeacher(model, device, init_kwargs)
    if student is not None:
        teacher.share_vocabulary(AutoConfig.from_pretrained(student), AutoTokenizer.from_pretrained(student))
    return teacher


def _layout(blocks: Dataset, lengths: Sequence[int]) -> dict:
    """Return what a cache says of its sequences: what belongs to their tokens, how many there are and how long."""
    shard_blocks = min(MAX_SHARD_BLOCKS, -(-len(lengths) // MIN_SHARDS))
    same = lengths[0] if len(set(lengths)) == 1 else None
    columns = {"position_ids": "position_ids" in blocks.column_names, "answers": "labels" in blocks.column_names}
    return {**columns, "blocks": len(lengths), "block_size": same, "shard_blocks": shard_blocks}


def _vocabulary(student: str | Path | None) -> dict:
    """Return what a cache says of the tokens of a student that has some of its teacher's; nothing of one that has all."""
    if student is None:
        return {}
    config = AutoConfig.from_pretrained(student)
    mark = pruned_vocab(config)
    return {} if mark is None else {PRUNED_VOCAB: mark, "vocab_size": text_config(config).vocab_size}


def _lengths(blocks: Dataset) -> list[int]:
    """Return the length of every sequence; refuse what cannot be cached."""
    if not hasattr(blocks, "__len__"):
        raise ValueError("A streamed dataset cannot be cached: it has no end. Make a Dataset of it, with max_tokens")
    if "attention_mask" in blocks.column_names and not all(
        np.all(mask) for mask in blocks.with_format("numpy")["attention_mask"]
    ):
        raise ValueError("attention_mask: the sequences are padded. Leave padding out of them; the collator adds it")
    lengths = [len(ids) for rows in blocks.with_format("numpy").iter(batch_size=64) for ids in rows["input_ids"]]
    if min(lengths, default=0) < 2:
        raise ValueError(
            f"Sequences need at least two tokens, one to predict another; the shortest has {min(lengths, default=0)}"
        )
    return lengths


def _tokens(blocks: Dataset) -> int:
    """Count the tokens of rows with labels before which a teacher is asked."""
    rows = blocks.with_format("torch").select_columns([name for name in COLUMNS if name in blocks.column_names])
    return sum(max(int(answers_of({name: value[None] for name, value in row.items()}).sum()), 1) for row in rows)


def _asked(ids: Tensor, answers: np.ndarray | None) -> Tensor:
    """Return at which positions, `(batch, seq)`, a teacher is asked: at all but the last, or before answers, one at least."""
    asked = torch.ones_like(ids, dtype=torch.bool) if answers is None else torch.tensor(answers, device=ids.device)
    asked[:, -1] = False
    asked[:, 0] |= ~asked.any(1)
    return asked


@dataclass(frozen=True)
class _Live:
    """The answers of a teacher that runs here; the draws of a sequence depend on the seed and its number alone."""

    teacher: LiveTeacher
    record: Record
    seed: int
    chunk_size: int

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor], asked: Tensor, first: int) -> Iterator[Arrays]:
        """Yield what is kept of every row of a batch, the first of which has the number `first`."""
        device = self.teacher.model.device
        inputs = {name: value.to(device) for name, value in inputs.items() if name != "labels"}
        signal = self.teacher({**inputs, POSITIONS: asked.flatten().nonzero().squeeze(1).to(device)})
        for number, hidden in enumerate(signal.hidden.split(asked.sum(1).tolist()), first):
            rng, chunks = np.random.default_rng([self.seed, number]), []
            for _, logits in head_chunks(signal.head.logits, hidden, self.chunk_size):
                chunks.append(self.record.keep(logits, rng))
                del logits  # before the next chunk's are made
            yield [np.concatenate(parts) for parts in zip(*chunks, strict=True)]


class _Recorder:
    """Makes the records of some sequences of what a teacher, live or served, says of them."""

    def __init__(self, source: _Live | Served, record: Record, batch_size: int):
        self.source, self.record, self.batch_size = source, record, batch_size

    def __call__(self, rows: Sequence[Mapping[str, Tensor]], first: int) -> Iterator[tuple[bytes, int, int]]:
        """Yield the record, the predicted tokens and the key of every sequence; `first` is the number of the first."""
        alike = len({len(row["input_ids"]) for row in rows}) == 1
        for batch in [rows] if alike else [[row] for row in rows]:  # nothing is padded
            names = [name for name in ("input_ids", "position_ids", "labels") if name in batch[0]]
            inputs = {name: torch.stack([torch.as_tensor(row[name]) for row in batch]) for name in names}
            answers = answers_of(inputs) if "labels" in inputs else None
            asked = _asked(inputs["input_ids"], answers)
            counts, arrays = asked.sum(1).tolist(), self.source(inputs, asked, first)
            for count, some, key in zip(counts, arrays, keys_of(inputs, answers), strict=True):
                yield self.record.encode(some), count, key
            first += len(batch)


def _claim(folder: Path, settings: dict, main: bool, num_bytes: int) -> bool:
    """Begin or resume in a folder; return whether there is work to do.

    Raises:
        ValueError: when it holds a cache of other settings, or its disk no place for this one.
    """
    meta, unfinished = folder / META, folder / UNFINISHED
    if not main:
        wait_for(unfinished, meta)
    mark = meta if meta.is_file() else unfinished
    if mark.is_file():
        theirs = json.loads(mark.read_text(encoding="utf-8"))
        theirs.setdefault("answers", False)  # as before there were any
        different = [key for key, value in settings.items() if theirs.get(key) != value]
        if different:
            key = different[0]
            raise ValueError(f"{folder} holds another cache: its {key} is {theirs.get(key)}, not {settings[key]}. "
                             "Write elsewhere, or delete it")  # fmt: skip
    elif main:
        require_space(folder, num_bytes, "the cache")
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(unfinished, settings)
    return mark is unfinished


def _write_shards(folder: Path, settings: dict, blocks: Dataset, recorder: _Recorder, state: PartialState) -> None:
    """Write every `num_processes`-th shard, from this process's on; another number of processes may have begun the cache."""
    size, total = settings["shard_blocks"], len(blocks)
    shards = range(-(-total // size))[state.process_index :: state.num_processes]
    own = sum(min(size, total - number * size) for number in shards)
    with tqdm(total=own, desc="Caching the teacher", unit=" sequences", disable=None if state.is_main_process else True) as bar:
        for number in shards:
            numbers = range(number * size, min((number + 1) * size, total))
            _write_shard(shard_path(folder, number), blocks, numbers, recorder, bar)


def _write_shard(path: Path, blocks: Dataset, numbers: range, recorder: _Recorder, bar: tqdm) -> None:
    part, index_part = path.with_suffix(".bin.part"), path.with_suffix(".index.part")
    if path.is_file():
        index_part.unlink(missing_ok=True)  # killed between two names
        bar.update(len(numbers))
        return
    with part.open("ab") as data, index_part.open("ab") as index:
        entries = np.fromfile(index_part, "<i8")
        entries = entries[: len(entries) // ENTRY * ENTRY].reshape(-1, ENTRY)
        done = int((entries[:, 0] <= part.stat().st_size).sum())
        if done < len(numbers):
            done -= done % recorder.batch_size  # whole batches: a model's numbers may depend on what it reads together
        end = int(entries[done - 1, 0]) if done else 0
        data.truncate(end)
        index.truncate(done * ENTRY * 8)
        bar.update(done)
        for start in range(done, len(numbers), recorder.batch_size):
            some = numbers[start : start + recorder.batch_size]
            new = []
            for raw, rows, key in recorder([blocks[number] for number in some], some[0]):
                data.write(raw)
                end += len(raw)
                new.append((end, rows, key))
            data.flush()  # before what says that it is there
            index.write(np.array(new, "<i8").tobytes())
            index.flush()
            bar.update(len(some))
        data.write(index_part.read_bytes())
    part.rename(path)
    index_part.unlink()


def _finish(folder: Path, settings: dict, tokens: int) -> None:
    """Say that the cache is complete once all processes have written their shards."""
    paths = [shard_path(folder, number) for number in range(-(-settings["blocks"] // settings["shard_blocks"]))]
    for path in paths:
        wait_for(path)
    size = sum(path.stat().st_size for path in paths)
    _write_json(folder / META, settings | {"tokens": tokens, "bytes": size, "bytes_per_token": round(size / tokens, 2)})
    (folder / UNFINISHED).unlink()


def _write_json(path: Path, content: dict) -> None:
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
