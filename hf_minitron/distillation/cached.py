"""A precomputed teacher: what `write_cache` wrote, mapped into memory, read by the collator and looked up by a row's tokens.

`cache.json` describes the cache. Every shard holds the records of some packed sequences, one after the other, and at its end an
index of three int64 per sequence: where its record ends, how many tokens it predicts, and a hash of the sequence. Rows are
found by that hash, in any order; another text, or the same packed in another way, has none in the cache.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_minitron.architecture.config import PRUNED_VOCAB, pruned_vocab, text_config
from hf_minitron.checkpoint.checkpoint import Checkpoint
from hf_minitron.checkpoint.model_files import resolve, split_kwargs
from hf_minitron.data.packing import text_hash
from hf_minitron.distillation.batch import COLUMNS, TARGETS, at_positions, positions_of, with_targets
from hf_minitron.distillation.records import record_of
from hf_minitron.distillation.signals import Signal

META, UNFINISHED = "cache.json", "unfinished.json"
ENTRY = 3  # int64 per sequence in a shard's index: end, rows, key
# The whole numbers as which floats are batched.
BITS = {torch.float16: torch.int16, torch.float32: torch.int32}
FLOATS = {bits: dtype for dtype, bits in BITS.items()}


class CachedTeacher:
    """A teacher whose outputs were precomputed by `write_cache`; its weights are not needed.

    Only the records of a batch are read. Each process of `accelerate launch` reads those of its own batches.

    Args:
        folder (`str` or `Path`): A cache.

    Attributes:
        meta (`dict`): The content of `cache.json`: method, teacher, text, blocks, tokens, bytes_per_token.
        record (`Record`): How outputs are stored.
        config: `model_type` and `vocab_size` of the teacher.

    Raises:
        ValueError: for a folder without a finished cache, or with a damaged one.

    Example:

    ```python
    >>> from hf_minitron.distillation.cache import write_cache
    >>> facts = write_cache(teacher, blocks, "cache/random", {"random": 50})
    >>> cached = CachedTeacher("cache/random")  # a teacher for DistillationTrainer
    >>> cached.check_blocks(blocks)
    >>> cached.meta["method"]
    {'random': 50}
    ```
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / META).is_file():
            what = "is not finished: write it again, and it goes on" if (self.folder / UNFINISHED).is_file() else "has none"
            raise ValueError(f"No cache of a teacher at {self.folder}: it {what}")
        self.meta = json.loads((self.folder / META).read_text(encoding="utf-8"))
        self.config = PreTrainedConfig(vocab_size=self.meta.get("vocab_size", self.meta["teacher"]["vocab_size"]))
        self.config.model_type = self.meta["teacher"]["model_type"]
        self.record = record_of(self.meta["method"], self.config.vocab_size, self.meta["dtype"])
        numbers = range(-(-self.meta["blocks"] // self.meta["shard_blocks"]))
        self._index = np.concatenate([self._read_index(number) for number in numbers])
        self._order = np.argsort(self._index[:, 2], kind="stable")
        self._keys = self._index[self._order, 2]
        self._shard = lru_cache(maxsize=256)(self._map)  # every map is an open file

    def __reduce__(self) -> tuple:
        return CachedTeacher, (self.folder,)  # a worker process of a DataLoader maps the files itself

    def columns(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the columns of a batch that hold what the cache knows of its rows, each of shape `(batch, seq, ...)`.

        A position has what the teacher says about the next token; padding and the last token have zeros, as have those whose
        next token is not learnt in a cache of rows with labels. Floats are there as the whole numbers of the same bits, for
        DeepSpeed rounds the floats of a batch.

        Raises:
            ValueError: for a row that the cache does not hold, with other answers, or that is padded in its middle.
        """
        tables = []
        answers = answers_of(inputs) if self.meta.get("answers") else None
        for row, (key, real) in enumerate(zip(keys_of(inputs, answers), _real(inputs), strict=True)):
            block = self._find(key)
            if block is None:
                raise ValueError(f"A row of the batch is not in the cache {self.folder}: {self._what()}. Cache what is "
                                 "trained on, with a data_collator that leaves rows whole")  # fmt: skip
            if not real[real.argmax() :][: real.sum()].all():
                raise ValueError("attention_mask: a row has padding between its tokens, of which there is no cache")
            arrays = [np.ascontiguousarray(array) for array in self._read(block)]
            tables.append([np.zeros((len(real), *array.shape[1:]), array.dtype) for array in arrays])
            places = real.argmax() + np.arange(len(arrays[0])) if answers is None else np.flatnonzero(answers[row])
            for table, array in zip(tables[-1], arrays, strict=True):
                table[places] = array[: len(places)]
        stacked = [torch.from_numpy(np.stack(column)) for column in zip(*tables, strict=True)]
        return {name: table.view(BITS.get(table.dtype, table.dtype))
                for name, table in zip(self.record.columns, stacked, strict=True)}  # fmt: skip

    def __call__(self, inputs: Mapping[str, Tensor]) -> Signal:
        """Return the teacher's signal where a batch has targets: from its columns, or looked up where it has none.

        Args:
            inputs (`Mapping[str, Tensor]`): The batch.
        """
        positions = positions_of(inputs)
        columns = inputs if self.record.columns[0] in inputs else self.columns(inputs)
        chosen = [at_positions(columns[name].to(positions.device), positions) for name in self.record.columns]
        return self.record.signal(*(table.view(FLOATS.get(table.dtype, table.dtype)) for table in chosen))

    def check_blocks(self, blocks: Dataset) -> None:
        """Refuse a dataset with rows that are not in the cache: other text, tokenizer or packing.

        Raises:
            ValueError: with how many, and what the cache holds.
        """
        missing = sum(self._find(key) is None for key in block_keys(blocks, self.meta.get("answers", False)))
        if not missing:
            return
        reason = "the same text, packed in another way" if text_hash(blocks) == self.meta["text"] else "other text"
        raise ValueError(
            f"{missing:,} of {len(blocks):,} sequences, the first of {len(blocks[0]['input_ids']):,} tokens, are not in the "
            f"cache {self.folder}: they are {reason}. {self._what()}. Precompute them in another cache"
        )

    def check_teacher(self, model: PreTrainedModel | str | Path, init_kwargs: dict | None = None) -> None:
        """Refuse a cache of another teacher than the one named. A folder without weights is compared by its config alone.

        Raises:
            ValueError: with what differs.
        """
        theirs, ours = self.meta["teacher"], teacher_identity(model, init_kwargs)
        for key, value in ours.items():
            if value is not None and value != theirs.get(key):
                raise ValueError(f"The cache {self.folder} is of another teacher: its {key} is {theirs.get(key)}, not {value}. "
                                 "Precompute this one in another cache")  # fmt: skip

    def check_vocabulary(self, mark: str | None) -> None:
        """Refuse a cache of other tokens than the student has.

        Args:
            mark (`str`, *optional*): `pruned_vocab` in the student's config.

        Raises:
            ValueError: with what to do.
        """
        if self.meta.get(PRUNED_VOCAB, self.meta["teacher"].get(PRUNED_VOCAB)) != mark:
            raise ValueError(f"The cache {self.folder} is of {self.config.vocab_size:,} tokens, which are not the student's: "
                             "make one of those, write_cache(..., student=its folder)")  # fmt: skip

    def _what(self) -> str:
        size = self.meta["block_size"] or "differing numbers of"
        apart = ", with document-masked attention" if self.meta["position_ids"] else ""
        return f"It holds {self.meta['blocks']:,} sequences of {size} tokens{apart}"

    def _find(self, key: int) -> int | None:
        place = int(np.searchsorted(self._keys, key))
        return int(self._order[place]) if place < len(self._keys) and self._keys[place] == key else None

    def _read(self, block: int) -> list[np.ndarray]:
        """Return a sequence's arrays, one row for each token but the first."""
        number, place = divmod(block, self.meta["shard_blocks"])
        begin = int(self._index[block - 1, 0]) if place else 0
        end, rows = map(int, self._index[block, :2])
        return list(self.record.decode(self._shard(number)[begin:end].tobytes(), rows))

    def _map(self, number: int) -> np.memmap:
        return np.memmap(shard_path(self.folder, number), np.uint8, "r")

    def _read_index(self, number: int) -> np.ndarray:
        """Read the end of a shard, and nothing else of it."""
        path, size = shard_path(self.folder, number), self.meta["shard_blocks"]
        count = min(size, self.meta["blocks"] - number * size)
        length = path.stat().st_size if path.is_file() else 0
        begin = length - count * ENTRY * 8
        index = np.fromfile(path, "<i8", offset=begin).reshape(-1, ENTRY) if begin > 0 else np.empty((0, ENTRY), "<i8")
        if len(index) != count or index[-1, 0] != begin:
            raise ValueError(f"{path} is missing or damaged ({length:,} bytes): delete the cache and write it again")
        return index


@dataclass(frozen=True)
class CachedCollator:
    """A collator that adds to each batch what a cache holds for its rows, in the DataLoader's worker processes.

    Args:
        collator (`Callable`): Makes a batch of rows. One that changes what the teacher has read is refused at the first batch.
        teacher (`CachedTeacher`): The cache.
    """

    collator: Callable[[Sequence], Mapping[str, Tensor]]
    teacher: CachedTeacher

    def __call__(self, rows: Sequence) -> dict[str, Tensor]:
        """Return the batch; one without labels, of which nothing is learnt, as it is."""
        batch = dict(self.collator(rows))
        return batch | self.teacher.columns(batch) if batch.keys() & {"labels", TARGETS} else batch

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The collator's tokenizer, which the Trainer saves with the model."""
        return getattr(self.collator, "tokenizer", None)


def shard_path(folder: Path, number: int) -> Path:
    """Return the file of a shard."""
    return folder / f"{number:05}.bin"


def key_of(ids: np.ndarray, positions: np.ndarray | None, answers: np.ndarray | None = None) -> int:
    """Return a hash, an int64, of a teacher's inputs: a sequence's tokens, their positions, and before which it is asked."""
    digest = hashlib.blake2b(np.ascontiguousarray(ids, "<i4").tobytes(), digest_size=8)
    if positions is not None:
        digest.update(b"positions" + np.ascontiguousarray(positions, "<i4").tobytes())
    if answers is not None:
        digest.update(b"answers" + np.packbits(answers).tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def answers_of(inputs: Mapping[str, Tensor]) -> np.ndarray:
    """Return at which positions of a batch, `(batch, seq)`, the next token is learnt."""
    return (with_targets(inputs)[TARGETS] != -100).cpu().numpy()


def keys_of(inputs: Mapping[str, Tensor], answers: np.ndarray | None = None) -> Iterator[int]:
    """Yield the keys of a batch's rows, without their padding; with `answers` those of a cache of them alone."""
    ids, positions = (inputs[name].cpu().numpy() if name in inputs else None for name in ("input_ids", "position_ids"))
    for row, real in enumerate(_real(inputs)):
        yield key_of(ids[row, real], *(None if part is None else part[row, real] for part in (positions, answers)))


def _real(inputs: dict[str, Tensor]) -> np.ndarray:
    """Return which tokens of a batch are no padding, shape `(batch, seq)`."""
    mask = inputs.get("attention_mask")
    return np.ones(inputs["input_ids"].shape, bool) if mask is None else mask.bool().cpu().numpy()


def block_keys(blocks: Dataset, answers: bool = False) -> Iterator[int]:
    """Yield the keys of a dataset's rows, without their padding; those of a cache of `answers` alone if so."""
    if answers:
        for row in blocks.with_format("torch"):
            inputs = {"labels": row["input_ids"], **row}
            inputs = {name: inputs[name][None] for name in COLUMNS if name in inputs}
            yield from keys_of(inputs, answers_of(inputs))
        return
    for rows in blocks.with_format("numpy").iter(batch_size=64):
        nothing = [None] * len(rows["input_ids"])
        positions, masks = (rows.get(name, nothing) for name in ("position_ids", "attention_mask"))
        for ids, starts, mask in zip(rows["input_ids"], positions, masks, strict=True):
            yield key_of(ids if mask is None else ids[mask.astype(bool)], starts)


def teacher_identity(model: PreTrainedModel | str | Path, init_kwargs: dict | None = None) -> dict:
    """Say which teacher a model is, the same on every machine and in every dtype, shard size and library version.

    Args:
        model (`PreTrainedModel`, `str` or `Path`): A model, a folder or a Hub id.
        init_kwargs (`dict`, *optional*): Which files are meant, as `teacher_model_init_kwargs`.

    Returns:
        `dict`: `model_type`, `vocab_size`, and `weights`: a SHA-256 of every parameter's name, shape and 16 of its values,
            rounded to bfloat16; `None` for a folder without weights.
    """
    if isinstance(model, str | Path):
        which, how = split_kwargs(init_kwargs)
        folder = resolve(model, variant=how.get("variant"), **which)
        config = AutoConfig.from_pretrained(folder)
        stored = Checkpoint(folder, how.get("variant")) if any(folder.glob("*.safetensors")) else None
        tensors = ((name, stored.read(name)) for name in sorted(stored.specs)) if stored else None
    else:
        config, tensors = model.config, sorted(model.named_parameters(), key=lambda item: item[0])
    digest = hashlib.sha256()
    for name, tensor in tensors or ():
        some = tensor.detach().flatten()[:: max(1, tensor.numel() // 16)][:16].to("cpu", torch.bfloat16)
        digest.update(f"{name} {list(tensor.shape)} ".encode() + some.view(torch.int16).numpy().tobytes())
    weights = None if tensors is None else digest.hexdigest()
    mark = pruned_vocab(config)
    identity = {"model_type": config.model_type, "vocab_size": text_config(config).vocab_size, "weights": weights}
    return identity | ({} if mark is None else {PRUNED_VOCAB: mark})
